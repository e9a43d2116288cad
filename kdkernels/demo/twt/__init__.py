"""The rehearsal of TwT: three teachers, curation, three stages, and what each part of it is worth. `python -m` this."""

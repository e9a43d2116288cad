"""Words that a teacher drew, on two processes under DDP and FSDP2, against full logits in fp64 (drawn_words.py)."""

import json

from .test_placement import TWO
from .test_processes import finish, start


def test_two_processes_have_the_gradients_of_full_logits(tmp_path):
    printed = finish(start((*TWO, "-m", "tests.training.drawn_words"), cwd=tmp_path), tmp_path)
    told = next(line for line in printed.splitlines() if line.startswith("errors "))
    errors = json.loads(told.partition(" ")[2])
    assert len(errors) == 4
    for case, (error, plain) in errors.items():
        assert 0 < plain < 0.1 and error < max(2 * plain, 5e-6), case

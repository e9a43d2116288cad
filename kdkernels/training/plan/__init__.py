"""What a step takes of a GPU: bytes (memory.py), seconds (seconds.py), and what to change where it does not fit."""

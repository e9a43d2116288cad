"""The demo: a task, a teacher, two students and every way to train them, measured. `python -m kdkernels.demo`."""

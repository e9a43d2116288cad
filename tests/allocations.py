"""Bytes that torch allocates on the CPU, inside its operators too."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile


class Allocations:
    """``peak``: the most bytes that were allocated at a time since the ``with`` block began.

    Blocks of kdkernels.memory are not torch's; conftest.py's poisoned memory has none.
    """

    def __enter__(self) -> Allocations:
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.profile.__exit__(*error)
        events = [each for each in self.profile.profiler.kineto_results.events() if each.name() == "[memory]"]
        self.peak = held = 0
        for event in sorted(events, key=lambda each: each.start_ns()):
            held += event.nbytes()
            self.peak = max(self.peak, held)
        assert events, "nothing was seen"

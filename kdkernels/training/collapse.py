"""Whether the student collapses: its entropy, or the length of what it writes, leaves the limits of [collapse] for
long.
"""

from collections.abc import Mapping

from kdkernels.training.recipe.config import Config


class Collapse:
    """Counts the steps that are beyond a limit. `in_a_row`: the last ones that were, none between them that was not.

    Judged are the steps whose responses the student wrote; in a run where it writes none, all of them. The others say
    nothing: they neither count nor end a row.
    """

    def __init__(self, config: Config, in_a_row: int = 0):
        limits = config.collapse
        self.steps, self.in_a_row = limits.steps, in_a_row
        self.writes = config.rollout.student_fraction > 0
        self.limits = {
            "student_entropy": ("min_entropy", limits.min_entropy, "max_entropy", limits.max_entropy, "nats a token"),
            "student_length": ("min_length", limits.min_length, "max_length", limits.max_length, "tokens a response"),
        }

    def see(self, metrics: Mapping[str, float]) -> str | None:
        """Counts a step that was not skipped, by its metrics, which are those of all processes. Returns what is beyond
        which limit, in words, once it has been so for long enough.
        """
        if self.writes and "student_length" not in metrics:
            return None
        beyond = self._beyond(metrics)
        self.in_a_row = self.in_a_row + 1 if beyond else 0
        if self.steps == 0 or self.in_a_row < self.steps:
            return None
        return f"{beyond}, the last of {self.in_a_row} steps in a row beyond a limit of [collapse]"

    def _beyond(self, metrics: Mapping[str, float]) -> str | None:
        for name, (low_key, low, high_key, high, unit) in self.limits.items():
            value = metrics.get(name)
            if value is None:
                continue
            if low is not None and value < low:
                return f"{name} is {value:.4g} {unit}, below {low_key} = {low:g}"
            if high is not None and value > high:
                return f"{name} is {value:.4g} {unit}, above {high_key} = {high:g}"
        return None

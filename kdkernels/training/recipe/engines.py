"""What [rollout] says of the engine that writes responses, and for how many steps: which keys go with which, and their
defaults.
"""

from dataclasses import replace

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import Config, RolloutConfig

TRIES = 6  # of a request: once, and five times again (kdkernels/http.py)
BELONG = {  # key -> engines that have it
    "url": ("server",),
    "key_variable": ("server",),
    "at_once": ("server",),
    "timeout_seconds": ("server",),
    "gpu_memory": ("vllm",),
    "weights": ("vllm", "server"),
    "max_drift": ("vllm", "server"),
}


def check_updates(rollout: RolloutConfig) -> None:
    """Raises InputError for a generation that cannot be shared as it should be."""
    if rollout.updates % rollout.reuse:
        raise InputError(
            f"[rollout] updates: expected a multiple of reuse = {rollout.reuse}, so that every batch of a generation "
            f"is used so often, got {rollout.updates}"
        )
    if rollout.updates > 1 and rollout.student_fraction == 0:
        raise InputError("[rollout] updates is of what the student writes; student_fraction is 0")
    if rollout.max_staleness is not None and rollout.updates == 1:
        raise InputError("[rollout] max_staleness is of responses for several updates: set updates, or leave it out")


def resolve_engine(rollout: RolloutConfig, config: Config) -> RolloutConfig:
    """`rollout`, that of the recipe `config`, with what its engine takes filled in.

    Raises InputError for keys that its engine does not have, or lacks, and for a time that others would not wait for.
    """
    check_updates(rollout)
    for key, engines in BELONG.items():
        if getattr(rollout, key) is not None and rollout.engine not in engines:
            raise InputError(
                f'[rollout] {key} belongs to engine "{" or ".join(engines)}": leave it out, or set that engine; got '
                f'engine "{rollout.engine}"'
            )
    if rollout.engine == "transformers":
        return rollout
    answers = config.evaluation is not None and "exact_match" in config.evaluation.metrics
    if rollout.student_fraction == 0 and not answers:
        raise InputError("[rollout] engine is of what the student writes; student_fraction is 0, and so is its work")
    if rollout.engine == "server" and rollout.url is None:
        raise InputError('[rollout] key \'url\' is missing; engine "server" needs it, as in url = "http://HOST:8000"')
    longest = config.run.timeout_seconds
    defaults = {"at_once": 64, "timeout_seconds": longest / 8, "gpu_memory": 0.3, "max_drift": 0.1}
    missing = {
        key: value for key, value in defaults.items() if rollout.engine in BELONG[key] and getattr(rollout, key) is None
    }
    rollout = replace(rollout, **missing)
    if rollout.engine == "server" and rollout.timeout_seconds * TRIES >= longest:
        raise InputError(
            f"[rollout] timeout_seconds: expected less than {longest / TRIES:g}: a request is tried {TRIES} times, and "
            f"the other processes wait for {longest:g} s (run.timeout_seconds); got {rollout.timeout_seconds:g}"
        )
    return rollout

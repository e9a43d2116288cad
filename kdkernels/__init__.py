"""kdkernels: distillation losses for large vocabularies, in chunks, straight from hidden states and lm_head weights.

import kdkernels as kd
out = kd.TSDKD()(kd.Head(hidden_s, weight_s), kd.Head(hidden_t, weight_t), mask)
out.loss.backward()

A name is imported, and with it torch, when it is first asked for: the command line answers without torch. Who needs
the torch operators before (a program that torch.export saved): ``import kdkernels.functional`` registers them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import modules
    from .distillation import Distillation
    from .divergences import JSD, ForwardKL, ReverseKL, SkewKL, SkewReverseKL
    from .functional import TokenStatistics, cross_entropy, divergence, entropy, plackett_luce, statistics
    from .layout import Layout
    from .machine import info
    from .objectives import GKD, SFT, TSDKD, VCRD, AdaptiveOpener, DistiLLM2, FusedLinearDistillationLoss
    from .sources import Head, Logits, TopK, hidden_states
    from .wrappers import through

__version__ = "0.1.0"

__all__ = [
    "GKD",
    "JSD",
    "SFT",
    "TSDKD",
    "VCRD",
    "AdaptiveOpener",
    "DistiLLM2",
    "Distillation",
    "ForwardKL",
    "FusedLinearDistillationLoss",
    "Head",
    "Layout",
    "Logits",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TokenStatistics",
    "TopK",
    "cross_entropy",
    "divergence",
    "entropy",
    "hidden_states",
    "info",
    "modules",
    "plackett_luce",
    "statistics",
    "through",
]
_HOMES = {  # the module that each public name comes from
    "distillation": ("Distillation",),
    "divergences": ("JSD", "ForwardKL", "ReverseKL", "SkewKL", "SkewReverseKL"),
    "functional": ("TokenStatistics", "cross_entropy", "divergence", "entropy", "plackett_luce", "statistics"),
    "layout": ("Layout",),
    "machine": ("info",),
    "objectives": ("GKD", "SFT", "TSDKD", "VCRD", "AdaptiveOpener", "DistiLLM2", "FusedLinearDistillationLoss"),
    "sources": ("Head", "Logits", "TopK", "hidden_states"),
    "wrappers": ("through",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str):
    """A public name, or a module of the package, imported when it is first asked for."""
    if name in _HOME:
        return globals().setdefault(name, getattr(import_module(f"{__name__}.{_HOME[name]}"), name))
    missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("_") or "." in name:
        raise missing
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise missing from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""kdkernels: distillation losses for large vocabularies, in chunks, straight from hidden states and lm_head weights.

import kdkernels as kd
out = kd.TSDKD()(kd.Head(hidden_s, weight_s), kd.Head(hidden_t, weight_t), mask)
out.loss.backward()
"""

from . import modules
from .divergences import JSD, ForwardKL, ReverseKL, SkewKL, SkewReverseKL
from .functional import TokenStatistics, cross_entropy, divergence, entropy, plackett_luce, statistics
from .layout import Layout
from .machine import info
from .objectives import GKD, SFT, TSDKD, VCRD, AdaptiveOpener, DistiLLM2
from .sources import Head, Logits, TopK

__all__ = [
    "GKD",
    "JSD",
    "SFT",
    "TSDKD",
    "VCRD",
    "AdaptiveOpener",
    "DistiLLM2",
    "ForwardKL",
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
    "info",
    "modules",
    "plackett_luce",
    "statistics",
]

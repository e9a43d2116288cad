"""Distillation objectives: per-token statistics -> per-token coefficients -> loss and metrics. One file per paper."""

from .adaptive_opener import AdaptiveOpener
from .base import Objective, Output
from .distillm import DistiLLM2
from .gkd import GKD
from .sft import SFT
from .tsd_kd import TSDKD
from .vcrd import VCRD, validity_weights

__all__ = [
    "GKD",
    "SFT",
    "TSDKD",
    "VCRD",
    "AdaptiveOpener",
    "DistiLLM2",
    "Objective",
    "Output",
    "validity_weights",
]

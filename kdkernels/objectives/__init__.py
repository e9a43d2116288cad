"""Distillation objectives: per-token statistics -> per-token coefficients -> loss and metrics. One file per paper."""

from .base import Objective, Output
from .gkd import GKD
from .sft import SFT
from .tsd_kd import TSDKD

__all__ = ["GKD", "SFT", "TSDKD", "Objective", "Output"]

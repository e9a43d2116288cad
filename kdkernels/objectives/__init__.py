"""Distillation objectives: per-token statistics -> per-token coefficients -> loss and metrics. One file per paper."""

from ..engine.terms import CrossEntropyTerm, DivergenceTerm, EntropyTerm, Needs, PlackettLuceTerm, Term
from ..engine.tokens import Tokens
from .adaptive_opener import AdaptiveOpener
from .base import Objective, Output, weighted
from .distillm import DistiLLM2
from .fused_linear import FusedLinearDistillationLoss
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
    "CrossEntropyTerm",
    "DistiLLM2",
    "DivergenceTerm",
    "EntropyTerm",
    "FusedLinearDistillationLoss",
    "Needs",
    "Objective",
    "Output",
    "PlackettLuceTerm",
    "Term",
    "Tokens",
    "validity_weights",
    "weighted",
]

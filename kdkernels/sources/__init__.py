"""Sources: what gives a distribution over the next token. A head over hidden states, logits, stored top-k entries."""

from __future__ import annotations

from .base import Comparison, Costs, Known, Producer, Source, autocasts, packed, row_bytes, take, unpacked
from .fitting import check_complete, check_student, check_teacher, shared_vocabulary
from .head import Head
from .hidden import hidden_states
from .logits import Logits
from .topk import TopK

__all__ = [
    "Comparison",
    "Costs",
    "Head",
    "Known",
    "Logits",
    "Producer",
    "Source",
    "TopK",
    "autocasts",
    "check_complete",
    "check_student",
    "check_teacher",
    "hidden_states",
    "packed",
    "row_bytes",
    "shared_vocabulary",
    "take",
    "unpacked",
]

"""Does an engine draw from the student's distribution? Its log-probabilities of the drawn tokens against the student's
own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

import kdkernels as kd
from kdkernels.data import collate
from kdkernels.rollouts.engine import Drawn
from kdkernels.rollouts.local import evaluating


@dataclass(frozen=True)
class Drift:
    """Of so many `tokens`, |log q_student - log q_engine| in nats: the `total` and the `largest`."""

    tokens: int
    total: float
    largest: float

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.total / self.tokens


def measure(
    student: PreTrainedModel, prompts: Sequence[Sequence[int]], drawn: Sequence[Drawn], vocab_size: int, pad_id: int
) -> Drift:
    """The drift over all tokens of `drawn`, the responses to `prompts` (token ids).

    Args:
        student: the model whose distribution they should be drawn from, without dropout.
        vocab_size: the ids that have a token.
        pad_id: fills up the shorter ones.
    """
    batch = collate(prompts, [one.ids for one in drawn], pad_id).to(student.device)
    layout = batch.layout.to(student.device)
    with torch.no_grad(), evaluating(student):
        values = kd.cross_entropy(kd.Head.of(student, vocab_size=vocab_size, **batch.inputs), batch.target, rows=layout)
    own = -values.flatten()[layout.index].double().cpu()
    theirs = torch.tensor([value for one in drawn for value in one.log_probs], dtype=torch.float64)
    apart = (own - theirs).abs()
    return Drift(len(apart), apart.sum().item(), apart.max().item())

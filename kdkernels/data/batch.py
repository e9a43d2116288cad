"""The batches that a step sees.

Axes: B responses, L length of the longest prompt + response (the others are padded on the right).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from kdkernels.layout import Layout


@dataclass(frozen=True)
class Batch:
    """Prompts with their responses, padded on the right.

    `input_ids`, `attention_mask`, `target` [B, L]; `target[b, t]` is the token after position t. `layout` marks the
    positions that predict a response token: from the last prompt position to the one before the response's last token,
    which is the end-of-sequence token if it ended. `from_teacher` [B]: responses of the data rather than the student.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    target: torch.Tensor
    layout: Layout
    from_teacher: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(getattr(self, entry.name).to(device) for entry in fields(self)))


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, from_teacher: bool = False
) -> Batch:
    """The Batch of `prompts` and their `responses` (token ids), all of them by the same author. Padding is known by
    position: a response may contain `pad_id`.
    """
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(prompts), length), pad_id)
    attention_mask = torch.zeros(len(prompts), length, dtype=torch.long)
    predicts = torch.zeros(len(prompts), length, dtype=torch.bool)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[b, :end] = torch.tensor([*prompt, *response])
        attention_mask[b, :end] = 1
        predicts[b, len(prompt) - 1 : end - 1] = True
    target = input_ids.roll(-1, dims=1)
    authors = torch.full((len(prompts),), from_teacher)
    return Batch(input_ids, attention_mask, target, Layout.from_mask(predicts), authors)

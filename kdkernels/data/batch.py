"""The batches that a step sees.

Axes: B responses, L length of the longest prompt + response (the others are padded on the right).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
        """The same batch for models on `device`. Layout and authors stay on the CPU, where an objective reads them
        without waiting for a GPU; it moves what it needs there.
        """
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "attention_mask", "target")}
        return replace(self, **moved)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model takes of it."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def fields(self, by_author: bool) -> dict[str, Any]:
        """What `kd.Distillation` takes of it; the authors only for an objective that tells them apart."""
        authors = self.from_teacher if by_author else None
        return {**self.inputs, "layout": self.layout, "target": self.target, "from_teacher": authors}


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, from_teacher: bool = False
) -> Batch:
    """The Batch of `prompts` and their `responses` (token ids), all of them by the same author. Padding is known by
    position: a response may contain `pad_id`.
    """
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(prompts), length), pad_id)
    attention_mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[b, :end] = torch.tensor([*prompt, *response])
        attention_mask[b, :end] = 1
    target = input_ids.roll(-1, dims=1)
    layout = Layout.from_spans([len(prompt) - 1 for prompt in prompts], [*map(len, responses)], length)
    authors = torch.full((len(prompts),), from_teacher)
    return Batch(input_ids, attention_mask, target, layout, authors)

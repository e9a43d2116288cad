"""The batches that a step sees.

Axes: B responses, L length of the longest prompt + response (the others are padded on the right).
"""

import hashlib
import sys
from array import array
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
    which is the end-of-sequence token if it ended. `from_teacher` [B]: who wrote each response, the teacher (or another
    author of the data) or the student. `ids`: the `sample_id` of each. `teachers`: the name of the teacher that scores
    each, None where there is but one.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    target: torch.Tensor
    layout: Layout
    from_teacher: torch.Tensor
    ids: tuple[str, ...]
    teachers: tuple[str | None, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch for models on `device`. Layout and authors stay on the CPU, where an objective reads them
        without waiting for a GPU; it moves what it needs there.
        """
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "attention_mask", "target")}
        return replace(self, **moved)

    def part(self, rows: Sequence[int]) -> "Batch":
        """These responses alone, in their order, with the batch's length L."""
        length, place = self.layout.shape[1], {b: i for i, b in enumerate(rows)}
        sequences = self.layout.sequence.tolist()
        layout = self.layout.take([number for number, b in enumerate(sequences) if b in place])
        moved = torch.tensor([place.get(b, 0) for b in range(len(self.ids))], device=layout.index.device)
        index = moved[layout.index // length] * length + layout.index % length
        layout = Layout.trusted(index, layout.lengths, (len(rows), length), layout.token, layout.parted)
        at = list(rows)
        tensors = {name: getattr(self, name)[at] for name in ("input_ids", "attention_mask", "target", "from_teacher")}
        ids, teachers = tuple(self.ids[b] for b in at), tuple(self.teachers[b] for b in at)
        return replace(self, **tensors, layout=layout, ids=ids, teachers=teachers)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model takes of it."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def fields(self, by_author: bool) -> dict[str, Any]:
        """What `kd.Distillation` takes of it; the authors only for an objective that tells them apart."""
        authors = self.from_teacher if by_author else None
        return {**self.inputs, "layout": self.layout, "target": self.target, "from_teacher": authors}


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    from_teacher: bool | Sequence[bool] = False,
    teachers: Sequence[str | None] | None = None,
) -> Batch:
    """The Batch of `prompts` and their `responses` (token ids). Padding is known by position: a response may contain
    `pad_id`.

    Args:
        prompts, responses: token ids, one response to a prompt.
        pad_id: fills up the shorter ones.
        from_teacher: who wrote each response, or all of them.
        teachers: the name of the teacher that scores each.
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
    authors = [from_teacher] * len(prompts) if isinstance(from_teacher, bool) else from_teacher
    teachers = [None] * len(prompts) if teachers is None else teachers
    for name, values in (("from_teacher", authors), ("teachers", teachers)):
        if len(values) != len(prompts):
            raise ValueError(f"{name}: expected {len(prompts)}, one for each prompt, got {len(values)}")
    return Batch(
        input_ids,
        attention_mask,
        target,
        layout,
        torch.tensor(authors),
        tuple(map(sample_id, prompts, responses)),
        tuple(teachers),
    )


def sample_id(prompt: Sequence[int], response: Sequence[int]) -> str:
    """What a prompt with its response is known by: 32 hexadecimal digits that depend on the very tokens (BLAKE2b, 128
    bits, of the prompt's length and all ids as little-endian 64-bit integers). Stored scores and caches of teachers are
    addressed by it, so that they never fit other tokens.
    """
    numbers = array("q", [len(prompt), *prompt, *response])
    if sys.byteorder == "big":
        numbers.byteswap()
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()

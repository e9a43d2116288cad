"""A teacher that ships its last hidden states, and its lm_head once.

A token takes H numbers in the model's own dtype (2 H bytes in bf16), and only the positions that the layout scores
travel. The student's process multiplies them with the same weights as a teacher in it would, so that the same hidden
states give the same loss and gradients, to the bit.

Axes: B sequences, L positions, N scored positions of a batch, V vocabulary, H hidden.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kdkernels.data.batch import Batch
from kdkernels.sources import Head
from kdkernels.sources.head import plain


@dataclass(frozen=True)
class Output:
    """A model's lm_head: what `kd.Head` has beside the hidden states.

    weight [V, H], bias [V] or None, softcap, scale: as there; V may be padded.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, head: Head) -> "Output":
        """That of a head. Raises TypeError for one that is more than hidden states and weights."""
        head = plain(head, "teacher")
        return cls(head.weight, head.bias, head.softcap, head.scale)

    def to_bytes(self) -> bytes:
        """As a safetensors file: weight, bias where there is one, and softcap and scale in its metadata."""
        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        numbers = {"scale": float(self.scale).hex()}
        numbers |= {} if self.softcap is None else {"softcap": float(self.softcap).hex()}
        return to_bytes(tensors, numbers)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Output":
        """What `to_bytes` made. Raises ValueError for anything else."""
        tensors, numbers = from_bytes(content)
        if "weight" not in tensors or not {*tensors} <= {"weight", "bias"} or "scale" not in numbers:
            raise ValueError(f"expected an lm_head: weight, perhaps bias, and a scale, got {[*tensors, *numbers]}")
        softcap = float.fromhex(numbers["softcap"]) if "softcap" in numbers else None
        found = cls(tensors["weight"], tensors.get("bias"), softcap, float.fromhex(numbers["scale"]))
        found.head(found.weight[:0])  # whose checks are all that there are
        check_finite("lm_head", found.weight)
        return found

    def to(self, device: torch.device) -> "Output":
        """The same on `device`."""
        bias = None if self.bias is None else self.bias.to(device)
        return Output(self.weight.to(device), bias, self.softcap, self.scale)

    def head(self, hidden: Tensor, vocab_size: int | None = None) -> Head:
        """The head of these hidden states [..., H]."""
        return Head(hidden, self.weight, self.bias, self.softcap, self.scale, vocab_size)


class HiddenStatesTeacher:
    """A teacher whose hidden states come from somewhere else: a cache, a server, memory.

    Args:
        output: its lm_head, on the device of the batches.
        states: gives the hidden states [N, H] of a batch at the positions of its layout, in the layout's order.
        vocab_size: the ids that have a token, which it shares with the student.

    Raises:
        ValueError: the lm_head has fewer entries.
    """

    alone = True

    def __init__(self, output: Output, states: Callable[[Batch], Tensor], vocab_size: int):
        self.output, self.states, self.vocab_size = output, states, vocab_size
        output.head(output.weight[:0], vocab_size)

    @property
    def bytes_per_token(self) -> int:
        """Of a scored position's hidden state."""
        return self.output.weight.shape[1] * self.output.weight.dtype.itemsize

    def __str__(self) -> str:
        width, dtype = self.output.weight.shape[1], self.output.weight.dtype
        kind = str(dtype).removeprefix("torch.")
        return f"hidden states of {width} numbers in {kind}, {self.bytes_per_token} bytes a token"

    @torch.no_grad()
    def score(self, batch: Batch) -> Head:
        """The hidden states [B, L, H] of `batch`, 0 where its layout scores nothing, with the lm_head."""
        states, weight = self.states(batch), self.output.weight
        expected = [len(batch.layout), weight.shape[1]]
        if list(states.shape) != expected or states.dtype != weight.dtype:
            raise ValueError(
                f"states: expected {expected} in {weight.dtype}, got {list(states.shape)} in {states.dtype}"
            )
        hidden = weight.new_zeros((math.prod(batch.layout.shape), weight.shape[1]))
        hidden.index_copy_(0, batch.layout.index.to(weight.device), states.to(weight.device))
        return self.output.head(hidden.view(*batch.layout.shape, -1), self.vocab_size)


def of_samples(states: Callable[[str], Tensor]) -> Callable[[Batch], Tensor]:
    """What a `HiddenStatesTeacher` takes, of what gives the hidden states [n, H] of one sample by its id."""
    return lambda batch: torch.cat([states(one) for one in batch.ids])


def scored(source: Head, batch: Batch) -> Tensor:
    """The hidden states [N, H] of a head over `batch` at the positions that its layout scores."""
    return source.hidden.flatten(0, -2)[batch.layout.index.to(source.device)]


# ---- tensors as bytes ----


def to_bytes(tensors: dict[str, Tensor], notes: dict[str, str]) -> bytes:
    """A safetensors file with `notes` as its metadata."""
    return save({name: one.detach().contiguous().cpu() for name, one in tensors.items()}, notes)


def from_bytes(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `to_bytes` was given. Raises ValueError for anything else, a part of it too."""
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        notes = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    except SafetensorError as error:
        raise ValueError(f"expected tensors as a whole safetensors file, got {len(content)} bytes: {error}") from error
    # in memory of their own: where a product's operands begin may decide how it adds up
    return {name: one.clone() for name, one in tensors.items()}, notes


def check_finite(what: str, values: Tensor) -> None:
    """Raises ValueError where there is a NaN or an infinity."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{what}: expected finite numbers, got {values[~values.isfinite()][0].item()}")

"""What heads, logits and stored words have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count


class Source:
    """What heads, logits and stored words have in common. ``names`` are the fields that hold tensors."""

    names: tuple[str, ...]

    @classmethod
    def trusted(cls, **fields) -> Source:
        """From fields that need no second look; the others have their defaults."""
        source = cls.__new__(cls)
        source.__dict__.update(fields)
        return source

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple([getattr(self, name) for name in self.names])

    def detach(self) -> Source:
        detached = [None if t is None else t.detach() for t in self.tensors]
        return self.trusted(**self.__dict__ | dict(zip(self.names, detached, strict=True)))

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions."""
        return getattr(self, self.names[0]).shape[:-1]

    @property
    def device(self) -> torch.device:
        return getattr(self, self.names[0]).device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self, self.names[0]).dtype

    def autocast(self) -> Source:
        """This source as autocast wants it: only a head multiplies matrices."""
        return self


def check_vocab_size(vocab_size: int | None, most: int, what: str) -> None:
    if vocab_size is None:
        return
    check_count("vocab_size", vocab_size, 1)
    if vocab_size > most:
        raise ValueError(f"vocab_size: expected at most {most} ({what}), got {vocab_size}")


def autocasts(device: torch.device) -> bool:
    """Whether ``torch.autocast`` is on."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast makes of a tensor: None where it is off, and for fp64, which it leaves alone."""
    if tensor.dtype == torch.float64 or not autocasts(tensor.device):
        return None
    return torch.get_autocast_dtype(tensor.device.type)

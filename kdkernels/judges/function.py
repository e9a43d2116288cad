"""A judge that is a Python function."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kdkernels.errors import InputError


class FunctionScorer:
    """Scores with a function of prefixes and tokens; a `Scorer`.

        def judge(prefixes: list[list[int]], tokens: list[int]) -> Sequence[float]:
            return [0.0 if token in prefix else 1.0 for prefix, token in zip(prefixes, tokens)]

    It is given token ids, those of the prompt among the prefix, and returns r(prefix, token) in [0, 1] for each: a list
    or a tensor [n]. A token that both models propose is asked about once.

    Args:
        function: the function.
        name: what it is called in error messages.
        batch_size: prefixes that it is given at a time.
    """

    def __init__(self, function: Callable, name: str, batch_size: int = 256):
        self.function, self.name, self.batch_size = function, name, batch_size

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], proposals: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """As `Scorer.score`. Raises InputError where the function raises or does not return a number for each
        prefix.
        """
        asked = {}  # (response, place, token), in order
        for b, (own, other) in enumerate(zip(responses, proposals, strict=True)):
            for t, pair in enumerate(zip(own, other, strict=True)):
                asked |= dict.fromkeys((b, t, token) for token in pair)
        known, left = {}, iter(asked)
        while part := list(islice(left, self.batch_size)):
            prefixes = [[*prompts[b], *responses[b][:t]] for b, t, _ in part]
            try:
                values = self.function(prefixes, [token for *_, token in part])
            except (Exception, SystemExit) as error:  # its own exit would look like one of kdkernels
                raise InputError(f"{self.name}: the function raised {type(error).__name__}: {error}") from error
            known |= dict(zip(part, numbers(values, len(part), self.name).tolist(), strict=True))
        return [
            torch.tensor([[known[b, t, token] for t, token in enumerate(row)] for row in pair])
            for b, pair in enumerate(zip(responses, proposals, strict=True))
        ]


def numbers(values: object, count: int, name: str) -> Tensor:
    """`count` numbers that a function returned, as a tensor [count]. Raises InputError for anything else."""
    try:
        found = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: expected {count} numbers, one for each prefix: {error}") from error
    if found.shape != (count,):
        raise InputError(f"{name}: expected {count} numbers, one for each prefix, got shape {list(found.shape)}")
    return found


def find_function(path: str) -> tuple[Callable, Path]:
    """The function at `module:function`, also of the current directory, and its file. Raises InputError."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # as for python -m
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
        file = inspect.getsourcefile(function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: expected module:function, a Python function that can be imported (PYTHONPATH says from where): "
            f"{error}"
        ) from error
    if not callable(function) or file is None:
        raise InputError(f"{path}: expected a Python function in a file, got {type(function).__name__}")
    return function, Path(file)

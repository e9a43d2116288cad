"""Judges: how much each token of a batch counts, where something beside the objective knows that."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kdkernels.data.batch import Batch
from kdkernels.errors import InputError
from kdkernels.judges.function import FunctionScorer
from kdkernels.judges.value_head import ValueHead

__all__ = ["FunctionScorer", "Judge", "Scorer", "ValueHead", "scores"]


class Judge(Protocol):
    """Gives every token of a batch a weight. A function is one:

    def favour_the_data(batch: Batch) -> Tensor:
        return torch.where(batch.from_teacher[:, None], 1.0, 0.5).expand(batch.target.shape).to(batch.target.device)
    """

    def __call__(self, batch: Batch) -> Tensor:
        """The weights of the tokens that `batch` is trained on, a factor on every term of the objective.

        Returns:
            [B, L] floating point, on the device of `batch.target`, at [b, t] the weight of the token after position t;
            positions outside of `batch.layout` are not read. No gradient reaches the judge.
        """


class Scorer(Protocol):
    """Says how valid single tokens are behind their prefixes: r(c, a) in [0, 1]  (VCRD, section 3)."""

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], proposals: Sequence[Sequence[int]]
    ) -> Sequence[Tensor]:
        """The scores of each response's own tokens and of other ones in their places.

        Args:
            prompts, responses: token ids, one response of n tokens to a prompt.
            proposals: for each response n token ids, the t-th of which another model proposed behind the prompt and the
                response's first t tokens.

        Returns:
            For each response a tensor [2, n]: r(c_t, response[t]) and r(c_t, proposals[t]), where c_t is the prompt and
            the response's first t tokens.
        """


def scores(
    scorer: Scorer,
    name: str,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    proposals: Sequence[Sequence[int]],
) -> list[Tensor]:
    """What `scorer` says of the tokens, as `Scorer.score`, in float32 on the CPU and checked.

    Args:
        name: of the judge, for error messages.

    Raises:
        InputError: an answer of another shape, with a NaN in it, or with a number outside [0, 1].
    """
    found = list(scorer.score(prompts, responses, proposals))
    if len(found) != len(responses):
        raise InputError(f"{name}: expected the scores of {len(responses)} responses, got {len(found)}")
    out = []
    for one, response in zip(found, responses, strict=True):
        if not isinstance(one, Tensor) or not one.is_floating_point() or one.shape != (2, len(response)):
            got = f"{one.dtype} {list(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
            raise InputError(f"{name}: expected floating-point scores of shape [2, {len(response)}], got {got}")
        one = one.float().cpu()
        bad = one[~((one >= 0) & (one <= 1))]  # a NaN is neither
        if bad.numel():
            raise InputError(
                f"{name}: expected scores from 0 to 1, got {bad[0].item():g}, one of {bad.numel()} such among "
                f"{one.numel()}: mend the judge; nothing of this shard was written"
            )
        out.append(one)
    return out

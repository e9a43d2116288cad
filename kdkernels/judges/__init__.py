"""Judges: how much each token of a batch counts, where something beside the objective knows that."""

from typing import Protocol

from torch import Tensor

from kdkernels.data.batch import Batch

__all__ = ["Judge"]


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

"""A teacher known at K entries of each token.

Axes: N tokens, n tokens of a chunk, K stored entries; [...] leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count
from ..divergences import Divergence
from ..kernels import Backend, Rows
from ..layout import Layout
from ..tensors import check_floating, check_integral
from . import sampled, served, topk_divergence
from .base import Costs, Known, Producer, Source, take


@dataclass(frozen=True, eq=False)
class TopK(Source):
    """A teacher known at K entries of each token, stored or served. What needs more than a divergence refuses it.

    Both distributions are coarsened to K + 1 outcomes: the K entries, and one bucket for all others. The teacher's
    bucket has the missing mass 1 - sum p, the student's bucket the mass of its other entries. ``renormalize=True``
    drops the bucket, so that teacher and student are normalised over the K entries. A temperature other than 1 needs
    that, because a bucket has no temperature. Where K = V there is no bucket.

    The ids of a token have to be distinct ids of the shared vocabulary, those of padding included. Padding has a
    log-probability of -inf: such an entry is not listed and lies in the bucket, or is dropped with it. So is one of
    -9999, by which servers mean "not known". Rounded probabilities may sum to 1 + 1e-3 (16 bits: 1 + 2e-2) and are then
    normalised. On CPUs a call raises a ValueError for anything else. On GPUs, where looking would cost a sync, the
    divergence of such a token is NaN, which the metrics count. The teacher's bucket has at least 2^-23, which fp32
    lists lose in rounding: with 0 a single confident token would make a reverse KL infinite.

    ``sampled=True`` says that the teacher drew the entries (``sample``). There is no bucket then: the divergence and
    its gradient are estimated from what each entry stands for, and are those of the whole teacher in the mean over the
    draws; the divergence of one token may be below 0. A reverse KL cannot be estimated, nor any temperature but 1. No
    call can tell drawn entries from the likeliest ones: read as the other kind, they give another loss. Their
    log-probabilities belong in fp32, because the entries that are not certain stand for 1 - sum p of the others.

    The list of a position is that of the token it predicts: what a server says about the token at t belongs to position
    t - 1. Lists in other places are as good a distribution, and no call can tell. ``from_openai`` and ``from_vllm`` put
    and check them; ``verify`` checks lists that were put by hand.

    Args:
        indices: [..., K] int64 or int32 ids of vocabulary entries. They are kept as they are: in int32 beside
            log-probabilities of 16 bits, an entry takes 6 bytes.
        log_probs: [..., K] log p of these entries, natural logarithm, at temperature 1.
        renormalize: drop the bucket of all other entries.
        sampled: the entries were drawn.

    Raises:
        TypeError: indices is neither int64 nor int32, log_probs not floating point, renormalize or sampled not a bool.
        ValueError: shapes or devices do not fit; both renormalize and sampled.
    """

    indices: Tensor
    log_probs: Tensor
    renormalize: bool = False
    sampled: bool = False

    names = ("log_probs", "indices")
    axis = "K"
    complete = False

    def __post_init__(self):
        check_floating("log_probs", self.log_probs)
        check_integral("indices", self.indices)
        if self.log_probs.dim() < 1 or self.log_probs.shape[-1] == 0:
            raise ValueError(f"log_probs: expected shape [..., K], got {list(self.log_probs.shape)}")
        if self.indices.shape != self.log_probs.shape:
            raise ValueError(
                f"indices: expected shape {list(self.log_probs.shape)} (that of log_probs), got "
                f"{list(self.indices.shape)}"
            )
        if self.indices.device != self.log_probs.device:
            raise ValueError(
                f"indices: expected device {self.log_probs.device} (that of log_probs), got {self.indices.device}"
            )
        for name in ("renormalize", "sampled"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if self.renormalize and self.sampled:
            raise ValueError("renormalize: expected False with sampled=True: sampled entries have no bucket to drop")

    @classmethod
    def sample(cls, teacher: Source, k: int, *, generator: torch.Generator | None = None) -> TopK:
        """K entries that ``teacher`` draws of each token: the likeliest for certain, the others by their probability.

        tau is such that sum_i min(1, p_i / tau) = K. Entries with p >= tau are all drawn, each other one with
        probability p / tau. A list of the K likeliest entries hides what the student has beyond it; a loss of drawn
        ones is that of the whole teacher in the mean over the draws, and its error falls with the number of tokens.

        Args:
            teacher: kd.Head, kd.Logits or another source that knows all entries, without a group. Its vocabulary has to
                be the student's: where it has more entries, say ``vocab_size`` or cut the logits.
            k: K, from 1 to the vocabulary.
            generator: of the draws, on the CPU; None: PyTorch's own.

        Returns:
            A kd.TopK [..., K] with ``sampled=True``: int64 ids, fp32 (or fp64) log-probabilities.

        Raises:
            TypeError: teacher is a kd.TopK or none of these.
            ValueError: k is outside [1, vocabulary], or a group divides the teacher's vocabulary.
        """
        if not isinstance(teacher, Source) or not teacher.complete:
            raise TypeError(f"teacher: expected kd.Head or kd.Logits, got {type(teacher).__name__}")
        if teacher.group is not None:
            raise ValueError("teacher: expected a whole vocabulary, got one that the ranks of a group divide")
        check_count("k", k, 1, teacher.vocabulary)
        count = teacher.shape.numel()
        offsets = torch.rand(count, generator=generator, dtype=torch.float64).to(teacher.device)
        with torch.no_grad():
            index = torch.arange(count, device=teacher.device)
            ids, log_probs = sampled.draw(teacher.autocast().detach(), index, k, offsets)
        log_probs = log_probs.to(torch.promote_types(teacher.dtype, torch.float32))
        return cls(ids.view(*teacher.shape, k), log_probs.view(*teacher.shape, k), sampled=True)

    @classmethod
    def from_openai(
        cls,
        json: object,
        layout: Layout,
        tokenizer: object = None,
        *,
        starts: Sequence[int] | None = None,
        drop_ambiguous: bool = False,
        renormalize: bool = False,
    ) -> TopK:
        """The teacher that servers of the OpenAI protocol return, at the positions of ``layout``.

            layout = kd.Layout.from_labels(labels)
            teacher = kd.TopK.from_openai(client.chat.completions.create(..., logprobs=True, top_logprobs=20), layout)

        Lists of generated tokens (chat completions, completions) are those of the layout's responses, in its order:
        packed sequences need nothing more. Lists of a whole text (completions with ``echo=True``) are those of a
        sequence, and begin at ``starts``. The token that stands at a place is an entry too, where it is none of the
        most likely ones. Entries of -9999, which says "not known", are not listed. Shorter lists are padded.

        Log-probabilities have to be those of temperature 1, before penalties and top-p (vLLM: its default
        ``logprobs_mode``, raw_logprobs). Nothing in a response says so.

        Args:
            json: a response or a list of them: JSON text, what it decodes to, or a client's objects. Each choice is a
                response of the layout or, with ``echo``, a sequence.
            layout: which positions are scored. One made from labels knows their tokens, and lists of other tokens (one
                position off, another text) are refused.
            tokenizer: the teacher's, of transformers, where tokens come as texts. It is not needed where they come as
                ids ("token_id:17", of vLLM's ``return_tokens_as_token_ids``).
            starts: of each sequence, the position of its text's first token; by default 0. Only with ``echo``.
            drop_ambiguous: leave entries whose text is that of several ids to the bucket.
            renormalize: see above.

        Returns:
            A kd.TopK of shape [B, L, K] on the layout's device, NaN at positions that the layout does not score.

        Raises:
            TypeError: texts without a tokenizer.
            ValueError: no log-probabilities, other tokens than the layout's, a text that is not one token's, naming the
                position [b, t].
        """
        lists = served.openai(json)
        return cls(
            *served.tensors(lists, served.Reader("json", tokenizer, drop_ambiguous), layout, starts), renormalize
        )

    @classmethod
    def from_vllm(
        cls, outputs: Sequence, layout: Layout, *, starts: Sequence[int] | None = None, renormalize: bool = False
    ) -> TopK:
        """The teacher that vLLM returns, at the positions of ``layout``; see ``from_openai``.

            prompts = [{"prompt_token_ids": ids} for ids in texts]
            outputs = llm.generate(prompts, vllm.SamplingParams(max_tokens=1, prompt_logprobs=20))
            teacher = kd.TopK.from_vllm(outputs, layout)

        ``prompt_logprobs`` are lists of a whole text: one output for each sequence, that begins at ``starts``; a list
        of outputs where a sequence has several texts, packed one behind the other. Without them, the ``logprobs`` of
        the completions are lists of the layout's responses, in its order.

        Args:
            outputs: a list of vLLM's RequestOutputs, of its server's JSON, or of prompt_logprobs themselves: lists of
                {id: log-probability or Logprob}, the first None.
            layout, starts, renormalize: as for ``from_openai``.

        Returns:
            A kd.TopK of shape [B, L, K] on the layout's device, NaN at positions that the layout does not score.

        Raises:
            ValueError: no log-probabilities, or other tokens than the layout's, naming the position [b, t].
        """
        lists = served.vllm(outputs)
        return cls(*served.tensors(lists, served.Reader("outputs"), layout, starts), renormalize)

    def verify(self, layout: Layout) -> None:
        """Checks lists that contain the tokens that were sampled: each has the token that its position predicts.

        Args:
            layout: made from labels, so that it knows the tokens.

        Raises:
            ValueError: the entries were drawn, so that tokens may be missing; the layout knows no tokens or has another
                shape; a token is not in its list, as where lists are one position off.
        """
        if self.sampled:
            raise ValueError(
                "sampled: expected False: entries that a teacher drew need not have the token that follows"
            )
        if layout.token is None or layout.shape != self.shape:
            raise ValueError(
                f"layout: expected one of shape {list(self.shape)} that was made from labels, got {list(layout.shape)}"
                + ("" if layout.token is not None else " without tokens")
            )
        layout = layout.to(self.device)
        missing = ~(take(self.indices, layout.index) == layout.token[:, None]).any(-1)
        if missing.any():
            first = int(missing.nonzero()[0])
            b, t = divmod(int(layout.index[first]), layout.shape[1])
            raise ValueError(
                f"indices: expected token {int(layout.token[first])} among those at [{b}, {t}], which predicts it; "
                f"{int(missing.sum())} of {len(layout)} lists are without theirs: what a server says about the token "
                "at t belongs to position t - 1"
            )

    def fits_dtype(self, student: Source) -> bool:
        """Always: its log-probabilities become fp64."""
        return True

    def check_temperature(self, temperature: float) -> None:
        """A bucket has no temperature, and entries were drawn at 1."""
        if temperature != 1 and self.sampled:
            raise ValueError(f"temperature: expected 1 with a kd.TopK of sampled entries, got {temperature}")
        if temperature != 1 and not self.renormalize:
            raise ValueError(
                f"temperature: expected 1 with a kd.TopK teacher that keeps a bucket of all other entries, got "
                f"{temperature}; renormalize=True drops the bucket"
            )

    @property
    def numbers(self) -> list[float]:
        """Whether the bucket is dropped, and whether entries were drawn."""
        return [self.renormalize, self.sampled]

    @classmethod
    def unpack(cls, tensors: list[Tensor], numbers: list[float]) -> TopK:
        """The source of these tensors and numbers."""
        log_probs, indices = tensors
        renormalize, drawn = map(bool, numbers)
        return cls.trusted(log_probs=log_probs, indices=indices, renormalize=renormalize, sampled=drawn)

    def costs(self, backend: Backend, vocabulary: int, dtype: torch.dtype, largest: int, trained: bool) -> Costs:
        """See Source.costs."""
        return Costs(0, 0, 144 * self.indices.shape[-1])  # ids, and sixteen fp64 vectors of outcomes

    def producer(self, backend, index, vocabulary, buffer, needs=None, pieces=1) -> TopKProducer:
        """See Source.producer."""
        return TopKProducer(self, backend, index, vocabulary)


class TopKProducer(Producer):
    """A teacher's stored entries, and divergences from them (topk_divergence.py, sampled.py)."""

    def __init__(self, source: TopK, backend: Backend, index: Tensor, vocabulary: int):
        super().__init__(backend, index, vocabulary, None)
        self.ids, self.log_probs = source.indices, source.log_probs
        self.renormalize, self.sampled = source.renormalize, source.sampled
        if self.ids.shape[-1] > vocabulary:
            raise ValueError(
                f"indices: expected at most {vocabulary} entries (the vocabulary), got {self.ids.shape[-1]}"
            )

    def entries(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """The entries of these tokens: ids [n, K], and log-probabilities [n, K] in fp64.

        Raises:
            ValueError: on CPUs, ids or log-probabilities that cannot be. On GPUs those of such a token become NaN.
        """
        at = self.index[tokens]
        ids, log_p = take(self.ids, at).long(), take(self.log_probs, at)
        slack = 1e-3 if log_p.dtype.itemsize >= 4 else 2e-2
        log_p = log_p.double()
        log_p = log_p.masked_fill(log_p <= served.UNKNOWN, -torch.inf)
        ordered, total = ids.sort(-1).values, log_p.exp().sum(-1)
        outside = (ordered[:, 0] < 0) | (ordered[:, -1] >= self.vocabulary)
        twice = (ordered.diff(dim=-1) == 0).any(-1)
        wrong = outside | twice | (total > 1 + slack)
        if ids.device.type != "cpu":
            return (
                torch.where(wrong[:, None], torch.arange(ids.shape[1], device=ids.device), ids),
                log_p.masked_fill(wrong[:, None], torch.nan),
            )
        larger = "; draw from a teacher that has the student's vocab_size" if self.sampled else ""
        for bad, expected, way_out in (
            (outside, f"ids in [0, {self.vocabulary})", larger),
            (twice, "distinct ids for each token", ""),
        ):
            if bad.any():
                raise ValueError(f"indices: expected {expected}, got {ids[bad][0].tolist()}{way_out}")
        if wrong.any():
            raise ValueError(
                f"log_probs: expected log-probabilities whose exponentials sum to at most 1 for each token, got "
                f"{log_p[wrong][0].tolist()} with a sum of {total[wrong][0]:.6g}"
            )
        return ids, log_p

    def divergence(
        self, student: Rows, teacher: Known, divergence: Divergence, temperature: float
    ) -> topk_divergence.Outcomes | sampled.Estimate:
        if self.sampled:
            return sampled.divergence(self.backend, student, *teacher, divergence)
        return topk_divergence.divergence(self.backend, student, *teacher, divergence, temperature, self.renormalize)

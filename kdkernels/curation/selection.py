"""Which of a query's answers are kept, and why not the others: first quality, then labels, then diversity."""

import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kdkernels.curation.chat import Answer, Failure
from kdkernels.curation.config import CurationConfig
from kdkernels.curation.parse import Parsed, Unreadable, canonical, parse
from kdkernels.curation.prompts import Prompt
from kdkernels.errors import InputError

KEPT = "kept"
DIGITS = 6  # of a similarity: two that are equal to so many are a tie, which the order of the teachers decides
Similarities = Callable[[Sequence[str]], Sequence[Sequence[float]]]  # of n texts: n x n cosines


@dataclass(frozen=True)
class Decision:
    """What became of a teacher's answer to a query.

    `why`: "kept", or what spoke against it, in the words by which decisions are counted. `score`: what quality was
    measured by, if it was. `similarity`: of the chosen pair.
    """

    teacher: str
    found: Answer | Failure
    parsed: Parsed | None
    why: str
    score: float | None = None
    similarity: float | None = None

    @property
    def kept(self) -> bool:
        return self.why == KEPT


class Selection:
    """The three criteria of a recipe, for one query after another.

    Args:
        config, prompt: the recipe's.
        correct: whether a label is right, given the right answer; by default whether they say the same.
    """

    def __init__(self, config: CurationConfig, prompt: Prompt, correct: Callable[[str, str], bool] | None = None):
        self.config, self.prompt = config, prompt
        self.correct = correct or (lambda label, right: self._said(label) == self._said(right))

    def good(self, found: Sequence[tuple[str, Answer | Failure]], right: str) -> list[Decision]:
        """Quality and agreement: of each teacher's answer to a query whose right answer is `right` ("" where none is
        known), in the teachers' order. Those still "kept" are the ones among which diversity chooses.
        """
        return self._agreed([self._judged(teacher, one, right) for teacher, one in found])

    def diverse(self, decisions: Sequence[Decision], query: str, similarities: Similarities) -> list[Decision]:
        """Of three or more answers that are kept, two. With fewer, all that are left stay."""
        left = [i for i, one in enumerate(decisions) if one.kept]
        if self.config.diversity == "none" or len(left) < 3:
            return list(decisions)
        pairs = list(itertools.combinations(left, 2))
        similarity = None
        if self.config.diversity == "random":
            pair = _generator(self.config.seed, query).choice(pairs)
        else:
            table = similarities([decisions[i].parsed.rationale for i in left])
            found = [round(float(table[left.index(p)][left.index(q)]), DIGITS) for p, q in pairs]
            if not all(map(math.isfinite, found)):
                raise InputError(f"[curation] embedding: its vectors of the rationales for {query!r} are no numbers")
            similarity = min(found)
            pair = pairs[found.index(similarity)]
        why = "not in the pair drawn" if self.config.diversity == "random" else "not in the pair least alike"
        return [
            replace(one, similarity=similarity) if i in pair else replace(one, why=why) if i in left else one
            for i, one in enumerate(decisions)
        ]

    def _judged(self, teacher: str, found: Answer | Failure, right: str) -> Decision:
        if isinstance(found, Failure):
            return Decision(teacher, found, None, f"no answer: {found.kind}")
        try:
            parsed = parse(found, self.prompt)
        except Unreadable as error:
            return Decision(teacher, found, None, f"unreadable: {error}")
        quality = self.config.quality
        if quality == "correct":
            good = self.correct(parsed.label, right)
            return Decision(teacher, found, parsed, KEPT if good else "wrong label", float(good))
        if quality == "none":
            return Decision(teacher, found, parsed, KEPT)
        if quality == "log_probability" and found.logprob is None:
            return Decision(teacher, found, parsed, "no log-probability")
        score = parsed.confidence if quality == "confidence" else math.exp(min(found.logprob, 0.0))
        why = KEPT if score >= self.config.threshold else f"{quality.replace('_', '-')} below the threshold"
        return Decision(teacher, found, parsed, why, score)

    def _agreed(self, decisions: list[Decision]) -> list[Decision]:
        labels = [self._said(one.parsed.label) if one.kept else None for one in decisions]
        counts = Counter(label for label in labels if label is not None)
        if self.config.disagreement == "keep" or len(counts) < 2:
            return decisions
        best, times = counts.most_common(1)[0]
        majority = self.config.disagreement == "majority" and 2 * times > counts.total()
        return [
            replace(one, why="label disagrees") if one.kept and not (majority and label == best) else one
            for one, label in zip(decisions, labels, strict=True)
        ]

    def _said(self, label: str) -> str:
        return canonical(label, self.prompt.labels)


def _generator(seed: int, query: str) -> random.Random:
    """Random numbers that depend on the seed and the query alone, whatever else is drawn."""
    return random.Random(hashlib.sha256(f"{seed} {query}".encode()).digest())

"""The rehearsal's teachers as `kdkernels.curation` asks them, and its cheap stand-in for a sentence embedding."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from kdkernels.curation import Answer, Chat, Failure, LocalChat
from kdkernels.curation.chat import Conversation

ANSWER = re.compile(r"(?s)(.*)\nAnswer: (\d+)\n?")
WORD = re.compile(r"[a-zA-Z]+|\S")


class Confident(Chat):
    """A model too small to judge itself: its confidence is the geometric mean of the probabilities of its tokens,
    exp(mean log p), and the marks are put around what it writes. What has no answer in it is left as it is.
    """

    def __init__(self, chat: LocalChat):
        self.chat, self.batch = chat, chat.batch
        self.identity = {"confidence": "mean token probability", **chat.identity}

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer | Failure]:
        return [self._marked(one) if isinstance(one, Answer) else one for one in self.chat.answers(conversations)]

    def close(self) -> None:
        self.chat.close()

    def _marked(self, answer: Answer) -> Answer:
        found = ANSWER.fullmatch(answer.text)
        if found is None:
            return answer
        parts = {"rationale": found[1], "label": found[2], "confidence": f"{math.exp(min(answer.logprob, 0.0)):.4f}"}
        return replace(answer, text="\n".join(f"<{name}>{text}</{name}>" for name, text in parts.items()))


class Words:
    """A text as the counts of its words, digits and signs: cosines of these stand in for those of an embedding."""

    cut, length = 0, None

    def similarities(self, texts: Sequence[str]) -> list[list[float]]:
        """[n, n]: the cosine of each two of n texts."""
        counts = [Counter(WORD.findall(text)) for text in texts]
        norms = [math.sqrt(sum(value * value for value in one.values())) for one in counts]
        return [
            [sum(value * other[key] for key, value in one.items()) / (norms[i] * norms[j])
             for j, other in enumerate(counts)]
            for i, one in enumerate(counts)
        ]  # fmt: skip

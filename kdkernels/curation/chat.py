"""Who answers: a conversation goes in, an answer comes out, or a failure with its kind."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, str]  # its role and its content
Conversation = Sequence[Message]


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    `tokens_in`, `tokens_out`: of the conversation and of the answer; None where a server does not say. `logprob`: the
    mean log-probability of the answer's tokens, in nats a token; None where it is not known. `truncated`: the model had
    more to say than it was allowed tokens. `faults`: the kinds of failure that came before the answer.
    """

    text: str
    tokens_in: int | None
    tokens_out: int | None
    logprob: float | None = None
    truncated: bool = False
    faults: tuple[str, ...] = ()


class Failure(Exception):
    """No answer. The message never has a key in it.

    Args:
        kind: a few words by which failures are counted.
        passes: it may pass by itself, so that asking again helps.
        final: this conversation is never answered by this teacher, and not asked for again, not by a later run either.
        stops: no conversation is answered (a wrong key, a model that is not there).
        wait: the seconds for which a server wants to be left alone.
        faults: as of an answer.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        passes: bool = True,
        final: bool = False,
        stops: bool = False,
        wait: float | None = None,
        faults: Sequence[str] = (),
    ):
        super().__init__(message)
        self.kind, self.passes, self.final, self.stops = kind, passes, final, stops
        self.wait, self.faults = wait, tuple(faults)

    def after(self, faults: Sequence[str]) -> "Failure":
        """The same, with what came before it."""
        self.faults = tuple(faults)
        return self


class Chat(ABC):
    """A model that answers conversations.

    Attributes:
        identity: all that an answer depends on beside the conversation, in JSON's types. Answers are kept under a hash
            of it, so it must not have a key or a password in it.
        batch: how many conversations a call of `answers` takes.
        workers: how many calls may be under way at the same time.
    """

    identity: Mapping[str, Any]
    batch: int = 1
    workers: int = 1

    @abstractmethod
    def answers(self, conversations: Sequence[Conversation]) -> list[Answer | Failure]:
        """What comes of each of at most `batch` conversations."""

    def answer(self, conversation: Conversation) -> Answer:
        """The answer to one conversation. Raises Failure."""
        found = self.answers([conversation])[0]
        if isinstance(found, Failure):
            raise found
        return found

    def stop(self) -> None:  # noqa: B027  most have nothing to interrupt
        """Calls under way end as soon as they can: a Failure of the kind "stopped" for what is not answered yet."""

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Gives back what it holds."""

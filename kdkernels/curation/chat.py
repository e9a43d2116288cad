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
    more to say than it was allowed tokens.
    """

    text: str
    tokens_in: int | None
    tokens_out: int | None
    logprob: float | None = None
    truncated: bool = False


class Failure(Exception):
    """No answer. `kind`: a few words by which failures are counted. `final`: asking again would not help.

    `stops`: no conversation can be answered (a wrong key, a model that is not there). `wait`: the seconds for which the
    server wants to be left alone. The message never has a key in it.
    """

    def __init__(self, kind: str, message: str, *, final: bool = False, stops: bool = False, wait: float | None = None):
        super().__init__(message)
        self.kind, self.final, self.stops, self.wait = kind, final, stops, wait


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

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Gives back what it holds."""

"""Asking several teachers at the same time: who still has to be asked what. Every answer is kept as it comes."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from kdkernels.curation.chat import Answer, Chat, Conversation, Failure
from kdkernels.curation.config import TeacherConfig
from kdkernels.curation.journal import Journal, address
from kdkernels.curation.server import OpenAIChat
from kdkernels.errors import ServerError

IN_A_ROW = 10  # failures without an answer between them, after which a teacher is taken to be out of order
_one_model_at_a_time = threading.Lock()  # of this process: memory, and the generator of random numbers


@dataclass(frozen=True)
class Teacher:
    """Who is asked. `open()` makes its chat, for as long as it is asked; `alone`: while no other such one is."""

    name: str
    identity: Mapping[str, Any]
    open: Callable[[], AbstractContextManager[Chat]]
    alone: bool = False

    def address(self, conversation: Conversation) -> str:
        """Under what its answer to a conversation is kept."""
        return address(self.name, self.identity, conversation)


def teacher(config: TeacherConfig, place: str = "[curation] teachers") -> Teacher:
    """The teacher of a recipe. A local model is loaded when it is asked, and dropped afterwards. Raises InputError."""
    common = {key: getattr(config, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")}
    if config.kind == "openai":
        own = ("logprobs", "extra", "key_variable", "timeout", "retries", "backoff", "requests_per_minute")
        asked = {key: getattr(config, key) for key in own}
        chat = OpenAIChat(config.url, config.model, **common, **asked, workers=config.concurrency)
        return Teacher(config.name, chat.identity, lambda: closing(chat))
    from kdkernels.curation.local import LocalChat, identity_of  # torch, transformers: seconds

    def load() -> AbstractContextManager[Chat]:
        where = f"{place} ({config.name}) path"
        return closing(LocalChat.load(config.path, dtype=config.dtype, key=where, batch=config.concurrency, **common))

    return Teacher(config.name, identity_of(config.path, config.dtype, **common), load, alone=True)


def given(name: str, chat: Chat) -> Teacher:
    """A teacher of the caller's own, which the caller closes."""
    return Teacher(name, chat.identity, lambda: nullcontext(chat))


def ask(teachers: Sequence[Teacher], questions: Mapping[str, Sequence[Conversation]], journal: Journal) -> None:
    """Puts into the journal what each of the teachers answers to its questions (by its name) that are not in there yet.
    A question that is there twice is asked once.

    Answers that servers failed to give in spite of all repetitions are put there too, as failures.

    Raises:
        ServerError: a teacher refuses all questions, or did not answer IN_A_ROW of them. What it and the others had
            answered is kept.
    """
    rounds = [(one, _missing(one, questions[one.name], journal)) for one in teachers]
    total = sum(len(questions[one.name]) for one in teachers)
    left = sum(len(missing) for _, missing in rounds)
    with tqdm(total=total, initial=total - left, unit="answer", disable=None, file=sys.stderr) as bar:
        state = _State(journal, bar)
        with ThreadPoolExecutor(max(1, len(teachers))) as pool:
            running = [pool.submit(_ask_one, one, missing, state) for one, missing in rounds if missing]
            try:
                for future in running:
                    future.result()
            except BaseException:
                state.stop()
                raise
    if state.problem is not None:
        raise state.problem


def _missing(one: Teacher, conversations: Sequence[Conversation], journal: Journal) -> dict[str, Conversation]:
    """What the teacher has to be asked, by the address of the answer."""
    found = {one.address(each): each for each in conversations}
    return {where: each for where, each in found.items() if not journal.has(where)}


class _State:
    """What the threads share: where answers go, and whether they are to stop."""

    def __init__(self, journal: Journal, bar: tqdm):
        self.journal, self.bar = journal, bar
        self.problem: BaseException | None = None
        self.stopped, self._lock = threading.Event(), threading.Lock()
        self._chats: list[Chat] = []

    @contextmanager
    def asking(self, chat: Chat) -> Iterator[None]:
        """While `chat` is asked it can be stopped; afterwards nothing here holds it, and the model it may be."""
        with self._lock:
            self._chats.append(chat)
        try:
            yield
        finally:
            with self._lock:
                self._chats.remove(chat)

    def stop(self, problem: BaseException | None = None) -> None:
        """Nobody is asked anything any more; the first problem is the one that is told."""
        with self._lock:
            self.problem = self.problem or problem
            self.stopped.set()
            for chat in self._chats:
                chat.stop()


def _ask_one(one: Teacher, missing: Mapping[str, Conversation], state: _State) -> None:
    """Asks a teacher all that is missing, in calls of its `batch`, of which its `workers` are under way together."""
    with _one_model_at_a_time if one.alone else nullcontext():
        if state.stopped.is_set():
            return
        with one.open() as chat, state.asking(chat):
            tally = _Tally(one.name, state)
            asked = list(missing.items())
            calls = [asked[i : i + chat.batch] for i in range(0, len(asked), chat.batch)]
            with ThreadPoolExecutor(chat.workers) as pool:
                for future in [pool.submit(_call, chat, call, tally) for call in calls]:
                    try:
                        future.result()
                    except BaseException as error:
                        state.stop(error)
                        raise


def _call(chat: Chat, call: Sequence[tuple[str, Conversation]], tally: "_Tally") -> None:
    if tally.state.stopped.is_set():
        return
    found = chat.answers([conversation for _, conversation in call])
    tally.keep([(where, one) for (where, _), one in zip(call, found, strict=True)])


class _Tally:
    """Keeps a teacher's answers, and notices when it gives none."""

    def __init__(self, name: str, state: _State):
        self.name, self.state, self._lock = name, state, threading.Lock()
        self._failed, self._answered = 0, False

    def keep(self, found: Sequence[tuple[str, Answer | Failure]]) -> None:
        """Puts answers into the journal. Those of a run that is being stopped, which are none, are left out."""
        kept = [(where, self.name, one) for where, one in found if not _of_a_stop(one)]
        if kept:
            self.state.journal.put(kept)
            self.state.bar.update(len(kept))
        with self._lock:
            for _, one in found:
                self._count(one)

    def _count(self, one: Answer | Failure) -> None:
        """Stops the run where the teacher answers nothing. That it cannot answer some queries says so only while it has
        answered none.
        """
        if isinstance(one, Answer):
            self._failed, self._answered = 0, True
        elif not one.final and not _of_a_stop(one) and (one.passes or not self._answered):
            self._failed += 1
        if isinstance(one, Failure) and (one.stops or self._failed >= IN_A_ROW):
            self.state.stop(self._problem(one))

    def _problem(self, failure: Failure) -> ServerError:
        often = "" if failure.stops else f" {self._failed} questions in a row, the last time with"
        return ServerError(
            f"teacher {self.name}: no answer:{often} {failure.kind}: {failure}; what was answered is kept: run the "
            "same again when the teacher answers"
        )


def _of_a_stop(one: Answer | Failure) -> bool:
    return isinstance(one, Failure) and one.kind == "stopped"

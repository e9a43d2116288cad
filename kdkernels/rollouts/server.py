"""A vLLM server, which is asked over HTTP: for responses as OpenAI's completions, to load weights by its developers'
routes.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from kdkernels.errors import ServerError
from kdkernels.http import Server
from kdkernels.rollouts.engine import Asked, Drawn


class ServerEngine:
    """An `Engine` behind a url.

    Args:
        server: where `VLLM_SERVER_DEV_MODE=1 vllm serve` answers; docs/ROLLOUTS.md has its options.
        at_once: how many requests are under way at the same time.
    """

    shared = True

    def __init__(self, server: Server, at_once: int):
        self.server, self.at_once = server, at_once

    def load(self, directory: Path) -> None:
        """Has the server read the weights in `directory`, which it must see under the same path, and forget what it
        keeps of prompts that it knows: that was computed with other weights.
        """
        what = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        try:
            self.server.post("/collective_rpc", what)
            self.server.post_json("/reset_prefix_cache", {}, _succeeded)
        except ServerError as error:
            raise ServerError(
                f"{error}. It was to load the student's weights from {directory}: it has to see that directory, serve "
                "the student's architecture, and be started with VLLM_SERVER_DEV_MODE=1"
            ) from None

    def draw(self, prompts: Sequence[Sequence[int]], asked: Asked, seeds: Sequence[int]) -> list[Drawn]:
        """One request a prompt: those that share one would share its seed."""
        with ThreadPoolExecutor(min(self.at_once, len(prompts))) as threads:
            futures = [threads.submit(self._one, *pair, asked) for pair in zip(prompts, seeds, strict=True)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)  # the others would be tried as often, one by one
                raise

    def close(self) -> None:
        """Nothing: the server goes on."""

    def _one(self, prompt: Sequence[int], seed: int, asked: Asked) -> Drawn:
        body = {"prompt": list(prompt), "return_token_ids": True, **asked.parameters(seed)}
        return self.server.post_json("/v1/completions", body, partial(_read, asked=asked))


def _read(answer: dict[str, Any], asked: Asked) -> Drawn:
    """What is in an answer of the completions. Raises ValueError, KeyError or TypeError, and is asked for again."""
    (choice,) = answer["choices"]
    if choice.get("token_ids") is None:
        raise ValueError("expected the response's token ids: a server that does not know return_token_ids?")
    return asked.drawn(choice["token_ids"], choice["logprobs"]["token_logprobs"])


def _succeeded(answer: dict[str, Any]) -> None:
    if answer["success"] is not True:
        raise ValueError("expected success, which takes a server that writes nothing just then")

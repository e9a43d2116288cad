"""vLLM on the same device as the trainer: an engine in a process of its own beside each of the trainer's."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from kdkernels.errors import MissingPackage, ServerError
from kdkernels.rollouts.engine import Asked, Drawn

T = TypeVar("T")
CUDA = "CUDA_VISIBLE_DEVICES"


class VllmEngine:
    """An `Engine` of vLLM, which starts with the first weights that it loads.

    Args:
        longest: tokens of the longest prompt with its response.
        memory: the share of the GPU's memory that it takes, for its weights and what it keeps of texts.
        dtype: of its weights, as [run] dtype.
        device: the number of the GPU, among those that this process sees.

    Raises:
        MissingPackage: there is no vLLM.
    """

    shared = False

    def __init__(self, longest: int, memory: float, dtype: str, device: int):
        try:
            import vllm
        except ImportError as error:
            raise MissingPackage(
                f'[rollout] engine = "vllm" needs vllm, which cannot be imported ({error}): pip install '
                'kdkernels[vllm], or engine = "server", whose server has an environment of its own'
            ) from error
        self.vllm, self.device, self.llm = vllm, device, None
        self.options = {
            "max_model_len": longest,
            "gpu_memory_utilization": memory,
            "dtype": dtype,
            "generation_config": "vllm",  # none of the checkpoint's defaults
            "logprobs_mode": "processed_logprobs",  # of what is drawn from
            "skip_tokenizer_init": True,
        }

    def load(self, directory: Path) -> None:
        self._do("load the student's weights", lambda: self._load(str(directory)))

    def draw(self, prompts: Sequence[Sequence[int]], asked: Asked, seeds: Sequence[int]) -> list[Drawn]:
        return self._do("write responses", lambda: self._draw(prompts, asked, seeds))

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None

    def _load(self, directory: str) -> None:
        if self.llm is None:
            with _one_gpu(self.device):
                self.llm = self.vllm.LLM(model=directory, **self.options)
            return
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
        if not self.llm.reset_prefix_cache():  # what it keeps of prompts was computed with other weights
            raise RuntimeError("it did not forget the prompts that it knows")

    def _draw(self, prompts: Sequence[Sequence[int]], asked: Asked, seeds: Sequence[int]) -> list[Drawn]:
        parameters = [self._parameters(asked.parameters(seed)) for seed in seeds]
        texts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = [one.outputs[0] for one in self.llm.generate(texts, parameters, use_tqdm=False)]
        drawn = []
        for output in outputs:
            ids = list(output.token_ids)
            told = [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]
            drawn.append(asked.drawn(ids, told))
        return drawn

    def _parameters(self, named: dict[str, Any]) -> Any:
        bias = named["logit_bias"] and {int(token): value for token, value in named["logit_bias"].items()}
        return self.vllm.SamplingParams(**named | {"logit_bias": bias, "detokenize": False})

    def _do(self, what: str, function: Callable[[], T]) -> T:
        try:
            return function()
        except Exception as error:  # whatever vLLM raises: the run ends, and nothing of it is trained on
            raise ServerError(f"vLLM in this process did not {what}: {type(error).__name__}: {error}") from error


@contextmanager
def _one_gpu(number: int) -> Iterator[None]:
    """Processes that are started here see only that GPU of this process's. They are started anew, not forked."""
    before = {name: os.environ.get(name) for name in (CUDA, "VLLM_WORKER_MULTIPROC_METHOD")}
    seen = (before[CUDA] or "").split(",") if before[CUDA] else []
    os.environ[CUDA] = seen[number] if seen else str(number)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""A model in this process that answers: a directory as transformers reads it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdkernels.curation.chat import Answer, Chat, Conversation, Failure
from kdkernels.data.encoding import Encoder
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.errors import InputError
from kdkernels.rollouts.local import TokenDistribution, end_ids, evaluating
from kdkernels.training.models.loading import read_tokenizer
from kdkernels.training.recipe.resolve import adapter_base
from kdkernels.training.run.hashes import sha256_of_all
from kdkernels.training.run.identity import MODEL_FILES


class LocalChat(Chat):
    """Answers with a model of transformers.

    The conversation is rendered by the tokenizer's chat template; without one it is the contents of its messages, a
    line each.

    Args:
        model, tokenizer: of the answering model.
        max_new_tokens: of an answer; a longer one is truncated.
        temperature: 0 takes the most probable token. Else tokens are drawn, from a generator that depends on `seed` and
            the conversations of the call alone.
        top_p: tokens are drawn from the smallest set that has this probability.
        batch: conversations that are answered at the same time.
        identity: of the model, by its files.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch: int = 8,
        identity: Mapping[str, Any] | None = None,
    ):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.max_new_tokens, self.temperature, self.top_p, self.seed = max_new_tokens, temperature, top_p, seed
        dtype = str(model.dtype).removeprefix("torch.")
        self.identity = _identity(identity or {}, dtype, max_new_tokens, temperature, top_p, seed)

    @classmethod
    def load(cls, path: str | Path, *, dtype: str = "float32", key: str = "path", **settings: Any) -> "LocalChat":
        """The model in the directory `path`, on a GPU where there is one. `key` is what the user calls the path;
        `settings`: as of the class. Raises InputError where there is no such model.
        """
        if not Path(path).is_dir():
            raise InputError(f"{key}: no such directory: {path}")
        if adapter_base(str(path)) is not None:
            raise InputError(f"{key}: expected a whole model, got an adapter in {path}: merge it into its base")
        tokenizer = read_tokenizer(str(path), key)
        if tokenizer.eos_token_id is None:
            raise InputError(f"{key}: the tokenizer in {path} has no end-of-sequence token: no answer would ever end")
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # its errors have no type in common
            raise InputError(f"{key}: {path} cannot be read as a language model: {error}") from error
        if report["missing_keys"]:
            raise InputError(f"{key}: weights are missing in {path}, for instance {min(report['missing_keys'])}")
        model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()
        return cls(model, tokenizer, identity=_files(Path(path)), **settings)

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer | Failure]:
        """The model's answers; a Failure for a conversation that leaves no room for one. Raises FloatingPointError for
        logits that are no distribution.
        """
        prompts = self._encode(conversations)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        found: list[Answer | Failure] = [
            Failure(
                "query too long",
                f"{len(prompt)} tokens, and {self.max_new_tokens} of an answer, of {limit}",
                passes=False,
                final=True,
            )
            for prompt in prompts
        ]
        fits = [i for i, one in enumerate(prompts) if limit is None or len(one) + self.max_new_tokens <= limit]
        if fits:
            written = self._generate([prompts[i] for i in fits], self._seed(conversations))
            for i, answer in zip(fits, written, strict=True):
                found[i] = answer
        return found

    def _encode(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        templated = bool(self.tokenizer.chat_template)
        texts = [
            self.tokenizer.apply_chat_template(list(each), tokenize=False, add_generation_prompt=True)
            if templated
            else "\n".join(message["content"] for message in each)
            for each in conversations
        ]
        return [one.prompt for one in Encoder(self.tokenizer, bare=templated).encode(texts, [""] * len(texts))]

    def _seed(self, conversations: Sequence[Conversation]) -> int:
        said = json.dumps([self.seed, [list(map(dict, each)) for each in conversations]], sort_keys=True)
        return int.from_bytes(hashlib.sha256(said.encode()).digest()[:7], "big")

    def _generate(self, prompts: Sequence[list[int]], seed: int) -> list[Answer]:
        """One answer to each prompt, padded on the left to the longest."""
        ends, device = end_ids(self.model, self.tokenizer), self.model.device
        length = max(map(len, prompts))
        input_ids = torch.tensor([[ends[0]] * (length - len(one)) + one for one in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in prompts], device=device)
        drawn = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p}
        settings = GenerationConfig(
            **(drawn if self.temperature else {"do_sample": False}),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        )
        heard = _Heard()
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), evaluating(self.model), _own_settings(self.model), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([TokenDistribution(vocabulary_size(self.tokenizer)), heard]),
            )
        logprobs = heard.of(output)
        rows = zip(prompts, output[:, length:].tolist(), logprobs.tolist(), strict=True)
        return [self._answer(len(prompt), ids, values, ends) for prompt, ids, values in rows]

    def _answer(self, tokens_in: int, ids: list[int], logprobs: list[float], ends: Sequence[int]) -> Answer:
        ended = next((i for i, token in enumerate(ids) if token in ends), None)
        count = len(ids) if ended is None else ended + 1
        text = self.tokenizer.decode(ids[:ended], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, tokens_in, count, sum(logprobs[:count]) / count, truncated=ended is None)


class _Heard(LogitsProcessor):
    """Notes the log-probability of every token that is taken, at temperature 1, holding one step's logits at a time."""

    def __init__(self):
        self.columns: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._note(input_ids)
        self.last = scores.float().log_softmax(-1)
        return scores

    def _note(self, ids: torch.Tensor) -> None:
        if self.last is not None:
            self.columns.append(self.last.gather(1, ids[:, -1:]))

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """[B, L]: of the tokens of `output`, prompts left out."""
        self._note(output)
        return torch.cat(self.columns, 1).double()


@contextmanager
def _own_settings(model: PreTrainedModel):
    """Hides the checkpoint's generation_config, from which `generate` takes what the given settings leave unset."""
    hidden, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = hidden


def identity_of(path: str | Path, dtype: str, **settings: Any) -> dict[str, Any]:
    """The identity that a `LocalChat` of the model in the directory `path` has, without loading it."""
    return _identity(_files(Path(path)), dtype, **settings)


def _identity(
    model: Mapping[str, Any], dtype: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> dict[str, Any]:
    drawn = {"top_p": top_p, "seed": seed} if temperature else {}
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "dtype": dtype}
    return {"model": dict(model), **settings, **drawn}


def _files(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES and file.is_file())
    return dict(zip((file.name for file in files), sha256_of_all(files), strict=True))

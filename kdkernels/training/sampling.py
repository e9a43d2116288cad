"""The sampler of a run: the student itself, or an engine that gets its weights."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.errors import ServerError
from kdkernels.http import Server
from kdkernels.rollouts import LocalSampler, Sampler
from kdkernels.rollouts.colocated import VllmEngine
from kdkernels.rollouts.drift import Drift, measure
from kdkernels.rollouts.engine import Asked, Drawn, Engine
from kdkernels.rollouts.local import end_ids
from kdkernels.rollouts.server import ServerEngine
from kdkernels.training.models.saving import save_model
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.run.atomic import UNFINISHED, remove, write_directory, writing
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.strategy import Strategy

COMPARED = 4  # responses of each process, at most, whose tokens are compared after every sync
DRIFT = "rollout_drift"


def make_sampler(
    config: Config, run: RunDirectory, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, strategy: Strategy
) -> Sampler:
    """What writes the recipe's responses ([rollout] engine) with the weights of `student`, which `strategy` updates.

    Raises InputError or MissingPackage for an engine that cannot be had.
    """
    rollout = config.rollout
    if rollout.engine == "transformers":
        return LocalSampler(student, tokenizer)
    directory = Path(rollout.weights) if rollout.weights else run.rollout_weights
    return EngineSampler(_engine(config), config, student, tokenizer, strategy, directory.absolute())


def _engine(config: Config) -> Engine:
    rollout = config.rollout
    if rollout.engine == "server":
        server = Server(rollout.url, timeout=rollout.timeout_seconds, key_variable=rollout.key_variable)
        return ServerEngine(server, rollout.at_once)
    lengths = [rollout.max_new_tokens] + ([config.evaluation.max_new_tokens] if config.evaluation else [])
    device = distributed.device().index or 0
    return VllmEngine(config.data.max_prompt_tokens + max(lengths), rollout.gpu_memory, config.run.dtype, device)


class EngineSampler:
    """A `Sampler` whose responses an engine writes. The student's weights reach it as a model's directory, each version
    under a name of its own, and the first responses after that show whether it has them.

    Args:
        engine: what writes.
        config: the recipe.
        student, tokenizer, strategy: of the run.
        directory: where the versions are written.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        strategy: Strategy,
        directory: Path,
    ):
        self.writer, self.student, self.strategy, self.directory = engine, student, strategy, directory
        self.ends, self.max_drift = end_ids(student, tokenizer), config.rollout.max_drift
        self.entries = student.config.get_text_config(decoder=True).vocab_size
        self.frozen, served = config.student.adapter is None, config
        if config.student.adapter is not None:  # an engine gets whole models
            adapter = replace(config.student.adapter, merge=True)
            served = replace(config, student=replace(config.student, adapter=adapter))
        self.save = partial(save_model, served, student, tokenizer=tokenizer)
        self.version, self.drift = 0, None

    def sync(self) -> None:
        """Writes the student's weights and has the engine load them. Raises ServerError, DiskError or InputError."""
        self.version += 1
        path, weights = self.directory / f"version-{self.version:06d}", self.strategy.weights(frozen=self.frozen)
        write_directory(path, lambda place: self.save(weights=weights, directory=place))
        if self.writer.shared:
            distributed.by_first(lambda: self.writer.load(path))
        else:
            with distributed.together():
                self.writer.load(path)
        distributed.by_first(lambda: self._remove_versions(path))
        self.drift = None

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, greedy: bool = False
    ) -> list[list[int]]:
        """What the engine writes, as in `Sampler.generate`. Every response has a seed of its own, drawn from this
        process's random state, which a checkpoint has.

        Raises ServerError, also where the engine does not draw from the student's distribution.
        """
        tokens = self.strategy.module.vocab_size
        asked = Asked(max_new_tokens, greedy, self.ends, tokens, self.entries)
        seeds = [0] * len(prompts) if greedy else torch.randint(2**63 - 1, (len(prompts),)).tolist()
        drawn = self.writer.draw(prompts, asked, seeds)
        if self.drift is None:
            places = range(0, len(prompts), -(-len(prompts) // COMPARED))  # from the first to near the last
            self.drift = self._compare([prompts[i] for i in places], [drawn[i] for i in places])
        return [one.ids for one in drawn]

    def metrics(self) -> dict[str, float]:
        """The drift since the last sync, over all processes: its mean and its largest, in nats."""
        told = [drift for drift in distributed.gathered(self.drift) if drift is not None]
        if not told:
            return {}
        mean = sum(drift.total for drift in told) / sum(drift.tokens for drift in told)
        return {DRIFT: mean, f"{DRIFT}_largest": max(drift.largest for drift in told)}

    def close(self) -> None:
        self.writer.close()
        if distributed.rank() == 0:
            with suppress(OSError):
                self._remove_versions(None)

    def _compare(self, prompts: Sequence[Sequence[int]], drawn: Sequence[Drawn]) -> Drift:
        drift = measure(self.student, prompts, drawn, self.strategy.module.vocab_size, self.ends[0])
        if not math.isfinite(drift.total):
            raise FloatingPointError("the student's logits of a response are not finite")
        if drift.mean > self.max_drift:
            raise ServerError(
                f"the engine does not draw from the student's distribution: its log-probabilities of {drift.tokens} "
                f"tokens are {drift.mean:.4g} nats a token away from the student's, the largest {drift.largest:.4g}; "
                f"expected at most {self.max_drift:g} in the mean ([rollout] max_drift). It has other weights (did "
                "loading version "
                f"{self.version} do nothing?), computes with less precision, or cuts or changes the distribution; see "
                "docs/ROLLOUTS.md"
            )
        return drift

    def _remove_versions(self, but: Path | None) -> None:
        """Of this run, and what a run that was killed has left."""
        for path in [*self.directory.glob("version-*"), *self.directory.glob(f"{UNFINISHED}version-*")]:
            if path != but:
                with writing(path):
                    remove(path)

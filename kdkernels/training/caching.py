"""`kdkernels teacher-cache`: what the teacher of a recipe says about the data's responses, written to disk once.

The teacher scores the very micro-batches of the first epoch of a run with as many processes, and the batches of
[evaluation] kl after them: in these the local teacher's hidden states are the stored ones to the bit.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import kdkernels as kd
from kdkernels.data import Batch, ExampleStream
from kdkernels.data.tokenizers import vocabulary_hash, vocabulary_size
from kdkernels.errors import InputError
from kdkernels.sources import Source
from kdkernels.sources.sampled import draw
from kdkernels.teachers import Teacher, stored
from kdkernels.teachers.hidden import Output, scored
from kdkernels.training.evaluation import as_batch
from kdkernels.training.inputs import Inputs, build_objective, read_inputs
from kdkernels.training.models.placement import checked_teacher, placed
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.run import lock
from kdkernels.training.run.atomic import remove_unfinished, write_bytes, write_text
from kdkernels.training.run.identity import differences, identify, sources
from kdkernels.training.step import micro_batches

KEY = "[teacher] cache"
PART_BYTES = 1 << 26  # of a part: what a process that is killed loses at most


def cache(config: Config, top_k: int | None = None, sampled: bool = False) -> str:
    """Writes the cache at [teacher] cache, as many processes as a launcher started each a share; what is there of it
    stays.

    Args:
        config: a recipe whose teacher has a path or a url.
        top_k: how many of the most probable entries of each token to store; None: hidden states.
        sampled: entries that the teacher draws (kd.TopK.sample), in place of the most probable ones.

    Returns:
        What is there now, in words.

    Raises:
        InputError: data or models that cannot be used, or a cache that is there was made from something else.
        DiskError, ServerError.
    """
    if sampled and top_k is None:
        raise InputError("--sampled: expected --top-k K too, how many words to draw of each token")
    distributed.start(config.run.timeout_seconds)
    root = Path(config.teacher.cache)
    with ExitStack() as held:
        distributed.by_first(lambda: held.enter_context(lock.locked(root, KEY)))
        alone = replace(config, teacher=replace(config.teacher, cache=None))
        with distributed.together():
            inputs = read_inputs(alone, build_objective(alone))
            entries = vocabulary_size(inputs.tokenizer)
            if top_k is not None and top_k > entries:
                raise InputError(f"--top-k: expected at most {entries}, the tokenizer's vocabulary, got {top_k}")
        manifest = distributed.by_first(lambda: _manifest(alone, inputs, top_k, sampled))
        done = distributed.by_first(lambda: _begin(root, manifest))
        with distributed.together():
            model = _model(alone, inputs)
        teacher = placed(alone, model, entries, inputs.tokenizer)
        with distributed.together():
            writer = _Writer(root, manifest, done)
            writer.write(teacher, _batches(config, inputs))
        return distributed.by_first(lambda: _conclude(root, manifest))


def _model(config: Config, inputs: Inputs):
    if config.teacher.path is None:
        return None
    if config.teacher.placement == "zero3":
        raise InputError('[teacher] placement: expected "replicated" or "cpu" to write a cache, got "zero3"')
    return checked_teacher(config, inputs.tokenizer)


def _manifest(config: Config, inputs: Inputs, top_k: int | None, sampled: bool) -> dict[str, Any]:
    """What the cache is made from."""
    places = sources(config, None)
    made_from = identify({key: place for key, place in places.items() if key.startswith(("[teacher]", "[data]"))})
    batches = {"batch_size": config.train.batch_size, "micro_batch_size": config.train.micro_batch_size}
    batches |= {"seed": config.run.seed, "by_length": config.data.by_length}
    return {
        "format": stored.FORMAT,
        "kind": stored.HIDDEN if top_k is None else stored.SAMPLED if sampled else stored.TOP_K,
        "k": top_k,
        "vocabulary": vocabulary_size(inputs.tokenizer),
        "tokenizer": vocabulary_hash(inputs.tokenizer),
        "dtype": config.teacher.dtype,
        **made_from,
        "batches": batches | {"processes": distributed.world_size()},
    }


def _begin(root: Path, manifest: dict[str, Any]) -> set[str]:
    """The ids of the samples that the cache has already. Raises InputError where it is another one."""
    remove_unfinished(root)
    if not (root / stored.MANIFEST).exists():
        others = [path.name for path in root.iterdir() if path.name != lock.NAME]
        if others:
            raise InputError(f"{KEY}: {root} is not empty, and what it holds is no cache: {others[0]}")
        write_text(root / stored.MANIFEST, json.dumps(manifest, indent=1))
    there = stored.read_manifest(root, KEY)
    differing = _differing(there, manifest)
    if differing:
        raise InputError(
            f"{KEY}: {root} was made from something else: {'; '.join(differing)}. Put back what it was made "
            "from, or give another directory"
        )
    return {one for _, samples in stored.parts(root, KEY) for one, *_ in samples}


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The items of two manifests that differ, in words."""
    found = []
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            known = key.startswith("[") and key in old and key in new
            told = differences({key: old[key]}, {key: new[key]}, {}) if known else []
            found += told or [f"{key}: {old.get(key)} -> {new.get(key)}"]
    return found


def _batches(config: Config, inputs: Inputs) -> Iterator[Batch]:
    """This process's share of the run's first epoch, and of what is evaluated, in the run's own batches."""
    examples, size = inputs.examples.usable, config.train.batch_size
    rank, world, pad = distributed.rank(), distributed.world_size(), inputs.tokenizer.eos_token_id
    lengths = [one.tokens for one in examples] if config.data.by_length else None
    stream = ExampleStream(len(examples), config.run.seed, 0, lengths, size)
    for _ in range(-(-len(examples) // size)):
        share = [examples[i] for i in stream.next(size)][rank::world]
        responses = [one.response_ids for one in share]
        yield from micro_batches(
            share, responses, [one.from_teacher for one in share], config.train.micro_batch_size, pad
        )
    if inputs.held_out is not None and config.evaluation.by_teacher:
        chosen = inputs.held_out.usable[: config.evaluation.limit][rank::world]
        for start in range(0, len(chosen), config.evaluation.batch_size):
            yield as_batch(chosen[start : start + config.evaluation.batch_size], pad)


class _Writer:
    """Writes what a teacher says about batches into parts; samples that are `done` are left out."""

    def __init__(self, root: Path, manifest: dict[str, Any], done: set[str]):
        self.root, self.manifest, self.done = root, manifest, done
        self.samples: list[tuple[str, stored.Rows]] = []
        self.size = 0

    def write(self, teacher: Teacher, batches: Iterator[Batch]) -> None:
        """Scores what is new in the batches, each of them as a whole."""
        shown = distributed.rank() == 0 and sys.stderr.isatty()
        with tqdm(unit="token", unit_scale=True, desc=str(self.root), disable=not shown, dynamic_ncols=True) as bar:
            for batch in batches:
                if set(batch.ids) - self.done:
                    self._add(batch, self._rows(teacher.score(batch.to(distributed.device())), batch))
                    bar.update(len(batch.layout))
        self._flush()

    def _rows(self, source: Source, batch: Batch) -> stored.Rows:
        if self.manifest["kind"] == stored.HIDDEN:
            head = self.root / stored.HEAD
            if not head.exists() and distributed.rank() == 0:
                write_bytes(head, Output.of(source).to_bytes())
            rows = {"hidden": scored(source, batch)}
        else:
            layout, sampled = batch.layout.to(source.device), self.manifest["kind"] == stored.SAMPLED
            ids, log_probs = self._drawn(source, batch) if sampled else self._likeliest(source, layout)
            rows = stored.packed_top_k(ids, log_probs, self.manifest["vocabulary"], sampled)
        rows = {name: one.cpu() for name, one in rows.items()}
        wrong = [name for name in ("hidden", "log_probs") if name in rows and not bool(rows[name].isfinite().all())]
        if wrong:
            raise InputError(f"[teacher]: its {wrong[0]} of sample {batch.ids[0]} and those beside it are not finite")
        return rows

    def _likeliest(self, source: Source, layout: kd.Layout) -> list[Tensor]:
        found = kd.statistics(source, topk=self.manifest["k"], rows=layout, logits_dtype=wide(source))
        return [one.flatten(0, -2)[layout.index] for one in (found.topk_indices, found.topk_log_probs)]

    def _drawn(self, source: Source, batch: Batch) -> tuple[Tensor, Tensor]:
        lengths = zip(batch.ids, batch.layout.lengths, strict=True)
        offsets = torch.cat([stored.offsets(one, tokens) for one, tokens in lengths])
        index = batch.layout.index
        return draw(source, index.to(source.device), self.manifest["k"], offsets.to(source.device))

    def _add(self, batch: Batch, rows: stored.Rows) -> None:
        lengths = torch.tensor(batch.layout.lengths)
        for one, start, tokens in zip(batch.ids, (lengths.cumsum(0) - lengths).tolist(), lengths.tolist(), strict=True):
            if one not in self.done:
                own = {name: values[start : start + tokens].clone() for name, values in rows.items()}
                self.done.add(one)
                self.samples.append((one, own))
                self.size += tokens * stored.bytes_per_token(own)
        if self.size >= PART_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.samples:
            rank = distributed.rank()
            there = [int(path.stem.rpartition("-")[2]) for path in self.root.glob(f"part-{rank:04d}-*")]
            number = max(there, default=-1) + 1
            write_bytes(self.root / f"part-{rank:04d}-{number:06d}.safetensors", stored.part(self.samples))
        self.samples, self.size = [], 0


def wide(source: Source) -> torch.dtype:
    """At least fp32, for logits whose rounding would show in stored log-probabilities."""
    return torch.promote_types(source.dtype, torch.float32)


def _conclude(root: Path, manifest: dict[str, Any]) -> str:
    """Writes the index of all parts; what is there, in words."""
    found = {}
    for path, samples in stored.parts(root, KEY):
        tokens = sum(one[1] for one in samples)
        found[path.name] = {"bytes": path.stat().st_size, "samples": len(samples), "tokens": tokens}
    head = {}
    if manifest["kind"] == stored.HIDDEN:
        if not (root / stored.HEAD).is_file():  # written before the first part
            raise InputError(f"{KEY}: {root / stored.HEAD} is missing: put it back, or write another cache")
        head = {"head": stored.digest((root / stored.HEAD).read_bytes())}
    write_text(root / stored.INDEX, json.dumps({"parts": found, **head}, indent=1))
    samples, tokens, size = (sum(said[name] for said in found.values()) for name in ("samples", "tokens", "bytes"))
    kind = stored.described(manifest)
    return f"{root}: {kind} of {samples} samples, {tokens} tokens, {size / tokens:.1f} bytes a token, {size} bytes"

"""What a teacher says about stored responses, on disk: its hidden states, its K most probable words, or K that it drew.

manifest.json                   format, kind ("hidden", "top-k" or "sampled"), and what it was made from: tokenizer,
                                teacher, data
head.safetensors                of hidden states: the lm_head (`hidden.Output`)
part-0000-000000.safetensors    of process 0, its first: tensors of one row a token, sample after sample, and in the
                                metadata under "samples" the index: [[id, tokens, CRC-32], ...]
index.json                      written last: of each part its bytes and its samples, of the lm_head its SHA-256

hidden  "hidden" [T, H] in the model's own dtype: 2 H bytes a token in bf16
top-k   "ids" [T, K] uint16, or [T, K, 3] uint8 (the lowest byte first) where the vocabulary has more than 65536
        entries; "log_probs" [T, K] fp16; "tail" [T] fp16, the log of what all other entries have: 4 K + 2 or 5 K + 2
        bytes a token. The words are scaled to
        1 - exp(tail) when they are read, so that rounding makes no mass of its own
sampled the same of words that were drawn (`kd.TopK.sample`), the certain ones first; "tail" is what all but these
        have, and these alone are scaled

A sample is known by its `kdkernels.data.sample_id`; its tokens are those that its response has, in their order.

Axes: T tokens of a part, N scored positions of a batch, n tokens of a sample, K entries, H hidden.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdkernels.data.batch import Batch
from kdkernels.errors import InputError
from kdkernels.reference import sampled_masses
from kdkernels.sources import TopK
from kdkernels.teachers.hidden import HiddenStatesTeacher, Output, of_samples, to_bytes

FORMAT = "kdkernels teacher cache 1"
MANIFEST, INDEX, HEAD, PARTS = "manifest.json", "index.json", "head.safetensors", "part-*.safetensors"
KINDS = HIDDEN, TOP_K, SAMPLED = "hidden", "top-k", "sampled"
SMALL = 1 << 16  # ids below it take two bytes
ID_BYTES = 3  # of larger vocabularies

Rows = dict[str, Tensor]  # each with a row a token
Entry = tuple[str, int, int]  # of a sample: id, tokens, CRC-32


# ---- what is stored ----


def packed_top_k(ids: Tensor, log_probs: Tensor, vocabulary: int, sampled: bool = False) -> Rows:
    """The stored form of ids [T, K] and their log-probabilities [T, K]. The tail is what all but these have; of
    ``sampled`` ones, which stand for other entries too, what all but the certain ones have.

    Raises:
        ValueError: the vocabulary has more entries than three bytes can number.
    """
    p = log_probs.double().exp()
    if sampled:
        p = torch.where(sampled_masses(log_probs.double()) > p, 0, p)
    rest = 1 - p.sum(-1)
    tail = rest.clamp_min(0).log() if ids.shape[-1] < vocabulary else torch.full_like(rest, -math.inf)
    if vocabulary > 1 << 8 * ID_BYTES:
        raise ValueError(f"vocabulary: expected at most {1 << 8 * ID_BYTES} entries, got {vocabulary}")
    narrow = ids.to(torch.uint16) if vocabulary <= SMALL else _bytes(ids)[..., :ID_BYTES].contiguous()
    return {"ids": narrow, "log_probs": log_probs.half(), "tail": tail.half()}


def _bytes(ids: Tensor) -> Tensor:
    return ids.to(torch.int32)[..., None].view(torch.uint8)


def _wide(ids: Tensor) -> Tensor:
    """Stored ids [T, K] or, in bytes, [T, K, 3] as int32 [T, K]."""
    if ids.dtype != torch.uint8:
        return ids.to(torch.int32)
    return torch.nn.functional.pad(ids, (0, 4 - ID_BYTES)).view(torch.int32)[..., 0]


def unpacked_top_k(rows: Rows, sampled: bool = False) -> tuple[Tensor, Tensor]:
    """ids [T, K] int32 and log-probabilities [T, K] fp32; the sum of those that are not drawn leaves exp(tail)."""
    log_probs, tail = rows["log_probs"].double(), rows["tail"].double()
    known = torch.ones_like(log_probs, dtype=torch.bool)
    if sampled:
        k = log_probs.shape[1]
        above = log_probs > tail[:, None] - torch.arange(k, 0, -1).log()  # p > tail / (K - c): the c-th is certain
        known = above.to(torch.uint8).cumprod(1).bool()
    mass = torch.log(-torch.expm1(tail.clamp_max(-1e-9)))
    missing = mass - log_probs.masked_fill(~known, -math.inf).logsumexp(-1)
    if sampled:  # rounding takes less than 1 %; else it also made a drawn one certain, which nothing needs to scale
        missing = torch.where(missing.abs() < 0.01, missing, 0)
    return _wide(rows["ids"]), torch.where(known, log_probs + missing[:, None], log_probs).float()


def offsets(sample: str, tokens: int) -> Tensor:
    """[n] where the draws of a sample's tokens begin: the same whenever it is scored."""
    return torch.rand(tokens, generator=torch.Generator().manual_seed(int(sample[:15], 16)), dtype=torch.float64)


def bytes_per_token(rows: Rows) -> int:
    """Of one row of all tensors."""
    return sum(one[0].numel() * one.dtype.itemsize for one in rows.values())


def described(manifest: dict[str, Any]) -> str:
    """What there is of each token, in words."""
    if manifest["kind"] == HIDDEN:
        return "hidden states"
    return f"{manifest['k']} {'sampled ' if manifest['kind'] == SAMPLED else ''}of {manifest['vocabulary']} entries"


def part(samples: Sequence[tuple[str, Rows]]) -> bytes:
    """The contents of a part."""
    names = samples[0][1]
    tensors = {name: torch.cat([rows[name] for _, rows in samples]) for name in names}
    index = [(one, len(next(iter(rows.values()))), checksum(rows)) for one, rows in samples]
    return to_bytes(tensors, {"samples": json.dumps(index)})


def checksum(rows: Rows) -> int:
    """CRC-32 of the bytes of all tensors, by their names."""
    crc = 0
    for name in sorted(rows):
        crc = zlib.crc32(rows[name].contiguous().view(torch.uint8).numpy(), crc)
    return crc


def digest(contents: bytes) -> str:
    """What the index knows an lm_head by."""
    return hashlib.sha256(contents).hexdigest()


def entries(path: Path, key: str) -> list[Entry]:
    """The index of a part. Raises InputError where it is cut, or none."""
    try:
        with safe_open(path, framework="pt") as file:
            samples = json.loads(file.metadata()["samples"])
            names = list(file.keys())
            rows = {file.get_slice(name).get_shape()[0] for name in names}
        if rows != {sum(tokens for _, tokens, _ in samples)}:
            raise ValueError(f"its tensors have {rows} rows")
        return [(str(one), int(tokens), int(crc)) for one, tokens, crc in samples]
    except (OSError, SafetensorError, ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"{key}: {path} is damaged or cut ({error}): delete it, and kdkernels teacher-cache makes it again"
        ) from error


def parts(root: Path, key: str) -> Iterator[tuple[Path, list[Entry]]]:
    """The parts in a directory with their indexes. Raises InputError."""
    for path in sorted(root.glob(PARTS)):
        yield path, entries(path, key)


def finished(root: Path, key: str) -> dict[str, Any]:
    """As `read_manifest`, of a cache that is complete. Raises InputError."""
    manifest = read_manifest(root, key)
    if not (root / INDEX).is_file():
        raise InputError(f"{key}: {root} is not finished: kdkernels teacher-cache goes on with it")
    return manifest


def read_manifest(root: Path, key: str) -> dict[str, Any]:
    """What the cache at `root` was made from. Raises InputError where there is none of this format."""
    manifest = _read_json(root / MANIFEST, key)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{key}: {root}: expected a cache of the format {FORMAT!r}, got {manifest.get('format')!r}: write it again "
            "with kdkernels teacher-cache of this version"
        )
    if manifest.get("kind") not in KINDS:
        raise InputError(
            f"{key}: {root}: expected a cache of the kind {', '.join(KINDS)}, got {manifest.get('kind')!r}: read it "
            "with the version that wrote it, or write it again"
        )
    return manifest


# ---- reading ----


@dataclass(frozen=True)
class _Place:
    part: Path
    start: int
    tokens: int
    crc: int


class Cache:
    """The cache in the directory `root`; `key` of the recipe names it in error messages.

    Raises:
        InputError: there is none, it is not finished or of another format, or parts are missing or cut.
    """

    def __init__(self, root: Path, key: str):
        self.root, self.key, self.manifest = root, key, finished(root, key)
        self.places: dict[str, _Place] = {}
        self._open: dict[Path, Any] = {}
        index = _read_json(root / INDEX, key)
        self.head = index.get("head")
        for name, said in index["parts"].items():
            path = root / name
            size = path.stat().st_size if path.is_file() else None
            if size != said["bytes"]:
                got = "none" if size is None else f"{size} bytes"
                raise InputError(
                    f"{key}: {path}: expected {said['bytes']} bytes, got {got}: delete what is left of it and "
                    f"{INDEX}, and kdkernels teacher-cache makes it again"
                )
            self._add(path, entries(path, key))

    def _add(self, path: Path, samples: list[Entry]) -> None:
        start = 0
        for one, tokens, crc in samples:
            self.places.setdefault(one, _Place(path, start, tokens, crc))
            start += tokens

    def rows(self, sample: str) -> Rows:
        """What is stored of a sample. Raises InputError for one that is not there, or has changed."""
        place = self.places.get(sample)
        if place is None:
            raise InputError(f"{self.key}: {self.root} has no sample {sample}")
        if place.part not in self._open:
            self._open[place.part] = safe_open(place.part, framework="pt").__enter__()
        file = self._open[place.part]
        found = {name: file.get_slice(name)[place.start : place.start + place.tokens] for name in file.keys()}  # noqa: SIM118
        if checksum(found) != place.crc:
            raise InputError(
                f"{self.key}: {place.part}: the bytes of sample {sample} are not those that were written: delete the "
                f"file and {INDEX}, and kdkernels teacher-cache makes it again"
            )
        return found

    def teacher(self, vocab_size: int, device: torch.device) -> "HiddenStatesTeacher | TopKTeacher":
        """The teacher whose scores are stored. Raises InputError."""
        if self.manifest["kind"] in (TOP_K, SAMPLED):
            return TopKTeacher(self)
        try:
            contents = (self.root / HEAD).read_bytes()
            if digest(contents) != self.head:
                raise ValueError("it is cut, changed or another cache's")
            output = Output.from_bytes(contents)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.key}: {self.root / HEAD} cannot be used: {error}: put back what it was, or write another cache"
            ) from error
        return HiddenStatesTeacher(output.to(device), of_samples(lambda one: self.rows(one)["hidden"]), vocab_size)


class TopKTeacher:
    """A teacher of which K entries of each token are stored, with the mass of all others."""

    alone = True

    def __init__(self, cache: Cache):
        self.cache, self.sampled = cache, cache.manifest["kind"] == SAMPLED

    def __str__(self) -> str:
        size = self.cache.manifest["k"] * (4 if self.cache.manifest["vocabulary"] <= SMALL else 2 + ID_BYTES) + 2
        return f"{described(self.cache.manifest)}, {size} bytes a token"

    def score(self, batch: Batch) -> TopK:
        """The entries [B, L, K] of `batch`; NaN where its layout scores nothing."""
        stored = [self.cache.rows(one) for one in batch.ids]
        rows = {name: torch.cat([rows[name] for rows in stored]) for name in stored[0]}
        ids, log_probs = unpacked_top_k(rows, self.sampled)
        count, k, device = math.prod(batch.layout.shape), ids.shape[1], batch.input_ids.device
        index = batch.layout.index.cpu()
        whole_ids = torch.arange(k, dtype=torch.int32).repeat(count, 1).index_copy_(0, index, ids)
        whole = torch.full((count, k), math.nan).index_copy_(0, index, log_probs)
        return TopK(*(one.view(*batch.layout.shape, k).to(device) for one in (whole_ids, whole)), sampled=self.sampled)


def _read_json(path: Path, key: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problem = "expected an object"
    except (OSError, ValueError, RecursionError) as error:
        problem = error
    raise InputError(
        f"{key}: {path.parent} is no cache of a teacher: {path.name}: {problem}; kdkernels teacher-cache writes one"
    )

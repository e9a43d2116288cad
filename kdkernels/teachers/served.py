"""Hidden states over HTTP: what `kdkernels teacher-serve` answers, and the client in a run.

GET  /about    JSON: format, model and tokenizer (hashes), vocabulary (entries of the lm_head), hidden (H), dtype,
               positions (the longest sequence, or null)
GET  /head     the lm_head once, as a safetensors file (`hidden.Output`)
POST /states   {"input_ids": [[...]], "lengths": [...], "positions": [...]}: a batch as it is padded, the tokens of each
               sequence without padding, and the flat positions b L + t that are asked for. The answer is a safetensors
               file: "hidden" [N, H] in the model's own dtype, and the hash of the model in its metadata.

The server runs the batch as the client would: the same shapes give the same bits on the same kind of machine.

Axes: B sequences, L positions, N positions that are asked for, H hidden.
"""

import json
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdkernels.data.batch import Batch
from kdkernels.errors import InputError, ServerError
from kdkernels.http import Server
from kdkernels.sources import Head
from kdkernels.sources.from_model import tail
from kdkernels.teachers.hidden import HiddenStatesTeacher, Output, check_finite, from_bytes, to_bytes

FORMAT = "kdkernels hidden states 1"
SAID = {"model": str, "tokenizer": str, "vocabulary": int, "hidden": int, "dtype": str}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Service:
    """Answers what clients ask of a model.

    Args:
        model: frozen, in evaluation mode.
        identity: the hash of its files.
        tokenizer: the hash of its tokenizer's entries.
    """

    def __init__(self, model: PreTrainedModel, identity: str, tokenizer: str):
        layer, self.model, self.lock = tail(model).layer, model, Lock()
        self.about = {
            "format": FORMAT,
            "model": identity,
            "tokenizer": tokenizer,
            "vocabulary": layer.weight.shape[0],
            "hidden": layer.weight.shape[1],
            "dtype": str(layer.weight.dtype).removeprefix("torch."),
            "positions": getattr(model.config.get_text_config(), "max_position_embeddings", None),
        }

    def answer(self, path: str, body: bytes) -> bytes:
        """The content for what is asked at `path`. Raises LookupError for a path that is none, ValueError for what is
        asked wrongly.
        """
        if path == "/about":
            return json.dumps(self.about).encode()
        with self.lock, torch.inference_mode():
            if path == "/head":
                return Output.of(self._head([[0]], [1])).to_bytes()
            if path == "/states":
                return self._states(body)
        raise LookupError(f"expected /about, /head or /states, got {path}")

    def _states(self, body: bytes) -> bytes:
        asked = json.loads(body)
        rows, lengths, positions = (_numbers(asked, name) for name in ("input_ids", "lengths", "positions"))
        count = len(rows) * len(rows[0])
        if any(len(row) != len(rows[0]) for row in rows) or len(lengths) != len(rows):
            raise ValueError("input_ids: expected sequences of one length, and a length for each")
        if not all(0 <= one < self.model.config.get_text_config().vocab_size for row in rows for one in row):
            raise ValueError("input_ids: expected ids of the model's vocabulary")
        if not all(0 < one <= len(rows[0]) for one in lengths) or not all(0 <= one < count for one in positions):
            raise ValueError("lengths, positions: expected those of the batch")
        hidden = self._head(rows, lengths).hidden.flatten(0, -2)
        at = torch.tensor(positions, dtype=torch.long, device=hidden.device)
        return to_bytes({"hidden": hidden[at]}, {"model": self.about["model"]})

    def _head(self, rows: list[list[int]], lengths: list[int]) -> Head:
        ids = torch.tensor(rows)
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        device = self.model.device
        return Head.of(self.model, input_ids=ids.to(device), attention_mask=mask.to(device))


class Client:
    """A server's hidden states of batches, checked.

    Args:
        server: where `kdkernels teacher-serve` runs.
        tokenizer: the hash of the run's tokenizer.
        key: of the recipe, for error messages.

    Raises:
        ServerError: there is no answer, or none of such a server.
        InputError: it serves a model with another tokenizer.
    """

    def __init__(self, server: Server, tokenizer: str, key: str):
        self.server = server
        self.about = about(server)
        if self.about["tokenizer"] != tokenizer:
            raise InputError(
                f"{key}: expected the recipe's tokenizer ({tokenizer[:12]}), got a teacher at {server.url} with "
                f"another one ({self.about['tokenizer'][:12]}), whose lm_head has {self.about['vocabulary']} "
                "entries: an id of one is another word in the other"
            )

    def teacher(self, vocab_size: int, device: torch.device) -> HiddenStatesTeacher:
        """The teacher, whose lm_head is fetched. Raises ServerError."""
        output = self.server.get("/head", self._read_head)
        if output.weight.shape[0] < vocab_size:
            raise InputError(
                f"{self.server.url}: expected a vocabulary of at least {vocab_size}, that of the tokenizer, got "
                f"{output.weight.shape[0]}"
            )
        return HiddenStatesTeacher(output.to(device), self.states, vocab_size)

    def states(self, batch: Batch) -> Tensor:
        """The hidden states [N, H] at the positions that the batch's layout scores, on the CPU. Raises ServerError."""
        asked = {
            "input_ids": batch.input_ids.tolist(),
            "lengths": batch.attention_mask.sum(1).tolist(),
            "positions": batch.layout.index.tolist(),
        }
        return self.server.post("/states", asked, lambda content: self._read_states(content, len(batch.layout)))

    def _read_head(self, content: bytes) -> Output:
        output = Output.from_bytes(content)
        self._check("lm_head", output.weight, self.about["vocabulary"])
        return output

    def _read_states(self, content: bytes, count: int) -> Tensor:
        tensors, notes = from_bytes(content)
        if notes.get("model") != self.about["model"]:
            raise ServerError(
                f"{self.server.url}: the teacher changed while the run went on: it began with model "
                f"{self.about['model'][:12]}, and {str(notes.get('model'))[:12]} answers now; serve the first one again"
            )
        if [*tensors] != ["hidden"]:
            raise ValueError(f"expected hidden states, got {[*tensors]}")
        self._check("hidden states", tensors["hidden"], count)
        check_finite("hidden states", tensors["hidden"])
        return tensors["hidden"]

    def _check(self, what: str, values: Tensor, count: int) -> None:
        shape, dtype = [count, self.about["hidden"]], DTYPES[self.about["dtype"]]
        if list(values.shape) != shape or values.dtype != dtype:
            raise ValueError(f"{what}: expected {shape} in {dtype}, got {list(values.shape)} in {values.dtype}")


def about(server: Server) -> dict[str, Any]:
    """What a server says about its teacher. Raises ServerError."""
    return server.get_json("/about", _read_about)


def _read_about(said: Any) -> dict[str, Any]:
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise ValueError(f"expected what `kdkernels teacher-serve` of this version says about itself ({FORMAT!r})")
    wrong = [name for name, kind in SAID.items() if type(said.get(name)) is not kind]
    if wrong or said["dtype"] not in DTYPES:
        raise ValueError(f"expected {', '.join(SAID)}, and one of {', '.join(DTYPES)}; wrong: {wrong or said['dtype']}")
    return said


def _numbers(asked: Any, name: str) -> list:
    values = asked.get(name) if isinstance(asked, dict) else None
    rows = values if isinstance(values, list) else []
    flat = [one for row in rows for one in (row if isinstance(row, list) else [row])]
    if not flat or not all(type(one) is int for one in flat):
        raise ValueError(f"{name}: expected integers, at least one")
    return values

"""A process reward model with a value head: sigmoid(w . h + b) of a causal model's last hidden state h.

A directory holds one: the backbone as `save_pretrained` of transformers writes it (config.json, tokenizer, weights) and
the head, a linear layer from the hidden size to one number. The head's weight [1, H] (and its bias [1], if it has one)
is in value_head.safetensors or among the backbone's weights, under one of these names:

v_head.summary.weight, .bias    Skywork-o1-Open-PRM, TRL's AutoModelForCausalLMWithValueHead
v_head.weight, .bias
score.weight, .bias             transformers' AutoModelForTokenClassification with num_labels = 1

Axes: B responses, L length of the longest prompt + response, M tokens off the responses' path, H hidden.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel

from kdkernels.data.batch import collate
from kdkernels.errors import InputError

OWN_FILE = "value_head.safetensors"
HEADS = ("v_head.summary", "v_head", "score")
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class ValueHead:
    """Scores tokens with a value-head model; a `Scorer`.

    The responses' own tokens take one forward. A token off the path, at place t, is read behind the keys and values of
    the first t tokens, which that forward left in the cache: all of a batch's are one more forward of M tokens, each of
    which attends to its prefix and to itself alone.

    Args:
        backbone: a transformers model without a head, in evaluation mode.
        weight, bias: [H] and [] of the head, in float32.
    """

    def __init__(self, backbone: nn.Module, weight: Tensor, bias: Tensor):
        self.backbone, self.weight, self.bias = backbone, weight, bias

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype, device: torch.device) -> "ValueHead":
        """The model in the directory `path`. Raises InputError for one without a value head, or that is none at all."""
        path = Path(path)
        weight, bias = read_head(path)
        try:
            backbone, report = AutoModel.from_pretrained(
                path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"[judge] path: {path} cannot be read as a model: {error}") from error
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise InputError(f"[judge] path: {len(missing)} weights are missing in {path}, for instance {missing[0]}")
        width = backbone.config.get_text_config().hidden_size
        if weight.shape != (1, width) or bias.shape != (1,):
            raise InputError(
                f"[judge] path: expected a value head of weight [1, {width}] and bias [1] in {path}, got "
                f"{list(weight.shape)} and {list(bias.shape)}"
            )
        return cls(backbone.eval().requires_grad_(False).to(device), weight[0].to(device), bias[0].to(device))

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], proposals: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """As `Scorer.score`. Raises InputError for tokens beyond the model's positions or its attention's window."""
        batch = collate(prompts, responses, pad_id=0).to(self.weight.device)
        self._check_length(batch.input_ids.shape[1])
        out = self.backbone(**batch.inputs, use_cache=True)
        values = self._values(out.last_hidden_state)
        own = [values[b, len(p) : len(p) + len(r)] for b, (p, r) in enumerate(zip(prompts, responses, strict=True))]
        other = [one.clone() for one in own]  # of what both propose
        off = [
            [(t, token) for t, (token, mine) in enumerate(zip(new, old, strict=True)) if token != mine]
            for new, old in zip(proposals, responses, strict=True)
        ]
        if any(off):
            values = self._off_path(off, [len(prompt) for prompt in prompts], batch.input_ids.shape, out)
            for b, one in enumerate(off):
                if one:
                    other[b][torch.tensor([t for t, _ in one], device=values.device)] = values[b, : len(one)]
        return [torch.stack(pair) for pair in zip(own, other, strict=True)]

    def _off_path(
        self, off: Sequence[Sequence[tuple[int, int]]], starts: Sequence[int], shape: torch.Size, known
    ) -> Tensor:
        """The scores [B, M] of tokens at places of their responses; `known`: the forward of the responses themselves,
        with its cache. Places beyond a response's own are padding.
        """
        responses, length = shape
        most, device, dtype = max(map(len, off)), self.weight.device, self.backbone.dtype
        tokens = torch.zeros(responses, most, dtype=torch.long)
        positions = torch.zeros_like(tokens)
        for b, one in enumerate(off):
            for i, (t, token) in enumerate(one):
                tokens[b, i], positions[b, i] = token, starts[b] + t
        seen = torch.arange(length) < positions[..., None]  # the prefix
        itself = torch.eye(most, dtype=torch.bool).expand(responses, -1, -1)
        hidden = torch.cat((seen, itself), dim=2)[:, None]  # [B, 1, M, L + M]
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(~hidden, torch.finfo(dtype).min)
        out = self.backbone(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=known.past_key_values,
        )
        return self._values(out.last_hidden_state)

    def _values(self, hidden: Tensor) -> Tensor:
        """sigmoid(w . h + b) in float32, of hidden states [..., H]."""
        return torch.sigmoid(hidden.float() @ self.weight + self.bias)

    def _check_length(self, length: int) -> None:
        config = self.backbone.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - KNOWN_LAYERS
        if kinds:
            raise InputError(
                f"[judge] path: expected a model of attention layers, got one with {', '.join(sorted(kinds))}: another "
                "token cannot be read behind its prefix's keys and values"
            )
        limits = {"max_position_embeddings": "positions of the model", "sliding_window": "window that its cache keeps"}
        for name, what in limits.items():
            most = getattr(config, name, None)
            if most is not None and name == "sliding_window":
                most -= 1  # the cache leaves a place for the next token
            if most is not None and length > most:
                raise InputError(
                    f"[judge] path: expected prompts and responses of at most {most} tokens, the {what}, "
                    f"got {length}: lower [data] max_prompt_tokens or max_response_tokens"
                )


def read_head(path: Path) -> tuple[Tensor, Tensor]:
    """Weight and bias of the value head in the directory `path`, in float32. Raises InputError where there is none."""
    try:
        if (path / OWN_FILE).is_file():
            files = [path / OWN_FILE]
        elif (path / "model.safetensors.index.json").is_file():
            weights = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
            files = sorted({path / file for name, file in weights.items() if name.startswith(HEADS)})
        else:
            files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()][:1]
        for file in files:
            found = _head_in(file)
            if found is not None:
                return found
    except (OSError, ValueError, LookupError, RuntimeError, AttributeError, SafetensorError) as error:
        raise InputError(f"[judge] path: {path} cannot be read: {type(error).__name__}: {error}") from error
    names = ", ".join(f"{name}.weight" for name in HEADS)
    raise InputError(
        f"[judge] path: no value head in {path}: expected one of {names}, in {OWN_FILE} or among the model's weights: "
        "give a process reward model of a linear value head, or [judge] function"
    )


def _head_in(file: Path) -> tuple[Tensor, Tensor] | None:
    if file.suffix == ".bin":
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return _chosen(tensors.keys(), tensors.__getitem__)
    with safe_open(file, framework="pt") as tensors:
        return _chosen(set(tensors.keys()), tensors.get_tensor)


def _chosen(names, read) -> tuple[Tensor, Tensor] | None:
    head = next((head for head in HEADS if f"{head}.weight" in names), None)
    if head is None:
        return None
    weight = read(f"{head}.weight").float()
    bias = read(f"{head}.bias").float() if f"{head}.bias" in names else torch.zeros(len(weight))
    return weight, bias

"""``head.verify``: the model's own logits at a few tokens, or where the head's part from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny
from torch import nn

import kdkernels as kd

IDS = torch.arange(24).reshape(2, 12) * 7 % 90 + 3
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def made(model, **inputs) -> kd.Head:
    return kd.Head.of(model, **inputs)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)]
)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "phi"])
def test_the_models_own_head(kind, dtype, most):
    model = tiny(kind).to(dtype)
    difference = made(model, **INPUTS).verify(model, **INPUTS)
    assert isinstance(difference, float) and 0 <= difference < most
    if dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made(model, **INPUTS).verify(model, **INPUTS) < 0.03


@pytest.mark.parametrize(
    "change",
    [
        lambda head: replace(head, scale=1.02),
        lambda head: replace(head, softcap=20.0),
        lambda head: replace(head, hidden=head.hidden.roll(1, 1)),
        lambda head: replace(head, bias=torch.zeros(97).index_fill(0, torch.tensor(5), 0.1)),
        lambda head: replace(head, weight=head.weight.flip(0)),
        lambda head: replace(head, hidden=head.hidden * torch.nan),
    ],
    ids=["scale", "softcap", "positions", "one entry", "entries", "nan"],
)
def test_another_head_is_told(change):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"at position \[\d, \d+\] for entry \d+, got .* more than 0.0001"):
        change(made(model, **INPUTS)).verify(model, **INPUTS)


def test_which_tokens_are_compared():
    """Those that the mask counts: the hidden states of others may be anything."""
    model, inputs = tiny("llama"), INPUTS | {"attention_mask": (torch.arange(12) < 5).long().expand(2, -1)}
    head = made(model, **inputs)
    wrong = head.hidden.clone()
    wrong[:, 5:] = 0
    assert replace(head, hidden=wrong).verify(model, **inputs) < 1e-5
    for position in (0, 4):
        wrong = head.hidden.clone()
        wrong[1, position] = 1
        with pytest.raises(ValueError, match=rf"at position \[1, {position}\]"):
            replace(head, hidden=wrong).verify(model, tokens=10, **inputs)
    assert replace(head, hidden=wrong).verify(model, tokens=1, **inputs) < 1e-5  # the first alone


def test_dropout_and_other_inputs():
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    with pytest.raises(ValueError, match=r"training mode: its dropout draws anew, call \.eval\(\) first"):
        made(model, **INPUTS).verify(model, **INPUTS)
    head = made(model.eval(), **INPUTS)
    assert head.verify(model, **INPUTS) < 1e-5
    with pytest.raises(ValueError, match=r"hidden: expected the last hidden states of these inputs.*\[2, 11, 97\]"):
        head.verify(model, input_ids=IDS[:, 1:])
    with pytest.raises(ValueError, match="tokens: expected an int of at least 1, got 0"):
        head.verify(model, tokens=0, **INPUTS)
    with pytest.raises(ValueError, match="attention_mask: expected at least one position that counts, got none"):
        head.verify(model, input_ids=IDS, attention_mask=torch.zeros_like(IDS))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for PEFT
def test_a_padded_vocabulary_and_an_adapter():
    model = tiny("inkling_text")  # its forward cuts its logits off
    assert made(model, **INPUTS).verify(model, **INPUTS) < 1e-5
    cut = kd.Head.of(model, **INPUTS, vocab_size=70)
    assert cut.verify(model, **INPUTS) < 1e-5
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    nn.init.normal_(model.get_base_model().lm_head.lora_B["default"].weight)
    head = made(model, **INPUTS)
    assert head.verify(model, **INPUTS) < 1e-5
    with pytest.raises(ValueError, match="at position"):
        kd.Head(head.hidden, head.weight).verify(model, **INPUTS)

"""Which attention the models of a run compute with, and what is said where one is wanted that is not there."""

import pytest
import torch

from kdkernels.training import InputError
from kdkernels.training.cli import main
from kdkernels.training.models import attention
from kdkernels.training.models.loading import load_student, load_tokenizer

from .conftest import GKD

IDS = torch.tensor([[3, 4, 5, 6, 7, 2]])


def student(load, *overrides, **options):
    config = load(*overrides)
    torch.manual_seed(config.run.seed)
    return load_student(config, load_tokenizer(config), **options)


def test_a_model_computes_with_what_is_asked_for(load):
    logits = {}
    for wanted in ("auto", "sdpa", "eager"):
        model = student(load, f"student.attention={wanted}").eval()
        assert model.config._attn_implementation == model.model.config._attn_implementation
        with torch.no_grad():
            out = model(IDS, output_attentions=wanted == "eager")
        logits[wanted] = out.logits
        assert model.config._attn_implementation == ("eager" if wanted == "eager" else "sdpa")
    assert out.attentions[0].sum(-1).allclose(torch.ones(())), "only eager has them"
    assert torch.equal(logits["auto"], logits["sdpa"])
    torch.testing.assert_close(logits["eager"], logits["sdpa"])


@pytest.mark.parametrize("meta", [True, False])
def test_an_attention_that_the_architecture_lacks_is_refused(load, meta):
    """GPT-J's code knows eager attention and flash_attention_2 alone."""
    gptj = ('student.architecture={model_type="gptj", n_embd=16, n_layer=1, n_head=2, rotary_dim=4}',)
    assert student(load, *gptj, meta=meta).config._attn_implementation == "eager"
    with pytest.raises(InputError, match=r"^\[student\] attention: .*GPTJForCausalLM.*"):
        student(load, *gptj, "student.attention=sdpa", meta=meta)


WHY = {  # what a machine has: (GPU's compute capability, flash-attn, dtype), and what is said
    "this machine has no GPU": (None, True, "bfloat16"),
    "this GPU's compute capability is 7.5, below 8.0": ((7, 5), True, "bfloat16"),
    "the package flash-attn is not installed": ((8, 0), False, "bfloat16"),
    "it computes in bfloat16, and the model's dtype is float32": ((9, 0), True, "float32"),
    None: ((8, 0), True, "bfloat16"),
}


@pytest.mark.parametrize("why", WHY)
def test_flash_attention_is_taken_where_it_works(load, monkeypatch, why):
    capability, package, dtype = WHY[why]
    model = student(load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: package)
    chosen = attention.implementation(model, "auto", dtype, "[student]")
    assert chosen == ("flash_attention_2" if why is None else "sdpa")
    if why is not None:
        with pytest.raises(
            InputError, match=r"^\[student\] attention: expected .auto., .*, since (.*), got"
        ) as refused:
            attention.implementation(model, "flash_attention_2", dtype, "[student]")
        assert why in str(refused.value)


def test_it_is_said_in_the_dry_run_and_in_the_banner(recipe, teacher_set, capsys):
    arguments = ["train", str(recipe), *(f"--set={text}" for text in (*GKD, teacher_set, "teacher.attention=eager"))]
    arguments.append("--set=train.gradient_checkpointing=true")
    line = "attention: student sdpa, teacher eager; the student's layers are computed again in the backward pass\n"
    for way in (["--dry-run"], []):
        assert main([*arguments, *way]) == 0
        assert line in capsys.readouterr().out
    arguments.append("--set=run.output=elsewhere")
    for way in (["--dry-run"], []):
        assert main([*arguments, *way, "--set=teacher.attention=flash_attention_2"]) == 2
        assert "[teacher] attention: expected " in capsys.readouterr().err
    assert main(["plan", *arguments[1:], "--gpus=2", "--set=teacher.attention=flash_attention_2"]) == 0
    assert "attention: student auto, teacher flash_attention_2;" in capsys.readouterr().out


def test_a_model_without_gradient_checkpointing_is_refused(load, monkeypatch):
    monkeypatch.setattr("transformers.Qwen2ForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match=r"^\[train\] gradient_checkpointing: Qwen2ForCausalLM does not support"):
        student(load, "train.gradient_checkpointing=true")

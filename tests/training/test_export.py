"""A checkpoint as a model: of every ZeRO stage what final/ is at the end."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kdkernels.training import InputError, load_config, train
from kdkernels.training.cli import main

from .conftest import GKD, final_weights
from .test_processes import finish, start


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")])
def test_the_last_checkpoint_is_the_final_model(load, teacher_set, in_parts, tmp_path, capsys, stage, dtype):
    settings = ("checkpoint.every=1", f"deepspeed.zero_stage={stage}", f"run.dtype={dtype}")
    result = train(load(*GKD, teacher_set, *settings, "student.architecture.tie_word_embeddings=true"))
    expected = final_weights(result.output)
    (tmp_path / "train.jsonl").unlink()  # nobody reads it
    moved = {}
    for step in (2, 3):
        checkpoint = result.output / "checkpoints" / f"step-00000{step}"
        assert main(["export", str(checkpoint), str(tmp_path / f"{step}" / "final")]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"model: {tmp_path}/{step}/final"
        got = final_weights(tmp_path / f"{step}")
        assert got.keys() == expected.keys() and all(one.dtype == getattr(torch, dtype) for one in got.values())
        moved[step] = max((got[name] - weight).abs().max().item() for name, weight in expected.items())
    assert moved[3] == 0 < moved[2]
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "3" / "final").eos_token == "<eos>"


@pytest.mark.parametrize("merge", ["false", "true"])
@pytest.mark.parametrize("stage", [0, 3])
def test_of_an_adapter_what_the_recipe_asks_for_is_written(load, teacher_set, in_parts, recipe, tmp_path, stage, merge):
    base = teacher_set.removeprefix("teacher.path=")
    text = recipe.read_text()
    before, after = text.split("[student]")[0], text.split("[data]")[1]
    recipe.write_text(f'{before}[student]\npath = "{base}"\n[student.adapter]\nr = 4\nmerge = {merge}\n[data]{after}')
    result = train(load("checkpoint.every=1", f"deepspeed.zero_stage={stage}"))
    file = "model.safetensors" if merge == "true" else "adapter_model.safetensors"
    assert main(["export", str(result.output / "checkpoints" / "step-000003"), str(tmp_path / "exported")]) == 0
    expected, got = (load_file(directory / file) for directory in (result.final, tmp_path / "exported"))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], one) for name, one in expected.items())
    assert any(one.any() for name, one in got.items() if merge == "true" or "lora_B" in name)


def test_what_is_no_checkpoint_is_told(load, recipe, tmp_path, capsys):
    result = train(load("checkpoint.every=1"))
    newest = result.output / "checkpoints" / "step-000003"
    copy = shutil.copytree(newest, tmp_path / "somewhere" / "else" / "step-000003")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for source, target, said in (
        (result.output, "new", f"{result.output} is a run, not one of its checkpoints: the newest is {newest}"),
        (tmp_path / "none", "new", "expected a checkpoint in the directory of its run, such as RUN/checkpoints/step-0"),
        (copy, "new", "expected a checkpoint in the directory of its run, such as RUN/checkpoints/step-000123"),
        (newest, "full", f"{tmp_path}/full is not empty: give another directory"),
    ):
        assert main(["export", str(source), str(tmp_path / target)]) == 2
        assert said in capsys.readouterr().err
    config = result.output / "config.toml"
    config.write_text(config.read_text().replace('"hidden_size" = 16', '"hidden_size" = 8'))
    assert main(["export", str(newest), str(tmp_path / "new")]) == 2
    assert f"{newest} is not of the recipe in {config}: " in capsys.readouterr().err
    (newest / "shared.pt").write_bytes(b"")
    assert main(["export", str(newest), str(tmp_path / "new")]) == 2
    assert f"{newest} is damaged: the contents of shared.pt changed" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_run_stands_for_its_model_as_a_student(load, recipe, tmp_path):
    result = train(load("checkpoint.every=1"))
    text = recipe.read_text()
    before, after = text.split("[student]")[0], text.split("[data]")[1]
    recipe.write_text(f'{before}[student]\npath = "{result.output}"\n[data]{after}')
    config = load_config(recipe, [f"run.output={tmp_path / 'next'}", "train.steps=1", "optimizer.lr=1e-12"])
    assert config.student.path == config.tokenizer.path == str(result.final)
    again = AutoModelForCausalLM.from_pretrained(train(config).final).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(result.final).state_dict()
    assert all(torch.allclose(again[name], one, atol=1e-9) for name, one in expected.items())
    newest = result.output / "checkpoints" / "step-000003"
    with pytest.raises(
        InputError, match=rf"\[student\] path: .* is a run's checkpoint: kdkernels export {newest} DIRECT"
    ):
        load(f"student.path={newest}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_exports_what_two_have_written(recipe, tmp_path, stage):
    """Of weights that two do not divide, too."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    program = str(Path(__file__).with_name("in_parts.py"))
    settings = ("train.micro_batch_size=1", "student.architecture.intermediate_size=33", "student.pad_vocab_to=7")
    overrides = (f"--set={text}" for text in (*settings, f"deepspeed.zero_stage={stage}", "checkpoint.every=1"))
    finish(start((*launcher, program), "train", str(recipe), *overrides, cwd=tmp_path), tmp_path)
    newest = tmp_path / "run" / "checkpoints" / "step-000003"
    assert len(list(newest.glob("process-*.pt"))) == 2
    assert main(["export", str(newest), str(tmp_path / "exported" / "final")]) == 0
    expected, got = final_weights(tmp_path / "run"), final_weights(tmp_path / "exported")
    assert got.keys() == expected.keys() and all(torch.equal(got[name], one) for name, one in expected.items())

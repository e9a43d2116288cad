"""Adapters on the student: gradients, what checkpoints and final/ hold, what comes of them."""

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdkernels.data import collate
from kdkernels.sources.adapted import AdaptedHead, Head
from kdkernels.training import InputError, load_config, needs, run_stages, train
from kdkernels.training.cli import main
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer

from .adapted import adapted, trained_weights
from .conftest import final_weights
from .engine_steps import EXAMPLES, engine_gradients, exact_gradients
from .test_engine import PROGRAM, TOLERANCE
from .test_processes import finish, start

IDS = torch.tensor([[3, 4, 5, 6, 7, 2]])


def load(root, *overrides, kind="lora"):
    return load_config(root / f"{kind}.toml", overrides)


def goes_on(root, kind="lora"):
    """The override that trains the random adapter of that kind further: every gradient of it is there."""
    return f"student.path={root / kind}"


# ---- gradients ----


def steps(root, kind, dtype, stage, micro_batches, processes=1):
    return [
        goes_on(root, kind),
        f"run.dtype={dtype}",
        "optimizer.max_grad_norm=0",
        f"train.batch_size={EXAMPLES}",
        f"train.micro_batch_size={EXAMPLES // micro_batches // processes}",
        f"deepspeed.zero_stage={stage}",
        "objective.name=GKD",
        f"teacher.path={root / 'base'}",
        "rollout.student_fraction=0",
    ]


def check_gradients(got, exact, dtype, case):
    assert got.keys() - {"norm"} == exact.keys() and len(exact) == 2 * 8 + 8 * ("dora" in case), case
    assert any("lm_head.lora_A" in name for name in exact) and any("lm_head.lora_B" in name for name in exact)
    total = torch.cat([each.flatten() for each in exact.values()]).norm()
    for name, wanted in exact.items():
        assert wanted.norm() > 1e-3 * total, (case, name)
        assert (got[name] - wanted).norm() < 10 * TOLERANCE[dtype] * wanted.norm(), (case, name)
    assert got["norm"] == pytest.approx(total.item(), rel=TOLERANCE[dtype]), case


@pytest.mark.parametrize(
    ("kind", "dtype", "stage", "micro_batches"),
    [
        ("lora", "float32", 0, 4),
        ("dora", "float32", 1, 2),
        pytest.param("lora", "float32", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_the_first_step_has_the_gradients_of_full_logits(root, kind, dtype, stage, micro_batches):
    config = load(root, *steps(root, kind, dtype, stage, micro_batches), kind=kind)
    check_gradients(engine_gradients(config), exact_gradients(config), dtype, (kind, stage))


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_full_logits(root):
    cases = [("lora", 0, 2), ("lora", 1, 1), ("lora", 2, 4), ("dora", 2, 2)]
    settings = [(str(root / f"{kind}.toml"), steps(root, kind, "float32", *rest, processes=2)) for kind, *rest in cases]
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROGRAM)
    finish(start(command, json.dumps(settings), str(root / "gradients.pt"), cwd=root), root)
    for case, (recipe, overrides), got in zip(cases, settings, torch.load(root / "gradients.pt"), strict=True):
        check_gradients(got, exact_gradients(load_config(recipe, overrides)), "float32", case)


def test_the_head_reads_its_adapter_without_a_full_weight(root):
    student = load_student(config := load(root, goes_on(root)), load_tokenizer(config))
    assert isinstance(Head.of(student, **collate([[3]], [[4]], pad_id=0).inputs), AdaptedHead)


# ---- what a run leaves ----


@pytest.mark.parametrize(("kind", "stage"), [("lora", 0), ("dora", 2)])
def test_final_is_what_was_trained_and_peft_reads_it(root, kind, stage):
    config = load(root, f"deepspeed.zero_stage={stage}", kind=kind)
    before = load_file(root / "base" / "model.safetensors")
    result = train(config)
    saved, trained = load_file(result.final / "adapter_model.safetensors"), trained_weights(config)
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)
    assert all(torch.count_nonzero(saved[name]) for name in saved if "lora_B" in name), "nothing was trained"
    assert {path.name for path in result.final.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert all(torch.equal(before[name], weight) for name, weight in load_file(root / "base/model.safetensors").items())
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
        plain = base(IDS).logits
        theirs = PeftModel.from_pretrained(base, result.final).eval()(IDS).logits
        ours = load_student(load(root, f"student.path={result.final}", kind=kind), load_tokenizer(config)).eval()
        assert torch.equal(ours(IDS).logits, theirs) and not torch.allclose(plain, theirs, atol=0.1)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merged_final_is_a_whole_model_of_the_same_logits(root, kind):
    alone = train(load(root, goes_on(root, kind), kind=kind))
    config = load(root, goes_on(root, kind), "student.adapter.merge=true", f"run.output={root}/merged", kind=kind)
    whole = train(config)
    assert not (whole.final / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(whole.final)
    alone_ = load_student(load(root, f"student.path={alone.final}", kind=kind), load_tokenizer(config))
    embedding, output = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    base = load_file(root / "base" / "model.safetensors")
    assert torch.equal(embedding, base["model.embed_tokens.weight"]) and not torch.allclose(output, embedding)
    with torch.no_grad():
        expected = alone_.eval()(IDS).logits
        assert torch.allclose(merged.eval()(IDS).logits, expected, rtol=1e-5, atol=1e-5) and expected.std() > 1
        teacher = load_teacher(load(root, f"teacher.path={alone.final}"), load_tokenizer(config))
        assert torch.allclose(teacher(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_the_next_recipes_student(root):
    """Trained further, or merged and trained as a whole."""
    first, recipes, base = (root / "lora.toml").read_text(), [], root / "base"
    for name, text in {
        "first": first,
        "second": first.replace(f"{base}", f"{root}/first/final"),
        "third": adapted(root, "").replace("[student.adapter]", "").replace(f"{base}", f"{root}/second/final"),
    }.items():
        recipes.append(root / f"{name}.toml")
        recipes[-1].write_text(text.replace(f"{root}/run", f"{root}/{name}"))
    run_stages(recipes)
    begun, ended = (load_file(root / name / "final" / "adapter_model.safetensors") for name in ("first", "second"))
    assert json.loads((root / "second/final/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        root / "base"
    )
    moved = max((ended[name] - begun[name]).abs().max() for name in begun)
    assert 1e-3 < moved < 0.1  # three steps of a rate of 0.01, from where the first had ended
    assert "lm_head.weight" in final_weights(root / "third")


PEFTS = {
    "a pattern": {"target_modules": r".*(q_proj|lm_head)"},
    "rsLoRA": {"target_modules": ["q_proj"], "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "a copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, about the tied weight
@pytest.mark.parametrize("kind", PEFTS)
def test_a_teacher_may_be_any_adapter_that_peft_wrote(root, kind):
    """Merged, its logits are those of PEFT's own model, though embedding and output layer were tied."""
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), LoraConfig(r=2, **PEFTS[kind])).eval()
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(root / "made")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "base" / name, root / "made")
    config = load(root, f"teacher.path={root / 'made'}")
    with torch.no_grad():
        expected, plain = made(IDS).logits, AutoModelForCausalLM.from_pretrained(root / "base").eval()(IDS).logits
        found = load_teacher(config, load_tokenizer(config))
        torch.testing.assert_close(found(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, plain, atol=0.1)
        found.save_pretrained(root / "whole")
        again = AutoModelForCausalLM.from_pretrained(root / "whole").eval()
        assert torch.equal(again(IDS).logits, found(IDS).logits)


def test_an_adapter_of_another_base_is_told_where_its_file_says_so(root):
    file = root / "lora" / "adapter_model.safetensors"
    weight = load_file(root / "base" / "model.safetensors")["model.embed_tokens.weight"]
    state, name = load_file(file), "base_model.model.lm_head.base_layer.weight"  # as PEFT itself writes
    config = load(root, goes_on(root))
    for beside in (weight.clone(), weight + 1):
        save_file(state | {name: beside}, file)
        if torch.equal(beside, weight):
            assert load_student(config, load_tokenizer(config)).get_output_embeddings().weight.equal(weight)
            continue
        with pytest.raises(InputError, match=rf"trained on another base: {name} is not that of the base"):
            load_student(config, load_tokenizer(config))


def test_checkpoints_hold_the_adapter_and_its_optimizer_alone(root):
    config = load(root, "student.adapter.r=8", "train.steps=2")
    needed = needs.needs(config, load_student(config, load_tokenizer(config), meta=True), None)
    assert main(["train", str(root / "lora.toml"), "--dry-run"]) == 0
    result = train(config)
    names = trained_weights(config)
    weights = sum(each.numel() for each in names.values())
    assert all("lora_" in name for name in names)
    assert needed.checkpoint == 12 * weights and needed.final == 4 * weights == needed.memory["gradients"]
    assert needed.memory["optimizer"] == 8 * weights
    assert needed.memory["student"] == 4 * (
        weights + sum(one.numel() for one in load_file(root / "base/model.safetensors").values())
    )
    assert needed.final < (result.final / "adapter_model.safetensors").stat().st_size < needed.final + 4000


@pytest.mark.parametrize(
    ("kind", "stage", "dtype"),
    [
        ("lora", 0, "float32"),
        pytest.param("dora", 1, "bfloat16", marks=pytest.mark.slow),
        pytest.param("lora", 2, "float32", marks=pytest.mark.slow),
    ],
)
def test_every_state_is_restored_to_the_bit(root, kind, stage, dtype):
    overrides = (f"deepspeed.zero_stage={stage}", f"run.dtype={dtype}", "checkpoint.every=2", "train.steps=4")
    overrides = (*overrides, *(["student.adapter.dropout=0.2"] if kind == "lora" else []))
    expected = load_file(train(load(root, *overrides, kind=kind)).final / "adapter_model.safetensors")
    again = (*overrides, f"run.output={root / 'again'}")
    train(load(root, *again, kind=kind))
    for path in (root / "again" / "checkpoints" / "step-000004", root / "again" / "final"):
        shutil.rmtree(path)
    found = load_file(train(load(root, *again, kind=kind), resume=True).final / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_base_that_changed_is_noticed_at_resume(root):
    config = load(root, goes_on(root))
    shutil.rmtree(train(config).final)
    file = root / "base" / "model.safetensors"
    contents = file.read_bytes()
    file.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    with pytest.raises(InputError, match=r"\[student\] path \(its base\).*model.safetensors changed"):
        train(config, resume=True)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.adapter.r=0"], r"\[student.adapter\] r: expected an integer >= 1, got 0"),
        (["student.adapter.r=100000"], r"r: expected at most 8, the smaller side of \S+k_proj \(8 x 16\), got 100000"),
        (["student.adapter.rank=3"], r"\[student.adapter\] unknown key 'rank'"),
        (["student.adapter=3"], r"\[student\] adapter: expected a table, got 3"),
        (["student.adapter.kind=qlora"], r"\[student.adapter\] kind: expected one of 'lora', 'dora', got 'qlora'"),
        (["student.adapter.target_modules=[]"], r"\[student.adapter\] target_modules: expected at least one"),
        (['student.adapter.target_modules=["lm_head", "query"]'], r"target_modules: expected .*q_proj.*'query'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(root, overrides, said):
    with pytest.raises(InputError, match=said):
        train(load(root, *overrides))


def test_fresh_weights_have_no_adapter(root):
    with pytest.raises(InputError, match=r"\[student.adapter\] belongs to a model at \[student\] path"):
        load_config(root / "recipe.toml", ["student.adapter.r=2"])


@pytest.mark.parametrize("meta", [True, False])
def test_another_adapter_than_the_recipes_is_refused(root, meta):
    config = load(root, goes_on(root), "student.adapter.r=4", "student.adapter.alpha=7")
    with pytest.raises(InputError, match=r"lora_alpha: expected 5.0, got 7.0; r: expected 3, got 4. To begin another"):
        load_student(config, load_tokenizer(config), meta=meta)
    config = load(root, goes_on(root), 'student.adapter.target_modules=["lm_head"]')
    with pytest.raises(InputError, match=r"lora_A.weight: expected shape nothing, got \[3, "):
        load_student(config, load_tokenizer(config), meta=meta)


@pytest.mark.parametrize("damage", ["cut", "missing", "no base", "another base"])
def test_an_adapter_that_cannot_be_read_is_refused(root, damage):
    file = root / "lora" / ("adapter_config.json" if "base" in damage else "adapter_model.safetensors")
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        text = json.loads(file.read_text())
        text["base_model_name_or_path"] = None if damage == "no base" else str(root / "nowhere")
        file.write_text(json.dumps(text))
    with pytest.raises(InputError, match=r"\[student\] path|base_model_name_or_path, the model that"):
        train(load(root, goes_on(root)))


def test_a_row_of_zeros_is_no_direction(root):
    weights = load_file(root / "base" / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] = 0
    save_file(weights, root / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match='expected "lora" for lm_head, which has a row of zeros'):
        train(load(root, kind="dora"))
    assert train(load(root)).final.is_dir()


def test_dropout_that_cannot_be_drawn_is_refused_before_training(root):
    with pytest.raises(InputError, match=r"has lora_dropout.*; set it to 0"):
        train(load(root, "student.adapter.dropout=0.1", kind="dora"))


def test_without_peft_the_message_names_the_extra(root, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["train", str(root / "lora.toml")]) == 2
    said = "kdkernels: [student.adapter] needs peft: pip install kdkernels[adapters]"
    assert capsys.readouterr().err.splitlines()[-1] == said

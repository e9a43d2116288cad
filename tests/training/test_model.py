"""The models of a recipe and the module that turns a batch into a loss."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kdkernels as kd
from kdkernels.data import collate
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.distillation import Distillation
from kdkernels.training import InputError
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer
from kdkernels.training.recipe.config import StudentConfig, TokenizerConfig

from .conftest import GKD


@pytest.fixture
def models(load, teacher_set):
    config = load(*GKD, teacher_set)
    tokenizer = load_tokenizer(config)
    torch.manual_seed(0)
    return load_student(config, tokenizer), load_teacher(config, tokenizer), tokenizer


def test_the_vocabulary_is_the_tokenizers_padded_differently(models):
    student, teacher, tokenizer = models
    entries = vocabulary_size(tokenizer)
    assert entries == len(tokenizer) == 3 + 3 + 10  # <pad> <eos> <unk>; + . =; digits
    assert student.get_output_embeddings().weight.shape[0] == 21
    assert teacher.get_output_embeddings().weight.shape[0] == 20


def test_the_loss_is_that_of_the_full_logits(models):
    student, teacher, tokenizer = models
    entries = vocabulary_size(tokenizer)
    prompts = [tokenizer(text)["input_ids"] for text in ("1+2=", "7=")]
    batch = collate(prompts, [tokenizer("3.")["input_ids"], [4, 5, 6, tokenizer.eos_token_id]], tokenizer.eos_token_id)
    module = Distillation(student, kd.GKD(beta=0.5), entries)
    with torch.no_grad():
        out = module(teacher=kd.Head.of(teacher, vocab_size=entries, **batch.inputs), **batch.fields(by_author=False))
        logits = [
            model(batch.input_ids, attention_mask=batch.attention_mask).logits[..., :entries]
            for model in (student, teacher)
        ]
    log_q, log_p = (each.double().log_softmax(-1) for each in logits)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    jsd = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
    means = [jsd[b, len(prompts[b]) - 1 :][:length].mean() for b, length in enumerate((2, 4))]
    assert out.loss.item() == pytest.approx(sum(means).item() / 2, rel=1e-5)
    assert out.count == 2


def test_a_saved_student_is_a_teacher(models, load, tmp_path):
    student, _, tokenizer = models
    student.save_pretrained(tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    config = load(f"teacher.path={tmp_path / 'final'}")
    teacher = load_teacher(config, load_tokenizer(config))
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, teacher.state_dict()[name])
    unread = load_teacher(config, tokenizer, meta=True)
    assert unread.device.type == "meta" and unread.num_parameters() == student.num_parameters()


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_a_saved_tokenizer_is_read_as_it_was(load, tmp_path, kind):
    prompt = 'data.prompt="Is it so, that {question}? \u00fc  1234\\n\\n= "'
    config = load(prompt, f"tokenizer.kind={kind}", *(["tokenizer.vocab_size=300"] if kind == "bpe" else []))
    tokenizer = load_tokenizer(config)
    load_student(config, tokenizer).save_pretrained(tmp_path / "model")  # of a type with a tokenizer class of its own
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('kind = "characters"', f'path = "{tmp_path / "model"}"'))
    for _ in range(2):  # the second time from what was read and saved again
        read = load_tokenizer(load(prompt))
        assert read.get_vocab() == tokenizer.get_vocab()
        for text in ("Is it so, that 1+2=? \u00fc", " 1  23\n\n =that"):
            assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert read.decode(read(text)["input_ids"]) == text
        read.save_pretrained(tmp_path / "model")


def test_another_tokenizer_is_refused(load, teacher_set, tmp_path):
    config = load(*GKD, teacher_set, 'data.prompt="Q {question}"')
    path, tokenizer = config.teacher.path, load_tokenizer(config)
    expected = (
        rf"\[teacher\] path: expected the recipe's tokenizer, one trained on {config.data.train}, but that of {path} "
        r"differs in .* entries"
    )
    with pytest.raises(InputError, match=expected):
        load_teacher(config, tokenizer)
    tokenizer.save_pretrained(tmp_path / "other")
    config = replace(config, student=StudentConfig(path=path), tokenizer=TokenizerConfig(path=str(tmp_path / "other")))
    with pytest.raises(InputError, match=rf"\[student\] path: .* that of {tmp_path / 'other'}, but that of {path} "):
        load_student(config, tokenizer)


def test_a_model_smaller_than_the_vocabulary_is_refused(models, load, tmp_path):
    student, _, tokenizer = models
    student.resize_token_embeddings(10)
    student.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    config = load(f"teacher.path={tmp_path / 'small'}")
    with pytest.raises(InputError, match=r"\[teacher\] path: expected a vocabulary of at least 16.* got 10"):
        load_teacher(config, tokenizer)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("hiden_size=3", "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ("vocab_size=3", "unknown key 'vocab_size'"),
        ("model_type=qwen0", "unknown model_type 'qwen0'; did you mean 'qwen"),
        ("model_type='#'", "unknown model_type '#'; none of the "),
        ("hidden_size=many", "'hidden_size' expected int, got str"),
        ("hidden_size=15", "size of tensor"),  # an odd size for each of two heads
        ("num_attention_heads=3", "size of tensor"),
        ("num_attention_heads=0", "ZeroDivisionError"),
        ("hidden_act=gelo", "KeyError: 'gelo'"),
        ("max_position_embeddings=13", "max_response_tokens 6 and .* max_prompt_tokens 8: .* sum of at most 13"),
    ],
)
def test_an_architecture_that_is_none(load, override, expected, meta):
    config = load(f"student.architecture.{override}")
    with pytest.raises(InputError, match=rf"\[student\] architecture.*(\n.*)*{expected}|{expected}.*\[student\] arch"):
        load_student(config, load_tokenizer(config), meta=meta)


@pytest.mark.parametrize(
    ("model_type", "heads"), [("gpt2", 2), ("phi", 2), ("qwen3_moe", 4), ("mamba", None), ("bloom", 2), ("gemma2", 4)]
)
def test_architectures_are_tried_out_without_weights(load, model_type, heads):
    heads = f"num_attention_heads={heads}, " if heads else ""
    config = load(f'student.architecture={{model_type="{model_type}", {heads}num_hidden_layers=1, hidden_size=16}}')
    tokenizer = load_tokenizer(config)
    expected = load_student(config, tokenizer).num_parameters()
    assert load_student(config, tokenizer, meta=True).num_parameters() == expected


@pytest.mark.parametrize("meta", [False, True])
def test_a_model_whose_head_is_more_than_a_head_is_refused(load, meta):
    sizes = "num_hidden_layers=1, hidden_size=16, num_attention_heads=2"
    config = load(f'student.architecture={{model_type="bert", {sizes}}}')
    expected = r"^\[student\] architecture: .*BertLMHeadModel \(model_type bert\).*cls\.predictions\.transform"
    with pytest.raises(InputError, match=expected):
        load_student(config, load_tokenizer(config), meta=meta)


@pytest.fixture
def damaged(models, tmp_path):
    """The directory of a saved model, to be damaged."""
    student, _, tokenizer = models
    for part in (student, tokenizer):
        part.save_pretrained(tmp_path / "damaged")
    return tmp_path / "damaged"


def refusals(load, damaged):
    """What load_teacher says of it, with and without reading the weights."""
    config = load(f"teacher.path={damaged}")
    tokenizer, said = load_tokenizer(config), {}
    for meta in (False, True):
        try:
            load_teacher(config, tokenizer, meta=meta)
        except InputError as error:
            said[meta] = str(error)
    assert all(text.startswith("[teacher] path: ") for text in said.values())
    return said


@pytest.mark.parametrize("contents", [lambda whole: whole[:-1], lambda whole: b"", lambda whole: b"{}" * 99])
def test_damaged_weights(load, damaged, contents):
    weights = damaged / "model.safetensors"
    weights.write_bytes(contents(weights.read_bytes()))
    assert all("SafetensorError" in text for text in refusals(load, damaged).values())
    assert refusals(load, damaged).keys() == {False, True}
    weights.unlink()
    assert all(str(damaged) in text for text in refusals(load, damaged).values())
    assert refusals(load, damaged).keys() == {False, True}


def test_a_weight_that_is_not_there_is_not_drawn_anew(load, damaged):
    weights = load_file(damaged / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert "1 weights are missing" in refusals(load, damaged)[False]
    assert "model.norm.weight" in refusals(load, damaged)[False]


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", '{"model_type": "qwen0"}'), ("config.json", "{"), ("tokenizer.json", "{}")],
)
def test_directories_that_hold_no_readable_model(load, damaged, name, text):
    (damaged / name).write_text(text)
    assert refusals(load, damaged).keys() == {False, True}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), r"\[rollout\] max_new_tokens 6 and \[data\] max_prompt_tokens 8: .* at most 13, .* of \[teacher\] path"),
        (("rollout.max_new_tokens=3", "data.max_prompt_tokens=10"), None),
        (("rollout.max_new_tokens=3", "rollout.student_fraction=0.5"), r"\[data\] max_response_tokens 6 and"),
    ],
)
def test_positions_that_are_used(load, damaged, overrides, expected):
    configuration = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(configuration | {"max_position_embeddings": 13}))
    config = load(*GKD, f"teacher.path={damaged}", *overrides)
    tokenizer = load_tokenizer(config)
    if expected is None:
        load_teacher(config, tokenizer)
    else:
        with pytest.raises(InputError, match=expected):
            load_teacher(config, tokenizer)


@pytest.mark.parametrize(("metric", "fits"), [("exact_match", True), ("kl", False)])
def test_an_evaluation_that_reads_only_answers_needs_no_positions_for_responses(load, damaged, tmp_path, metric, fits):
    configuration = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(configuration | {"max_position_embeddings": 13}))
    evaluation = [f"evaluation.data={tmp_path / 'test.jsonl'}", f'evaluation.metrics=["{metric}"]']
    evaluation += [r"evaluation.answer='(\d+)'"] if metric == "exact_match" else []
    config = load(*GKD, f"teacher.path={damaged}", "rollout.max_new_tokens=3", *evaluation)
    with nullcontext() if fits else pytest.raises(InputError, match=r"\[data\] max_response_tokens 6 and"):
        load_teacher(config, load_tokenizer(config))


def test_bfloat16_models(load, teacher_set):
    config = load(*GKD, teacher_set, "run.dtype=bfloat16")
    tokenizer = load_tokenizer(config)
    assert load_teacher(config, tokenizer).dtype == torch.bfloat16
    path = teacher_set.partition("=")[2]
    assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.float32

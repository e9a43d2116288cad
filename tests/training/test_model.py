"""The models of a recipe and the module that turns a batch into a loss."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import kdkernels as kd
from kdkernels.training import InputError
from kdkernels.training.data import collate
from kdkernels.training.model import (
    Distillation,
    count_parameters,
    head,
    load_student,
    load_teacher,
    load_tokenizer,
    vocabulary_size,
)

from .conftest import GKD


@pytest.fixture
def models(load, teacher_set):
    config = load(*GKD, teacher_set)
    tokenizer = load_tokenizer(config)
    torch.manual_seed(0)
    return load_student(config, tokenizer), load_teacher(config, tokenizer), tokenizer


def test_the_vocabulary_is_the_tokenizers_padded_differently(models):
    student, teacher, tokenizer = models
    words = vocabulary_size(tokenizer)
    assert words == len(tokenizer) == 3 + 3 + 10  # <pad> <eos> <unk>; + . =; digits
    assert student.get_output_embeddings().weight.shape[0] == 21
    assert teacher.get_output_embeddings().weight.shape[0] == 20


def test_the_loss_is_that_of_the_full_logits(models):
    student, teacher, tokenizer = models
    words = vocabulary_size(tokenizer)
    prompts = [tokenizer(text)["input_ids"] for text in ("1+2=", "7=")]
    batch = collate(prompts, [tokenizer("3.")["input_ids"], [4, 5, 6, tokenizer.eos_token_id]], tokenizer.eos_token_id)
    module = Distillation(student, kd.GKD(beta=0.5), words)
    with torch.no_grad():
        out = module(batch, head(teacher, batch, words))
        logits = [
            model(batch.input_ids, attention_mask=batch.attention_mask).logits[..., :words]
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
    assert count_parameters(config, tokenizer)["teacher"] == student.num_parameters()


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


def test_another_tokenizer_is_refused(load, teacher_set):
    config = load(*GKD, teacher_set, 'data.prompt="Q {question}"')
    with pytest.raises(InputError, match=r"\[teacher\] path: expected the student's tokenizer.* differs in .* entries"):
        load_teacher(config, load_tokenizer(config))


def test_a_model_smaller_than_the_vocabulary_is_refused(models, load, tmp_path):
    student, _, tokenizer = models
    student.resize_token_embeddings(10)
    student.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    config = load(f"teacher.path={tmp_path / 'small'}")
    with pytest.raises(InputError, match=r"\[teacher\] path: expected a vocabulary of at least 16.* got 10"):
        load_teacher(config, tokenizer)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("hiden_size=3", r"\[student\] architecture: unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ("vocab_size=3", r"\[student\] architecture: unknown key 'vocab_size'"),
        ("model_type=qwen0", r"\[student\] architecture: .*qwen0"),
    ],
)
def test_an_architecture_that_is_none(load, override, expected):
    config = load(f"student.architecture.{override}")
    with pytest.raises(InputError, match=expected):
        load_student(config, load_tokenizer(config))


def test_directories_that_hold_no_readable_model(load, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "qwen2"}')
    config = load(f"teacher.path={tmp_path / 'broken'}")
    with pytest.raises(InputError, match=r"\[teacher\] path: "):
        load_teacher(config, load_tokenizer(config))


def test_bfloat16_models(load, teacher_set):
    config = load(*GKD, teacher_set, "run.dtype=bfloat16")
    tokenizer = load_tokenizer(config)
    assert load_teacher(config, tokenizer).dtype == torch.bfloat16
    path = teacher_set.partition("=")[2]
    assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.float32

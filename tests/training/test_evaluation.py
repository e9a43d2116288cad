"""Held-out evaluation: answers against a greedy loop by hand, cross-entropy and KL against dense logits in fp64."""

import copy
from dataclasses import replace

import pytest
import torch

import kdkernels as kd
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.rollouts import LocalSampler
from kdkernels.teachers import LocalTeacher
from kdkernels.training import InputError
from kdkernels.training.evaluation import evaluate, find_answer, summarize
from kdkernels.training.inputs import read_examples
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer

from .conftest import GKD


@pytest.fixture
def settings(tmp_path):
    return (
        f"evaluation.data={tmp_path / 'test.jsonl'}",
        'evaluation.metrics=["exact_match", "cross_entropy", "kl", "agreement"]',
        r"evaluation.answer='(\d+)'",
        "evaluation.batch_size=3",
    )


@pytest.fixture
def load_all(load, teacher_set, settings):
    """load_all(*overrides): model, tokenizer, examples, config, teacher, as evaluate takes them."""

    def load_all(*overrides):
        config = load(*GKD, teacher_set, *settings, *overrides)
        tokenizer = load_tokenizer(config)
        torch.manual_seed(0)
        examples = read_examples(config.data, config.evaluation.data, tokenizer).usable
        student = load_student(config, tokenizer)
        teacher = LocalTeacher(load_teacher(config, tokenizer), vocabulary_size(tokenizer))
        return student, tokenizer, examples, config, teacher

    return load_all


def log_probs(model, example, vocab_size):
    """[N, V] at the positions that predict the example's response, fp64."""
    ids = torch.tensor([[*example.prompt_ids, *example.response_ids]])
    logits = model(ids).logits[0, len(example.prompt_ids) - 1 : -1, :vocab_size]
    return logits.double().log_softmax(-1)


def test_the_metrics_by_token_are_those_of_dense_logits(load_all):
    student, tokenizer, examples, config, teacher = load_all()
    records = evaluate(student, LocalSampler(student, tokenizer), tokenizer, examples, config, teacher)
    entries = vocabulary_size(tokenizer)
    assert student.config.vocab_size > entries  # padding rows, which must have no probability
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for example, record in zip(examples, records, strict=True):
            q, p = (log_probs(model.eval(), example, entries) for model in (student, teacher.model))
            target = torch.tensor(example.response_ids)
            cross_entropy = -q.gather(1, target[:, None])[:, 0]
            kl = (p.exp() * (p - q)).sum(1)
            same = (p.argmax(1) == q.argmax(1)).double()
            assert record["tokens"] == len(target)
            assert record["line"] == example.line
            assert record["cross_entropy"] == pytest.approx(cross_entropy.mean().item(), rel=1e-5)
            assert record["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
            assert record["agreement"] == pytest.approx(same.mean().item())
            assert kl.mean() > 0.01
            sums += torch.stack([cross_entropy.sum(), kl.sum(), same.sum(), torch.tensor(float(len(target)))])
    for name, total in zip(("cross_entropy", "kl", "agreement"), sums, strict=False):
        assert summarize(records)[name] == pytest.approx((total / sums[3]).item(), rel=1e-5)


def test_agreement_counts_the_tokens_with_the_same_most_probable_entry(load_all):
    student, tokenizer, examples, config, _ = load_all()
    near = copy.deepcopy(student)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in near.parameters():
            weight += 0.3 * weight.std(correction=0) * torch.randn_like(weight)
    config = replace(config, evaluation=replace(config.evaluation, metrics=("agreement",)))
    entries, same, tokens = vocabulary_size(tokenizer), 0, 0
    with torch.no_grad():
        for example in examples:
            one, other = (log_probs(model.eval(), example, entries).argmax(1) for model in (student, near))
            same, tokens = same + (one == other).sum().item(), tokens + len(one)
    records = evaluate(student, None, tokenizer, examples, config, LocalTeacher(near, entries))
    assert 0 < same < tokens
    assert summarize(records) == {"agreement": pytest.approx(same / tokens)}


def test_a_teacher_is_whatever_scores_a_batch(load_all):
    """Its logits over the shared vocabulary instead of a model with a head: the same KL."""
    student, tokenizer, examples, config, teacher = load_all()

    class Dense:
        def score(self, batch):
            logits = teacher.model(batch.input_ids, attention_mask=batch.attention_mask).logits
            return kd.Logits(logits[..., : teacher.vocab_size].contiguous())

    config = replace(config, evaluation=replace(config.evaluation, metrics=("kl",)))
    sampler = LocalSampler(student, tokenizer)
    expected = evaluate(student, sampler, tokenizer, examples, config, teacher)
    for record, right in zip(evaluate(student, sampler, tokenizer, examples, config, Dense()), expected, strict=True):
        assert record["kl"] == pytest.approx(right["kl"], rel=1e-4) and right["kl"] > 0.01


def test_responses_are_greedy(load_all):
    student, tokenizer, examples, config, teacher = load_all("evaluation.max_new_tokens=5")
    records = evaluate(student, LocalSampler(student, tokenizer), tokenizer, examples, config, teacher)
    student.eval()
    for example, record in zip(examples, records, strict=True):
        ids = list(example.prompt_ids)
        while len(ids) < len(example.prompt_ids) + 5 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                logits = student(torch.tensor([ids])).logits[0, -1, : vocabulary_size(tokenizer)]
            ids.append(int(logits.argmax()))
        response = tokenizer.decode(ids[len(example.prompt_ids) :], skip_special_tokens=True)
        assert record["response"] == response
        assert record["finished"] == (ids[-1] == tokenizer.eos_token_id)
        assert record["answer"] == find_answer(r"(\d+)", response)
        assert record["correct"] == (record["answer"] == record["expected"])
    assert len({record["response"] for record in records}) > 1


def test_what_counts_as_right(load_all, monkeypatch):
    student, tokenizer, examples, config, teacher = load_all(
        'evaluation.metrics=["exact_match"]', "evaluation.max_new_tokens=7"
    )
    eos = tokenizer.eos_token_id
    right = [one.response_ids for one in examples]
    answers = {
        examples[0].prompt_ids: [*right[0]],  # right
        examples[1].prompt_ids: [*tokenizer("1+1=")["input_ids"], *right[1]],  # right: the last match counts
        examples[2].prompt_ids: [*right[2][:-1]],  # right, though cut off at the limit
        examples[3].prompt_ids: [*tokenizer("+")["input_ids"], eos],  # no answer
        examples[4].prompt_ids: [*right[4][:-1], *tokenizer("0")["input_ids"], eos],  # another answer at the end
    }
    monkeypatch.setattr(LocalSampler, "generate", lambda _, prompts, *a, **k: [answers[one] for one in prompts])
    records = evaluate(student, LocalSampler(student, tokenizer), tokenizer, examples[:5], config, teacher)
    assert [record["correct"] for record in records] == [True, True, True, False, False]
    assert [record["finished"] for record in records] == [True, True, False, True, True]
    assert records[3]["answer"] is None
    lengths = [len(answers[one.prompt_ids]) for one in examples[:5]]
    assert [record["response_tokens"] for record in records] == lengths and len(set(lengths)) > 1
    assert summarize(records) == {"exact_match": 0.6, "finished": 0.8, "response_tokens": sum(lengths) / 5}
    assert {"prompt", "response", "expected"} < records[0].keys()


def test_a_response_ended_by_another_of_the_models_end_tokens_is_finished(load_all, monkeypatch):
    """That token is no special one here: it must not get into the text and the answer."""
    student, tokenizer, examples, config, teacher = load_all('evaluation.metrics=["exact_match"]')
    (seven,) = tokenizer("7")["input_ids"]
    student.generation_config.eos_token_id = [seven, tokenizer.eos_token_id]
    right = [one.response_ids for one in examples[:3]]
    answers = {
        examples[0].prompt_ids: [*right[0]],
        examples[1].prompt_ids: [*right[1][:-2], seven],  # right: the 7 is the end and not a digit
        examples[2].prompt_ids: [*right[2][:-1]],  # at the limit
    }
    monkeypatch.setattr(LocalSampler, "generate", lambda _, prompts, *a, **k: [answers[one] for one in prompts])
    records = evaluate(student, LocalSampler(student, tokenizer), tokenizer, examples[:3], config, teacher)
    assert [record["finished"] for record in records] == [True, True, False]
    assert [record["correct"] for record in records] == [True, True, True]
    assert records[1]["response"] == records[1]["expected"] == examples[1].response[:-1]


def test_batches_change_nothing(load_all):
    student, tokenizer, examples, config, teacher = load_all()
    threes = evaluate(student, LocalSampler(student, tokenizer), tokenizer, examples, config, teacher)
    *_, config, _ = load_all("evaluation.batch_size=1")
    ones = evaluate(student, LocalSampler(student, tokenizer), tokenizer, examples, config, teacher)
    for three, one in zip(threes, ones, strict=True):
        assert three | {"cross_entropy": 0, "kl": 0} == one | {"cross_entropy": 0, "kl": 0}
        assert three["cross_entropy"] == pytest.approx(one["cross_entropy"], rel=1e-5)
        assert three["kl"] == pytest.approx(one["kl"], rel=1e-4)


def test_only_what_is_asked_for_and_the_mode_is_kept(load_all):
    student, tokenizer, examples, config, _ = load_all()
    config = replace(config, evaluation=replace(config.evaluation, metrics=("cross_entropy",), answer=None))
    student.train()
    records = evaluate(student, LocalSampler(student, tokenizer), tokenizer, examples[:2], config)
    assert summarize(records).keys() == {"cross_entropy"}
    assert records[0].keys() == {"line", "prompt", "tokens", "cross_entropy"}
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_response_without_an_answer_is_named(load_all):
    student, tokenizer, examples, config, teacher = load_all(r"evaluation.answer='#### (\d+)'")
    with pytest.raises(InputError, match=r"test\.jsonl, line 1: .* not found in"):
        evaluate(student, LocalSampler(student, tokenizer), tokenizer, examples, config, teacher)


def test_means_are_over_tokens_not_examples():
    records = [{"tokens": 1, "cross_entropy": 4.0, "kl": 1.0}, {"tokens": 3, "cross_entropy": 0.0, "kl": 3.0}]
    assert summarize(records) == {"cross_entropy": 1.0, "kl": 2.5}

"""Rollouts: the sampled tokens follow the model's distribution, whatever the checkpoint's generation_config says."""

import math
import string
from dataclasses import replace

import pytest
import torch
from faulty_server import faulty_server
from transformers import AutoModelForCausalLM, GenerationConfig
from vllm_server import VllmServer

from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.http import Server
from kdkernels.rollouts import LocalSampler
from kdkernels.rollouts.drift import measure
from kdkernels.rollouts.engine import Asked
from kdkernels.rollouts.server import ServerEngine
from kdkernels.training import sampling, train
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD

DRAWS = 3000
HOSTILE = {
    "do_sample": False,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.2,
    "min_p": 0.5,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.1,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 6,
    "max_length": 5,
    "bad_words_ids": [[4], [5]],
    "suppress_tokens": [6, 7],
    "begin_suppress_tokens": [8],
    "forced_eos_token_id": 3,
    "sequence_bias": [[[9], 10.0]],
    "num_return_sequences": 2,
    "num_beams": 3,
    "eos_token_id": 5,
    "pad_token_id": 4,
}


@pytest.fixture
def tokenizer(load):
    """More than 50 tokens, so that the top_k = 50 of transformers would cut some off."""
    return load_tokenizer(load(f"data.prompt='{string.ascii_letters}{{question}}'"))


@pytest.fixture
def model(load, tokenizer, tmp_path):
    """A checkpoint with a hostile generation_config and padding rows that would win every draw."""
    torch.manual_seed(0)
    config = load("student.pad_vocab_to=9", "student.architecture.hidden_size=24")
    student = load_student(config, tokenizer)
    entries = vocabulary_size(tokenizer)
    assert student.get_output_embeddings().weight.shape[0] > entries
    with torch.no_grad():
        head = student.get_output_embeddings().weight
        # padding rows that score above everything else for some prompts and below for others
        head[entries:] = 3 * head[:entries].abs().max() * torch.randn(head[entries:].shape).sign()
    student.save_pretrained(tmp_path / "hostile")
    settings = GenerationConfig()
    for name, value in HOSTILE.items():
        setattr(settings, name, value)
    (tmp_path / "hostile" / "generation_config.json").write_text(settings.to_json_string(use_diff=False))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hostile")
    assert loaded.generation_config.top_k == 1 and loaded.generation_config.bad_words_ids == [[4], [5]]
    return loaded


def probabilities(model, tokenizer, ids):
    """The distribution of the token after `ids`, padding rows left out."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1, : vocabulary_size(tokenizer)]
    return logits.double().softmax(0)


def assert_drawn_from(expected, tokens):
    """Pearson's chi-squared test at six standard deviations, ids with few expected draws pooled."""
    observed = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    assert len(observed) == len(expected), "a token outside the vocabulary was drawn"
    expected = expected * len(tokens)
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum().clamp(min=1e-3)[None]])
    freedom = len(expected) - 1
    assert freedom >= 3, "the distribution is too peaked to show a cut tail"
    chi_squared = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_squared < freedom + 6 * math.sqrt(2 * freedom), (observed, expected)


def test_a_temperature_and_a_top_p_change_what_is_drawn(model, tokenizer):
    """Of the tokens' distribution: padding rows take nothing of top_p, though they would win every draw."""
    ids = tokenizer("1+2=")["input_ids"]
    p = probabilities(model, tokenizer, ids).pow(1 / 0.5)
    p /= p.sum()
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.6).sum()) + 1]
    assert 1 < len(kept) < len(p) - 5
    expected = torch.zeros_like(p).index_copy(0, kept, p[kept] / p[kept].sum())
    torch.manual_seed(5)
    drawn = LocalSampler(model, tokenizer, temperature=0.5, top_p=0.6).generate([ids] * DRAWS, 1)
    assert {one[0] for one in drawn} <= set(kept.tolist())
    assert_drawn_from(expected, [one[0] for one in drawn])


def test_sampling_is_the_models_distribution(model, tokenizer):
    prompts = [tuple(tokenizer("7+1=")["input_ids"]), tuple(tokenizer("5=")["input_ids"])]  # the second one is padded
    torch.manual_seed(1)
    drawn = LocalSampler(model, tokenizer).generate([prompt for prompt in prompts for _ in range(DRAWS)], 2)
    for prompt, responses in zip(prompts, (drawn[:DRAWS], drawn[DRAWS:]), strict=True):
        first = probabilities(model, tokenizer, prompt)
        assert_drawn_from(first, [response[0] for response in responses])
        likely = max(range(len(first)), key=lambda id: first[id] * (id not in LocalSampler(model, tokenizer).ends))
        after = [response[1] for response in responses if response[0] == likely]
        assert len(after) > 200
        assert_drawn_from(probabilities(model, tokenizer, (*prompt, likely)), after)


def test_a_server_is_asked_for_the_models_distribution(model, tokenizer, tmp_path):
    """One whose own defaults, and those of the checkpoint, would all change it; and which says what it drew from."""
    server, ends = VllmServer(tmp_path / "hostile"), LocalSampler(model, tokenizer).ends
    entries = model.get_output_embeddings().weight.shape[0]
    asked = Asked(2, False, ends, vocabulary_size(tokenizer), entries)
    prompt = tuple(tokenizer("7+1=")["input_ids"])
    with faulty_server(server.answer) as http:
        drawn = ServerEngine(Server(http.url), 4).draw([prompt] * 600, asked, range(600))
        again = ServerEngine(Server(http.url), 4).draw([prompt] * 9, asked, range(9))
        ids = ServerEngine(Server(http.url), 4).draw([prompt], replace(asked, greedy=True), [0])[0].ids
    first = probabilities(model, tokenizer, prompt)
    assert_drawn_from(first, [one.ids[0] for one in drawn])
    assert again == drawn[:9], "a seed gives the same response"
    assert {len(one.ids) for one in drawn if one.ids[0] not in ends} == {2}
    assert {len(one.ids) for one in drawn if one.ids[0] in ends} == {1}, "the token that ends a response is in it"
    assert all(math.isclose(one.log_probs[0], first[one.ids[0]].log().item(), abs_tol=1e-4) for one in drawn)
    drift = measure(model, [prompt] * 600, drawn, vocabulary_size(tokenizer), ends[0])
    assert drift.tokens == sum(len(one.ids) for one in drawn) and 0 < drift.mean < drift.largest < 1e-4
    assert [ids] == LocalSampler(model, tokenizer).generate([prompt], 2, greedy=True)


def test_greedy_takes_the_most_probable_token(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in ("7+1=", "5=", "33+4=")]
    for prompt, response in zip(prompts, LocalSampler(model, tokenizer).generate(prompts, 5, greedy=True), strict=True):
        ids = list(prompt)
        for token in response:
            assert token == probabilities(model, tokenizer, ids).argmax()
            ids.append(token)


def test_the_end_of_sequence_token_stays_where_it_is_the_padding_too(model, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    prompt = tuple(tokenizer("5=")["input_ids"])
    torch.manual_seed(2)
    responses = LocalSampler(model, tokenizer).generate([prompt] * 300, 8)
    ended = [response for response in responses if tokenizer.eos_token_id in response]
    assert 20 < len(ended) < 300
    assert all(
        response.count(tokenizer.eos_token_id) == 1 and response[-1] == tokenizer.eos_token_id for response in ended
    )
    assert all(len(response) == 8 for response in responses if not {*LocalSampler(model, tokenizer).ends} & {*response})
    share = sum(response == [tokenizer.eos_token_id] for response in responses) / len(responses)
    at_once = probabilities(model, tokenizer, prompt)[tokenizer.eos_token_id].item()
    assert abs(share - at_once) < 6 * math.sqrt(at_once * (1 - at_once) / len(responses)) + 1e-9


@pytest.mark.parametrize("named", [None, 5, [5], [8, 1, 5], "the tokenizer's own"])
def test_any_of_the_checkpoints_end_tokens_ends_a_response(model, tokenizer, named):
    """Chat models name several in generation_config.json; `named` need not be in the tokenizer's own order."""
    eos = tokenizer.eos_token_id
    assert eos == 1
    model.generation_config.eos_token_id = eos if isinstance(named, str) else named
    expected = {None: {1}, 5: {1, 5}}.get(named, {1}) if not isinstance(named, list) else {1, *named}
    assert {*LocalSampler(model, tokenizer).ends} == expected and LocalSampler(model, tokenizer).ends[0] == eos
    torch.manual_seed(3)
    prompts = [tokenizer(text)["input_ids"] for text in ("5=", "33+4=")] * 150
    responses = LocalSampler(model, tokenizer).generate(prompts, 12)
    for response in responses:
        assert not expected & {*response[:-1]}, "nothing follows the first token that ends a response"
        assert len(response) == 12 or response[-1] in expected
    assert {response[-1] for response in responses if len(response) < 12} == expected, "each of them ended some"


def test_the_model_is_left_as_it_was(model, tokenizer):
    before = model.generation_config
    model.train()
    LocalSampler(model, tokenizer).generate([tokenizer("5=")["input_ids"]], 2)
    assert model.training and model.generation_config is before and before.top_k == 1


def test_dropout_is_off_while_generating(load, tokenizer):
    torch.manual_seed(0)
    student = load_student(load("student.architecture.attention_dropout=0.9"), tokenizer)
    prompts = [tokenizer("33+4=")["input_ids"]] * 8
    responses = LocalSampler(student, tokenizer).generate(prompts, 6, greedy=True)
    assert len({tuple(response) for response in responses}) == 1


def test_a_mixture_of_experts_writes_behind_prompts_of_any_length(load, tokenizer):
    """transformers' router loss takes the mask of all positions for that of the new one."""
    torch.manual_seed(0)
    routed = load(
        'student.architecture={model_type="mixtral", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, '
        "num_key_value_heads=1, intermediate_size=32, num_local_experts=4, initializer_range=0.3, "
        "output_router_logits=true}"
    )
    student = load_student(routed, tokenizer)
    prompts = [tokenizer(text)["input_ids"] for text in ("5=", "33+4=")]
    responses = LocalSampler(student, tokenizer).generate(prompts, 4, greedy=True)
    assert responses == [LocalSampler(student, tokenizer).generate([prompt], 4, greedy=True)[0] for prompt in prompts]
    assert max(map(len, responses)) > 1, "more than one token was drawn"
    assert student.config.output_router_logits, "training still has its router loss"


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_takes_a_sampler_that_is_no_model(load, teacher_set, tmp_path, monkeypatch, broken):
    """Its responses are what is trained on and evaluated; it is told of new weights before it writes, and closed."""
    calls = []

    class Scripted:
        def __init__(self, student, tokenizer):
            self.ends = (tokenizer.eos_token_id,)
            self.response = [*tokenizer("7.")["input_ids"], tokenizer.eos_token_id]

        def generate(self, prompts, max_new_tokens, *, greedy=False):
            calls.append("greedy" if greedy else "sample")
            if broken:
                raise ValueError("no server")
            return [self.response for _ in prompts]

        def sync(self):
            calls.append("sync")

        def metrics(self):
            return {"liked": 0.5}

        def close(self):
            calls.append("close")

    monkeypatch.setattr(sampling, "LocalSampler", Scripted)
    config = load(
        *GKD,
        teacher_set,
        "train.steps=2",
        f"evaluation.data={tmp_path / 'test.jsonl'}",
        'evaluation.metrics=["exact_match"]',
        r"evaluation.answer='(\d+)'",
    )
    if broken:
        with pytest.raises(ValueError, match="no server"):
            train(config)
        assert calls == ["sync", "greedy", "close"]
        return
    result = train(config)
    assert calls == ["sync", "greedy", "sync", "sample", "sync", "sample", "sync", "greedy", "close"]
    lines = read_metrics(result.output / "metrics.jsonl")
    assert [line["tokens"] for line in lines[1:]] == [4 * 3, 4 * 3]
    assert [line["liked"] for line in lines[1:]] == [0.5, 0.5], "what it measured is logged"
    assert result.evaluations[2]["finished"] == 1 and 0 < result.evaluations[2]["exact_match"] < 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda responses: responses[1:], "expected 2 responses, one for each prompt, got 1"),
        (lambda responses: [responses[0], []], "expected responses of 1 to 6 tokens, got one of 0"),
        (lambda responses: [responses[0], [3] * 7], "expected responses of 1 to 6 tokens, got one of 7"),
        (lambda responses: [[3, 999], responses[1]], r"expected ids in \[0, \d+\), got 999"),
        (lambda responses: [[-1], responses[1]], r"expected ids in \[0, \d+\), got -1"),
        (lambda responses: [[3.0], responses[1]], r"expected ids in \[0, \d+\), got 3\.0"),
    ],
    ids=["few", "empty", "long", "beyond", "negative", "no id"],
)
@pytest.mark.parametrize("greedy", [False, True])
def test_what_is_no_response_to_each_prompt_is_refused(load, teacher_set, monkeypatch, tmp_path, spoil, said, greedy):
    """In a step, and in an evaluation."""

    class Broken(LocalSampler):
        def generate(self, prompts, max_new_tokens, *, greedy=False):
            responses = super().generate(prompts, max_new_tokens, greedy=greedy)
            return spoil(responses) if greedy == spoiled else responses

    spoiled = greedy
    monkeypatch.setattr(sampling, "LocalSampler", Broken)
    settings = ("train.steps=1", "train.batch_size=2", "evaluation.batch_size=2", "evaluation.limit=2")
    answers = (
        f"evaluation.data={tmp_path}/test.jsonl",
        'evaluation.metrics=["exact_match"]',
        "evaluation.answer='(.*)'",
    )
    with pytest.raises(ValueError, match=f"sampler: {said}"):
        train(load(*GKD, teacher_set, *settings, *answers))

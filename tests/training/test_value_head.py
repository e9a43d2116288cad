"""A process reward model with a value head: tokens off the path behind the cache, and what is no such model."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from kdkernels.errors import InputError
from kdkernels.judges import FunctionScorer, ValueHead, scores
from kdkernels.judges.function import find_function
from kdkernels.judges.value_head import OWN_FILE

V, H = 23, 16
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": H, "intermediate_size": 32, "vocab_size": V}
FAMILIES = {
    "qwen2": SIZES | {"num_key_value_heads": 1},
    "llama": SIZES | {"num_key_value_heads": 1},
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": H, "n_positions": 40, "vocab_size": V},
}


def write_model(path, family="qwen2", seed=1, cls=AutoModelForCausalLM, **options):
    torch.manual_seed(seed)
    model = cls.from_config(AutoConfig.for_model(family, initializer_range=0.5, **FAMILIES[family], **options))
    model.save_pretrained(path)
    return model


def write_prm(path, family="qwen2", seed=1, **options):
    """A backbone and the head beside it."""
    write_model(path, family, seed, **options)
    weight, bias = torch.randn(1, H, generator=torch.Generator().manual_seed(seed)), torch.tensor([0.3])
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, path / "value_head.safetensors")
    return path


def texts(seed=0):
    """Prompts, responses and what another model proposes: at some places the same token, in one response everywhere."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(V, (n,), generator=generator).tolist()  # noqa: E731
    prompts, responses = [draw(n) for n in (3, 6, 2, 5)], [draw(n) for n in (7, 1, 9, 4)]
    proposals = [[token if i % 3 == 0 else (token + 1 + i) % V for i, token in enumerate(one)] for one in responses]
    proposals[3] = list(responses[3])
    return prompts, responses, proposals


def naive(scorer, prompts, responses, proposals):
    """A forward of its own for each prefix and token."""
    with torch.no_grad():
        return [
            torch.tensor(
                [
                    [
                        torch.sigmoid(
                            scorer.backbone(torch.tensor([[*prompt, *response[:t], token]])).last_hidden_state[0, -1]
                            @ scorer.weight
                            + scorer.bias
                        )
                        for t, token in enumerate(row)
                    ]
                    for row in (response, other)
                ]
            )
            for prompt, response, other in zip(prompts, responses, proposals, strict=True)
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_off_the_path_are_read_behind_their_own_prefix(tmp_path, family):
    scorer = ValueHead.load(write_prm(tmp_path, family), torch.float32, torch.device("cpu"))
    prompts, responses, proposals = texts()
    got, expected = scores(scorer, "it", prompts, responses, proposals), naive(scorer, prompts, responses, proposals)
    for one, right in zip(got, expected, strict=True):
        torch.testing.assert_close(one, right, atol=2e-6, rtol=2e-6)
    spread = torch.cat([one.flatten() for one in expected])
    assert spread.std() > 0.1  # a head that saw nothing would give one number
    assert any((one[0] - one[1]).abs().max() > 0.05 for one in expected) and torch.equal(*got[3])


def test_a_batch_is_its_responses(tmp_path):
    scorer = ValueHead.load(write_prm(tmp_path), torch.float32, torch.device("cpu"))
    together = scorer.score(*texts())
    for b, one in enumerate(zip(*texts(), strict=True)):
        torch.testing.assert_close(scorer.score(*([each] for each in one))[0], together[b], atol=2e-6, rtol=2e-6)


def test_heads_of_these_names_and_places_are_read(tmp_path):
    weight, bias = torch.randn(1, H), torch.tensor([0.3])
    write_model(tmp_path / "a")
    inside = load_file(tmp_path / "a" / "model.safetensors")
    for name in ("v_head.summary", "v_head"):
        head = {f"{name}.weight": weight, f"{name}.bias": bias}
        save_file(inside | head, tmp_path / "a" / "model.safetensors", {"format": "pt"})
        read = ValueHead.load(tmp_path / "a", torch.float32, torch.device("cpu"))
        assert torch.equal(read.weight, weight[0]) and read.bias == bias[0]
    torch.save(inside | {"v_head.weight": weight}, tmp_path / "a" / "pytorch_model.bin")
    (tmp_path / "a" / "model.safetensors").unlink()
    assert ValueHead.load(tmp_path / "a", torch.float32, torch.device("cpu")).bias == 0
    own = write_model(tmp_path / "b", cls=AutoModelForTokenClassification, num_labels=1).eval()
    read = ValueHead.load(tmp_path / "b", torch.float32, torch.device("cpu"))
    prompts, responses, _ = texts()
    ids = torch.tensor([[*prompts[0], *responses[0]]])
    with torch.no_grad():
        logits = own(ids).logits[0, len(prompts[0]) :, 0]
    torch.testing.assert_close(read.score(prompts[:1], responses[:1], responses[:1])[0][0], logits.sigmoid())


def test_a_head_in_one_of_several_files_is_found(tmp_path):
    model = write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    index = tmp_path / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    assert len(set(contents["weight_map"].values())) > 1
    save_file({"v_head.summary.weight": torch.ones(1, H)}, tmp_path / "head.safetensors", {"format": "pt"})
    contents["weight_map"]["v_head.summary.weight"] = "head.safetensors"
    index.write_text(json.dumps(contents))
    assert torch.equal(ValueHead.load(tmp_path, torch.float32, torch.device("cpu")).weight, torch.ones(H))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_model, "no value head in .*: expected one of v_head.summary.weight.*or .judge. function"),
        (lambda path: path.mkdir(), "no value head"),
        (
            lambda path: (write_model(path), save_file({"score.weight": torch.ones(2, H)}, path / OWN_FILE)),
            r"expected a value head of weight \[1, 16\] and bias \[1\].*got \[2, 16\] and \[2\]",
        ),
        (
            lambda path: (path.mkdir(), save_file({"score.weight": torch.ones(1, H)}, path / OWN_FILE)),
            "cannot be read as a model",
        ),
        (lambda path: (write_prm(path), (path / "value_head.safetensors").write_bytes(b"1234")), "cannot be read"),
    ],
    ids=["none", "empty", "shape", "no backbone", "cut"],
)  # fmt: skip
def test_what_is_no_such_model_is_refused(tmp_path, write, said):
    write(tmp_path / "model")
    with pytest.raises(InputError, match=rf"\[judge\] path: .*{said}"):
        ValueHead.load(tmp_path / "model", torch.float32, torch.device("cpu"))


def test_what_it_cannot_score_is_refused(tmp_path):
    scorer = ValueHead.load(write_prm(tmp_path, "gpt2"), torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match="at most 40 tokens, the positions of the model, got 41: lower"):
        scorer.score([[1] * 40], [[1]], [[2]])
    scorer = ValueHead.load(
        write_prm(tmp_path / "w", use_sliding_window=True, sliding_window=8, max_window_layers=0),
        torch.float32,
        torch.device("cpu"),
    )
    with pytest.raises(InputError, match="at most 7 tokens, the window that its cache keeps, got 8"):
        scorer.score([[1] * 7], [[1]], [[2]])
    given = [[1] * 4], [[1, 2, 3]], [[2, 4, 5]]
    torch.testing.assert_close(scorer.score(*given)[0], naive(scorer, *given)[0], atol=2e-6, rtol=2e-6)


def longer_is_better(prefixes, tokens):
    return [len(prefix) / 100 + token / 1000 for prefix, token in zip(prefixes, tokens, strict=True)]


def test_a_function_scores():
    calls = []

    def judge(prefixes, tokens):
        calls.append(len(tokens))
        assert len(prefixes) == len(tokens)
        return longer_is_better(prefixes, tokens)

    prompts, responses, proposals = texts()
    found = scores(FunctionScorer(judge, "it", batch_size=4), "it", prompts, responses, proposals)
    for prompt, response, other, one in zip(prompts, responses, proposals, found, strict=True):
        right = [[(len(prompt) + t) / 100 + token / 1000 for t, token in enumerate(row)] for row in (response, other)]
        torch.testing.assert_close(one, torch.tensor(right))
    different = sum(
        a != b for one, two in zip(responses, proposals, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert sum(calls) == 21 + different and max(calls) == 4  # what both propose is asked about once


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            lambda prefixes, tokens: [0.5] * (len(tokens) - 1),
            r"expected 2 numbers, one for each prefix, got shape \[1\]",
        ),
        (lambda prefixes, tokens: torch.ones(len(tokens), 1), r".*got shape \[2, 1\]"),
        (lambda prefixes, tokens: None, "expected 2 numbers"),
        (lambda prefixes, tokens: [float("nan")] * len(tokens), "expected scores from 0 to 1, got nan"),
        (lambda prefixes, tokens: [1.5] * len(tokens), "expected scores from 0 to 1, got 1.5"),
        (lambda prefixes, tokens: [-0.1] * len(tokens), "expected scores from 0 to 1, got -0.1"),
        (lambda prefixes, tokens: {}["text"], "the function raised KeyError: 'text'"),
        (lambda prefixes, tokens: sys.exit(3), "the function raised SystemExit: 3"),
    ],
)
def test_what_is_no_score_is_refused(answer, said):
    with pytest.raises(InputError, match=f"a judge: {said}"):
        scores(FunctionScorer(answer, "a judge"), "a judge", [[1]], [[2]], [[3]])


def test_a_scorer_of_another_shape_is_refused():
    class Wrong:
        def score(self, prompts, responses, proposals):
            return [torch.ones(len(responses[0]), 2)]

    with pytest.raises(
        InputError, match=r"it: expected floating-point scores of shape \[2, 3\], got torch.float32 \[3, 2\]"
    ):
        scores(Wrong(), "it", [[1]], [[1, 2, 3]], [[1, 2, 3]])
    with pytest.raises(InputError, match="it: expected the scores of 2 responses, got 1"):
        scores(Wrong(), "it", [[1]] * 2, [[1, 2, 3]] * 2, [[1, 2, 3]] * 2)


def test_functions_are_found(tmp_path, monkeypatch):
    function, file = find_function("json:dumps")
    assert callable(function) and file.name == "__init__.py"
    for name in ("json", "json:nothing", "no_such_module:f", "math:sqrt", ""):
        with pytest.raises(InputError, match=r"expected (module:function|a Python function)"):
            find_function(name)

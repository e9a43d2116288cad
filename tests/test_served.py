"""What servers return, as kd.TopK: every format gives the lists that were made by hand; lists in other places do not.

Axes: B sequences, L positions, V vocabulary, K entries.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import truth

import kdkernels as kd
from kdkernels import reference

F64 = torch.float64
VOCABULARY, K = 40, 5
TEXTS = [[3, 17, 9, 22, 5, 31], [8, 30, 2, 27]]  # prompts of two tokens, then responses; 27 is a likely one
PROMPT = 2


def teacher_logits() -> list[torch.Tensor]:
    """[T, V] of each text: what each of its tokens predicts next."""
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(len(text), VOCABULARY, generator=generator, dtype=F64) for text in TEXTS]


def labels_of(texts=TEXTS, left=False, length=7) -> torch.Tensor:
    labels = torch.full((len(texts), length), -100)
    for row, text in zip(labels, texts, strict=True):
        start = length - len(text) if left else 0
        row[start + PROMPT : start + len(text)] = torch.tensor(text[PROMPT:])
    return labels


def tops(logits: torch.Tensor, token: int) -> dict[int, float]:
    """The K most likely entries and, where it is none of them, the token: what a server lists of a token."""
    log_p = logits.log_softmax(-1)
    found = {int(i): float(log_p[i]) for i in log_p.topk(K).indices}
    return {token: float(log_p[token]), **found}


def by_token(b: int) -> list[dict[int, float] | None]:
    """The lists about the tokens of text b: the first is predicted by nothing."""
    logits = teacher_logits()[b]
    return [None] + [tops(logits[t - 1], TEXTS[b][t]) for t in range(1, len(TEXTS[b]))]


def name(i: int) -> str:
    return f"token_id:{i}"


def chat(b: int, naming=name) -> dict:
    content = [
        {
            "token": naming(token),
            "logprob": listed[token],
            "bytes": None,
            "top_logprobs": [
                {"token": naming(i), "logprob": value, "bytes": None}
                for i, value in sorted(listed.items(), key=lambda item: -item[1])[:K]
            ],
        }
        for token, listed in list(zip(TEXTS[b], by_token(b), strict=True))[PROMPT:]
    ]
    return {"object": "chat.completion", "choices": [{"index": 0, "logprobs": {"content": content}}]}


def completions(echo: bool, naming=name) -> dict:
    choices = []
    for b, text in enumerate(TEXTS):
        first = 0 if echo else PROMPT
        lists = by_token(b)[first:]
        logprobs = {
            "tokens": [naming(token) for token in text[first:]],
            "token_logprobs": [None if each is None else each[i] for i, each in zip(text[first:], lists, strict=True)],
            "top_logprobs": [None if each is None else {naming(i): v for i, v in each.items()} for each in lists],
        }
        choices.insert(0, {"index": b, "text": "", "logprobs": logprobs})  # in another order than asked for
    return {"object": "text_completion", "choices": choices}


def vllm_json(b: int) -> dict:
    lists = [
        each and {str(i): {"logprob": v, "rank": 1, "decoded_token": "x"} for i, v in each.items()}
        for each in by_token(b)
    ]
    return {"choices": [{"index": 0, "prompt_logprobs": lists}]}


def request_output(b: int, generated=False) -> SimpleNamespace:
    """vLLM's RequestOutput, whose prompt is the whole text, or which wrote the response."""
    lists = [
        each and {i: SimpleNamespace(logprob=v, rank=1, decoded_token=None) for i, v in each.items()}
        for each in by_token(b)
    ]
    if generated:
        completion = SimpleNamespace(token_ids=TEXTS[b][PROMPT:], logprobs=lists[PROMPT:])
        return SimpleNamespace(prompt_logprobs=None, prompt_token_ids=TEXTS[b][:PROMPT], outputs=[completion])
    completion = SimpleNamespace(token_ids=[1], logprobs=None)
    return SimpleNamespace(prompt_logprobs=lists, prompt_token_ids=TEXTS[b], outputs=[completion])


FORMATS = {
    "chat completions": lambda layout: kd.TopK.from_openai([chat(0), json.dumps(chat(1))], layout),
    "completions": lambda layout: kd.TopK.from_openai(completions(echo=False), layout),
    "completions with echo": lambda layout: kd.TopK.from_openai(completions(echo=True), layout),
    "a client's object": lambda layout: kd.TopK.from_openai(
        SimpleNamespace(model_dump=lambda: completions(echo=False)), layout
    ),
    "vLLM's server": lambda layout: kd.TopK.from_vllm([vllm_json(0), vllm_json(1)], layout),
    "vLLM's prompts": lambda layout: kd.TopK.from_vllm([request_output(0), request_output(1)], layout),
    "vLLM's completions": lambda layout: kd.TopK.from_vllm([request_output(b, True) for b in (0, 1)], layout),
    "prompt_logprobs": lambda layout: kd.TopK.from_vllm([by_token(0), by_token(1)], layout),
}


def lists_of(teacher: kd.TopK, b: int, t: int) -> dict[int, float]:
    pairs = zip(teacher.indices[b, t].tolist(), teacher.log_probs[b, t].tolist(), strict=True)
    return {i: value for i, value in pairs if value != -math.inf}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_lists(form):
    layout = kd.Layout.from_labels(labels_of())
    teacher = FORMATS[form](layout)
    assert teacher.indices.shape == (*layout.shape, K + 1) and teacher.indices.dtype == torch.int32
    for b, text in enumerate(TEXTS):
        logits = teacher_logits()[b]
        for t in range(PROMPT - 1, len(text) - 1):
            assert lists_of(teacher, b, t) == pytest.approx(tops(logits[t], text[t + 1]), abs=1e-6)
    teacher.verify(layout)
    outside = torch.ones(layout.shape, dtype=torch.bool).flatten().index_fill(0, layout.index, False).view(layout.shape)
    assert teacher.log_probs[outside].isnan().all(), "a position that is not scored has no number"


@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.5)], ids=lambda d: d.family)
def test_the_loss_is_that_of_each_list_for_itself(divergence):
    """Of lists of K and of K + 1 entries, in fp64: no number depends on the padding."""
    layout = kd.Layout.from_labels(labels_of())
    teacher = FORMATS["chat completions"](layout)
    torch.manual_seed(1)
    hidden, weight = torch.randn(2, 7, 6, dtype=F64), torch.randn(VOCABULARY, 6, dtype=F64).requires_grad_()
    value = kd.divergence(kd.Head(hidden, weight), teacher, divergence, rows=layout)
    expected = torch.zeros_like(value)
    sizes = set()
    for b, text in enumerate(TEXTS):
        for t in range(PROMPT - 1, len(text) - 1):
            listed = tops(teacher_logits()[b][t], text[t + 1])
            ids, log_p = torch.tensor([list(listed)]), torch.tensor([list(listed.values())], dtype=F64)
            sizes.add(len(listed))
            one = reference.topk_divergence((hidden[b, t] @ weight.T)[None], ids, log_p, divergence)
            expected = expected.index_put((torch.tensor([b]), torch.tensor([t])), one)
    assert sizes == {K, K + 1}
    assert truth.relative(value.detach(), expected.detach()) < 1e-6  # the lists are fp32
    (gradient,), (exact,) = (torch.autograd.grad(each.sum(), weight) for each in (value, expected))
    assert truth.relative(gradient, exact) < 1e-5


def test_padding_on_the_left_needs_starts():
    layout, plain = kd.Layout.from_labels(labels_of(left=True)), kd.Layout.from_labels(labels_of())
    expected = FORMATS["prompt_logprobs"](plain)
    for make in (
        lambda **starts: kd.TopK.from_vllm([by_token(0), by_token(1)], layout, **starts),
        lambda **starts: kd.TopK.from_openai(completions(echo=True), layout, **starts),
    ):
        teacher = make(starts=torch.tensor([7 - len(text) for text in TEXTS]))
        for values, others in ((teacher.indices, expected.indices), (teacher.log_probs, expected.log_probs)):
            assert torch.equal(values.flatten(0, 1)[layout.index], others.flatten(0, 1)[plain.index])
        with pytest.raises(ValueError, match=r"starts="):
            make()
    generated = FORMATS["completions"](layout)
    assert torch.equal(generated.log_probs.flatten(0, 1)[layout.index], expected.log_probs.flatten(0, 1)[plain.index])


def test_packed_texts_come_one_behind_the_other():
    text = TEXTS[0] + TEXTS[1]
    labels = torch.tensor([text])
    ids = torch.tensor([[*range(len(TEXTS[0])), *range(len(TEXTS[1]))]])
    layout = kd.Layout.from_labels(labels, position_ids=ids)
    expected = kd.TopK.from_vllm([by_token(0) + by_token(1)], layout)
    assert lists_of(expected, 0, len(TEXTS[0])) == pytest.approx(by_token(1)[1], abs=1e-6)
    for packed in ([request_output(0), request_output(1)], [by_token(0), by_token(1)], [vllm_json(0), vllm_json(1)]):
        teacher = kd.TopK.from_vllm([packed], layout)
        assert torch.equal(teacher.indices, expected.indices)
        assert torch.equal(teacher.log_probs[0, layout.index], expected.log_probs[0, layout.index])
    labels = labels.masked_fill(ids < PROMPT, -100)
    generated = kd.TopK.from_vllm([[request_output(b, True) for b in (0, 1)]], kd.Layout.from_labels(labels))
    assert lists_of(generated, 0, len(TEXTS[0]) + 1) == pytest.approx(by_token(1)[PROMPT], abs=1e-6)


def test_values_that_say_not_known_are_not_listed():
    lists = by_token(0)
    lists[3] = {22: -9999.0, 7: -0.5, 11: -math.inf, 4: -3.0}
    teacher = kd.TopK.from_vllm([lists], kd.Layout.from_labels(labels_of(TEXTS[:1])))
    assert lists_of(teacher, 0, 2) == pytest.approx({7: -0.5, 4: -3.0})
    assert len(set(teacher.indices[0, 2].tolist())) == K + 1, "padding has ids of its own"


# ---- lists in other places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["completions with echo", "vLLM's server", "vLLM's prompts", "prompt_logprobs"])
@pytest.mark.parametrize("by", [-1, 1])
def test_lists_one_position_off_are_refused_by_name(form, by):
    with pytest.raises(ValueError, match=r"^(json|outputs): expected (at \[0, \d\] the list about token|a list about)"):
        FORMATS[form](kd.Layout.from_labels(labels_of().roll(by, dims=1)))


@pytest.mark.parametrize("form", ["chat completions", "completions", "vLLM's completions"])
def test_lists_of_another_response_are_refused_by_name(form):
    with pytest.raises(ValueError, match=r"^(json|outputs): expected at \[0, 2\] the list about token 21, .*22"):
        FORMATS[form](kd.Layout.from_labels(labels_of([[3, 17, 9, 21, 5, 31], TEXTS[1]])))


def test_lists_put_by_hand_one_position_off_are_found():
    layout = kd.Layout.from_labels(labels_of())
    teacher = FORMATS["vLLM's prompts"](layout)
    moved = kd.TopK(teacher.indices.roll(1, 1), teacher.log_probs.roll(1, 1))
    with pytest.raises(ValueError, match=r"^indices: expected token 9 among those at \[0, 1\].*position t - 1"):
        moved.verify(layout)
    with pytest.raises(ValueError, match=r"^layout: expected one of shape \[2, 7\] .*without tokens"):
        teacher.verify(kd.Layout.from_mask(layout.target >= 0))


# ---- texts -----------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Ids below 38 are written so, with a space before even ones; 38 and 39 are both undecodable."""

    def text(self, i: int) -> str:
        return "\ufffd" if i >= 38 else f"{' ' * (i % 2 == 0)}{i}"

    def __len__(self) -> int:
        return VOCABULARY

    def get_vocab(self) -> dict[str, int]:
        return {self.text(i).replace(" ", "\u0120") if i < 38 else f"<0x{i}>": i for i in range(VOCABULARY)}

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return [self.text(i) for (i,) in ids]


@pytest.mark.parametrize("written", ["decoded", "as the vocabulary has them"])
def test_tokens_that_are_texts(written):
    tokenizer, layout = Tokenizer(), kd.Layout.from_labels(labels_of())
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
    naming = pieces.__getitem__ if written != "decoded" else tokenizer.text
    expected = FORMATS["completions"](layout)
    found = kd.TopK.from_openai([chat(0, naming), chat(1, naming)], layout, tokenizer)
    for t in layout.index.tolist():
        b, t = divmod(t, 7)
        assert lists_of(found, b, t) == pytest.approx(lists_of(expected, b, t))


def test_a_text_of_several_ids_is_refused_or_left_to_the_bucket():
    tokenizer, layout = Tokenizer(), kd.Layout.from_labels(labels_of(TEXTS[:1]))
    response = chat(0, tokenizer.text)
    response["choices"][0]["logprobs"]["content"][1]["top_logprobs"][2] = {"token": "\ufffd", "logprob": -2.0}
    with pytest.raises(ValueError, match=r"^json: .*got '\ufffd' at \[0, 2\].*\[38, 39\].*drop_ambiguous"):
        kd.TopK.from_openai(response, layout, tokenizer)
    teacher = kd.TopK.from_openai(response, layout, tokenizer, drop_ambiguous=True)
    assert not {38, 39} & set(lists_of(teacher, 0, 2)) and len(lists_of(teacher, 0, 2)) >= K - 1


def test_the_labels_say_which_token_was_sampled_where_its_text_does_not():
    tokenizer = Tokenizer()
    entry = {"token": "\ufffd", "logprob": -3.0, "top_logprobs": [{"token": "7", "logprob": -0.1}]}
    response = {"choices": [{"index": 0, "logprobs": {"content": [entry]}}]}
    teacher = kd.TopK.from_openai(response, kd.Layout.from_labels(torch.tensor([[-100, 39]])), tokenizer)
    assert lists_of(teacher, 0, 0) == pytest.approx({7: -0.1, 39: -3.0})


def test_a_tokenizer_of_transformers():
    pytest.importorskip("transformers")
    from training.families import byte_level

    tokenizer = byte_level()
    ids = tokenizer("7+8=15. Köln é", add_special_tokens=False).input_ids
    entries = [
        {
            "token": tokenizer.decode([i]),
            "logprob": -1.0,
            "top_logprobs": [{"token": tokenizer.decode([i + 1]), "logprob": -2.0}],
        }
        for i in ids
        if "\ufffd" not in tokenizer.decode([i]) + tokenizer.decode([i + 1])
    ]
    kept = [i for i in ids if "\ufffd" not in tokenizer.decode([i]) + tokenizer.decode([i + 1])]
    layout = kd.Layout.from_labels(torch.tensor([[-100, *kept]]))
    teacher = kd.TopK.from_openai({"choices": [{"logprobs": {"content": entries}}]}, layout, tokenizer)
    assert len(kept) > 4
    assert [set(lists_of(teacher, 0, t)) for t in range(len(kept))] == [{i, i + 1} for i in kept]


# ---- bad input -------------------------------------------------------------------------------------------------------

LAYOUT = kd.Layout.from_labels(labels_of())


def without(response: dict, *path) -> dict:
    response = json.loads(json.dumps(response))
    inner = response
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = None
    return response


CONTENT = ("choices", 0, "logprobs", "content")
BAD = {
    "no choices": (lambda: kd.TopK.from_openai([], LAYOUT), ValueError, ["json", "choices"]),
    "no logprobs": (
        lambda: kd.TopK.from_openai(without(chat(0), "choices", 0, "logprobs"), LAYOUT),
        ValueError, ["json", "top_logprobs", "ask the server"],
    ),
    "a missing value": (
        lambda: kd.TopK.from_openai([without(chat(0), *CONTENT, 1, "logprob"), chat(1)], LAYOUT),
        ValueError, ["json", "log-probability", "[0, 2]", "None"],
    ),
    "too few responses": (
        lambda: kd.TopK.from_openai(chat(0), LAYOUT), ValueError, ["json", "each of the layout's 2", "got 1"],
    ),
    "without the final token": (
        lambda: kd.TopK.from_vllm([request_output(0, True)] * 2, LAYOUT),
        ValueError, ["outputs", "expected 2 tokens in response 1", "got 4", "EOS"],
    ),
    "texts of no tokenizer": (
        lambda: kd.TopK.from_openai([chat(0, str), chat(1, str)], LAYOUT), TypeError, ["tokenizer", "None", "[0, 1]"],
    ),
    "a text that no token has": (
        lambda: kd.TopK.from_openai([chat(0, lambda i: f"x{i}"), chat(1)], LAYOUT, Tokenizer()),
        ValueError, ["json", "'x9'", "[0, 1]"],
    ),
    "no outputs": (lambda: kd.TopK.from_vllm([], LAYOUT), ValueError, ["outputs", "at least one"]),
    "outputs without": (
        lambda: kd.TopK.from_vllm([SimpleNamespace(outputs=[SimpleNamespace(logprobs=None)])], LAYOUT),
        ValueError, ["outputs", "prompt_logprobs=20"],
    ),
    "both kinds": (
        lambda: kd.TopK.from_vllm([request_output(0), request_output(1, True)], LAYOUT),
        ValueError, ["outputs", "both"],
    ),
    "no JSON": (lambda: kd.TopK.from_openai("<html>", LAYOUT), ValueError, ["json", "JSON", "<html>"]),
    "no ids": (
        lambda: kd.TopK.from_vllm([[None, {"x": -1.0}], by_token(1)], LAYOUT),
        ValueError, ["outputs", "{id: log-probability}", "'x'"],
    ),
    "no lists": (lambda: kd.TopK.from_vllm([[None, 5]] * 2, LAYOUT), ValueError, ["outputs", "log-probability", "5"]),
    "a mask": (lambda: kd.TopK.from_vllm([by_token(0)], LAYOUT.target >= 0), TypeError, ["layout", "Layout", "Tensor"]),
    "one start": (
        lambda: kd.TopK.from_vllm([by_token(0), by_token(1)], LAYOUT, starts=3), TypeError, ["starts", "2", "3"],
    ),
    "too few texts": (
        lambda: kd.TopK.from_vllm([by_token(0)], LAYOUT), ValueError, ["outputs", "2 sequences", "1 texts"],
    ),
    "starts of generated tokens": (
        lambda: kd.TopK.from_openai(completions(False), LAYOUT, starts=[0, 0]), ValueError, ["starts", "None"],
    ),
    "a list of nothing": (
        lambda: kd.TopK.from_vllm([[None, {}, {9: -9999.0}, *by_token(0)[3:]], by_token(1)], LAYOUT),
        ValueError, ["outputs", "[0, 1]", "none"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_name_argument_expected_and_actual(case):
    call, error, told = BAD[case]
    with pytest.raises(error) as raised:
        call()
    missing = [part for part in told if part not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"
    assert str(raised.value).startswith(told[0]), f"does not begin with the argument's name: {raised.value}"

"""Data files: every line counts. Batches: which positions predict what."""

import json
from collections import Counter

import pytest
import torch

from kdkernels.training import InputError
from kdkernels.training.data import ExampleStream, collate, load_examples, render
from kdkernels.training.model import load_tokenizer


def test_examples_are_rendered_and_tokenized(load):
    config = load()
    tokenizer = load_tokenizer(config)
    examples = load_examples(config.data, config.data.train, tokenizer)
    assert len(examples.usable) == 32 and examples.long_prompts == examples.long_responses == 0
    first = examples.usable[1]
    assert (first.line, first.prompt, first.response) == (2, "0+2=", "2.")
    assert tokenizer.decode(first.prompt_ids) == "0+2="
    assert tokenizer.decode(first.response_ids[:-1]) == "2." and first.response_ids[-1] == tokenizer.eos_token_id


def test_too_long_examples_are_left_out_and_counted(load):
    config = load("data.max_response_tokens=3", "data.max_prompt_tokens=4", "data.prompt='{question}'")
    tokenizer = load_tokenizer(config)
    with open(config.data.train, "a") as file:
        file.write(json.dumps({"question": "1+1+1=", "answer": "3."}) + "\n")
    examples = load_examples(config.data, config.data.train, tokenizer)
    two_digits = sum(a + b > 9 for a in range(8) for b in range(0, 8, 2))
    assert (examples.long_prompts, examples.long_responses) == (1, two_digits)
    assert len(examples.usable) == 32 - two_digits
    assert "left out 1 with too long a prompt" in str(examples) and f"{two_digits} with too long a response" in str(
        examples
    )
    config = load("data.max_prompt_tokens=2")
    with pytest.raises(InputError, match=r"left out 33 with too long a prompt, 0 .*none is left"):
        load_examples(config.data, config.data.train, tokenizer)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"question": "1"', "line 33: expected a JSON object: "),
        (b"", "line 33: expected a JSON object: "),
        (b"[1, 2]", "line 33: expected a JSON object, got list"),
        (b'{"question": "\xff", "answer": "1"}', "line 33: expected a JSON object: "),
        (b'{"question": "1"}', "line 33: field 'answer' of [data] response is missing; the line has question"),
        (b'{"question": "", "answer": "1"}', "line 33: the prompt '' has no tokens"),
    ],
)
def test_a_broken_line_is_named(load, line, expected):
    config = load()
    tokenizer = load_tokenizer(config)
    with open(config.data.train, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError) as refusal:
        load_examples(config.data, config.data.train, tokenizer)
    assert str(refusal.value).startswith(f"{config.data.train}, {expected}")
    if "no tokens" not in expected:
        with pytest.raises(InputError) as refusal:
            load_tokenizer(config)
        assert str(refusal.value).startswith(f"{config.data.train}, {expected}")


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{question:d}", "Unknown format code"), ("{question!z}", "conversion"), ("{question:{width}}", "width")],
)
def test_a_template_that_a_line_cannot_fill_is_named_with_it(load, template, expected):
    config = load(f"data.response='{template}'")
    place = f"{config.data.train}, line 1: [data] response: '{template}' cannot be filled in: "
    for read in (lambda: load_tokenizer(config), lambda: list(render(config.data, config.data.train))):
        with pytest.raises(InputError) as refusal:
            read()
        assert str(refusal.value).startswith(place) and expected in str(refusal.value)


def test_a_file_without_text_is_named(load):
    config = load()
    with open(config.data.train, "w"):
        pass
    with pytest.raises(InputError, match=r"\[tokenizer\] trained on /.*train\.jsonl: texts: expected .* got 0"):
        load_tokenizer(config)


@pytest.mark.parametrize("template", ["{", "{}", "{question.x}", "{0}"])
def test_a_template_that_is_none(load, template):
    config = load(f"data.prompt='{template}'")
    with pytest.raises(InputError, match=r"\[data\] prompt: "):
        load_tokenizer(config)


def test_a_batch_predicts_exactly_the_response_tokens():
    eos = 9
    prompts, responses = [(1, 2, 3), (4,)], [(5, eos), (6, 7, eos)]
    batch = collate(prompts, responses, pad_id=eos)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.layout.lengths == (2, 3)
    assert batch.layout.index.tolist() == [2, 3, 5 + 0, 5 + 1, 5 + 2]
    # the end-of-sequence token is a label although it is also the padding
    assert batch.target.flatten()[batch.layout.index].tolist() == [5, eos, 6, 7, eos]
    assert torch.equal(batch.target[:, :-1], batch.input_ids[:, 1:])


def test_a_response_cut_short_has_no_end():
    batch = collate([(1,)], [(5, 6)], pad_id=9)
    assert batch.target.flatten()[batch.layout.index].tolist() == [5, 6]


def test_every_epoch_has_every_example_in_an_order_of_its_own():
    stream = ExampleStream(size=10, seed=1)
    batches = [stream.next(7) for _ in range(10)]
    drawn = [example for batch in batches for example in batch]
    epochs = [drawn[i : i + 10] for i in range(0, 70, 10)]
    assert all(Counter(epoch) == Counter(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert ExampleStream(size=10, seed=2).next(10) != epochs[0]


def test_a_stream_goes_on_from_its_position():
    stream = ExampleStream(size=10, seed=1)
    stream.next(17)
    assert ExampleStream(size=10, seed=1, position=stream.position).next(25) == stream.next(25)

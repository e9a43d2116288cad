"""Data files: every line counts. Batches: which positions predict what."""

import json
import random
from collections import Counter

import pytest
import torch

from kdkernels.data import ExampleStream, collate, sample_id
from kdkernels.data import examples as examples_module
from kdkernels.data.texts import render
from kdkernels.data.tokenizers import train_tokenizer
from kdkernels.training import InputError
from kdkernels.training.inputs import read_examples, read_inputs
from kdkernels.training.models.loading import load_tokenizer

from .conftest import GKD
from .families import byte_level, llama, metaspace, word_pieces


def test_examples_are_rendered_and_tokenized(load):
    config = load()
    tokenizer = load_tokenizer(config)
    examples = read_examples(config.data, config.data.train, tokenizer)
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
    examples = read_examples(config.data, config.data.train, tokenizer)
    two_digits = sum(a + b > 9 for a in range(8) for b in range(0, 8, 2))
    assert (examples.long_prompts, examples.long_responses) == (1, two_digits)
    assert len(examples.usable) == 32 - two_digits
    assert "left out 1 with too long a prompt" in str(examples) and f"{two_digits} with too long a response" in str(
        examples
    )
    config = load("data.max_prompt_tokens=2")
    with pytest.raises(InputError, match=r"left out 33 with too long a prompt, 0 .*none is left"):
        read_examples(config.data, config.data.train, tokenizer)


FAMILIES = {
    "gpt2": lambda: byte_level("bos eos"),
    "llama": lambda: llama("bos eos"),
    "metaspace": lambda: metaspace("first", "bos eos"),
    "unigram": lambda: metaspace("always", "eos", unigram=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_tokenizer_puts_around_texts_an_example_reads_as_it_is_written(load, family):
    """BOS once in front, where the tokenizer has one; EOS behind the response only; no space between the two."""
    tokenizer, config = FAMILIES[family](), load("data.max_prompt_tokens=20", "data.max_response_tokens=20")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for example in read_examples(config.data, config.data.train, tokenizer).usable:
        ids = example.prompt_ids + example.response_ids
        assert ids.count(bos) == (family != "unigram") and (ids[0] == bos or family == "unigram")
        assert ids.count(eos) == 1 and ids[-1] == eos
        assert tokenizer.decode(ids, skip_special_tokens=True) == example.prompt + example.response
    config = load(
        "data.max_prompt_tokens=30", "data.prompt='<s>[INST] {question} [/INST]'", "data.response=' {answer}</s>'"
    )
    for example in read_examples(config.data, config.data.train, tokenizer).usable:
        assert example.prompt_ids.count(bos) == 1 and example.prompt_ids[0] == bos, "a chat template has its own"
        assert eos not in example.prompt_ids
        assert example.response_ids.count(eos) == 1 and example.response_ids[-1] == eos, "so has this response"


def test_a_special_token_in_a_field_is_refused_and_taken_where_it_is_meant(load):
    config, tokenizer = load(), byte_level("bos")
    with open(config.data.train, "a") as file:
        file.write(json.dumps({"question": "<s>7</s><s>8+1=", "answer": "9.</s>"}) + "\n")
    with pytest.raises(InputError, match=r"line 33: field 'question' of \[data\] prompt has '<s>' in it"):
        read_examples(config.data, config.data.train, tokenizer)
    config = load("data.special_tokens_in_fields=true", "data.max_prompt_tokens=20")
    example = read_examples(config.data, config.data.train, tokenizer).usable[-1]
    assert tokenizer.decode(example.prompt_ids) == "<s>7</s><s>8+1="
    assert tokenizer.decode(example.response_ids) == "9.</s>"


def test_an_end_before_the_end_of_a_response_is_refused(load):
    config, tokenizer = load("data.response='{answer}</s> '"), byte_level()
    with pytest.raises(InputError, match=r"line 1: expected the response's end-of-sequence token at its end, got"):
        read_examples(config.data, config.data.train, tokenizer)


def test_text_that_the_tokenizer_changes_is_counted_and_shown(load):
    config = load()
    tokenizer = load_tokenizer(config)
    with open(config.data.train, "a") as file:
        file.write(json.dumps({"question": "1+1=", "answer": "zwei."}) + "\n")
    examples = read_examples(config.data, config.data.train, tokenizer)
    assert len(examples.usable) == 33
    assert str(examples).endswith(
        "; the tokenizer changes the text of 1 (the first: line 33, 'zwei.' became '<unk><unk><u')"
    )


def test_a_response_without_tokens_of_its_own_is_left_out_and_said(load):
    """A tokenizer of words cannot begin a response inside of one."""
    config = load("data.prompt='{question} 1'", "data.response='{answer}'", "data.max_prompt_tokens=30")
    words = [f"{n}" for n in range(20)] + [f"1{n}" for n in range(20)] + ["+", "=", "."]
    tokenizer = word_pieces(words)
    with pytest.raises(InputError, match=r"left out 32 whose response has no tokens .* line 1\).*none is left"):
        read_examples(config.data, config.data.train, tokenizer)
    config = load("data.response=' {answer}'", "data.max_prompt_tokens=30")
    assert "no tokens" not in str(read_examples(config.data, config.data.train, tokenizer))


def test_responses_that_nobody_reads_are_not_too_long(load, teacher_set, tmp_path):
    """The student writes its own; exact_match reads the answer in the text."""
    long = json.dumps({"question": "1+1=", "answer": "1+1+1+1+1+1-4=2."}) + "\n"
    for name in ("train", "test"):
        with open(tmp_path / f"{name}.jsonl", "a") as file:
            file.write(long)
    evaluation = [f"evaluation.data={tmp_path / 'test.jsonl'}", r"evaluation.answer='(\d+)\.'"]
    matches = 'evaluation.metrics=["exact_match"]'

    def read(*overrides):
        config = load(*GKD, teacher_set, *evaluation, *overrides)
        return read_inputs(config, config.objective.build())

    inputs = read(matches)
    assert len(inputs.examples.usable) == 33 and len(inputs.held_out.usable) == 9
    assert inputs.examples.long_responses == inputs.held_out.long_responses == 0
    assert all(example.response_ids == () for example in inputs.examples.usable + inputs.held_out.usable)
    inputs = read(matches, "rollout.student_fraction=0.9")
    assert len(inputs.examples.usable) == 32 and inputs.examples.long_responses == 1
    inputs = read('evaluation.metrics=["exact_match", "kl"]')
    assert len(inputs.held_out.usable) == 8 and inputs.held_out.long_responses == 1


def test_the_first_example_is_shown_as_the_model_sees_it(load):
    config = load("data.max_prompt_tokens=20", 'data.prompt="Question:\\n {question}"')
    examples = read_examples(config.data, config.data.train, llama("bos eos"))
    assert examples.first == (
        f"first example, line 1 of {config.data.train}:\n"
        "  text    '<s> Question:\\n 0+0=' | '0.</s>'\n"
        "  tokens  <s> \u2581 Quest ion: '\\n' \u2581 0 + 0 = | 0 . </s>\n"
        "  10 tokens | 3"
    )
    config = load("data.prompt='" + "x" * 500 + "{question}'", "data.max_prompt_tokens=600")
    shown = read_examples(config.data, config.data.train, train_tokenizer(["x0+=."], "characters")).first
    assert " ... 440 more ... " in shown and len(shown) < 1000 and shown.endswith("\n  504 tokens | 3")


def test_tokenizing_a_long_file_is_reported(load, monkeypatch, capsys):
    config = load()
    tokenizer = load_tokenizer(config)
    monkeypatch.setattr(examples_module, "AT_ONCE", 10)
    monkeypatch.setattr(examples_module, "PLAIN_SECONDS", 0.0)
    once = read_examples(config.data, config.data.train, tokenizer)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{config.data.train}: {n} of 32 examples are tokenized" for n in (10, 20, 30, 32)]
    monkeypatch.undo()
    assert read_examples(config.data, config.data.train, tokenizer) == once
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"question": "1"', "line 33: expected a JSON object: "),
        (b"\n{}", "line 33: expected a JSON object, got a blank line between others"),
        (b"[1, 2]", "line 33: expected a JSON object, got a list"),
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
        read_examples(config.data, config.data.train, tokenizer)
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
    for read in (
        lambda: load_tokenizer(config),
        lambda: list(render(config.data.train, config.data.prompt, config.data.response)),
    ):
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


def test_what_an_objective_reads_on_the_cpu_stays_there():
    batch = collate([(1,), (2,)], [(5, 6), (7,)], pad_id=9, from_teacher=True)
    moved = batch.to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in (moved.input_ids, moved.attention_mask, moved.target))
    assert moved.layout is batch.layout and moved.from_teacher is batch.from_teacher


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


def test_examples_of_similar_length_share_a_batch():
    """And nothing else changes: each epoch has every example, in an order of its own, the batches in none by length."""
    draw = random.Random(0)
    lengths = [int(draw.lognormvariate(5, 0.5)) for _ in range(1003)]
    stream = ExampleStream(1003, 1, lengths=lengths, batch_size=16)
    batches = [stream.next(16) for _ in range(188)]  # three epochs, whose ends lie within batches
    drawn = [example for batch in batches for example in batch]
    epochs = [drawn[:1003], drawn[1003:2006]]
    assert all(sorted(epoch) == list(range(1003)) for epoch in epochs) and epochs[0] != epochs[1]
    lengths_of = [[lengths[i] for i in batch] for batch in batches[:62]]  # all of the first epoch but its last 11
    used, places = sum(map(sum, lengths_of)), sum(16 * max(batch) for batch in lengths_of)
    plain = [[lengths[i] for i in epochs[0][k::63]] for k in range(62)]
    assert used / places > 0.85 and sum(map(sum, plain)) / sum(16 * max(one) for one in plain) < 0.6
    means = [sum(batch) for batch in lengths_of]
    rising = sum(a < b for a, b in zip(means, means[1:], strict=False))
    assert 20 < rising < 42
    shares = [[sum(batch[rank::4]) for rank in range(4)] for batch in lengths_of]
    assert sum(map(max, shares)) < 1.1 * used / 4  # processes wait for the one with the most tokens
    for taken in (0, 5, 62, 63, 130):
        later = ExampleStream(1003, 1, 16 * taken, lengths, 16)
        assert [later.next(16) for _ in range(9)] == batches[taken : taken + 9]


@pytest.mark.parametrize("size", [1, 3, 16, 17, 40])
def test_few_examples_are_in_every_epoch_too(size):
    stream = ExampleStream(size, 1, lengths=range(size), batch_size=16)
    drawn = [example for _ in range(10 * size) for example in stream.next(16)]
    assert all(sorted(drawn[i : i + size]) == list(range(size)) for i in range(0, 160 * size, size))


def test_an_epoch_is_shuffled_once(monkeypatch):
    shuffled = []
    order = ExampleStream._order
    monkeypatch.setattr(ExampleStream, "_order", lambda self, epoch: shuffled.append(epoch) or order(self, epoch))
    stream = ExampleStream(size=10, seed=1)
    for _ in range(9):
        stream.next(3)
    assert shuffled == [0, 1, 2]


def test_a_stream_goes_on_from_its_position():
    stream = ExampleStream(size=10, seed=1)
    stream.next(17)
    assert ExampleStream(size=10, seed=1, position=stream.position).next(25) == stream.next(25)


def test_ids_are_those_of_the_very_tokens():
    batch = collate([(1, 2), (1,)], [(5,), (2, 5)], pad_id=9)
    assert len(set(batch.ids)) == 2  # the same text, the responses begin elsewhere
    assert batch.ids[0] == sample_id([1, 2], [5]) == collate([(3,) * 8, (1, 2)], [(4,), (5,)], 0).ids[1]
    assert sample_id([1, 2], [5, 9]) != batch.ids[0] != sample_id([1, 2], [6])
    assert sample_id([1, 2], [5]) == "f334d1d3908f3375eb70a67ef82cd38c"  # what is stored stays readable


def test_responses_of_several_authors_and_teachers():
    batch = collate([(1,), (2,)], [(5,), (7,)], 0, from_teacher=[True, False], teachers=["a", None])
    assert batch.from_teacher.tolist() == [True, False] and batch.teachers == ("a", None)
    assert batch.to(torch.device("cpu")).ids == batch.ids
    with pytest.raises(ValueError, match=r"^from_teacher: expected 2, one for each prompt, got 1"):
        collate([(1,), (2,)], [(5,), (7,)], 0, from_teacher=[True])
    with pytest.raises(ValueError, match=r"^teachers: expected 2, one for each prompt, got 3"):
        collate([(1,), (2,)], [(5,), (7,)], 0, teachers=["a", "b", "a"])


def test_pairs_are_taken_together():
    lengths = [i % 7 + (i % 2) * 10 for i in range(40)]
    stream = ExampleStream(40, seed=1, lengths=lengths, batch_size=8, together=2)
    taken = [stream.next(8) for _ in range(5)]
    assert sorted(i for one in taken for i in one) == list(range(40)) and stream.position == 20
    for one in taken:
        assert [i + 1 for i in one[:4]] == one[4:] and all(i % 2 == 0 for i in one[:4])
    again = ExampleStream(40, seed=1, position=8, lengths=lengths, batch_size=8, together=2)
    assert [again.next(8) for _ in range(3)] == taken[2:]

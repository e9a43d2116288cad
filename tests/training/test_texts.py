"""What a data file may hold: texts and numbers, as they are written; everything else is refused with its line."""

import json

import pytest

from kdkernels.data.texts import render
from kdkernels.training import InputError

GOOD = {"question": "1+1=", "answer": "2."}


@pytest.fixture
def rendered(load):
    """rendered(lines, *overrides, special=()): what a file of these bytes is rendered to."""

    def rendered(lines: bytes, *overrides: str, special=()):
        config = load(*overrides)
        with open(config.data.train, "wb") as file:
            file.write(lines)
        return [*render(config.data.train, config.data.prompt, config.data.response, special)]

    return rendered


def refused(rendered, *given, **options) -> str:
    with pytest.raises(InputError) as refusal:
        rendered(*given, **options)
    return str(refusal.value).split("train.jsonl, ", 1)[1]


def line(**fields) -> bytes:
    return json.dumps(GOOD | fields).encode() + b"\n"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"null", "got null"),
        (b"true", "got true or false"),
        (b"false", "got true or false"),
        (b'["2", "3"]', "got a list"),
        (b'{"a": 1}', "got an object"),
        (b'"\\ud83d"', "got half a surrogate pair, \\ud83d, at character 1"),
        (b'"ab\\udc00c"', "got half a surrogate pair, \\udc00, at character 3"),
    ],
)
def test_what_is_no_text_is_refused_with_line_and_field(rendered, answer, words):
    bad = b'{"question": "1+1=", "answer": %b}\n' % answer
    message = refused(rendered, line() + bad)
    kinds = "a text" if "half" in words else "a text or a number"
    assert message == f"line 2: field 'answer' of [data] response: expected {kinds}, {words}"
    both = b'{"question": "1+1=", "answer": "2", "other": %b}\n' % answer  # no template uses it
    assert rendered(both) == [(1, "1+1=", "2")]


def test_a_whole_surrogate_pair_is_a_character(rendered):
    smile = "\N{SLIGHTLY SMILING FACE}"
    assert rendered(b'{"question": "\\ud83d\\ude42", "answer": "\xf0\x9f\x99\x82"}') == [(1, smile, smile)]


@pytest.mark.parametrize("number", ["0", "-0", "-3", "1.50", "1e3", "0.1", "12345678901234567890123", "1E-400"])
def test_numbers_are_written_as_the_file_writes_them(rendered, number):
    assert rendered(b'{"question": %b, "answer": "x"}' % number.encode()) == [(1, number, "x")]


def test_a_template_may_format_numbers(rendered):
    lines = b'{"question": 3.14159, "answer": 7}'
    assert rendered(lines, "data.prompt='{question:.2f}'", "data.response='{answer:03d}'") == [(1, "3.14", "007")]


def test_a_format_wider_than_memory_is_refused(rendered):
    message = refused(rendered, line(), f"data.prompt='{{question:>{10**15}}}'")
    assert message.startswith("line 1: [data] prompt: ") and "longer than memory" in message


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"question": "1"', "Expecting ',' delimiter at column 17"),
        (b'{"question": "\xff", "answer": "1"}', "expected UTF-8, got byte 0xff at column 15"),
        (b'\xff\xfe{\x00"\x00', "expected UTF-8, got byte 0xff at column 1"),
        (b'{"question": NaN, "answer": "1"}', "NaN is no JSON number"),
        (b'{"question": "1", "answer": "1", "x": [-Infinity]}', "-Infinity is no JSON number"),
        (b'{"question": 1e999, "answer": "1"}', "1e999 is too large for a number; expected a text"),
        (b'{"question": ' + b"9" * 5000 + b"}", "an integer of 5000 digits; expected at most 4000, or a text"),
        (b'{"question": "1", "answer": "1", "question": "2"}', "field 'question' is there twice"),
        (b'{"question": "1", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deep within each other"),
        (b'{"question": "1", "answer": "1", "x": ' + b'{"a":' * 100_000, "too deep within each other"),
        (b"[1, 2]", "got a list"),
        (b"null", "got null"),
        (b"17", "got int"),
        (b'{"question": "1"} {"question": "2"}', "Extra data at column 19"),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_line_that_is_no_json_object_is_named(rendered, bad, words):
    message = refused(rendered, line() + bad + b"\n" + line())
    assert message.startswith("line 2: expected a JSON object") and message.endswith(words)


def test_a_byte_order_mark_is_no_part_of_the_first_line(rendered):
    assert rendered(b"\xef\xbb\xbf" + line() + line()) == [(1, "1+1=", "2."), (2, "1+1=", "2.")]
    assert "line 2: expected a JSON object" in refused(rendered, line() + b"\xef\xbb\xbf" + line())


def test_blank_lines_end_a_file_but_are_not_between_lines(rendered):
    for blank in (b"\n", b"\r\n", b"  \n\n\t\n", b" "):
        assert rendered(line() + blank) == [(1, "1+1=", "2.")]
    message = refused(rendered, line() + b"\n \n" + line())
    assert message == "line 2: expected a JSON object, got a blank line between others"
    assert rendered(b"\r\n".join([line().strip(), line().strip()])) == [(1, "1+1=", "2."), (2, "1+1=", "2.")]


SPECIAL = ["<eos>", "<|im_start|>", "<|im_end|>", "<|im_end|>!"]


@pytest.mark.parametrize(
    ("fields", "overrides", "words"),
    [
        ({"question": "a<eos>b"}, (), "field 'question' of [data] prompt has '<eos>' in it"),
        ({"answer": "2<|im_end|>"}, (), "field 'answer' of [data] response has '<|im_end|>' in it"),
        ({"answer": "2<|im_end|>!"}, (), "has '<|im_end|>!' in it"),
        ({"question": "<e"}, ("data.prompt='{question}os>'",), "field 'question' of [data] prompt has '<eos>' in it"),
        (
            {"question": "<eo", "answer": "s>"},
            ("data.prompt='{question}{answer}'",),
            "field 'question' of [data] prompt",
        ),
        ({"answer": "o"}, ("data.prompt='{question}<e{answer}s>'",), "field 'answer' of [data] prompt has '<eos>'"),
    ],
)
def test_a_special_token_in_a_field_is_refused(rendered, fields, overrides, words):
    lines = line() + line(**fields)
    message = refused(rendered, lines, *overrides, special=SPECIAL)
    assert message.startswith("line 2: ") and words in message and "special_tokens_in_fields = true" in message
    assert len(rendered(lines, *overrides)) == 2


def test_a_template_may_have_special_tokens(rendered):
    template = "data.prompt='<|im_start|>user {question}<|im_end|>{answer}'"
    assert rendered(line(answer="<eo"), template, "data.response='{question}'", special=SPECIAL) == [
        (1, "<|im_start|>user 1+1=<|im_end|><eo", "1+1=")
    ]

"""Prompt and response as a model sees them: on tokenizers of every family, the boundary is where generation has it."""

import pytest
from transformers import AddedToken

from kdkernels.data.encoding import Encoder
from kdkernels.data.tokenizers import train_tokenizer

from .families import LLAMA3, QWEN, TEXTS, byte_level, llama, metaspace, prefix_space, word_pieces

PAIRS = [
    ("12+3=", "15."),
    ("12+3=", " 15."),
    ("12+3= ", "15."),
    ("12+3=", "=1"),
    ("Question: what is 12+3?\nAnswer:", " 15\n"),
    ("Question: what is 12+3?\nAnswer:\n", "15"),
    ("Answer:\n", "\n\n15  and  more "),
    ("The sum of 1", "2 and 3 is 15."),
    ("The su", "m of 12"),
    ("12+3=", ""),
    ("  12", "\t\n 中文 Köln"),
]


KINDS = {
    "gpt2": byte_level,
    "gpt2 bos eos": lambda: byte_level("bos eos"),
    "llama3 bos": lambda: byte_level("bos", LLAMA3),
    "qwen": lambda: byte_level("", QWEN),
    "qwen-embedding eos": lambda: byte_level("eos", QWEN),
    "prefix space bos eos": lambda: prefix_space("bos eos"),
    "llama bos": llama,
    "llama bos eos": lambda: llama("bos eos"),
    "metaspace always bos": lambda: metaspace("always"),
    "metaspace always bos eos": lambda: metaspace("always", "bos eos"),
    "metaspace first bos": lambda: metaspace("first"),
    "metaspace never bos": lambda: metaspace("never"),
    "unigram always eos": lambda: metaspace("always", "eos", unigram=True),
    "unigram first bos": lambda: metaspace("first", "bos", unigram=True),
    "own bpe": lambda: train_tokenizer(TEXTS, "bpe", 320),
    "own characters": lambda: train_tokenizer([*TEXTS, *map("".join, PAIRS)], "characters"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param, KINDS[request.param]()


def read(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_response_reads_behind_its_prompt_as_it_is_written(kind):
    name, tokenizer = kind
    encoded = Encoder(tokenizer).encode(*zip(*PAIRS, strict=True))
    bos, eos = [tokenizer.bos_token_id] if "bos" in name else [], tokenizer.eos_token_id
    for (prompt, response), one in zip(PAIRS, encoded, strict=True):
        alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert one.prompt == bos + alone, "the prompt is what generation would be given"
        assert eos not in one.prompt and eos not in one.response
        if one.changed is None:
            assert read(tokenizer, alone + one.response) == read(tokenizer, alone) + response
    kept = [one.changed is None for one in encoded]
    assert all(kept) or "unigram" in name, "only that one has no token for a character it has not seen"
    assert sum(kept) >= len(PAIRS) - 2


def test_a_response_is_what_follows_the_prompt_in_the_text_as_a_whole(kind):
    """Where the tokens of prompt + response begin with the prompt's, training on them is training on the text."""
    _, tokenizer = kind
    for prompt, response in PAIRS:
        (one,) = Encoder(tokenizer).encode([prompt], [response])
        alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
        if whole[: len(alone)] == alone:
            assert one.response == whole[len(alone) :], (prompt, response)


def test_no_space_gets_into_a_sum():
    """As the report had it: "12+3=" and "15." became "12+3= 15."."""
    for tokenizer in (metaspace("always"), metaspace("first"), llama(), metaspace("always", unigram=True)):
        (one,) = Encoder(tokenizer).encode(["12+3="], ["15."])
        assert tokenizer.decode(one.prompt + one.response, skip_special_tokens=True) == "12+3=15."
        apart = tokenizer("12+3=")["input_ids"] + tokenizer("15.", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(apart, skip_special_tokens=True) == "12+3= 15."


def test_bos_is_there_once_and_eos_not_behind_a_prompt():
    for tokenizer in (byte_level("bos eos"), metaspace("first", "bos eos"), llama("bos eos")):
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        texts = ["<s>", "12+3=", "<s>12+3=", "", "<s>7</s><s>8"]
        encoded = [one.prompt for one in Encoder(tokenizer).encode(texts, [" 15"] * len(texts))]
        assert tokenizer("12+3=")["input_ids"][-1] == eos, "the post-processor closes a text"
        assert [ids.count(bos) for ids in encoded] == [1, 1, 1, 1, 2]
        assert all(ids[0] == bos for ids in encoded)
        assert [ids.count(eos) for ids in encoded] == [0, 0, 0, 0, 1], "one that the text has itself stays"
    (one,) = Encoder(byte_level("eos")).encode([""], ["15"])
    assert one.prompt == []


def test_behind_a_special_token_the_text_as_a_whole_is_what_models_are_trained_on():
    """As Phi-3 has it: the special token swallows the line break behind it, and a space follows it in every text."""
    tokenizer = llama()
    tokenizer.add_tokens([AddedToken("<|assistant|>", special=True, rstrip=True)], special_tokens=True)
    prompt, response = "12+3=<|assistant|>\n", "15."
    (one,) = Encoder(tokenizer).encode([prompt], [response])
    assert one.prompt + one.response == tokenizer(prompt + response)["input_ids"]
    assert one.changed == ("12+3=<|assistant|>15.", "12+3=<|assistant|> 15."), "which is said"


def test_truncation_and_padding_that_a_tokenizer_was_saved_with_do_not_count():
    tokenizer = byte_level("bos eos")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    (one,) = Encoder(tokenizer).encode(["12+3= and much more text"], ["15."])
    assert tokenizer.decode(one.prompt + one.response, skip_special_tokens=True) == "12+3= and much more text15."


def test_where_no_tokens_express_a_boundary_the_example_is_refused_and_where_the_text_changes_it_is_said():
    """A tokenizer of words: inside of one there is no boundary, spaces and capitals are lost."""
    tokenizer = word_pieces(["12", "=", "15", "1215", "what", "is"])
    exact, inside, capital, unknown = Encoder(tokenizer).encode(
        ["what is 12 =", "what is 12", "what is 12 =", "why 12 ="], [" 15", "15", " What", " 15"]
    )
    assert tokenizer.convert_ids_to_tokens(exact.prompt + exact.response) == ["<s>", "what", "is", "12", "=", "15"]
    assert exact.changed is None
    assert inside.response is None
    assert tokenizer.convert_ids_to_tokens(capital.response) == ["what"]
    assert capital.changed == ("what is 12 = What", "what is 12 = what")
    assert unknown.changed == ("why 12 =", "<unk> 12 =") and unknown.response == exact.response


def test_unknown_characters_are_said():
    tokenizer = train_tokenizer(["12+3=15."], "characters")
    first, second = Encoder(tokenizer).encode(["1+1=", "1+1="], ["2", "é"])
    assert first.changed is None and first.response == tokenizer("2")["input_ids"]
    assert second.response == [tokenizer.unk_token_id]
    assert second.changed == ("1+1=é", "1+1=<unk>")


def test_an_end_token_that_is_the_unknown_token_too_changes_nothing():
    """As GPT-2 has it."""
    tokenizer = byte_level("bos", unk_token="<s>")
    (one,) = Encoder(tokenizer).encode(["<s>12+3="], ["15"])
    assert tokenizer.unk_token_id in one.prompt and one.changed is None


def test_special_tokens_are_those_the_tokenizer_reads_as_such():
    tokenizer = byte_level("bos")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<think>")])
    assert Encoder(tokenizer).special_tokens() == ["</s>", "<s>", "<unk>", "<|im_end|>"]

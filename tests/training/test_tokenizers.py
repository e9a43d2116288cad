"""Trained tokenizers: round trips, determinism, and that padding never looks like the end."""

import pytest
from transformers import AutoTokenizer

from kdkernels.data.tokenizers import train_tokenizer

TEXTS = ["A dial shows 98, gains five.\n98+5=03\n", "A dial shows 07, doubles.\n07*2=14\nAnswer: 14"]
STRANGE = "Köln 12,345 <<3.14>>\n\n\t 中文 🙂  #### 72 "


def test_bpe_survives_any_text_and_splits_digits():
    tokenizer = train_tokenizer(TEXTS, "bpe", 300)
    for text in (*TEXTS, STRANGE, ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("shows 98")["input_ids"])
    assert tokens[-2:] == ["9", "8"]
    assert len(tokenizer(" shows")["input_ids"]) == 1  # merged: it occurs twice


def test_bpe_sizes():
    assert len(train_tokenizer(TEXTS, "bpe", 270)) == 270
    assert len(train_tokenizer(["ab"], "bpe", 400)) == 259  # 256 bytes, <pad>, <eos>, one merge
    with pytest.raises(ValueError, match="at least 258, got 100"):
        train_tokenizer(TEXTS, "bpe", 100)
    with pytest.raises(ValueError, match="at least 258, got None"):
        train_tokenizer(TEXTS, "bpe")


def test_characters():
    tokenizer = train_tokenizer(TEXTS, "characters")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 3 + len(set("".join(TEXTS)))
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]  # visible, not dropped
    with pytest.raises(ValueError, match="takes its size from the texts, got 300"):
        train_tokenizer(TEXTS, "characters", 300)


@pytest.mark.parametrize(("kind", "size"), [("characters", None), ("bpe", 300)])
def test_saved_and_loaded_it_is_the_same(tmp_path, kind, size):
    tokenizer = train_tokenizer(TEXTS, kind, size)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (0, 1, "left")
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text


@pytest.mark.parametrize(("kind", "size"), [("characters", None), ("bpe", 300)])
def test_the_same_texts_give_the_same_tokenizer(kind, size):
    first, again = (train_tokenizer(iter(TEXTS), kind, size).backend_tokenizer.to_str() for _ in range(2))
    assert first == again
    assert train_tokenizer(["other text"], kind, size).backend_tokenizer.to_str() != first


@pytest.mark.parametrize(("kind", "size"), [("characters", None), ("bpe", 300)])
def test_encoding_adds_nothing_and_pads_on_the_left(kind, size):
    tokenizer = train_tokenizer(TEXTS, kind, size)
    batch = tokenizer(["98", "9"], padding=True)
    (nine, eight), (pad, other) = batch["input_ids"]
    assert (pad, other) == (0, nine)
    assert eight not in (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert batch["attention_mask"] == [[1, 1], [0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert tokenizer.decode([nine, tokenizer.eos_token_id, pad], skip_special_tokens=True) == "9"


def test_unusable_requests():
    with pytest.raises(ValueError, match="one of characters, bpe, got 'words'"):
        train_tokenizer(TEXTS, "words")
    for empty in ([], ["", ""]):
        with pytest.raises(ValueError, match=f"got {len(empty)} texts without a character"):
            train_tokenizer(empty, "characters")

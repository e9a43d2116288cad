"""Tokenizers: trained on a run's own text, for models that start from fresh weights, and the ids that they use."""

import hashlib
import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
KINDS = ("characters", "bpe")
BYTES = 256


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids with a token behind them: a model may have more, as padding."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer's entries, tokens with their ids, are known by: tokenizers of equal ids have the same."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def train_tokenizer(texts: Iterable[str], kind: str, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `texts`; the same texts give the same tokenizer.

    kind "characters": one token per character of the texts, in code point order; any other character becomes `<unk>`.
    kind "bpe": byte-level byte-pair encoding with every digit a token of its own, so that any text survives the round
    trip. It has at most `vocab_size` tokens, fewer when the texts have no more pairs to merge.

    `<pad>` is token 0 and `<eos>` token 1, two different tokens; encoding adds neither. Padding goes to the left, as
    generation needs.

    Raises ValueError for an unknown kind, texts without a character and a `vocab_size` that the kind cannot have.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    texts = list(texts)
    if not any(texts):
        raise ValueError(f"texts: expected text to train a tokenizer on, got {len(texts)} texts without a character")
    build = _characters if kind == "characters" else _byte_pairs
    special = {"pad_token": PAD, "eos_token": EOS} | ({"unk_token": UNKNOWN} if kind == "characters" else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=build(texts, vocab_size), padding_side="left", clean_up_tokenization_spaces=False, **special
    )


def _characters(texts: list[str], vocab_size: int | None) -> Tokenizer:
    if vocab_size is not None:
        raise ValueError(f'vocab_size: kind "characters" takes its size from the texts, got {vocab_size}')
    tokens = [PAD, EOS, UNKNOWN, *sorted(set().union(*texts))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token=UNKNOWN))
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _byte_pairs(texts: list[str], vocab_size: int | None) -> Tokenizer:
    smallest = BYTES + 2  # every byte, <pad> and <eos>
    if vocab_size is None or vocab_size < smallest:
        raise ValueError(f'vocab_size: kind "bpe" needs at least {smallest}, got {vocab_size}')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

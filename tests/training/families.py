"""Small tokenizers of every family that language models have, trained on a few texts. `affixes`: what the
post-processor puts around every text, "bos", "eos", "bos eos" or nothing.
"""

import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "12+3=15. 7+8=15.\nThe sum of 12 and 3 is 15.",
    "Question: what is 12+3?\nAnswer: 15\n\n",
    "==15 =1 = 15 \t\n Köln 中文",
    string.printable,
]


def wrapped(tokenizer, affixes, **special):
    """The tokenizer with what its post-processor puts around every text: "", "bos", "eos" or "bos eos"."""
    pieces = ["<s>" if name == "bos" else "</s>" for name in affixes.split()]
    if pieces:
        at = pieces.index("</s>") if "</s>" in pieces else len(pieces)
        ids = [(piece, tokenizer.token_to_id(piece)) for piece in pieces]
        single = " ".join([*pieces[:at], "$A", *pieces[at:]])
        template = processors.TemplateProcessing(single=single, special_tokens=ids)
        own = tokenizer.post_processor
        tokenizer.post_processor = template if own is None else processors.Sequence([own, template])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(affixes="", split=None, **special):
    """GPT-2's family; `split`: a regular expression of words, as Llama 3 and Qwen have."""
    tokenizer = Tokenizer(models.BPE())
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return wrapped(tokenizer, affixes, **({} if split is None else {"unk_token": None}), **special)


def prefix_space(affixes=""):
    """A byte-level tokenizer that puts a space before every text (RoBERTa's family)."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return wrapped(tokenizer.backend_tokenizer, affixes)


def metaspace(scheme, affixes="bos", unigram=False):
    """SentencePiece's family: Llama 1 and 2, Mistral, Gemma ("never"), T5 (Unigram, EOS at the end)."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    if unigram:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + bytes_, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()]
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return wrapped(tokenizer, affixes)


def llama(affixes="bos"):
    """Llama's first conversion: a normalizer prepends the space, the decoder strips it."""
    tokenizer = metaspace("never", "").backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer, affixes)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")


def word_pieces(words):
    """BERT's family: whole words, lower case, spaces lost."""
    tokens = [*SPECIAL, *dict.fromkeys(words)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return wrapped(tokenizer, "bos eos")

"""What the examples train where you name no models: a tiny random student and teacher, differently padded."""

import os

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, LlamaConfig

from kdkernels.data.tokenizers import train_tokenizer

TEXTS = [(f"{a}**{b}=", str(a**b)) for a in range(2, 10) for b in range(2, 8)]
TEMPLATE = "{% for m in messages %}{{ m.content + ('' if m.role == 'user' else '<eos>') }}{% endfor %}"
DEVICE = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
)


def models(*paths):
    """Student, teacher (frozen) and tokenizer: those of these paths, or tiny ones."""
    if paths:
        tokenizer = AutoTokenizer.from_pretrained(paths[0])
        student, *teachers = [AutoModelForCausalLM.from_pretrained(path).to(DEVICE) for path in paths]
    else:
        tokenizer = train_tokenizer([prompt + response for prompt, response in TEXTS], "characters")
        tokenizer.chat_template = TEMPLATE
        torch.manual_seed(0)
        student, *teachers = [random_model(width, entries).to(DEVICE) for width, entries in ((16, 20), (24, 24))]
    return student.train(), *(teacher.eval().requires_grad_(False) for teacher in teachers), tokenizer


def random_model(width, entries):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=entries, initializer_range=0.3, **sizes))


def rows(tokenizer):
    """A list of input_ids and labels: -100 at the prompt."""
    pairs = [[tokenizer(text).input_ids for text in (prompt, answer + tokenizer.eos_token)] for prompt, answer in TEXTS]
    return [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in pairs]


def loader(tokenizer, size=4):
    """Padded batches of input_ids, attention_mask and labels."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    return DataLoader(rows(tokenizer), size, collate_fn=lambda some: collate(some).to(DEVICE))

"""A tiny chat model and its tokenizer, random, in a directory as transformers writes it."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdkernels.data.tokenizers import train_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXTS = ["What is the weather like today?", "<user><assistant> Name two things. A short answer: yes, and no."]


def write_tiny_chat(directory: Path, layers: int = 4) -> Path:
    """A llama of `layers` layers, a tied head, a byte-level tokenizer with a chat template."""
    tokenizer = train_tokenizer(TEXTS, "bpe", 280)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.4,
        max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # it ends some of its answers by itself
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 3
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

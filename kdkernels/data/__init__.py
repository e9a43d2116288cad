"""Prompts and responses: from JSON lines to token ids, and from these to batches. Needs transformers, no engine.

examples = load_examples("train.jsonl", tokenizer, prompt="{question}=", response="{answer}", ...).usable
batch = collate([one.prompt_ids for one in examples], [one.response_ids for one in examples], pad_id)
"""

from kdkernels.data.batch import Batch, collate, sample_id
from kdkernels.data.examples import Example, Examples, load_examples
from kdkernels.data.stream import ExampleStream

__all__ = ["Batch", "Example", "ExampleStream", "Examples", "collate", "load_examples", "sample_id"]

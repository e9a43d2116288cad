"""A teacher behind vLLM's server, without its weights:  python examples/served_teacher.py student http://host:8000"""

import json
import sys
from functools import partial
from urllib.request import Request, urlopen

import torch
from stand_ins import loader, models

import kdkernels as kd


def ask(url, texts):
    """What the server says about texts of token ids: at each place the 20 likeliest tokens, and the one there."""
    body = json.dumps({"prompt": texts, "max_tokens": 1, "prompt_logprobs": 20}).encode()
    return json.load(urlopen(Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})))


def train(student, entries, batches, optimizer, ask):
    """The loss of each step. All tokens that the server does not list are one entry, for the student too."""
    objective, losses = kd.GKD(beta=0.5), []
    for batch in batches:
        layout, real = kd.Layout.from_labels(batch.pop("labels")), batch["attention_mask"].bool()
        texts = [ids[here].tolist() for ids, here in zip(batch["input_ids"], real, strict=True)]
        from_teacher = kd.TopK.from_vllm(ask(texts), layout, starts=real.int().argmax(1).tolist())
        from_student = kd.Head.of(student, **batch, vocab_size=entries)
        out = objective(from_student, from_teacher, layout)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return losses


if __name__ == "__main__":
    student, tokenizer = models(sys.argv[1])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    print(train(student, len(tokenizer), loader(tokenizer), optimizer, partial(ask, sys.argv[2])))

"""What a judge's stored weights add to a step of VCRD, and what tokens off the path cost with and without the cache.

    python benchmarks/judged_step.py

Ratios of the smallest CPU time of interleaved runs, by one thread: seconds of other machines differ, ratios hardly.
"""

import argparse
import time

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import kdkernels as kd
from kdkernels.data import collate
from kdkernels.judges import ValueHead
from kdkernels.training.offline.scores import StoredWeights


def model(cls, hidden: int, layers: int, vocabulary: int):
    """A fresh qwen2."""
    config = AutoConfig.for_model(
        "qwen2", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=3 * hidden, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    return cls.from_config(config).eval()


def smallest(runs: int, **tasks) -> dict[str, float]:
    """name -> the CPU seconds of the fastest run of each task; they take turns."""
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(runs):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            best[name] = min(best[name], time.process_time() - start)
    return best


def step(options: argparse.Namespace) -> None:
    """Forward and backward of a micro-batch of both authors' responses."""
    student = model(AutoModelForCausalLM, options.hidden, options.layers, options.vocabulary)
    teacher = model(AutoModelForCausalLM, 2 * options.hidden, options.layers, options.vocabulary)
    prompts = torch.randint(options.vocabulary, (options.batch, 16)).tolist()
    responses = torch.randint(options.vocabulary, (options.batch, options.length)).tolist()
    authors = [i % 2 == 0 for i in range(options.batch)]
    batch = collate(prompts, responses, 0, authors)
    known = {key: torch.rand(options.length) for key in zip(batch.ids, authors, strict=True)}
    judge = StoredWeights(known, "here")

    def run(objective, weights) -> None:
        with torch.no_grad():
            scored = kd.Head.of(teacher, **batch.inputs)
        distillation = kd.Distillation(student, objective, options.vocabulary)
        fields = batch.fields(by_author=True)
        distillation(teacher=scored, weights=weights and weights(batch), **fields).loss.backward()

    given, uniform = kd.VCRD(weighting="given"), kd.VCRD(weighting="uniform")
    best = smallest(options.runs, plain=lambda: run(uniform, None), judged=lambda: run(given, judge))
    print(f"step with stored weights / without: {best['judged'] / best['plain']:.3f} ({best['plain']:.3f} s without)")


def off_path(options: argparse.Namespace) -> None:
    """Scores of both models' proposals, a share of which differ from the response's own tokens."""
    backbone = model(AutoModel, options.hidden, options.layers, options.vocabulary)
    scorer = ValueHead(backbone, torch.randn(options.hidden), torch.zeros(()))
    prompts = torch.randint(options.vocabulary, (4, 16)).tolist()
    responses = torch.randint(options.vocabulary, (4, options.length)).tolist()
    for share in (0.1, 0.3, 1.0):
        other = [[t if torch.rand(()) > share else (t + 1) % options.vocabulary for t in one] for one in responses]
        prefixes = [
            (prompt + response[:t], token)
            for prompt, response, row in zip(prompts, responses, other, strict=True)
            for t, token in enumerate(row)
            if token != response[t]
        ]

        def naive(prefixes=prefixes) -> None:
            scorer.score(prompts, responses, responses)
            with torch.no_grad():
                for prefix, token in prefixes:
                    scorer.backbone(torch.tensor([[*prefix, token]]))

        best = smallest(
            2,
            path=lambda: scorer.score(prompts, responses, responses),
            cached=lambda other=other: scorer.score(prompts, responses, other),
            naive=naive,
        )
        print(
            f"{share:.0%} of the tokens off the path: cached {best['cached'] / best['path']:.2f}, a forward each "
            f"{best['naive'] / best['path']:.1f} times the responses' own forward"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {
        "hidden": 256,
        "layers": 4,
        "vocabulary": 16384,
        "batch": 4,
        "length": 128,
        "runs": 9,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step(options)
    off_path(options)


if __name__ == "__main__":
    main()

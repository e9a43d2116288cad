"""What becomes of a student that learns from stored words: runs of the trainer from hidden states, from lists with and
without a bucket for all other words, and from words that the teacher drew.

    python benchmarks/stored_run.py [--demo runs/demo-lm] [--output runs/stored-run] [--beta 0.9] [--steps 16]
                                    [--arms whole bucket renormalised sampled] [--plot FILE]

The models and data are those of a finished `make demo-lm`: SmolLM2-135M-Instruct teaches 24 of its own layers by GKD on
its answers (recipes/smollm2-gkd.toml), all weights trained. Every arm sees the same answers in the same order. A
renormalised list has no key in a recipe; here the trainer's stored teacher is told to drop the bucket. Measured after
each run are the held-out answers, with the whole teacher. What is finished stays in the output's directory, but for the
trained models (0.5 GB each).

Axes: N tokens, H hidden, V vocabulary, K words.
"""

import argparse
import gc
import json
import os
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from stored_teachers import measured, show
from transformers import AutoModelForCausalLM

import kdkernels as kd
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.demo.lm.phases import ARMS, settings
from kdkernels.teachers.hidden import Output, scored
from kdkernels.teachers.stored import TopKTeacher
from kdkernels.training import Config, load_config, train
from kdkernels.training.caching import cache
from kdkernels.training.evaluation import as_batch
from kdkernels.training.inputs import build_objective, read_inputs
from kdkernels.training.run.atomic import remove, write_text
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.metrics import read_metrics

K = 16
WORDS = {"bucket": "top-k", "renormalised": "top-k", "sampled": "sampled"}  # the cache of each arm, else hidden states
TITLES = {
    "whole": "whole",
    "bucket": "list with its bucket",
    "renormalised": "renormalised list",
    "sampled": "drawn words",
}
GKD = next(arm for arm in ARMS if arm.name == "gkd")


def recipe(demo: Path, output: Path, steps: int, *overrides: str) -> Config:
    """The demo's GKD, with the files of the demo in `demo`, and the first of its answers that last for an epoch."""
    train = output / f"train-steps-{steps}.jsonl"
    own = (f"train.steps={steps}", f"data.train={train}", "checkpoint.every=0")
    own += ("evaluation.metrics=['cross_entropy']", "evaluation.limit=1")  # `HeldOut` measures all of them
    config = load_config(GKD.recipe, settings(GKD, demo))
    with open(config.data.train, encoding="utf-8") as lines:
        write_text(train, "".join(islice(lines, steps * config.train.batch_size)))
    return load_config(GKD.recipe, settings(GKD, demo, (*own, *overrides)))


@contextmanager
def without_bucket():
    """Stored lists are renormalised."""
    score = TopKTeacher.score
    with mock.patch.object(TopKTeacher, "score", lambda self, batch: replace(score(self, batch), renormalize=True)):
        yield


class HeldOut:
    """The held-out answers and what the teacher says about them: its head [N, H] and its K words [N, K]."""

    def __init__(self, config: Config):
        config = replace(config, teacher=replace(config.teacher, cache=None))  # which has other answers
        inputs = read_inputs(config, build_objective(config))
        examples, size = inputs.held_out.usable, config.evaluation.batch_size
        self.vocabulary = vocabulary_size(inputs.tokenizer)
        self.batches = [
            as_batch(examples[i : i + size], inputs.tokenizer.eos_token_id) for i in range(0, len(examples), size)
        ]
        self.teacher = self.head(config.teacher.path)
        self.ids = kd.statistics(self.teacher, topk=K).topk_indices

    @torch.no_grad()
    def head(self, model: str | Path) -> kd.Head:
        """That of the model in a directory at all tokens of the answers."""
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        heads = [kd.Head.of(model, vocab_size=self.vocabulary, **batch.inputs) for batch in self.batches]
        states = [scored(head, batch) for head, batch in zip(heads, self.batches, strict=True)]
        return Output.of(heads[0]).head(torch.cat(states).detach(), self.vocabulary)

    def measured(self, model: str | Path) -> dict[str, float]:
        return measured(self.head(model), self.teacher, self.ids)


def run(arm: str, config: Config, held_out: HeldOut) -> dict:
    """What `arm` logged step by step, and its student on the held-out answers; the model is deleted."""
    with without_bucket() if arm == "renormalised" else nullcontext():
        result = train(config)
    gc.collect()  # an engine refers to itself: this arm's would stay in memory beside the next one's
    lines = [line for line in read_metrics(RunDirectory(result.output).metrics) if line["step"] > 0]
    logged = [name for name in ("student_entropy", "teacher_entropy") if name in lines[0]]
    found = {name: [line[name] for line in lines] for name in logged}
    found["held out"] = held_out.measured(result.final)
    remove(result.final)
    return found


def arms(demo: Path, output: Path, names: Sequence[str], beta: float, steps: int) -> dict[str, dict]:
    """The runs of these arms, and under "start" the student before them."""
    found, held_out, output = {}, None, output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for arm in ("start", *names):
        file = output / f"{arm}-steps-{steps}-beta-{str(beta).replace('.', '_')}.json"
        if not file.is_file():
            kind = WORDS.get(arm, "hidden")
            own = (f"run.output={output / file.stem}", f"teacher.cache={output / kind}-steps-{steps}")
            config = recipe(demo, output, steps, f"objective.beta={beta}", *own)
            held_out = held_out or HeldOut(config)
            if arm == "start":
                values = {"held out": held_out.measured(config.student.path)}
                values["entropy"] = kd.entropy(held_out.teacher).mean().item()
                values["tokens"] = len(held_out.ids)
            else:
                print(cache(config, K if arm in WORDS else None, kind == "sampled"), flush=True)
                values = run(arm, config, held_out)
            write_text(file, json.dumps(values))
        found[arm] = json.loads(file.read_text())
    return found


def plot(found: dict[str, dict], path: Path) -> None:
    """The student's entropy over the steps, a line for each arm, and the teacher's, dashed."""
    from kdkernels.demo.plots import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    for number, (arm, title) in enumerate(TITLES.items()):
        if arm in found:
            values = found[arm]["student_entropy"]
            axes.plot(range(1, len(values) + 1), values, color=f"C{number}", label=title)
    teacher = found.get("whole", {}).get("teacher_entropy", [])
    axes.plot(range(1, len(teacher) + 1), teacher, color="black", linestyle="dashed", label="the teacher's own")
    axes.set_xlabel("step")
    axes.set_ylabel("entropy (nats a token)")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo-lm"), help="of a finished `make demo-lm`")
    parser.add_argument("--output", type=Path, default=Path("runs/stored-run"), help="caches and runs; goes on")
    parser.add_argument("--beta", type=float, default=0.9, help="of GKD; 1 is the reverse KL, without sampled words")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--arms", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the students' entropies over the steps")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    names = [arm for arm in TITLES if arm in options.arms and (arm != "sampled" or options.beta < 1)]
    found = arms(options.demo, options.output, names, options.beta, options.steps)
    show([{"teacher": TITLES.get(arm, "before"), **values["held out"]} for arm, values in found.items()])
    start = found["start"]
    print(f"{start['tokens']} held-out tokens, the teacher's entropy: {start['entropy']:.5f}")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()

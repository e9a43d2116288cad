"""Runs from stored words: a renormalised list leaves the student with more entropy and more of a tail than one with its
bucket."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdkernels.teachers import stored
from kdkernels.training import caching, train
from kdkernels.training.evaluation import as_batch
from kdkernels.training.inputs import build_objective, read_inputs
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD

DEMO = os.environ.get("KDKERNELS_DEMO_LM", "")
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "stored_run.py"
K = 3


def learnt(config) -> tuple[float, float]:
    """The student's entropy in the last steps of a run, and its mass beyond the teacher's words after it."""
    result = train(config)
    lines = read_metrics(result.output / "metrics.jsonl")[-8:]
    inputs = read_inputs(config, build_objective(config))
    batch = as_batch(inputs.examples.usable, inputs.tokenizer.eos_token_id)
    ids = stored.Cache(Path(config.teacher.cache), "").teacher(len(inputs.tokenizer), "cpu").score(batch).indices
    model = AutoModelForCausalLM.from_pretrained(result.final)
    with torch.no_grad():
        q = model(**batch.inputs).logits.softmax(-1)
    inside = q.gather(-1, ids.long()).sum(-1).flatten()[batch.layout.index]
    return sum(line["student_entropy"] for line in lines) / len(lines), 1 - inside.mean().item()


def test_stored_words_keep_their_bucket_in_the_trainer(load, teacher_set, monkeypatch):
    root = Path(load().run.output).parent
    options = (*GKD, "objective.beta=1", "rollout.student_fraction=0", "train.steps=40", f"teacher.cache={root}/cache")
    caching.cache(load(*options, teacher_set), K)
    bucket = learnt(load(*options))
    score = stored.TopKTeacher.score
    monkeypatch.setattr(stored.TopKTeacher, "score", lambda self, batch: replace(score(self, batch), renormalize=True))
    without = learnt(load(*options, f"run.output={root}/without"))
    for kept, dropped in zip(bucket, without, strict=True):
        assert 0 < 1.1 * kept < dropped


@pytest.mark.slow
@pytest.mark.skipif(not DEMO, reason="KDKERNELS_DEMO_LM names no directory of a finished make demo-lm")
def test_the_runs_of_a_real_model(tmp_path):
    command = [sys.executable, str(PROGRAM), "--demo", DEMO, "--output", str(tmp_path), "--steps", "2"]
    command += ["--arms", "bucket", "renormalised", "--plot", str(tmp_path / "drift.png")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = printed[printed.index("| teacher | entropy | outside |") :].splitlines()[2:5]
    rows = [line.strip("| ").split(" | ") for line in table]
    assert [row[0] for row in rows] == ["before", "list with its bucket", "renormalised list"]
    assert all(len(row) == 5 for row in rows) and 0 < 1.1 * float(rows[1][2]) < float(rows[2][2])
    assert (tmp_path / "drift.png").stat().st_size > 5000 and not list(tmp_path.rglob("model.safetensors"))

"""The gradient of a step, however its responses are spread over micro-batches, processes and ZeRO's shares: that of
full logits in fp64.
"""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from kdkernels.training import load_config
from kdkernels.training.deepspeed_strategy import accumulation_steps
from kdkernels.training.recipe.schema import InputError

from .conftest import GKD
from .engine_steps import EXAMPLES, engine_gradients, exact_gradients
from .test_processes import finish, start

PROGRAM = str(Path(__file__).with_name("engine_steps.py"))
OBJECTIVES = {
    "SFT": (),
    "GKD": GKD,
    "TSDKD": (*GKD, "objective.name=TSDKD", "objective.k=4"),
    "DistiLLM2": (*GKD, "objective.name=DistiLLM2"),
    "VCRD": (*GKD, "objective.name=VCRD", "objective.weighting=likelihood_ratio"),
    "tied": (*GKD, "student.architecture.tie_word_embeddings=true"),
    "layers computed again": (*GKD, "objective.name=TSDKD", "objective.k=4", "train.gradient_checkpointing=true"),
}
# Of all parameters together. bfloat16: what rounding the model's activations costs, 1.4 to 1.6 % however the batch is
# cut, and 3 % where TSD-KD selects by them. Without the engine's preparation for a backward, 8 micro-batches were 340 %
# off.
TOLERANCE = {"float32": 2e-6, "bfloat16": 0.05}


def overrides(
    name: str, teacher_set: str, dtype: str, stage: int | str, micro_batches: int, processes: int = 1
) -> list[str]:
    return [
        *OBJECTIVES[name],
        *([teacher_set] if OBJECTIVES[name] else []),
        f"run.dtype={dtype}",
        "rollout.student_fraction=0",
        "optimizer.max_grad_norm=0",
        f"train.batch_size={EXAMPLES}",
        f"train.micro_batch_size={EXAMPLES // micro_batches // processes}",
        *stage_set(stage),
    ]


def stage_set(stage: int | str) -> list[str]:
    """The settings of a ZeRO stage; of "3 offloaded", with its optimizer in the machine's memory."""
    number, _, offloaded = str(stage).partition(" ")
    return [f"deepspeed.zero_stage={number}", *(["deepspeed.offload_optimizer=true"] if offloaded else [])]


def check(got: dict, exact: dict, dtype: str, case: object) -> None:
    assert got.keys() - {"norm"} == exact.keys() and len(exact) > 10
    a, b = (torch.cat([gradients[name].flatten() for name in exact]) for gradients in (got, exact))
    assert (a - b).norm() < TOLERANCE[dtype] * b.norm(), f"{case}: {a.norm()} instead of {b.norm()}"
    if "tied" in str(case):
        assert not any("lm_head" in name for name in exact)
        tied, right = (gradients["model.embed_tokens.weight"] for gradients in (got, exact))
        assert (tied - right).norm() < TOLERANCE[dtype] * right.norm(), case
    assert got["norm"] == pytest.approx(b.norm().item(), rel=TOLERANCE[dtype]), case


FEW = [  # every objective, precision, stage and number of micro-batches at least once
    ("SFT", "float32", 0, 8), ("SFT", "bfloat16", 2, 8), ("SFT", "bfloat16", 0, 8), ("GKD", "bfloat16", 1, 8),
    ("GKD", "float32", 1, 4), ("TSDKD", "bfloat16", 2, 4), ("TSDKD", "float32", 2, 2), ("DistiLLM2", "bfloat16", 0, 4),
    ("DistiLLM2", "float32", 2, 8), ("VCRD", "bfloat16", 2, 2), ("VCRD", "float32", 0, 1), ("TSDKD", "float32", 3, 4),
    ("tied", "float32", 3, 2), ("tied", "float32", 1, 4),
    ("layers computed again", "float32", 3, 2), ("layers computed again", "bfloat16", 0, 2),
    ("GKD", "float32", "1 offloaded", 4), ("GKD", "bfloat16", "2 offloaded", 2), ("GKD", "bfloat16", "3 offloaded", 4),
]  # fmt: skip
OFFLOADED = ("1 offloaded", "2 offloaded", "3 offloaded")
ALL = [
    *itertools.product(OBJECTIVES, TOLERANCE, (0, 1, 2, 3), (1, 2, 4, 8)),
    *itertools.product(["TSDKD"], TOLERANCE, OFFLOADED, (1, 4)),
]


@pytest.mark.parametrize(
    ("name", "dtype", "stage", "micro_batches"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FEW)],
)
def test_one_process(load, in_parts, teacher_set, name, dtype, stage, micro_batches):
    config = load(*overrides(name, teacher_set, dtype, stage, micro_batches))
    check(engine_gradients(config), exact_gradients(config), dtype, (name, dtype, stage, micro_batches))


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_layers_are_computed_again(load, in_parts, teacher_set, monkeypatch, stage):
    """In the backward pass, and not while the student writes or is evaluated."""
    calls, forward = [], Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda *given: calls.append(torch.is_grad_enabled()) or forward(*given))
    found = {}
    for again in (False, True):
        settings = overrides("TSDKD", teacher_set, "float32", stage, 2)
        engine_gradients(load(*settings, "rollout.student_fraction=1", f"train.gradient_checkpointing={again}".lower()))
        found[again] = calls.count(True), calls.count(False)
        calls.clear()
    assert found[False][0] == 2 and found[True] == (4, found[False][1])


def test_sums_that_bfloat16_cannot_hold_are_refused(load):
    many = ("run.dtype=bfloat16", "train.batch_size=65", "train.micro_batch_size=1", "deepspeed.zero_stage={}")
    with pytest.raises(InputError, match=r"\[deepspeed\] zero_stage: expected 1, 2 or 3 for bfloat16 with 65 micro"):
        accumulation_steps(load(*(text.format(0) for text in many)))
    assert accumulation_steps(load(*(text.format(1) for text in many))) == 65
    assert accumulation_steps(load(*(text.format(0) for text in many[1:]))) == 65


def two_processes(recipe, teacher_set, tmp_path, cases):
    settings = [overrides(*case[:1], teacher_set, *case[1:], processes=2) for case in cases]
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROGRAM)
    results = tmp_path / "gradients.pt"
    recipes = json.dumps([(str(recipe), each) for each in settings])
    finish(start(command, recipes, str(results), cwd=tmp_path), tmp_path)
    for case, each, got in zip(cases, settings, torch.load(results), strict=True):
        check(got, exact_gradients(load_config(recipe, each)), case[1], case)


def test_two_processes(recipe, teacher_set, tmp_path):
    cases = [
        ("GKD", "bfloat16", 0, 4), ("TSDKD", "bfloat16", 2, 4), ("SFT", "float32", 1, 2), ("VCRD", "bfloat16", 1, 2),
        ("DistiLLM2", "float32", 2, 1), ("TSDKD", "float32", 3, 2), ("GKD", "bfloat16", 3, 4),
        ("tied", "float32", 3, 2), ("layers computed again", "float32", 3, 2), ("GKD", "float32", "2 offloaded", 2),
        ("GKD", "float32", "3 offloaded", 2),
    ]  # fmt: skip
    two_processes(recipe, teacher_set, tmp_path, cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_two_processes_throughout(recipe, teacher_set, tmp_path, name, dtype):
    two_processes(recipe, teacher_set, tmp_path, list(itertools.product([name], [dtype], (0, 1, 2, 3), (1, 2, 4))))

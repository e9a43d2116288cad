"""Rehearsals of runs on many GPUs: two processes of the papers' methods, ZeRO-3, the whole student or an adapter.

One process is killed (SIGKILL): the other ends with a line that says so, and the run goes on with --resume to the
weights and the log that it would have had, to the bit.
"""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from kdkernels.training.processes import distributed
from kdkernels.training.processes.exits import LOST

from ..adapted import write_base
from .conftest import SETTINGS, Task, only_line

pytestmark = pytest.mark.slow
METHODS = {
    "TSD-KD": ("objective.name=TSDKD", "objective.k=4", "rollout.student_fraction=1"),
    "VCRD": ("objective.name=VCRD", "objective.weighting=likelihood_ratio", "train.batch_size=4"),
}
LONG = ("deepspeed.zero_stage=3", "train.steps=6", "checkpoint.every=2", "evaluation.every=3")
KILLS = {  # the process, and when: as it writes its part of the third checkpoint, or in between
    "in a checkpoint": (1, ["kill", "unfinished-step-000006/process-00001.pt", 1]),
    "between checkpoints": (0, ["kill", "evaluation-000003.jsonl", 1]),
}


class Rehearsal(Task):
    """A task of two processes with ZeRO-3 whose student is trained as a whole or by its adapter."""

    def run(self, name, *arguments, **job):
        return super().run(name, *arguments, **job, in_parts=True)

    def left_by(self, name):
        adapter = self.root / name / "final" / "adapter_model.safetensors"
        return (load_file(adapter), self.log(name)) if adapter.exists() else super().left_by(name)


def begin(worker, root, method, student):
    distributed.start()
    rehearsal = Rehearsal(worker, root, (*SETTINGS, *METHODS[method], *LONG))
    if student == "LoRA":
        rehearsal.recipe = write_base(root)
        rehearsal.settings = (*rehearsal.settings, f"student.path={root / 'lora'}")
    return rehearsal


@pytest.fixture(scope="module", params=["full", "LoRA"])
def student(request):
    return request.param


@pytest.fixture(scope="module", params=METHODS)
def rehearsal(request, student, worker, tmp_path_factory):
    return begin(worker, tmp_path_factory.mktemp("rehearsal"), request.param, student)


@pytest.fixture(scope="module")
def adapter(worker, tmp_path_factory):
    return begin(worker, tmp_path_factory.mktemp("adapter"), "TSD-KD", "LoRA")


@pytest.mark.parametrize("kill", KILLS)
def test_a_run_of_which_a_process_is_killed_resumes(rehearsal, student, kill):
    rank, fault = KILLS[kill]
    name = kill.replace(" ", "-")
    answer = rehearsal.run(name, processes=2, rank=rank, fault=fault)
    assert answer["statuses"][rank] == -signal.SIGKILL and answer["statuses"][1 - rank] == LOST, answer["output"]
    assert "another process of the run ended, or did not answer in time" in only_line(answer)
    run = rehearsal.root / name
    there = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert there == (["step-000002", "step-000004"] if rank else ["step-000002"])
    shares = [torch.load(run / "checkpoints" / there[-1] / f"process-0000{one}.pt") for one in range(2)]
    shared = torch.load(run / "checkpoints" / there[-1] / "shared.pt")["module"]
    assert not [weight for weight in shared if weight.endswith("weight")] and all(one["optimizer"] for one in shares)

    answer = rehearsal.run(name, "--resume", processes=2)
    assert answer["statuses"] == [0, 0], answer["output"]
    trained = [step for step in range(1, 7) if f"step {step}/6  loss" in answer["output"]]
    assert trained == list(range(int(there[-1][-6:]) + 1, 7)), answer["output"]
    rehearsal.check_left_by(name, processes=2)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["gradient_norm"] > 1e-3
    assert (run / "final" / "adapter_config.json").exists() == (student == "LoRA")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_adapter_resumes_in_the_other_stages_too(adapter, stage):
    settings = (f"--set=deepspeed.zero_stage={stage}",)
    rank, fault = KILLS["in a checkpoint"]
    answer = adapter.run(f"stage-{stage}", *settings, processes=2, rank=rank, fault=fault)
    assert answer["statuses"][rank] == -signal.SIGKILL and answer["statuses"][1 - rank] == LOST, answer["output"]
    answer = adapter.run(f"stage-{stage}", *settings, "--resume", processes=2)
    assert answer["statuses"] == [0, 0] and "step 4/6  loss" not in answer["output"], answer["output"]
    adapter.check_left_by(f"stage-{stage}", *settings, processes=2)


def test_an_adapter_in_parts_is_merged_into_a_whole_model(adapter):
    (alone, _), settings = adapter.whole(processes=2), ("--set=student.adapter.merge=true",)
    merged, _ = adapter.whole(*settings, processes=2)
    base = load_file(adapter.root / "base" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (alone[f"base_model.model.{name}.lora_{one}.weight"].double() for one in "AB")
    expected = base[f"{name}.weight"].double() + 5 / 3 * b @ a
    torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert (expected - base[f"{name}.weight"]).abs().max() > 0.1
    assert merged.keys() == base.keys() | {"lm_head.weight"}

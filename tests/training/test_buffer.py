"""Rollouts that several updates share: whose, how old they are, and what a checkpoint has of them."""

import copy
import shutil

import pytest
import torch
from faulty_server import faulty_server
from vllm_server import VllmServer

from kdkernels.data import ExampleStream
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.engine.gpu import Gpu
from kdkernels.rollouts import LocalSampler
from kdkernels.training import InputError, train, trainer
from kdkernels.training.buffer import Buffer
from kdkernels.training.errors import Stopped
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer
from kdkernels.training.plan.memory import Load, memory
from kdkernels.training.plan.seconds import seconds
from kdkernels.training.processes import distributed
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD, final_weights
from .test_engines import TWO, served, teacher_of
from .test_processes import finish, start

CONSTANT = ("optimizer.schedule=constant", "optimizer.warmup_ratio=0")


class One:
    def __init__(self, place: int):
        self.prompt_ids = (place,)


def steps_of(load, teacher_set, *settings: str, size=40):
    """Of each step: (the examples it takes, what was written to them and when, what was written in it)."""
    distributed.start()
    config = load(*GKD, teacher_set, "train.steps=12", "train.batch_size=2", *settings)
    buffer, now = Buffer(config, [One(place) for place in range(size)], ExampleStream(size, 0)), {"step": 0}
    for step in range(1, 13):
        buffer = again(config, buffer)  # as if the run had been interrupted here
        now["step"], written = step, []

        def write(prompts, step=step, written=written):
            written += [prompt[0] for prompt in prompts]
            return [[prompt[0], step] for prompt in prompts]

        taken = [one.prompt_ids[0] for one in buffer.batch(step)]
        student = int(step * config.rollout.student_fraction) > int((step - 1) * config.rollout.student_fraction)
        yield taken, buffer.write(step, write) if student else None, written


def again(config, buffer: Buffer) -> Buffer:
    stream = ExampleStream(buffer.stream.size, buffer.stream.seed, buffer.stream.position)
    other = Buffer(config, buffer.examples, stream)
    other.load_state(copy.deepcopy(buffer.state()))
    return other


def test_every_step_writes_its_own_by_default(load, teacher_set):
    seen, order = [*steps_of(load, teacher_set)], ExampleStream(40, 0)
    for step, (taken, (responses, staleness), written) in enumerate(seen, 1):
        assert taken == written == order.next(2) and staleness == 0
        assert responses == [[place, step] for place in taken]


def test_a_generation_for_several_steps(load, teacher_set):
    """Of 12 steps, 5 and 5 share one, and the last 2."""
    seen, order = [*steps_of(load, teacher_set, "rollout.updates=5")], ExampleStream(40, 0)
    assert [len(written) for _, _, written in seen] == [10, 0, 0, 0, 0, 10, 0, 0, 0, 0, 4, 0]
    for step, (taken, (responses, staleness), _) in enumerate(seen, 1):
        assert taken == order.next(2) and staleness == (step - 1) % 5
        assert responses == [[place, step - staleness] for place in taken]


def test_batches_that_are_used_again_come_in_turn(load, teacher_set):
    seen, order = [*steps_of(load, teacher_set, "rollout.updates=4", "rollout.reuse=2")], ExampleStream(40, 0)
    for first_step in (0, 4, 8):
        first, second = order.next(2), order.next(2)
        assert [taken for taken, *_ in seen[first_step : first_step + 4]] == [first, second, first, second]
        assert [written for *_, written in seen[first_step : first_step + 4]] == [[*first, *second], [], [], []]
        for taken, (responses, _), _ in seen[first_step : first_step + 4]:
            assert responses == [[place, first_step + 1] for place in taken]


def test_what_is_too_old_is_written_anew(load, teacher_set):
    """Nothing that was to be trained on is left out."""
    seen = [*steps_of(load, teacher_set, "rollout.updates=6", "rollout.max_staleness=2")]
    order = ExampleStream(40, 0)
    assert [len(written) for *_, written in seen] == [12, 0, 0, 6, 0, 0] * 2
    for step, (taken, (responses, staleness), _) in enumerate(seen, 1):
        assert taken == order.next(2) and staleness == (step - 1) % 3
        assert responses == [[place, step - staleness] for place in taken]


def test_steps_whose_responses_are_the_datas_pass_by(load, teacher_set):
    """They take the next examples, and make what was written older."""
    response = ("rollout.student_fraction=0.5", "rollout.updates=3")
    seen, order = [*steps_of(load, teacher_set, *response)], ExampleStream(40, 0)
    assert [len(written) for *_, written in seen] == [0, 6, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0]
    assert [found and found[1] for _, found, _ in seen] == [None, 0, None, 2, None, 4] * 2
    assert sorted(place for taken, *_ in seen for place in taken) == sorted(order.next(24)), "none twice, none left out"


def test_what_fails_is_written_by_the_next_step(load, teacher_set):
    distributed.start()
    config = load(*GKD, teacher_set, "rollout.updates=3", "train.batch_size=2")
    buffer = Buffer(config, [One(place) for place in range(9)], ExampleStream(9, 0))

    def fail(prompts):
        raise FloatingPointError("no number")

    buffer.batch(1)
    with pytest.raises(FloatingPointError):
        buffer.write(1, fail)
    taken = [one.prompt_ids for one in buffer.batch(2)]
    asked = []
    responses, staleness = buffer.write(2, lambda prompts: asked.extend(prompts) or [[1, 2] for _ in prompts])
    assert staleness == 0 and len(asked) == 4 and asked[:2] == taken and responses == [[1, 2]] * 2


@pytest.mark.parametrize("reuse", [1, 2])
def test_a_run_interrupted_within_a_generation_goes_on_with_it(load, teacher_set, tmp_path, monkeypatch, reuse):
    """By a stop after every step, and by none: the same metrics and weights."""
    generate, calls, weights, metrics = LocalSampler.generate, [], [], []

    def counted(sampler, prompts, *rest, **options):
        calls.append(len(prompts))
        return generate(sampler, prompts, *rest, **options)

    monkeypatch.setattr(LocalSampler, "generate", counted)
    for stops in (False, True):
        settings = (*GKD, teacher_set, "rollout.updates=4", f"rollout.reuse={reuse}", "train.steps=6", *CONSTANT)
        config = load(*settings, f"run.output={tmp_path / str(stops)}")
        monkeypatch.setattr(trainer.Termination, "asked", lambda self, stops=stops: stops)
        for _ in range(5 if stops else 0):
            with pytest.raises(Stopped):
                train(config, resume=True)
        result = train(config, resume=stops)
        weights.append(final_weights(result.output))
        kept = ("loss", "rollout_staleness", "tokens", "student_length", "gradient_norm")
        metrics.append([{name: line[name] for name in kept} for line in read_metrics(result.output / "metrics.jsonl")])
    assert calls == [16 // reuse, 8 // reuse] * 2, "two generations"
    assert metrics[0] == metrics[1] and [line["rollout_staleness"] for line in metrics[0]] == [0, 1, 2, 3, 0, 1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    if reuse == 2:
        assert metrics[0][0]["tokens"] == metrics[0][2]["tokens"] and metrics[0][0]["loss"] != metrics[0][2]["loss"]


def test_weights_are_handed_over_once_a_generation(load, teacher_set):
    server = VllmServer(teacher_of(teacher_set))
    with faulty_server(server.answer) as http:
        result = train(load(*served(http.url, teacher_set, "rollout.updates=2", "train.steps=4")))
    lines = read_metrics(result.output / "metrics.jsonl")
    assert len(server.loaded) == 2 and len(server.asked) == 4 * 4
    assert ["rollout_drift" in line for line in lines] == [True, False, True, False]


def test_a_plan_counts_what_is_written_at_once(load, teacher_set):
    """Four steps' prompts, each trained on twice: the memory of twice the batch, half the tokens of each step."""

    def planned(*settings):
        config = load(*GKD, teacher_set, *settings)
        tokenizer = load_tokenizer(config)
        models = [make(config, tokenizer, meta=True) for make in (load_student, load_teacher)]
        one = Load(config, *models, 1, vocabulary_size(tokenizer), Gpu.named("h100"))
        passes = one.student_pass(), one.teacher_pass()
        return memory(one, *passes), seconds(one, *passes)

    shared, times = planned("rollout.updates=4", "rollout.reuse=2")
    twice, twice_times = planned("train.batch_size=8")
    assert shared.phases["rollout"] == twice.phases["rollout"] and shared.phases["loss"] == twice.phases["loss"]
    assert times["rollout"] == pytest.approx(twice_times["rollout"] / 4)
    served, times = planned("rollout.engine=server", "rollout.url=http://a:1")
    assert "rollout" not in served.phases and "rollout" not in times and served.lasting == twice.lasting
    beside, _ = planned("rollout.engine=vllm")
    assert beside.lasting["vLLM's share"] == int(0.3 * Gpu.named("h100").memory)


@pytest.mark.slow
def test_two_processes_keep_their_own(recipe, teacher_set, tmp_path):
    """Back at a checkpoint within a generation, each goes on with its own responses."""
    program, run = (*TWO, "-m", "kdkernels.training.cli", "train", str(recipe)), tmp_path / "run"
    settings = (*GKD, teacher_set, "rollout.updates=3", "train.batch_size=8", "deepspeed.zero_stage=3", *CONSTANT)
    settings = (*settings, "train.steps=5", "checkpoint.every=2")
    arguments = [word for one in settings for word in ("--set", one)]
    finish(start(program, *arguments, cwd=tmp_path), tmp_path)
    weights = final_weights(run)
    for left in ("final", "checkpoints/step-000004", "checkpoints/step-000005"):
        shutil.rmtree(run / left)
    finish(start(program, *arguments, "--resume", cwd=tmp_path), tmp_path)
    assert all(torch.equal(weights[name], one) for name, one in final_weights(run).items())
    own = [torch.load(run / f"checkpoints/step-000004/process-0000{i}.pt")["buffer"]["responses"] for i in (0, 1)]
    assert own[0] != own[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("rollout.updates=4", "rollout.reuse=3"), "[rollout] updates: expected a multiple of reuse = 3"),
        (("rollout.updates=2", "rollout.student_fraction=0"), "[rollout] updates is of what the student writes"),
        (("rollout.max_staleness=2",), "[rollout] max_staleness is of responses for several updates"),
    ],
)
def test_recipes_that_cannot_be(load, teacher_set, settings, said):
    with pytest.raises(InputError) as caught:
        load(*GKD, teacher_set, *settings)
    assert said in str(caught.value)

"""Objectives in a step of transformers' Trainer, accumulated: the gradient of full logits in fp64, or an error."""

import copy
import weakref

import pytest
import torch
from tiny_models import VOCABULARY, tiny

import kdkernels as kd
from kdkernels import reference
from kdkernels.errors import InputError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BETA = 0.5
# of each micro-batch, [B, 6] labels: 2 responses each, of different lengths
LENGTHS = ([1, 4], [3, 2], [4, 4], [2, 1])


def data() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (length for batch in LENGTHS for length in batch):
        ids = torch.randint(3, VOCABULARY, (6,), generator=generator)
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(6) < 6 - length, -100, ids)})
    return rows


STUDENT, TEACHER = tiny("llama").double(), tiny("qwen2").double().requires_grad_(False)


class Distilling(transformers.Trainer):
    """One step of SGD from STUDENT with a loss of ``write(trainer, out, items)``."""

    def __init__(self, write=None, objective=None, accumulation=4, **options):
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        plain = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
        order = {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
        args = transformers.TrainingArguments("unused", **sizes, **plain, **quiet, **order)
        options = {"model": copy.deepcopy(STUDENT)} | options
        super().__init__(args=args, train_dataset=data(), eval_dataset=data(), **options)
        self.write, self.objective = write, objective or kd.GKD(BETA)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.write(self, self.call(model, inputs), num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def call(self, model, inputs):
        """The objective by kd.Distillation, as a function of the options it is called with."""
        with torch.no_grad():
            teacher = kd.Head.of(TEACHER, input_ids=inputs["input_ids"])
        module = kd.Distillation(model, self.objective, VOCABULARY)
        return lambda **options: module(teacher=teacher, **inputs, **options)

    def step(self) -> list[torch.Tensor]:
        """The change of the weights, which is the gradient."""
        self.train()
        return changes(self.model)


class Saying(Distilling):
    """A class of its own loss that says that it is divided."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def changes(model) -> list[torch.Tensor]:
    return [p.detach() - before for p, before in zip(model.parameters(), STUDENT.parameters(), strict=True)]


def by_full_logits(reduce, batches: int = 4) -> list[torch.Tensor]:
    """The step of ``reduce(values)`` of all responses, values a list of a list of [l] for each micro-batch."""
    model = copy.deepcopy(STUDENT)
    values = []
    for i in range(batches):
        values.append([])
        for row in data()[2 * i : 2 * i + 2]:
            at = row["labels"][1:] != -100
            z = (each(input_ids=row["input_ids"][None]).logits[0, :-1][at] for each in (model, TEACHER))
            values[-1].append(reference.divergence(*z, kd.JSD(BETA)))
    reduce(values).backward()
    return [-p.grad for p in model.parameters()]


def mean_of_means(values):
    return torch.stack([torch.stack([v.mean() for v in batch]).mean() for batch in values]).mean()


def mean_of_tokens(values):
    return torch.cat([v for batch in values for v in batch]).mean()


def sum_of_tokens(values):
    return torch.cat([v for batch in values for v in batch]).sum()


def check(got, expected):
    assert len(got) == len(expected) > 10
    for one, right in zip(got, expected, strict=True):
        assert right.norm() > 0 and (one - right).norm() < 1e-9 * right.norm()


def bare(trainer, call, items):
    return call().loss


def given(trainer, call, items):
    return call(denominator=items).loss


def divided(trainer, call, items):
    return call().loss / trainer.current_gradient_accumulation_steps


TOKENS, SUM = kd.GKD(BETA, reduction="tokens"), kd.GKD(BETA, reduction="sum")


@pytest.mark.parametrize("objective", [kd.GKD(BETA), TOKENS], ids=["responses", "tokens"])
@pytest.mark.parametrize("write", [bare, divided])
def test_means_that_nobody_divides_are_refused(write, objective):
    with pytest.raises(InputError, match=r"Distilling.*4 micro-batches.*denominator=num_items_in_batch.*loss_is_sca"):
        Distilling(write, objective).step()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_denominator_makes_parts_of_the_step(accumulation):
    check(Distilling(given, TOKENS, accumulation).step(), by_full_logits(mean_of_tokens, accumulation))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_count_of_tokens_is_none_of_responses(accumulation):
    with pytest.raises(InputError, match=r"expected a number of responses, got num_items_in_batch"):
        Distilling(given, kd.GKD(BETA), accumulation).step()
    check(Distilling(lambda _, call, items: call(denominator=8).loss).step(), by_full_logits(mean_of_means))


def test_a_trainer_may_count_responses():
    class Counting(Distilling):
        def _get_num_items_in_batch(self, batch_samples, device):
            return sum(len(batch["labels"]) for batch in batch_samples)

    check(Counting(given, kd.GKD(BETA)).step(), by_full_logits(mean_of_means))


def test_one_micro_batch_needs_none():
    check(Distilling(bare, accumulation=1).step(), by_full_logits(mean_of_means, 1))


def test_a_trainer_that_divides_needs_none():
    trainer = Distilling(bare)
    trainer.model_accepts_loss_kwargs = False
    check(trainer.step(), by_full_logits(mean_of_means))
    if not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"):
        return
    trainer = Distilling(bare)
    trainer.loss_is_scaled_for_ga = False
    check(trainer.step(), by_full_logits(mean_of_means))


def test_who_divides_says_so():
    check(Saying(divided).step(), by_full_logits(mean_of_means))
    check(Distilling(bare, SUM).step(), by_full_logits(sum_of_tokens))
    check(Distilling(lambda _, call, items: call().loss / items, SUM).step(), by_full_logits(mean_of_tokens))


def test_what_another_class_says_is_not_about_this_loss():
    """TRL's DistillationTrainer divides its loss and says so; a class of it with another loss has to say so too."""

    class Another(Saying):
        def _compute_loss(self):
            pass

    with pytest.raises(InputError, match="Another"):
        Another(bare).step()


def test_a_word_that_the_trainer_does_not_know_is_none(monkeypatch):
    """Before 5.19 loss_is_scaled_for_ga = False divided nothing."""
    monkeypatch.delattr(transformers.Trainer, "loss_is_scaled_for_ga")
    trainer = Distilling(bare)
    trainer.loss_is_scaled_for_ga = False
    monkeypatch.setattr("accelerate.Accelerator.backward", lambda self, loss, **_: loss.backward())
    with pytest.raises(InputError, match="before transformers 5"):
        trainer.step()


def test_a_loss_function_is_never_divided():
    def function(outputs, labels, num_items_in_batch):
        student = kd.Logits(outputs.logits)
        return kd.SFT()(student, None, kd.Layout.from_labels(labels)).loss

    class Plain(Distilling):
        compute_loss = transformers.Trainer.compute_loss

    with pytest.raises(InputError, match="Plain"):
        Plain(compute_loss_func=function).step()


def test_evaluation_and_what_needs_no_gradient_are_no_step():
    trainer = Distilling(bare)
    assert trainer.evaluate()["eval_loss"] > 0.01

    def logging_too(trainer, call, items):
        with torch.no_grad():
            assert call().loss > 0.01
        return call(denominator=items).loss

    check(Distilling(logging_too, TOKENS).step(), by_full_logits(mean_of_tokens))


def test_a_loss_that_trains_nothing_is_a_metric():
    def logging_too(trainer, call, items):
        logits = kd.Logits(torch.randn(1, 3, VOCABULARY))
        assert kd.SFT()(logits, None, kd.Layout.from_labels(torch.tensor([[-100, 1, 2]]))).loss > 0.1
        return call(denominator=items).loss

    check(Distilling(logging_too, TOKENS).step(), by_full_logits(mean_of_tokens))


def test_the_batch_is_not_kept_for_the_backward():
    """Trainer.training_step deletes it before; who looks at that function's variables may keep them."""
    batches, kept = [], []

    class Watched(Distilling):
        def call(self, model, inputs):
            inputs["more"] = torch.zeros(1000)
            batches.append(weakref.ref(inputs["more"]))
            return super().call(model, {name: each for name, each in inputs.items() if name != "more"})

    def watched(trainer, call, items):
        loss = call().loss
        loss.register_hook(lambda grad: kept.append(batches[-1]() is not None))
        return loss

    check(Watched(watched, accumulation=1).step(), by_full_logits(mean_of_means, 1))
    assert kept == [False]


def test_every_way_to_an_objective():
    """Head and objective, the fused calling convention; a per-token function is a tensor like any other."""

    class Direct(Distilling):
        def call(self, model, inputs):
            ids, labels = inputs["input_ids"], inputs["labels"]
            hidden = [kd.hidden_states(each, input_ids=ids) for each in (model, TEACHER)]
            student, teacher = map(kd.Head.from_model, (model, TEACHER), hidden)
            layout = kd.Layout.from_labels(labels)
            ways = {
                "objective": lambda: self.objective(student, teacher, layout).loss,
                "fused": lambda: kd.FusedLinearDistillationLoss(self.objective)(
                    hidden[0][:, :-1], model.lm_head.weight, hidden[1][:, :-1], TEACHER.lm_head.weight, labels[:, 1:]
                ),
                "function": lambda: kd.divergence(student, teacher, kd.JSD(BETA), rows=layout).sum(),
            }
            return ways

    for way in ("objective", "fused"):
        with pytest.raises(InputError, match="Direct"):
            Direct(lambda _, ways, items, way=way: ways[way]()).step()
    check(Direct(lambda _, ways, items: ways["function"]() / items).step(), by_full_logits(mean_of_tokens))


def test_distillation_as_the_trainers_model():
    class Plain(Distilling):
        compute_loss = transformers.Trainer.compute_loss

        def _prepare_inputs(self, inputs):
            ids = inputs["input_ids"]
            with torch.no_grad():
                teacher = kd.Head.of(TEACHER, input_ids=ids)
            return {**inputs, "teacher": teacher}

    trainer = Plain(model=kd.Distillation(copy.deepcopy(STUDENT), kd.GKD(BETA), VOCABULARY))
    check(trainer.step(), by_full_logits(mean_of_means))


def test_the_trainers_count_is_no_input_of_a_model():
    with pytest.raises(TypeError, match=r"num_items_in_batch.*denominator"):
        kd.hidden_states(STUDENT, input_ids=torch.ones(1, 2, dtype=torch.int64), num_items_in_batch=3)

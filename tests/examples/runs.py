"""Each example's training with SGD on a few rows, in this process or together with others, and what it should give.

A program under torch.distributed.run too, with a file for the results and the names of the runs.
"""

import copy
import functools
import sys
import tempfile
import warnings
from typing import NamedTuple

import stand_ins
import torch
import torch.distributed as dist
from stand_ins import TEXTS, models, rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import SGD
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from . import full_logits, serving

LR = 1.0  # large: what an update loses to the weights' own rounding is small beside it
# for both Trainer and TRL: batches of two rows, four of them accumulated, in the order of the data
ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "optim": "sgd",
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "num_train_epochs": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


class Run(NamedTuple):
    """Losses, the change of each weight, and both by full logits."""

    losses: list[float]
    update: dict[str, torch.Tensor]
    expected: tuple[list[float], dict[str, torch.Tensor]]


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Task:
    """The stand-ins of the examples, and the rows of some steps of some batches."""

    def __init__(self, batches: int, size: int):
        self.student, self.teacher, self.tokenizer = models()
        self.entries = len(self.tokenizer)
        self.before = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        self.rows = rows(self.tokenizer)[: batches * size]
        self.loader = DataLoader(self.rows, size, collate_fn=DataCollatorForSeq2Seq(self.tokenizer))
        self.batches = list(self.loader)
        self.optimizer = SGD(self.student.parameters(), lr=LR)

    def grouped(self, count: int) -> list[list[dict]]:
        """The batches in steps of ``count``."""
        return [self.batches[i : i + count] for i in range(0, len(self.batches), count)]

    def mine(self) -> list[dict]:
        """This process's batches."""
        return [dict(batch) for batch in self.batches[rank() :: world()]]

    def expect(self, steps, loss):
        return full_logits.train(self.student, self.teacher, self.entries, steps, LR, loss)

    def run(self, losses, expected, weights=None) -> Run:
        found = dict(self.student.named_parameters()) if weights is None else weights
        return Run(losses, {name: p.detach() - self.before[name] for name, p in found.items()}, expected)


def mean_over_processes(losses):
    total = torch.tensor(losses, dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(total)
    return (total / world()).tolist()


def logged(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


# ---- one run an example ----


def plain() -> Run:
    import plain

    task = Task(batches=3, size=4)
    expected = task.expect(task.grouped(1), full_logits.mean_of_responses)
    return task.run(plain.train(task.student, task.teacher, task.entries, task.loader, task.optimizer), expected)


def packed() -> Run:
    """Against rows of their own. Between texts without a prompt no label shows where one ends."""
    import packed

    task = Task(batches=12, size=1)
    for row in task.rows[:6]:
        row["labels"] = list(row["input_ids"])
    task.batches = list(task.loader)
    expected = task.expect(task.grouped(6), full_logits.tsd_kd)
    batches = DataLoader(task.rows, 6, collate_fn=DataCollatorWithFlattening(separator_id=task.entries - 1))
    return task.run(packed.train(task.student, task.teacher, task.entries, batches, task.optimizer), expected)


def hf_trainer() -> Run:
    import hf_trainer
    from transformers import TrainingArguments

    task = Task(batches=16, size=2)
    expected = task.expect(task.grouped(4 * world()), full_logits.mean_of_tokens)
    args = TrainingArguments(tempfile.mkdtemp(), train_sampling_strategy="sequential", **ARGUMENTS)
    data = {"train_dataset": task.rows, "data_collator": DataCollatorForSeq2Seq(task.tokenizer)}
    trainer = hf_trainer.Distilling(teacher=task.teacher, entries=task.entries, model=task.student, args=args, **data)
    trainer.train()
    return task.run(logged(trainer), expected)


def accelerate_loop() -> Run:
    import accelerate_loop
    from accelerate import Accelerator

    task = Task(batches=8, size=2)
    expected = task.expect(task.grouped(2 * world()), full_logits.mean_of_responses)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    losses = accelerate_loop.train(accelerator, task.student, task.teacher, task.entries, task.loader, task.optimizer)
    return task.run([sum(pair) / 2 for pair in zip(losses[::2], losses[1::2], strict=True)], expected)


def lightning_module() -> Run:
    import lightning
    import lightning_module

    task = Task(batches=8, size=2)
    expected = task.expect(task.grouped(2 * world()), full_logits.mean_of_responses)
    module, losses = lightning_module.Distilling(task.student, task.teacher, task.entries, task.optimizer), []
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=world(),
        strategy="ddp" if world() > 1 else "auto",
        use_distributed_sampler=False,  # which would shuffle
        **dict.fromkeys(quiet, False),
    )
    module.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"].item() * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has advice on workers, eval mode and so on
        trainer.fit(module, DataLoader(task.mine(), batch_size=None))
    losses = mean_over_processes([sum(pair) / 2 for pair in zip(losses[::2], losses[1::2], strict=True)])
    return task.run(losses, expected)


def fsdp2() -> Run:
    import fsdp2

    task = Task(batches=4, size=2)
    expected = task.expect(task.grouped(world()), full_logits.mean_of_responses)
    module = fsdp2.shard(task.student, task.entries)
    losses = fsdp2.train(module, task.teacher, task.mine(), SGD(module.parameters(), lr=LR))
    weights = {name: p.full_tensor() for name, p in task.student.named_parameters()}
    return task.run(mean_over_processes(losses), expected, weights)


def deepspeed_zero3() -> Run:
    from kdkernels.training import deepspeed_strategy  # says on what, and that gloo reduces

    import deepspeed  # isort: skip
    import deepspeed_zero3

    deepspeed_strategy.join()
    task = Task(batches=4, size=2)
    expected = task.expect(task.grouped(world()), full_logits.mean_of_responses)
    small = {"stage3_param_persistence_threshold": 0}  # else small weights stay whole
    config = deepspeed_zero3.CONFIG | {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3, **small}}
    config["zero_allow_untested_optimizer"] = True
    engine = deepspeed_zero3.shard(task.student, task.entries, task.optimizer, config)
    losses = deepspeed_zero3.train(engine, task.teacher, task.mine())
    parameters = dict(task.student.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        weights = {name: p.detach().clone() for name, p in parameters.items()}
    return task.run(mean_over_processes(losses), expected, weights)


def trl_gkd() -> Run:
    import trl_gkd
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig

    task = Task(batches=16, size=2)
    expected = task.expect(task.grouped(4 * world()), full_logits.mean_of_responses)
    talks = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]} for p, r in TEXTS[:32]]
    args = GKDConfig(tempfile.mkdtemp(), lmbda=0.0, train_sampling_strategy="sequential", **ARGUMENTS)
    trainer = trl_gkd.Distilling(
        task.student, task.teacher, args, task.tokenizer, train_dataset=Dataset.from_list(talks)
    )
    trainer.train()
    return task.run(logged(trainer), expected)


def trl_distillation() -> Run:
    """On what the student writes at each step, in batches that are padded on both sides."""
    import trl_distillation
    from datasets import Dataset
    from trl import DistillationConfig

    task, steps = Task(batches=16, size=2), []
    student = copy.deepcopy(task.student)  # before TRL changes its forward
    args = DistillationConfig(tempfile.mkdtemp(), beta=0.5, max_completion_length=6, **ARGUMENTS)
    prompts = Dataset.from_list([{"prompt": prompt} for prompt, _ in TEXTS[:32]])
    trainer = trl_distillation.Distilling(task.student, task.teacher, args, task.tokenizer, train_dataset=prompts)
    write = trainer._generate_and_score_completions

    def written(prompts):
        found = write(prompts)
        batch = {
            "input_ids": torch.cat([found["prompt_ids"], found["completion_ids"]], 1),
            "attention_mask": torch.cat([found["prompt_mask"], found["completion_mask"]], 1),
        }
        scored = torch.cat([torch.zeros_like(found["prompt_mask"]), found["completion_mask"]], 1) != 0
        batch["labels"] = batch["input_ids"].masked_fill(~scored, -100)
        every = [None] * world()
        dist.all_gather_object(every, batch) if world() > 1 else every.__setitem__(0, batch)
        steps.append(every)
        return found

    trainer._generate_and_score_completions = written
    trainer.train()
    expected = full_logits.train(student, task.teacher, task.entries, steps, LR, full_logits.mean_of_tokens)
    return task.run(logged(trainer), expected)


def peft_lora() -> Run:
    import peft_lora
    from peft import get_peft_model

    task = Task(batches=3, size=4)
    peft_lora.LORA.init_lora_weights = False  # its B would be 0, and A's gradient with it
    task.student = get_peft_model(task.student, peft_lora.LORA)
    trained = {name: p for name, p in task.student.named_parameters() if p.requires_grad}
    task.before = {name: p.detach().clone() for name, p in trained.items()}
    expected = task.expect(task.grouped(1), full_logits.mean_of_responses)
    losses = peft_lora.train(task.student, task.teacher, task.entries, task.loader, SGD(trained.values(), lr=LR))
    return task.run(losses, expected, trained)


def served_teacher() -> Run:
    """Beside a stand-in for vLLM's server with the teacher in it, over HTTP."""
    import served_teacher

    task = Task(batches=3, size=4)
    expected = task.expect(task.grouped(1), full_logits.mean_over_listed)
    with serving.server(task.teacher, task.entries, full_logits.LISTED) as url:
        ask = functools.partial(served_teacher.ask, url)
        losses = served_teacher.train(task.student, task.entries, task.loader, task.optimizer, ask)
    return task.run(losses, expected)


def tensor_parallel() -> Run:
    import tensor_parallel

    task = Task(batches=3, size=4)
    expected = task.expect(task.grouped(1), full_logits.mean_of_responses)
    student = tensor_parallel.shard(task.student, init_device_mesh("cpu", (world(),)))
    optimizer = SGD(student.parameters(), lr=LR, foreach=False)
    losses = tensor_parallel.train(student, task.teacher, task.entries, task.loader, optimizer)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in student.named_parameters()}
    return task.run(losses, expected, whole)


RUNS = {
    run.__name__: run
    for run in (
        *(plain, packed, peft_lora, served_teacher),
        *(hf_trainer, accelerate_loop, lightning_module, trl_gkd, trl_distillation),
        *(fsdp2, deepspeed_zero3, tensor_parallel),
    )
}


def main(results: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    stand_ins.DEVICE = torch.device("cpu")
    dist.init_process_group("gloo")
    torch.save({name: tuple(RUNS[name]()) for name in names}, f"{results}.{rank()}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""The memory of a process: what is there all the time, and what each phase of a step takes on top.

    peak = sum(lasting) + max over the phases of sum(phase)

    prompts       KV cache of the prompts, layers of one forward pass over them
    rollout       KV cache of prompts and responses, logits of one token
    teacher       layers of its forward pass over a micro-batch; of one in parts, the layers that are put together
    loss          activations of the student, the teacher's hidden states, chunks of logits, dW and dX; under ZeRO-3 the
                  layers that are put together
    backward      activations and their gradients, falling as the weights' gradients come; and the same layers
    reduce        without ZeRO, a copy of the gradients in one piece
    optimizer     a copy of its gradients, the root of the second moments

Lengths are the recipe's limits: a batch of shorter texts takes less. Of activations see activations.py, of chunks
engine/predict.py. Not counted: CUDA's context, fragmentation (RESERVE is left for both), kernels' own workspace.

Axes: M sequences of a micro-batch, B those of a process's step, P prompt tokens, R response tokens, V vocabulary, H
hidden size of the student, T that of the teacher, w bytes of a weight, n trained weights of a process.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from kdkernels.engine.gpu import Gpu
from kdkernels.engine.predict import Call
from kdkernels.training.needs import BUCKET, needs
from kdkernels.training.plan.activations import Pass, cache_bytes, forward, forward_backward
from kdkernels.training.recipe.config import Config

RESERVE = 0.1  # of a GPU's memory
LIVE, GATHERED = 10**9, 5 * 10**7  # weights that DeepSpeed keeps whole under ZeRO-3, and gathers at a time, by default
LOGITS_BYTES = 16  # an entry, while a token is drawn: logits, their float32 copy, probabilities, random numbers


@dataclass(frozen=True)
class Load:
    """A recipe's step on one of `processes`, with models on the meta device, which get the recipe's dtypes and its
    gradient checkpointing.
    """

    config: Config
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    processes: int
    vocabulary: int
    gpu: Gpu | None  # None: a CPU

    def __post_init__(self):
        self.student.to(getattr(torch, self.config.run.dtype))
        if self.teacher is not None:
            self.teacher.to(getattr(torch, self.config.teacher.dtype))
        if self.config.train.gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of the name, which older transformers know alone
                self.student.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def scorer(self) -> PreTrainedModel | None:
        """The model that scores a batch for the student: itself, where it is the teacher's base."""
        own = self.config.teacher is not None and self.config.teacher.base
        return self.student if own else self.teacher

    @property
    def sequences(self) -> int:
        return self.config.train.micro_batch_size

    @property
    def micro_batches(self) -> int:
        return self.responses // self.sequences

    @property
    def at_once(self) -> int:
        """Responses that the student writes at the same time."""
        return self.responses * self.config.rollout.updates // self.config.rollout.reuse

    @property
    def prompt(self) -> int:
        return self.config.data.max_prompt_tokens

    @property
    def response(self) -> int:
        """The longest: of the data's where they are read, of the student's where it writes."""
        data, fraction = self.config.data, self.config.rollout.student_fraction
        read, written = data.max_response_tokens, self.config.rollout.max_new_tokens
        return max(read if fraction < 1 else 1, written if fraction > 0 else 1)

    @property
    def width(self) -> int:
        return getattr(torch, self.config.run.dtype).itemsize

    @property
    def trained(self) -> int:
        return sum(one.numel() for one in self.student.parameters() if one.requires_grad)

    @property
    def own(self) -> int:
        """Trained weights whose optimizer state is this process's."""
        return self.trained // self.processes if self.config.deepspeed.zero_stage else self.trained

    @property
    def loss(self) -> Call:
        """The call of a micro-batch."""
        head, teacher = self.student.get_output_embeddings().weight, self.scorer
        return Call(
            self.gpu,
            self.sequences * self.response,
            head.shape[1],
            0 if teacher is None else teacher.get_output_embeddings().weight.shape[1],
            self.vocabulary,
            logits=4 if self.gpu else self.width,
            trained=head.requires_grad,
        )

    @property
    def responses(self) -> int:
        """Of a step."""
        return self.config.train.batch_size // self.processes

    @cached_property
    def prompts_pass(self) -> Pass:
        """The student's pass over the prompts that it writes to at once."""
        return forward(self.student, self.at_once, self.prompt)

    @cached_property
    def cached(self) -> int:
        """Bytes that the KV cache has of a token."""
        return cache_bytes(self.student)

    def student_pass(self) -> Pass:
        return forward_backward(self.student, self.sequences, self.prompt + self.response)

    def teacher_pass(self) -> Pass | None:
        return None if self.scorer is None else forward(self.scorer, self.sequences, self.prompt + self.response)


@dataclass(frozen=True)
class Memory:
    """All in bytes."""

    lasting: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def widest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.lasting.values()) + sum(self.phases[self.widest].values())


def memory(load: Load, student: Pass, teacher: Pass | None) -> Memory:
    """That of a step whose gradients are there from the micro-batch before. The passes are those of `load`."""
    config, scored = load.config, _scored(load, teacher)
    lasting = dict(needs(config, load.student, load.teacher, processes=load.processes).memory)
    chunks, gradients = _loss(load)
    if load.gpu is None:
        lasting["loss"] = chunks + gradients["dW"]  # compute/memory.py keeps the blocks
        gradients["dW"] = chunks = 0
    elif "ZeRO's bucket" in lasting:  # all of its buffer is there, however little is trained
        lasting["ZeRO's bucket"] = lasting["ZeRO's bucket"] * BUCKET // min(BUCKET, load.trained)
    in_parts = config.deepspeed.zero_stage == 3 and load.processes > 1
    gathered = {"gathered layers": _gathered(load.student)} if in_parts else {}
    phases = {
        "loss": {"activations": student.kept, **gathered, **scored, "loss": chunks + sum(gradients.values())},
        "backward": {"activations": student.backward, **gathered, **scored},
        "optimizer": {"optimizer's step": _step(load)},
    }
    if not config.deepspeed.zero_stage:
        phases["reduce"] = {"gradients, side by side": min(BUCKET, load.trained) * load.width}
    if teacher is not None:
        phases["teacher"] = {"teacher's layers": teacher.forward}
        if load.gpu is not None and config.teacher.placement == "cpu":  # a CPU's own memory has it all the time
            phases["teacher"]["teacher"] = lasting.pop("teacher")
        if config.teacher.placement == "zero3" and load.processes > 1:
            phases["teacher"]["gathered layers"] = _gathered(load.scorer)
    if config.rollout.engine == "vllm" and load.gpu is not None:
        lasting["vLLM's share"] = int(config.rollout.gpu_memory * load.gpu.memory)
    if config.rollout.student_fraction > 0 and config.rollout.engine == "transformers":
        phases |= _rollout(load)
    return Memory(lasting, phases)


def _scored(load: Load, teacher: Pass | None) -> dict[str, int]:
    """What the student learns from; the teacher's output layer is there where its other weights are not."""
    if teacher is None:
        return {}
    scored = {"teacher's hidden states": teacher.kept}
    placement = load.config.teacher.placement
    if (placement == "zero3" and load.processes > 1) or (placement == "cpu" and load.gpu is not None):
        scored["teacher's output layer"] = load.scorer.get_output_embeddings().weight.nbytes
    return scored


def _gathered(model: PreTrainedModel) -> int:
    """The layers that ZeRO-3 has put together, and what those under way come in."""
    weights = sum(one.numel() for one in model.parameters())
    return (min(LIVE, weights) + min(GATHERED, weights)) * model.dtype.itemsize


def _loss(load: Load) -> tuple[int, dict[str, int]]:
    """Chunks of logits, and dX [M, P + R, H] and dW [V, H], with fp32 sums of the latter where chunks are several."""
    call, rows = load.loss, load.sequences * (load.prompt + load.response)
    size = load.student.get_output_embeddings().weight.numel() if call.trained else 0
    several = load.width < 4 and call.rows.student < call.tokens
    return call.memory, {"dX": rows * call.student * load.width, "dW": size * (load.width + 4 * several)}


def _step(load: Load) -> int:
    """4 n bytes for the root, and as many for ZeRO's copy of the gradients; on CPUs AdamW goes weight by weight."""
    if load.config.deepspeed.offload_optimizer:
        return 0
    largest = max(one.numel() for one in load.student.parameters() if one.requires_grad)
    stage = load.config.deepspeed.zero_stage
    return 4 * (load.own if load.gpu or stage else largest) + (4 * load.own if stage else 0)


def _rollout(load: Load) -> dict[str, dict[str, int]]:
    """All responses of a generation are written at once."""
    written = load.prompt + load.config.rollout.max_new_tokens
    return {
        "prompts": {
            "KV cache": load.at_once * load.prompt * load.cached,
            "layers": load.prompts_pass.forward,
        },
        "rollout": {
            "KV cache": load.at_once * written * load.cached,
            "logits": load.at_once * load.vocabulary * LOGITS_BYTES,
        },
    }

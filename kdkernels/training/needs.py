"""What a run takes of the machine: memory of its processes, space in its directory. Estimated before anything is made.

Counted are the tensors whose sizes the recipe determines: weights, gradients, AdamW's moments and float32 weights.
Activations, logits, logs and evaluation records come on top.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kdkernels.compute import gemm
from kdkernels.errors import InputError
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.run.directory import RunDirectory

BUCKET = 5 * 10**8  # gradients that ZeRO reduces at a time


@dataclass(frozen=True)
class Needs:
    """All in bytes. `memory`: of each process, by what it is for; `offloaded`: what it takes of the machine's memory
    beside that of its device. `checkpoint`, `final`: of one of them on the disk; `written`: how many checkpoints a run
    writes; `keep`: how many of them stay. `version`: of the weights that an engine gets for rollouts, of which there
    are two while one is written.
    """

    memory: dict[str, int]
    checkpoint: int
    final: int
    written: int
    keep: int
    offloaded: int = 0
    version: int = 0

    def disk(self) -> int:
        """The space at the worst moment: an old checkpoint goes when the new one is there, the model comes last."""
        kept = min(self.written, self.keep)
        most = max(min(self.written, self.keep + 1) * self.checkpoint, kept * self.checkpoint + self.final)
        return most + 2 * self.version


def needs(
    config: Config, student: nn.Module, teacher: nn.Module | None, done: int = 0, processes: int | None = None
) -> Needs:
    """The needs of a run of `config` with these models (on the meta device, if need be) on as many `processes` as are
    given, or as there are; `done` of its steps are trained.
    """
    weights, trained = _count(student), sum(p.numel() for p in student.parameters() if p.requires_grad)
    width = _width(config.run.dtype)
    stage = config.deepspeed.zero_stage
    in_parts = stage == 3
    offloads = config.deepspeed.offload_optimizer
    master = 4 if stage in (1, 2) or width < 4 or offloads else 0  # float32 weights beside the model's own
    shares = (processes or distributed.world_size()) if stage > 0 else 1
    gradients = 0 if stage > 0 else trained * width  # with ZeRO, each goes into the bucket as it comes
    if stage == 1 and width < 4:
        gradients += 4 * trained  # of all micro-batches so far, in float32
    elif stage > 0:
        gradients += 4 * trained // shares
    memory = {
        "student": weights * width // (shares if in_parts else 1),
        **({"student, whole while it generates": weights * width} if in_parts else {}),
        "gradients": gradients,
        **({"ZeRO's bucket": min(BUCKET, trained) * (4 if stage == 1 else width)} if stage > 0 else {}),
        **({} if offloads else {"optimizer": (8 + master) * trained // shares}),
        **({} if teacher is None else {"teacher": teacher_bytes(config, teacher, processes)}),
    }
    every = config.checkpoint.every
    return Needs(
        memory,
        checkpoint=(12 if in_parts else width + master + 8) * trained,
        final=width * (trained if config.student.adapter and not config.student.adapter.merge else weights),
        # the last step has one in any case
        written=-(-config.train.steps // every) if every and done < config.train.steps else 0,
        keep=config.checkpoint.keep,
        offloaded=(8 + master + 4) * trained // shares if offloads else 0,  # float32 gradients too
        version=width * weights if config.rollout.engine != "transformers" and config.rollout.weights is None else 0,
    )


def check_disk(run: RunDirectory, needed: Needs) -> None:
    """Raises InputError unless the disk of the run's directory can hold the run, whose checkpoints may be there."""
    free = free_disk(run.root) + _size(run.checkpoints)
    if needed.disk() > free:
        raise InputError(
            f"[run] output: expected {text(needed.disk())} on the disk of {run.root}, for {describe_disk(needed)}, got "
            f"{text(free)}: free some, write fewer ([checkpoint] keep, every), or give another directory"
        )


def check_output(root: Path) -> None:
    """Raises InputError unless the directory `root` is there and writable, or can be made; makes nothing."""
    there = _nearest(root)
    if not there.is_dir():
        raise InputError(f"[run] output: {root} cannot be a directory: {there} is none")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"[run] output: nothing can be written into {root}: no permission to write into {there}")


def describe_disk(needed: Needs) -> str:
    """What the space is for, in words."""
    at_once = min(needed.written, needed.keep + 1)
    checkpoints = f"{at_once} checkpoints of {text(needed.checkpoint)}, " if at_once else ""
    versions = f"2 versions of {text(needed.version)} for the rollouts' engine, " if needed.version else ""
    return f"{checkpoints}{versions}a model of {text(needed.final)}"


def describe(run: RunDirectory, needed: Needs, here: bool = True) -> list[str]:
    """Lines of a plan: what is needed and, if the run is one of this machine, `here`, what there is."""
    memory, parts = sum(needed.memory.values()), needed.memory.items()
    lines = [
        f"memory: {text(memory)} for each process ({', '.join(f'{name} {text(part)}' for name, part in parts)}), "
        "activations and logits on top"
        + (
            f"; of the machine's memory: {text(needed.offloaded)}, for the offloaded optimizer"
            if needed.offloaded
            else ""
        ),
        f"disk: at most {text(needed.disk())} ({describe_disk(needed)})",
    ]
    if not here:
        return lines
    there = free_memory()
    warning = "" if there is None or memory <= there else "; more than there is"
    free = ["unknown" if there is None else text(there), text(free_disk(run.root))]
    return [f"{lines[0]}; free for each: {free[0]}{warning}", f"{lines[1]}; free: {free[1]}"]


def describe_dtype(config: Config) -> list[str]:
    """A line where the run's dtype makes the models slow on this machine."""
    dtypes = {"[run] dtype": config.run.dtype, "[teacher] dtype": config.teacher and config.teacher.dtype}
    key = next((key for key, dtype in dtypes.items() if dtype == "bfloat16"), None)
    if key is None or distributed.device().type != "cpu" or not gemm.torch_crawls(torch.bfloat16):
        return []
    return [
        f"{key}: this CPU has no units for bfloat16, and PyTorch multiplies the models' matrices 5 to 100 times "
        'slower than in float32: set dtype = "float32" (--dry-run shows the memory it takes)'
    ]


def free_memory() -> int | None:
    """Free bytes for each process of this machine: of its accelerator, or its share of the machine's memory. None where
    nothing says it.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(distributed.device())[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return None
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))


def free_disk(root: Path) -> int:
    """Free bytes of the disk that `root` is on, or would be."""
    return shutil.disk_usage(_nearest(root)).free


def text(size: int) -> str:
    """`size` bytes, to read."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _nearest(path: Path) -> Path:
    """`path`, or the nearest of the directories above it that is there."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def teacher_bytes(config: Config, teacher: nn.Module, processes: int | None) -> int:
    """Bytes on a process's device, where a teacher in CPU memory is while it scores."""
    size = _count(teacher) * _width(config.teacher.dtype)
    return size // (processes or distributed.world_size()) if config.teacher.placement == "zero3" else size


def _width(dtype: str) -> int:
    """Bytes of a number."""
    return getattr(torch, dtype).itemsize


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

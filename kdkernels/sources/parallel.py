"""The process group of a head whose vocabulary is divided among ranks, as tensor parallelism divides it.

    group = mesh["tp"].get_group()
    student = kd.Head(hidden, weight, vocab_size=151936, group=group)      weight [V/P, H]: this rank's rows
    teacher = kd.Head(hidden_t, weight_t, vocab_size=151936, group=group)  divided alike, or
    teacher = kd.Head(hidden_t, whole_weight_t)                            whole on every rank
    kd.GKD()(student, teacher, mask).loss.backward()

- Every rank of the group makes the same call: the same batch, hidden states, targets and options. Ranks that do not all
  get the same error. Hidden states divided along the sequence (sequence parallelism) are gathered before.
- Loss and metrics come out bitwise the same on all ranks. The gradient of hidden is complete on each of them, so
  nothing is left to be reduced over the group; the gradients of weight and bias are those of the rank's rows. A layer
  that sums gradients over the group (Megatron's ``copy_to_tensor_model_parallel_region``) does not come before it.
- Other groups (data parallelism) reduce as they would without this one.
- The rows of all ranks, in the order of ranks, are the lm_head. ``vocab_size`` cuts off padding, which may fill the end
  of the last shard but not all of it.
- For each chunk, all ranks exchange what they know of its tokens: once for each model and each divergence. Once for a
  call they exchange what they are about to do (on GPUs a sync), and add up the gradient of hidden in fp32.

torch.distributed is imported where a group is at hand: some builds of PyTorch have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checks import check_count

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_group(group: object, vocab_size: int | None) -> None:
    """Checks the ``group`` and ``vocab_size`` of a head that has a group. Whether the ranks' heads go together is seen
    when they meet (engine/agreement.py).

    Raises:
        TypeError: group is no process group, or vocab_size no int.
        ValueError: this process is not in the group, it has been destroyed, or vocab_size is not positive.
    """
    from torch import distributed

    if not isinstance(group, getattr(distributed, "ProcessGroup", ())):
        way_out = "; pass mesh.get_group()" if hasattr(group, "get_group") else ""
        got = type(group).__name__
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {got}{way_out}")
    if not distributed.is_initialized():
        raise ValueError("group: expected one of a process group that is initialised, but torch.distributed is not")
    if distributed.get_rank(group) < 0:
        raise ValueError("group: expected one that this process is in, got one of other processes")
    if vocab_size is None:
        raise TypeError(
            "vocab_size: expected an int with group=, the whole vocabulary (the tokenizer's, or the sum of all ranks' "
            "rows of weight), got None"
        )
    check_count("vocab_size", vocab_size, 1)


def packed_group(group: ProcessGroup | None) -> list[float]:
    """The bytes of the group's name: PyTorch operators take numbers."""
    return [] if group is None else [float(byte) for byte in group.group_name.encode()]


def unpacked_group(name: list[float]) -> ProcessGroup | None:
    """The group whose name ``packed_group`` took."""
    if not name:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(bytes(int(byte) for byte in name).decode())

"""Parts of one batch on two processes under DDP, accumulated, with the denominator of the whole."""

import torch
import truth
from batches import fixed
from test_reduction import LENGTHS, OBJECTIVES, dense, given, part
from torch import distributed, nn

F64 = torch.float64
ROWS = (([0, 1], [3]), ([2], [4]))  # of both processes, first and second micro-batch: one has no token
CASES = (("GKD", "tokens"), ("TSDKD", "responses"), ("SFT", "tokens"), ("VCRD", "prompts"), ("DistiLLM2", "sum"))


class Part(nn.Module):
    """An objective of some rows of a batch, whose student's tensors are this module's parameters."""

    def __init__(self, batch: truth.Batch, objective):
        super().__init__()
        self.tensors = nn.ParameterList(truth.leaves(batch.student))
        batch.student = type(batch.student)(*self.tensors)
        self.batch, self.objective = batch, objective

    def forward(self, rows: list[int], denominator: float | torch.Tensor):
        return given(self.objective, part(self.batch, rows), denominator=denominator)


def process(rank: int, store: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, reduction in CASES:
        objective = OBJECTIVES[name][0](reduction=reduction)
        module = Part(fixed(F64, LENGTHS, bias=True), objective)
        count = int(given(objective, module.batch).count)
        expected = truth.gradients(dense(name, reduction, module.batch), module.batch.student)
        wrapped = nn.parallel.DistributedDataParallel(module)
        first, second = ROWS[rank]
        with wrapped.no_sync():
            out = wrapped(first, count)
            (2 * out.loss).backward()  # DDP averages over two processes
        last = wrapped(second, torch.tensor(count))
        (2 * last.loss).backward()
        loss = out.loss.detach() + last.loss.detach()
        distributed.all_reduce(loss)
        whole = dense(name, reduction, module.batch).detach()
        assert abs(loss - whole) < 1e-12 * whole, (name, reduction)
        for p, exact in zip(module.tensors, expected, strict=True):
            assert truth.relative(p.grad, exact) < 1e-10 and exact.norm() > 1e-3, (name, reduction)
    distributed.destroy_process_group()


def test_processes_and_micro_batches_add_up(tmp_path):
    """Uneven responses everywhere, and a process that has no token when gradients are reduced."""
    torch.multiprocessing.spawn(process, (str(tmp_path / "store"),), nprocs=2)

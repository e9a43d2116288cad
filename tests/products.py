"""Counts the matrix products that run."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels.engine import operators


class Products(TorchDispatchMode):
    """``shapes`` lists (rows, inner, columns) of every product inside the ``with`` block, forward and backward."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        if function.namespace == "kdkernels" and name.startswith("token_"):  # a mode does not look inside operators
            with self:
                return getattr(operators, f"_{name}")(*args)
        if name in ("mm", "gemm_", "addmm", "addmm_"):
            a, b = args[:2] if name in ("mm", "gemm_") else args[1:3]
            self.shapes.append((a.shape[0], a.shape[1], b.shape[1]))
        else:
            assert name not in ("matmul", "bmm", "baddbmm", "linear"), f"a product this does not count: {name}"
        return function(*args, **(kwargs or {}))

    def between(self, *sizes: int) -> int:
        """Number of the products with these three sizes, in any order."""
        return sum(sorted(shape) == sorted(sizes) for shape in self.shapes)

"""Files and functions stay short enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACES = ("kdkernels", "csrc", "python_bindings", "tests", "benchmarks", "examples", "hub")
FILE, FUNCTION = 450, 50  # lines at most, docstring included
KERNELS = {"kernel", "triton.jit"}  # decorators of Triton's, which may be longer


def too_long(name: str, source: str) -> list[str]:
    """What of a file exceeds its lines."""
    lines = len(source.splitlines())
    out = [f"{name}: {lines} lines"] if lines > FILE else []
    if not name.endswith(".py"):
        return out
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if lines > FUNCTION and KERNELS.isdisjoint(map(ast.unparse, node.decorator_list)):
            out.append(f"{name}: {node.name} has {lines} lines")
    return out


def test_files_and_functions_are_short():
    suffixes = {".py", ".cpp", ".h"}
    files = [path for place in PLACES for path in (ROOT / place).rglob("*") if path.suffix in suffixes]
    names = {str(path.relative_to(ROOT)) for path in files}
    assert {"kdkernels/engine/loop.py", "csrc/sweeps.h", "tests/test_structure.py"} <= names
    assert [each for path in files for each in too_long(str(path.relative_to(ROOT)), path.read_text())] == []


def test_the_check_sees_what_is_planted():
    body = '\n    """' + "\n    x" * (FUNCTION - 1) + '"""'
    assert too_long("a.py", f"def f():{body}") == ["a.py: f has 51 lines"]
    assert too_long("a.py", f"@kernel\ndef f():{body}") == []
    assert too_long("a.py", f"@cache\nasync def f():{body}") == ["a.py: f has 51 lines"]
    assert too_long("a.py", "\n" * 451) == too_long("a.py", "x\n" * 451) == ["a.py: 451 lines"]
    assert too_long("a.h", "int a;\n" * 451) == ["a.h: 451 lines"]
    assert too_long("a.h", "int a;\n" * 450) == []

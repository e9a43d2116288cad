"""The kernel for the kernels hub (hub/export.py): its layout; that it stands alone and computes the same."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

import kdkernels as kd

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
ROOT = Path(__file__).parent.parent
EXPORT = ROOT / "hub" / "export.py"
# What the kernel and the package compute on Triton, interpreted. The kernel comes first, loaded as `kernels` does it,
# while the package and what a kernel may not need cannot be imported.
PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
import torch

def loaded(variant):
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def computed(kd):
    generator = torch.Generator().manual_seed(0)
    def drawn(*shape):
        return torch.randn(shape, generator=generator)
    student = [drawn(2, 3, 8).requires_grad_(), drawn(150, 8).requires_grad_()]
    teacher = kd.Head(drawn(2, 3, 6), drawn(150, 6))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    target, values = torch.arange(6).view(2, 3), []
    for out in (
        kd.TSDKD(k=3)(kd.Head(*student), teacher, mask),
        kd.SFT()(kd.Head(*student), None, mask, target=target),
    ):
        values += [out.loss, *torch.autograd.grad(out.loss, student)]
    per_token = kd.divergence(kd.Head(*student), teacher, kd.JSD(0.9), temperature=2.0)
    values += [per_token, *torch.autograd.grad(per_token.sum(), student)]
    found = kd.statistics(kd.Head(*student), teacher, topk=4)
    values += [found.entropy, found.topk_indices, found.topk_log_probs, found.teacher.lse]
    return [value.detach() for value in values]

HIDDEN = ("kdkernels", "transformers", "deepspeed")
sys.modules.update(dict.fromkeys(HIDDEN))
kernel = loaded(Path(sys.argv[1]))
assert set(kernel.__all__) <= set(dir(kernel)) and kernel.modules.Entropy
got = computed(kernel)
older = importlib.util.spec_from_file_location("older", Path(sys.argv[1]) / "kdkernels" / "__init__.py")
module = importlib.util.module_from_spec(older)
older.loader.exec_module(module)
assert module.Head is kernel.Head and module.__all__ == kernel.__all__
for name in HIDDEN:
    del sys.modules[name]
import kdkernels
assert kdkernels.Head is not kernel.Head and kernel.__all__ == kdkernels.__all__
expected = computed(kdkernels)
assert len(got) == len(expected) > 12
for a, b in zip(got, expected):
    assert torch.equal(a, b) and b.abs().max() > 0
print("equal:", len(got))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, EXPORT, folder], check=True, capture_output=True, text=True)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout(repository):
    config = tomllib.loads((repository / "build.toml").read_text())
    general = config["general"]
    assert general["edition"] == 5 and config["torch-noarch"] == {} and general["version"] == int(kd.__version__[0])
    top = {path.name for path in repository.iterdir()}
    assert top == {"build.toml", "flake.nix", "CARD.md", "LICENSE", "torch-ext", "build"}
    source = files(repository / "torch-ext" / general["name"])
    assert {"__init__.py", "kernels/triton/backend.py", "engine/loop.py", "objectives/gkd.py"} <= set(source)
    assert "_ops.py" not in source  # kernel-builder's
    assert not [name for name in source if name.startswith(("training", "demo", "cli", "data/"))]
    assert {path.name for path in (repository / "build").iterdir()} == {f"torch-{b}" for b in general["backends"]}
    for backend in general["backends"]:
        built = files(repository / "build" / f"torch-{backend}")
        metadata = json.loads(built.pop("metadata.json"))
        assert metadata["backend"] == {"type": backend} and metadata["license"] == "Apache-2.0"
        assert metadata["id"].isidentifier() and metadata["id"].encode() in built["_ops.py"]
        digests = {name: base64.b64encode(sha256(content).digest()).decode() for name, content in built.items()}
        assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
        assert {name: built[name] for name in source} == source
        assert set(built) - set(source) == {"_ops.py", "kdkernels/__init__.py"}


def test_no_operator_has_a_name_of_its_own(repository):
    """Builds of several versions, and the package beside them, are loaded in one process."""
    for name, content in files(repository / "torch-ext").items():
        assert not re.search(rb"[\"']kdkernels::", content), name


def test_imports_that_a_kernel_has_not():
    refused = runpy.run_path(str(EXPORT))["refused"]
    assert refused("def f():\n    import transformers.models") == ["imports transformers.models"]
    assert refused("from kdkernels.data import Batch") == ["imports kdkernels.data"]
    assert refused("import numpy as np") == ["imports numpy"]
    assert refused("import math\nimport torch.nn\nfrom triton import language\nfrom ..kernels import eager") == []


def test_it_stands_alone_and_computes_what_the_package_does(repository):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "KDKERNELS_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, repository / "build" / "torch-cuda"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"equal: \d+", done.stdout)


def test_the_code_on_the_card_runs(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "hub" / "CARD.md").read_text(), re.DOTALL)
    names = {"repository": "somebody/kdkernels"}
    monkeypatch.setitem(sys.modules, "kernels", type(sys)("kernels"))
    sys.modules["kernels"].get_kernel = lambda repository, version, trust_remote_code: kd
    exec(code, names)
    assert names["loss"] > 0 and names["hidden"].grad.abs().max() > 0 and names["weight"].grad.abs().max() > 0

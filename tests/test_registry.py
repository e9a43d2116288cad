"""One backend decides, says so, and never steps in silently."""

import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import kdkernels as kd
from kdkernels.kernels import Backend, Request, backend_for, registry
from kdkernels.kernels.interface import refused_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def head(dtype=torch.float32) -> kd.Head:
    return kd.Head(torch.randn(3, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype))


def name_of(*asked) -> str:
    return backend_for(*asked).name


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_logged", set())


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, logger="kdkernels")
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_native_backend_is_built():
    assert name_of(CPU, torch.float32) == name_of(CPU, torch.bfloat16) == "native"


def test_info():
    info = kd.info()
    assert info["backends"]["eager"] == info["backends"]["native"] == "ok"
    assert info["devices"]["cpu"] == "native"
    assert info["cpu_isa"] in ("avx512", "avx2", "portable")
    assert set(info["cpu_products"]) == {"float32", "bfloat16", "float16"}
    assert info["cpu_products"]["float16"].startswith(("native: ", "torch: "))


def test_info_says_why_not(monkeypatch):
    monkeypatch.setattr(registry, "load", lambda name: (None, "no compiler") if name == "native" else LOAD(name))
    info = kd.info()
    assert "no compiler" in info["backends"]["native"]
    assert info["devices"]["cpu"] == "eager" and info["cpu_isa"] is None
    assert all(told.startswith(("torch: ", "torch in fp32: ")) for told in info["cpu_products"].values())


LOAD = registry.load


@pytest.mark.parametrize("name", ["eager", "native"])
def test_a_forced_backend_runs(monkeypatch, name, warned):
    monkeypatch.setenv("KDKERNELS_BACKEND", name)
    backend = backend_for(CPU, torch.float32)
    assert backend.name == name
    called = []
    real = backend.statistics
    monkeypatch.setattr(backend, "statistics", lambda *args: called.append(name) or real(*args))
    kd.entropy(head())
    assert called and not warned()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("triton", "it runs on cuda, not on cpu"), ("nonsense", "expected one of eager, native, triton")],
)
def test_a_forced_backend_that_cannot_run_is_an_error(monkeypatch, name, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("KDKERNELS_BACKEND", name)
    with pytest.raises(RuntimeError, match=f"KDKERNELS_BACKEND={name}: {reason}"):
        kd.entropy(head())


def test_a_forced_backend_that_lacks_the_dtype_is_an_error(monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "native")
    with pytest.raises(RuntimeError, match=r"KDKERNELS_BACKEND=native: .*float64"):
        kd.entropy(head(torch.float64))


def test_a_forced_backend_that_does_not_load_is_an_error(monkeypatch):
    monkeypatch.setattr(registry, "load", lambda name: (None, "ImportError: not built"))
    monkeypatch.setenv("KDKERNELS_BACKEND", "native")
    with pytest.raises(RuntimeError, match=r"KDKERNELS_BACKEND=native: .*not built"):
        kd.entropy(head())


def test_the_slow_way_out_warns_once(warned):
    for _ in range(3):
        kd.entropy(head(torch.float64))
    assert len(warned()) == 1
    assert "eager" in warned()[0] and "cpu" in warned()[0] and "float64" in warned()[0]


def test_each_reason_warns(monkeypatch, warned):
    kd.entropy(head(torch.float64))
    monkeypatch.setattr(registry, "load", lambda name: (None, "no compiler") if name == "native" else LOAD(name))
    kd.entropy(head())
    assert len(warned()) == 2 and "no compiler" in warned()[1]


def test_the_usual_way_is_silent(warned):
    kd.entropy(head())
    kd.entropy(head(torch.bfloat16))
    assert not warned()


def test_who_asks_for_information_is_told_once(caplog):
    caplog.set_level(logging.INFO, logger="kdkernels")
    for _ in range(2):
        kd.entropy(head())
    assert [(each.levelno, each.getMessage()) for each in caplog.records] == [
        (logging.INFO, "kdkernels uses its native backend on cpu: it is the first choice on cpu")
    ]


class Sampled(Backend):
    """A backend of a device that has none, which computes with bf16 alone."""

    name = "sampled"
    workspace = statistics = divergence_sums = gradient_ = None

    def refusal(self, request: Request) -> str:
        return refused_dtype(request, lambda dtype: dtype == torch.bfloat16)


@pytest.fixture
def sampled(monkeypatch):
    """One module and one line of the table add a backend."""
    module = ModuleType("kdkernels.kernels.sampled")
    module.BACKEND = Sampled()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "BACKENDS", {"sampled": registry.Entry(".sampled", "xpu"), **registry.BACKENDS})
    return module.BACKEND


def test_another_backend(sampled, monkeypatch, warned):
    xpu = torch.device("xpu")
    assert backend_for(xpu, torch.bfloat16) is sampled and not warned()
    assert name_of(xpu, torch.float32, torch.bfloat16) == "eager" and name_of(CPU, torch.bfloat16) == "native"
    assert warned() == [
        "kdkernels uses its slow eager backend on xpu: sampled: it does not compute with torch.float32 logits"
    ]
    assert kd.info()["backends"]["sampled"] == "it runs on xpu, not on cpu"
    monkeypatch.setenv("KDKERNELS_BACKEND", "sampled")
    with pytest.raises(RuntimeError, match=r"KDKERNELS_BACKEND=sampled: .*float32 gradients"):
        backend_for(xpu, torch.bfloat16, torch.float32)


def test_a_device_without_a_backend_of_its_own(warned):
    assert name_of(torch.device("xpu"), torch.float32) == "eager"
    assert warned() == ["kdkernels uses its slow eager backend on xpu: xpu has no backend of its own yet"]


@pytest.mark.parametrize("name", ["eager", "native"])
def test_a_backend_may_project_and_look_at_once(monkeypatch, name):
    """Logits of a head come from this call alone."""
    monkeypatch.setenv("KDKERNELS_BACKEND", name)
    backend, asked, torn = backend_for(CPU, torch.float32), [], head()
    expected = kd.entropy(torn)

    def fused(products, hidden, weight, bias, logits, scale, softcap, temperature, topk, gather):
        asked.append(logits.shape)
        torch.mm(hidden, 2 * weight.t(), out=logits)
        return backend.statistics(logits, scale, softcap, temperature, topk, gather)

    monkeypatch.setattr(backend, "project", fused)
    doubled = kd.entropy(torn)
    assert asked == [(3, 9)] and not torch.allclose(doubled, expected)
    torch.testing.assert_close(
        doubled, torch.distributions.Categorical(logits=2 * torn.hidden @ torn.weight.t()).entropy()
    )


@pytest.mark.parametrize("name", ["eager", "native"])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_every_backend_scales_gradients(name, factor):
    backend, gradient = registry.load(name)[0], torch.randn(5, 7).bfloat16()
    expected = (gradient.float() * factor).bfloat16()
    assert backend.scale_(gradient, torch.tensor(factor)) is None
    assert torch.equal(gradient, expected) and gradient.norm() > 0


# ---- GPUs, as far as they can be pretended ---------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    pytest.importorskip("triton", reason="Triton is for Linux")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_a_gpu_gets_triton(gpu, warned):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert name_of(CUDA, torch.float32, dtype) == name_of(CUDA, dtype) == "triton"
    assert kd.info()["devices"] == {"cpu": "native", "cuda": "triton"}
    assert set(kd.info()["backends"].values()) == {"ok"}
    assert not warned()


def test_float64_on_a_gpu_is_slow_and_says_so(gpu, warned):
    assert [name_of(CUDA, torch.float64) for _ in range(2)] == ["eager", "eager"]
    assert warned() == [
        "kdkernels uses its slow eager backend on cuda: triton: it does not compute with torch.float64 logits"
    ]


def test_a_gpu_without_triton_is_told_why_it_is_slow(gpu, monkeypatch, warned):
    monkeypatch.setitem(sys.modules, "kdkernels.kernels.triton.backend", None)
    info = kd.info()
    assert "it does not load" in info["backends"]["triton"] and info["devices"]["cuda"] == "eager"
    assert not warned(), "asking is not using"
    assert [name_of(CUDA, torch.float32) for _ in range(2)] == ["eager", "eager"]
    assert len(warned()) == 1 and "eager backend on cuda: triton: it does not load" in warned()[0]


def test_a_backend_forced_on_all_devices_but_able_on_one(gpu, monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "native")
    with pytest.raises(RuntimeError, match="KDKERNELS_BACKEND=native: it runs on cpu, not on cuda"):
        backend_for(CUDA, torch.float32)
    devices = kd.info()["devices"]
    assert devices == {"cpu": "native", "cuda": "KDKERNELS_BACKEND=native: it runs on cpu, not on cuda"}


def test_triton_on_a_cpu_only_interpreted(monkeypatch):
    pytest.importorskip(
        "kdkernels.kernels.triton.backend", reason="Triton is for Linux"
    )  # before it would be interpreted
    assert kd.info()["backends"]["triton"] == "it runs on cuda, not on cpu"
    monkeypatch.setenv("KDKERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert name_of(CPU, torch.float32) == "triton"


def test_info_says_what_is_wrong_with_a_forced_instruction_set():
    code = "import kdkernels as kd; print(kd.info()['cpu_isa'])"
    environment = {**os.environ, "KDKERNELS_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "mmx" in done.stdout and "avx512" in done.stdout

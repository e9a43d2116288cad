"""One backend decides, says so, and never steps in silently."""

import logging

import pytest
import torch

import kdkernels as kd
from kdkernels.rows import backend_for, dispatch

CPU = torch.device("cpu")


def head(dtype=torch.float32) -> kd.Head:
    return kd.Head(torch.randn(3, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype))


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, logger="kdkernels")
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_native_backend_is_built():
    assert backend_for(CPU, torch.float32).__name__ == "kdkernels.rows.native"
    assert backend_for(CPU, torch.bfloat16).__name__ == "kdkernels.rows.native"


def test_info():
    info = kd.info()
    assert info["backends"]["eager"] == info["backends"]["native"] == "ok"
    assert info["devices"]["cpu"] == "native"
    assert info["cpu_isa"] in ("avx512", "avx2", "portable")


def test_info_says_why_not(monkeypatch):
    monkeypatch.setattr(dispatch, "_load", lambda name: (None, "no compiler") if name == "native" else LOAD(name))
    info = kd.info()
    assert "no compiler" in info["backends"]["native"]
    assert info["devices"]["cpu"] == "eager" and info["cpu_isa"] is None


LOAD = dispatch._load


@pytest.mark.parametrize("name", ["eager", "native"])
def test_a_forced_backend_runs(monkeypatch, name, warned):
    monkeypatch.setenv("KDKERNELS_BACKEND", name)
    module = backend_for(CPU, torch.float32)
    assert module.__name__ == f"kdkernels.rows.{name}"
    called = []
    real = module.statistics
    monkeypatch.setattr(module, "statistics", lambda *args: called.append(name) or real(*args))
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
    monkeypatch.setattr(dispatch, "_load", lambda name: (None, "ImportError: not built"))
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
    monkeypatch.setattr(dispatch, "_load", lambda name: (None, "no compiler") if name == "native" else LOAD(name))
    kd.entropy(head())
    assert len(warned()) == 2 and "no compiler" in warned()[1]


def test_the_usual_way_is_silent(warned):
    kd.entropy(head())
    kd.entropy(head(torch.bfloat16))
    assert not warned()

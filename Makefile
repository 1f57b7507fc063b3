# `make demo` and `make test` set everything up by themselves; they need python3 (3.10 or newer) with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test check bench bench-recovery crash-matrix layout-matrix clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: venv
	$(BIN)/python examples/demo.py

test: venv
	$(BIN)/python -m pytest

check: venv
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: venv
	$(BIN)/python benchmarks/throughput.py --json build/throughput.json

# Against TorchFT and torchrun: the first needs a package of its own.
bench-recovery: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev,bench]'
	$(BIN)/python benchmarks/recovery.py --replication --json build/recovery.json
	$(BIN)/python benchmarks/stress.py --json build/stress.json

# A save broken at every file-system call, in every way: what can be loaded afterwards.
crash-matrix: venv
	$(BIN)/python -m tests.checkpoint.crash_matrix

# Jobs that save on one layout and go on from it on another, with the checkpoint cut into slices in between: every combination.
layout-matrix: venv
	$(BIN)/python -m tests.checkpoint.layouts

clean:
	rm -rf build $(VENV)

# `make demo` and `make test` set everything up by themselves; they need python3 (3.10 or newer) with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-all test-peers check docs bench bench-recovery bench-checkpoints bench-convert crash-matrix layout-matrix soak chaos-defects chaos-goodput clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: venv
	$(BIN)/python examples/demo.py

test: venv
	$(BIN)/python -m tests.side_by_side

test-all: venv
	HYPOTHESIS_PROFILE=random $(BIN)/python -m pytest

# The real DeepSpeed, Megatron-Core, Accelerate, Lightning, transformers and TensorBoard, s3fs with a server for it, and the tests that need one of them
# (others skip them). DeepSpeed is installed without its operators, which would be compiled; hence by itself, with what it imports.
PEERS := $(VENV)/.peers-installed

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev,peers]' \
	    hjson msgpack ninja py-cpuinfo psutil pydantic tqdm wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --no-deps --no-build-isolation deepspeed
	touch $@

test-peers: $(PEERS)
	$(BIN)/python -m pytest tests/checkpoint/test_megatron.py tests/checkpoint/test_deepspeed.py tests/checkpoint/test_accelerate.py \
	    tests/checkpoint/test_hf.py tests/checkpoint/test_convert.py tests/checkpoint/test_s3.py \
	    tests/checkpoint/test_extra_files.py tests/checkpoint/test_naming.py tests/process/test_callbacks.py tests/process/test_launchers.py

check: venv
	$(BIN)/ruff check .
	$(BIN)/pyright

# The site in build/site: open build/site/index.html, or let any web server show it. Only pip uses the network.
DOCS := $(VENV)/.docs-installed

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev,docs]'
	touch $@

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m pytest -q tests/docs/test_site.py

bench: venv
	$(BIN)/python benchmarks/throughput.py --json build/throughput.json

# Against TorchFT and torchrun: the first needs a package of its own.
bench-recovery: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev,bench]'
	$(BIN)/python benchmarks/recovery.py --replication --json build/recovery.json
	$(BIN)/python benchmarks/stress.py --json build/stress.json

# Against torch.save, torch's distributed checkpoint, and plain writes and reads.
bench-checkpoints: venv
	$(BIN)/python benchmarks/checkpoints.py --json build/checkpoints.json
	$(BIN)/python benchmarks/checkpoint_stalls.py --json build/checkpoint-stalls.json

# Against DeepSpeed's own converter.
bench-convert: $(PEERS)
	$(BIN)/python -m benchmarks.convert --json build/convert.json

# A save broken at every file-system call, in every way: what can be loaded afterwards.
crash-matrix: venv
	$(BIN)/python -m tests.checkpoint.crash_matrix

# Jobs that save on one layout and go on from it on another, with the checkpoint cut into slices in between: every combination.
layout-matrix: venv
	$(BIN)/python -m tests.checkpoint.layouts

# 200 random schedules of real faults; called again, it goes on where it was. SOAK=20 runs fewer.
SOAK ?= 200
soak: venv
	$(BIN)/python benchmarks/soak.py --count $(SOAK) --folder build/soak

# Deliberate defects in copies of the runtime: the chaos harness must find each.
chaos-defects: venv
	$(BIN)/python benchmarks/chaos_defects.py --json build/chaos_defects.json

# Workers killed every 15 s on average, with steps of about 0.5 s: the share of the steps that the surviving workers could have made.
chaos-goodput: venv
	$(BIN)/elastic chaos run --script examples/gpt.py:train --arg '{"steps": 1000000, "batch": 16, "micro_batch": 2}' --workers 2 \
		--seed 1 --minutes 5 --mtbf 15 --faults kill --json build/chaos_goodput.json --html build/chaos_goodput.html

clean:
	rm -rf build $(VENV)

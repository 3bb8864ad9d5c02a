# Each verb makes .venv on its first run: pinned packages, and this project in place.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPAT := .venv-compat
COMPUTES := ^(torch|numpy|transformers|tokenizers|peft|safetensors)==

FAST := tests/test_house.py tests/settings tests/wire/test_messages.py tests/wire/test_codec.py tests/adapters/test_algebra.py tests/strategies/test_rounds.py tests/strategies/test_registry.py tests/journal/test_record.py

.PHONY: demo quick test check lint types format bench fuzz soak load compat plot pretrain clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Bouquet needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## ten clients of rank 64 to 4, three rounds, beside base and central LoRA
	$(BIN)/bouquet simulate --central --steps 4

test: $(READY)  ## the whole suite, a process on each core, each file in one of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile

quick: lint types  ## lint, types and the tests of what is pure arithmetic: under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist loadfile $(FAST)

check: lint types test  ## what CI runs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

plot: $(READY)  ## draw the newest demo run into docs/demo.svg
	$(BIN)/python -m tools.plot_run $$(ls -dt runs/*/ | head -1) --output docs/demo.svg

bench: $(READY)  ## ratios against plain loops, memory, Ray, Flower's FedAvg; half an hour
	$(BIN)/python -m benchmarks

fuzz: $(READY)  ## a million damaged payloads at the decoders of what clients send; ten minutes
	$(BIN)/python -m tools.fuzz_codec

soak: $(READY)  ## kill -9 in a federation, 20 times each process, and compare bytes; an hour
	$(BIN)/python -m tools.soak

load: $(READY)  ## 2, 4, 8 and 16 SuperNodes, 50 rounds each: nothing lost, nothing grows; under an hour
	$(BIN)/python -m tools.load

compat: $(READY)  ## the same apps under the newest Flower, over HTTP: the same bytes? ten minutes
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	grep -E '$(COMPUTES)' constraints.txt > $(COMPAT)/computes.txt
	$(COMPAT)/bin/python -m pip install --quiet --constraint $(COMPAT)/computes.txt torch
	$(COMPAT)/bin/python -m pip install --quiet --constraint $(COMPAT)/computes.txt --editable '.[dev]'
	$(COMPAT)/bin/python -m pip install --quiet --constraint $(COMPAT)/computes.txt --upgrade 'flwr[simulation]'
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python -m pytest -q tests/client tests/server
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python -m tools.compat --pinned $(BIN)/python

pretrain: $(READY)  ## make the embedded base model again
	$(BIN)/python -m tools.pretrain

clean:
	rm -rf $(VENV) $(COMPAT) .pytest_cache .mypy_cache .ruff_cache

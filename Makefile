# make demo   set everything up, then make a CLIP forget the digit seven (leaves runs/demo/)
# make test   set everything up, then lint and test
# make gpu-check   on a machine with a GPU, with the python in PYTHON: the kernels' tests, then the loss benchmark
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint gpu-check clean

demo: $(STAMP)
	$(BIN)/cliperase-fast demo

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check:
	$(PYTHON) -m pytest tests/ops/gpu_triton.py tests/ops/gpu_runtime.py
	$(PYTHON) -m benchmarks.loss --gpu-check

# Everything a user or a developer needs, from the ordinary package index; again only when the metadata changes.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# make demo   set everything up, then make a CLIP forget the digit seven (leaves runs/demo/)
# make test   set everything up, then lint and test
# make long-check   the tests that take minutes: every tests/**/long_*.py
# make native-sanitize   the C++ sweep's tests under the address and undefined-behaviour sanitizers
# make avx512-check   the C++ sweep's test on an emulated processor with AVX-512 (says which Debian packages it needs)
# make bench-check   have the losses become slower? ratios to open_clip's against the committed ones
# make gpu-check   on a machine with a GPU, with the python in PYTHON: the kernels' tests, the loss benchmark, auto's choice
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint long-check bench-check native-sanitize cuda-sanitize avx512-check gpu-check clean

demo: $(STAMP)
	$(BIN)/cliperase-fast demo

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

long-check: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(shell find tests -name 'long_*.py')

bench-check: $(STAMP)
	$(BIN)/python -m benchmarks.check

# The package beside a sanitized extension, ahead of the installed one on the path (pytest, not python -m pytest, which
# would put this folder first).
SANITIZED := build/sanitize
native-sanitize: $(STAMP)
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCLIPERASE_SANITIZE=ON \
		-DCLIPERASE_CUDA=OFF
	$(BIN)/cmake --build $(SANITIZED)
	ASAN_OPTIONS=detect_leaks=1 $(BIN)/ctest --test-dir $(SANITIZED) --output-on-failure
	rm -rf $(SANITIZED)/python && mkdir -p $(SANITIZED)/python
	cp -r cliperase_fast $(SANITIZED)/python/
	rm -f $(SANITIZED)/python/cliperase_fast/_C*.so && cp $(SANITIZED)/_C*.so $(SANITIZED)/python/cliperase_fast/
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/python OMP_NUM_THREADS=2 \
		$(BIN)/pytest tests/ops/test_native_cpu.py tests/ops/test_native_fuzz.py

avx512-check: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" csrc/tests/avx512/run.sh

gpu-check:
	CLIPERASE_EXTENSION=1 CLIPERASE_CUDA=ON $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest tests/ops/gpu_triton.py tests/ops/gpu_native.py tests/ops/gpu_runtime.py
	$(PYTHON) -m benchmarks.loss --gpu-check
	$(PYTHON) -m benchmarks.fastest

# The CUDA kernels, emulated on the CPU, under the address and undefined-behaviour sanitizers.
cuda-sanitize: $(STAMP)
	CLIPERASE_SANITIZE=1 OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest tests/ops/test_native_cuda_emulated.py -k "not rules and not compiles"

# Everything a user or a developer needs, from the ordinary package index; again only when the metadata changes.
# CUDA kernels for one architecture, whose PTX any newer GPU takes too: six take nvcc a minute. `pip install .` builds all.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	CMAKE_ARGS="-DCLIPERASE_CUDA_ARCHITECTURES=80 $$CMAKE_ARGS" $(BIN)/python -m pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

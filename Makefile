# make demo   install the demo's dependencies, then make a CLIP forget the digit seven (writes runs/demo/)
# make test   install the test dependencies too, then lint and test; fails at the end if either failed
# make lint   only ruff and mypy
# make long-check   the tests that take minutes: those marked `long`
# make native-sanitize   the C++ sweep's tests under the address and undefined-behaviour sanitizers
# make cuda-sanitize   the same for the CUDA kernels, emulated on the CPU
# make avx512-check   the C++ sweep's test on an emulated processor with AVX-512 (says which Debian packages it needs)
# make bench-check   compare the losses' speed relative to open_clip's with the committed ratios
# make docs   build the documentation's site into build/site
# make wheels   build the sdist and a wheel for each of PYTHONS into dist/, and run each in new environments
# make gpu-check   on a machine with a GPU, with the python in PYTHON: the GPU tests, the loss benchmark, auto's choice
# make gpu-tournament   there too: the variants of the Triton kernels against each other; make gpu-tune: more configurations
# make clean   remove .venv, builds and caches
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := $(VENV)/.installed-demo
TEST   := $(VENV)/.installed-test
DOCS   := $(VENV)/.installed-docs

# What ruff checks: only the repository's own folders. pytest's are in pyproject.toml.
JUDGED := cliperase_fast benchmarks tests examples docs setup.py

# Python without PYTHONPATH, and without this folder at the front of its path: a file or folder here with the name of a
# module (runs/, random.py) is then not imported in its place. Scripts in .venv/bin would break in a moved clone.
RUN  := $(BIN)/python -I -m
# The tests run with the package's defaults, not with the caller's CLIPERASE_* variables. PYTHONSAFEPATH does for pytest's
# workers what -I does for pytest; tests/conftest.py removes it for the processes that tests start.
OURS := env -u PYTHONPATH $(foreach name,$(filter CLIPERASE_%,$(.VARIABLES)),-u $(name)) PYTHONSAFEPATH=1

# The .venv of a moved or copied clone points to the old place: install again. Remove one whose Python is gone.
ifneq ($(wildcard $(VENV)),)
$(shell $(BIN)/python -I -c '' || rm -rf $(VENV))
$(shell test "$$(cat $(VENV)/.folder 2> /dev/null)" = "$$(pwd -P)" || rm -f $(DEMO) $(TEST) $(DOCS))
endif

.PHONY: demo test lint docs long-check bench-check native-sanitize cuda-sanitize avx512-check wheels gpu-check \
	gpu-tournament gpu-tune clean

demo: $(DEMO)
	$(RUN) cliperase_fast.cli demo

test: $(TEST)
	@lint=passed; tests=passed; \
	$(MAKE) --no-print-directory lint || lint=FAILED; \
	echo 'pytest: some minutes on two cores'; \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(OURS) $(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder \
		|| tests=FAILED; \
	echo "make test: lint $$lint, tests $$tests"; \
	test $$lint$$tests = passedpassed

# mypy sees only these two, through links, because it would take any folder here for a module of that name.
lint: $(TEST)
	@mkdir -p build/lint && ln -sfn ../../cliperase_fast ../../benchmarks build/lint
	@echo 'ruff and mypy: a minute the first time'; failed=; \
	$(RUN) ruff check $(JUDGED) || failed="$$failed, ruff check"; \
	$(RUN) ruff format --check $(JUDGED) || failed="$$failed, ruff format"; \
	(cd build/lint && env -u MYPYPATH ../../$(RUN) mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache cliperase_fast benchmarks) || failed="$$failed, mypy"; \
	test -z "$$failed" || { echo "make lint: FAILED$${failed#,}"; exit 1; }

# Built without network. mkdocs-material's notice about its successor is turned off.
SITE := build/site
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(OURS) $(RUN) mkdocs build --quiet --strict --site-dir $(SITE)
	$(BIN)/python -I docs/site/check.py $(SITE)
	@echo 'To read it: python3 -m http.server --directory $(SITE)'

long-check: $(TEST)
	@echo 'pytest: the tests that take minutes each'
	OMP_NUM_THREADS=1 $(OURS) $(RUN) pytest -n 2 --dist loadfile -m long

bench-check: $(TEST)
	$(BIN)/python -m benchmarks.check

# The package beside a sanitized extension, ahead of the installed one on the path (pytest, not python -m pytest, which
# would put this folder first).
SANITIZED := build/sanitize
native-sanitize: $(TEST)
	$(BIN)/cmake --fresh -S . -B $(SANITIZED) -G Ninja "-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python" -DCLIPERASE_SANITIZE=ON \
		-DCLIPERASE_CUDA=OFF
	$(BIN)/cmake --build $(SANITIZED)
	ASAN_OPTIONS=detect_leaks=1 $(BIN)/ctest --test-dir $(SANITIZED) --output-on-failure
	rm -rf $(SANITIZED)/python && mkdir -p $(SANITIZED)/python
	cp -r cliperase_fast $(SANITIZED)/python/
	rm -f $(SANITIZED)/python/cliperase_fast/_C*.so && cp $(SANITIZED)/_C*.so $(SANITIZED)/python/cliperase_fast/
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/python OMP_NUM_THREADS=2 \
		$(BIN)/pytest tests/ops/test_native_cpu.py tests/ops/test_native_buffers.py tests/ops/test_native_fuzz.py

avx512-check: $(TEST)
	PATH="$(CURDIR)/$(BIN):$$PATH" csrc/tests/avx512/run.sh

# PYTHONS: such as 'python3.10 python3.11:2.11.0,2.14.1', with versions of torch after the colon.
PYTHONS ?= $(PYTHON)
wheels: $(DEMO)
	$(BIN)/python -m benchmarks.wheels $(PYTHONS)

# Needs torch, triton, pytest, pybind11, cmake and nvcc, and no network. GPU_SECONDS: for all of it, 180 by default.
gpu-check:
	'$(PYTHON)' -m benchmarks.gpu_check $(if $(GPU_SECONDS),--seconds $(GPU_SECONDS))

# The variants of the Triton kernels against each other, then more launch configurations: no build is needed.
gpu-tournament:
	'$(PYTHON)' -m benchmarks.tournament $(if $(GPU_SECONDS),--seconds $(GPU_SECONDS))

gpu-tune:
	'$(PYTHON)' -m benchmarks.tournament --tune 768 512 $(if $(GPU_SECONDS),--seconds $(GPU_SECONDS))

# The CUDA kernels, emulated on the CPU, under the address and undefined-behaviour sanitizers.
cuda-sanitize: $(TEST)
	CLIPERASE_SANITIZE=1 OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest tests/ops/test_native_cuda_emulated.py -k "not rules and not compiles"

# Repeated only when the metadata or the C++ source changes.
# The CUDA kernels are built for one architecture, whose PTX runs on any newer GPU: all six take nvcc a minute, and
# `pip install .` builds them.
$(DEMO): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@echo 'Setting up .venv: minutes, most of them the download of torch (with its GPU libraries, several GB)'
	@command -v '$(PYTHON)' > /dev/null || { echo 'there is no $(PYTHON): make PYTHON=/path/to/python3.10-or-newer'; exit 1; }
	'$(PYTHON)' -m venv $(VENV)
	$(BIN)/python -I -m pip install --quiet --upgrade pip
	began=$$(date +%s); \
	CMAKE_ARGS="-DCLIPERASE_CUDA_ARCHITECTURES=80 $$CMAKE_ARGS" $(BIN)/python -I -m pip install --editable . && \
	echo "installed in $$(($$(date +%s) - began)) s"
	pwd -P > $(VENV)/.folder
	touch $@

# The package is already installed: this adds the dependencies of its extra `dev`.
$(TEST): $(DEMO)
	@echo 'Adding what the tests and linters need to .venv: a minute or two'
	$(BIN)/python -I -m pip install "cliperase_fast[dev]"
	touch $@

$(DOCS): $(DEMO)
	@echo 'Adding what the documentation needs to .venv'
	$(BIN)/python -I -m pip install "cliperase_fast[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

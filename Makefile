# make demo, make test, make test-slow (whole runs, more combinations), make notebooks (both, whole), make lint: each sets up .venv first.
# Python 3.11 or newer; no GPU needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# Merged models and answers of each family.
FINISHED_TESTS := tests/finished/test_export.py tests/finished/test_generate.py
# Exactness, attention, load, checkpoints and resume; the loop and its checks.
OLDEST_TESTS := tests/models tests/parallel tests/quantization tests/checkpoints tests/training tests/test_matrix.py \
	tests/test_parity.py tests/test_quantize_layers.py tests/test_reference_training.py tests/data/test_packing.py \
	$(FINISHED_TESTS)
# Each family: equal to transformers and PEFT, packed, expanded, resumed; and the above.
FAMILY_TESTS := tests/models tests/data/test_packing.py tests/checkpoints/test_block_expansion.py \
	tests/checkpoints/test_resume.py $(FINISHED_TESTS)

.PHONY: demo test test-slow test-oldest test-oldest-slow notebooks lint types clean
demo: $(VENV)/.run
	$(BIN)/python train.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The oldest versions of requirements.txt, in an environment of their own: gigabytes of downloads, so not in .ci/run.
test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" $(OLDEST_TESTS)

test-oldest-slow: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -m slow $(FAMILY_TESTS)

notebooks: $(VENV)/.dev
	$(BIN)/python -m tools.run_notebooks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.run: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

$(OLDEST)/.dev: requirements.txt constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
		pytest pytest-xdist peft psutil -c constraints-oldest.txt
	touch $@

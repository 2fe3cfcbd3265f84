# Everything people type. `make help` lists it; each target makes .venv first if it is missing or out of date.

PYTHON ?= python3
CONFIG ?= configs/tiny.yaml
ROUND  ?=
# Extra dotted overrides, for example: make train ROUND=3 SET="train.steps=100 name=short"
SET    ?=

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
# A half-finished installation is told by this file and thrown away: pip believes packages whose files are missing.
HALF   := $(VENV)/installing
FLAGS   = --config $(CONFIG) $(if $(ROUND),--round $(ROUND)) $(SET)

.DEFAULT_GOAL := help
.PHONY: help train collect evaluate status report mlflow cluster cluster-stop test test-slow check format bench docs tiny-base constraints clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22
	@echo
	@echo "Variables: ROUND=3  CONFIG=configs/tiny.yaml  SET=\"train.learning_rate=1e-5 name=other\"  PYTHON=python3"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed (make … PYTHON=python3.11)"; exit 1; }
	@if [ -e $(HALF) ] || [ ! -x $(BIN)/pip ]; then $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(HALF)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@# Ray's defaults for this environment, in every shell and without exports, and quicker starts: see jf_cluster/startup.py.
	@echo 'import jf_cluster.startup' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/jf_cluster_startup.pth"
	@rm -f $(HALF)
	@touch $(READY)

train: $(READY)  ## Run the whole chain for ROUND rounds (default: the configuration's), or what is missing of it
	@$(BIN)/python jobs/distill.py $(FLAGS)

collect: $(READY)  ## Collect the trajectories of ROUND (default: the round that is due)
	@$(BIN)/python jobs/collect.py $(FLAGS)

evaluate: $(READY)  ## Evaluate the model of ROUND (default: the first without an evaluation; 0 is the base)
	@$(BIN)/python jobs/evaluate.py $(FLAGS)

status: $(READY)  ## Show what the run is doing, refreshed, from its files alone
	@$(BIN)/python -m jf_cluster status --config $(CONFIG) $(SET)

report: $(READY)  ## Print the table of the rounds so far
	@$(BIN)/python -m jf_cluster report --config $(CONFIG) $(SET)

mlflow: $(READY)  ## Serve the MLflow dashboard on 127.0.0.1
	@$(BIN)/python -m jf_cluster mlflow --config $(CONFIG) $(SET)

cluster: $(READY)  ## Start a local Ray head with its dashboard and job server on 127.0.0.1
	@$(BIN)/python -m jf_cluster cluster start

cluster-stop: $(READY)  ## Stop the Ray head that `make cluster` started
	@$(BIN)/python -m jf_cluster cluster stop

test: $(READY)  ## Run the tests
	@# More at once and Rays that start beside each other take longer than Ray lets them. tests/conftest.py says what stays together.
	@$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(READY)  ## Run the tests that take minutes each
	@$(BIN)/python -m pytest -n 2 -m slow

check: $(READY)  ## Lint, check formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)  ## Format the code and fix what the linter can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY)  ## Run the side-by-side measurements and print their tables
	@$(BIN)/python -m bench

docs: $(READY)  ## Build the documentation into site/, refusing links that lead nowhere
	@$(BIN)/python -m jf_cluster config --reference > docs/configuration.md
	@$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

tiny-base: $(READY)  ## Train the embedded run's tokenizer and base model again from nothing (about 40 minutes on one core)
	@$(BIN)/python -m jf_cluster.tiny.pretrain --output jf_cluster/tiny/base

constraints: $(READY)  ## Write the installed versions into constraints.txt
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//'; } > $(VENV)/constraints.new
	@mv $(VENV)/constraints.new constraints.txt

clean:  ## Remove the environment and caches, never runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

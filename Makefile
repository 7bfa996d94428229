# The front door. Every target sets up what it needs; running one twice changes nothing more.
PYTHON ?= python3
RECIPE ?= tiny_facts
SET    ?=
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup plan train merge test lint schema clean

help:  ## this list
	@echo "make TARGET [RECIPE=name] [SET='section.key=value ...']   recipes: $(notdir $(basename $(wildcard configs/recipes/*.yaml)))"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bitsandbytes,test]'
	@touch $(READY)

setup: $(READY)  ## make .venv with everything (the other targets do it themselves)

plan: $(READY)  ## what RECIPE would train: targets, parameters, data, steps; no weights, no GPU (JSON=1 for machines)
	@$(PY) scripts/plan.py $(RECIPE) $(SET) $(if $(OUTPUTS),--outputs $(OUTPUTS)) $(if $(JSON),--json)

train: $(READY)  ## train RECIPE into outputs/RECIPE/ (RESUME=1 continues, FORCE=1 replaces, OUTPUTS=dir puts it elsewhere)
	@$(PY) scripts/train.py $(RECIPE) $(SET) $(if $(OUTPUTS),--outputs $(OUTPUTS)) $(if $(RESUME),--resume) $(if $(FORCE),--force)

merge: $(READY)  ## merge RECIPE's adapter into its base: outputs/RECIPE/merged, verified (DTYPE=, BASE=, FORCE=1)
	@$(PY) scripts/merge.py $(RECIPE) $(if $(OUTPUTS),--outputs $(OUTPUTS)) $(if $(BASE),--base $(BASE)) $(if $(DTYPE),--dtype $(DTYPE)) $(if $(FORCE),--force)

test: $(READY)  ## every test, on the CPU, without network
	@$(PY) -m pytest

lint: $(READY)  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

schema: $(READY)  ## write lora_recipes/recipe.schema.json anew from the installed peft and trl
	@$(PY) scripts/schema.py

clean:  ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info

# Thin: every target makes sure that .venv holds the locked environment, then calls what anyone may call by hand.
BIN := .venv/bin
CONFIG ?= configs/smoke.toml
ARGS ?=
# Tests that start Ray or take long have the machine for themselves; all others share it, two files at a time.
ALONE := $(BIN)/python -m pytest -m "(ray or slow) and not nightly"
TOGETHER := $(BIN)/python -m pytest -m "not ray and not slow and not nightly" --numprocesses 2 --dist loadfile

.PHONY: help run test lint format bench lock clean bootstrap

help:           ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

run: bootstrap  ## the whole chain, corpus to table; CONFIG=configs/… ARGS=--plan
	@$(BIN)/krony run $(CONFIG) $(ARGS)

test: lint      ## everything that must hold before a change lands; ARGS="-k topic" for a part
	@$(if $(ARGS),$(BIN)/python -m pytest $(ARGS),$(ALONE) && $(TOGETHER))

lint: bootstrap ## style, format, types, layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: bootstrap ## rewrite to the one format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: bootstrap ## ratios against the baselines, both sides in one process
	@set -e; for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python -m "benchmarks.$$(basename $$file .py)"; done

lock: bootstrap ## pin the environment again after pyproject.toml changed; ARGS=--upgrade renews all
	@env -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-annotate --no-header --quiet $(ARGS) -o constraints.txt

clean:          ## caches and .venv; runs/ stays
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info

bootstrap:
	@sh .ci/bootstrap

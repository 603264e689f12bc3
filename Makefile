# Thin: every target makes sure that .venv holds the locked environment, then calls what anyone may call by hand.
BIN := .venv/bin
CONFIG ?= configs/smoke.toml
ARGS ?=
# Tests that start Ray or take long have the machine for themselves; all others share it, two files at a time.
ALONE := $(BIN)/python -m pytest -m "(ray or slow) and not nightly"
TOGETHER := $(BIN)/python -m pytest -m "not ray and not slow and not nightly" --numprocesses 2 --dist loadfile

.PHONY: help run test lint format bench audit lock clean bootstrap

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

BENCHES = mlp plans training_step evaluate_perplexity decode_export memory growth data_loading ray_train
bench: bootstrap ## ratios against the baselines, sides by turns in one process; a CSV of each in bench/
	@set -e; for name in $(BENCHES); do echo "== $$name"; $(BIN)/python -m "benchmarks.$$name" --csv "bench/$$name.csv"; done

audit: bootstrap ## known vulnerabilities of the pinned versions, where an advisory service can be asked
	@sh .ci/audit

lock: bootstrap ## pin the environment again after pyproject.toml changed; ARGS=--upgrade renews all
	@env -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-annotate --no-header --quiet $(ARGS) -o constraints.txt

clean:          ## caches and .venv; runs/ stays
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info

bootstrap:
	@sh .ci/bootstrap

# `make` lists what there is. Needs Python 3.11 or newer; everything else goes into .venv.

JOB ?= ticket_triage
FROM ?= 2026-11-01
TO ?= 2026-11-03
MODEL ?=
DAY ?= $(FROM)
CSV ?=
BENCH ?=
PYTHON ?= python3

PY := .venv/bin/python
STAMP := .venv/.installed
UV = "$$(sed -n 's/^\(uv==[0-9.]*\).*/\1/p' requirements-dev.txt)"
STACK := $(PY) -m include.local_stack
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock" $(PY) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url
DAYS = --job "$(JOB)" --from "$(FROM)" --to "$(TO)" --model "$(MODEL)"

.DEFAULT_GOAL := help
.PHONY: help venv demo up backfill redrive load-commits test bench faults lint lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

venv: $(STAMP) ## create .venv with the locked packages

$(STAMP): requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d. Say make PYTHON=python3.12 (or 3.11, 3.13)." % v[:2])'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m uv --version >/dev/null 2>&1 || $(PY) -m pip install --quiet --disable-pip-version-check $(UV)
	@$(PY) -m uv pip install --quiet --python $(PY) --require-hashes -r requirements-dev.txt
	@touch $(STAMP)

demo: $(STAMP) ## process some days with real Airflow and a simulated API: JOB= FROM= TO= MODEL=
	@$(STACK) demo $(DAYS)

up: $(STAMP) ## the same stack, staying up: UI on http://127.0.0.1:8080
	@$(STACK) up

backfill: $(STAMP) ## process days on the stack of `make up`: JOB= FROM= TO= MODEL=
	@$(STACK) backfill $(DAYS)

redrive: $(STAMP) ## send the failed rows of one day again, on the stack of `make up`: JOB= DAY=
	@$(STACK) redrive --job "$(JOB)" --day "$(DAY)"

load-commits: $(STAMP) ## load a CSV of commits into source_db: CSV=path
	@$(STACK) load-commits --csv "$(CSV)"

test: $(STAMP) ## all tests but the long ones; those that need a missing service are skipped
	@$(PY) -m pytest -q -m "not long"

faults: $(STAMP) ## every fault, proven: some minutes, ends with a table
	@$(PY) -m pytest -q tests/faults --all-faults

bench: $(STAMP) ## what each step costs, against its limit: BENCH="--quick" or "--write"
	@$(PY) -m include.bench $(BENCH)

lint: $(STAMP) ## ruff, mypy, import-linter
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@PYTHONPATH=.:plugins .venv/bin/lint-imports --no-cache --no-logo

lock: $(STAMP) ## write requirements.txt and requirements-dev.txt anew
	@$(COMPILE) -o requirements.txt requirements.in
	@$(COMPILE) -c requirements.txt -o requirements-dev.txt requirements-dev.in

clean: ## delete what demo and up have left: databases, artifacts, logs
	@if test -x $(PY); then $(STACK) clean; fi

# `make` lists what there is. Needs Python 3.11 or newer; everything else goes into .venv.

JOB ?= ticket_triage
FROM ?= 2026-11-01
TO ?= 2026-11-03
MODEL ?=
DAY ?= $(FROM)
ARGS ?= status
MONTH ?=
CSV ?=
DATABASE ?=
PORT ?= 8080
DRY ?=
BUDGET ?=
BACKWARDS ?=
REPROCESS ?= completed
RUNS ?= 10
DO ?= run
DEMO ?=
BENCH ?=
ROWS ?= 120000
PYTHON ?= python3

PY := .venv/bin/python
STAMP := .venv/.installed
UV = "$$(sed -n 's/^\(uv==[0-9.]*\).*/\1/p' requirements-dev.txt)"
STACK := $(PY) -m include.local_stack
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock" $(PY) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url
BACKFILL = $(if $(DRY),--dry-run) $(if $(BACKWARDS),--backwards) --budget "$(BUDGET)" --reprocess "$(REPROCESS)" --runs "$(RUNS)" --do "$(DO)"
DAYS = --job "$(JOB)" --from "$(FROM)" --to "$(TO)" --model "$(MODEL)"

.DEFAULT_GOAL := help
.PHONY: help venv env demo up backfill redrive on-call costs load-commits test size bench bench-pages bench-year screenshots faults lint lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

venv: $(STAMP) ## create .venv with the locked packages

$(STAMP): requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d. Say make PYTHON=python3.12 (or 3.11, 3.13)." % v[:2])'
	@echo "Installing the locked packages into .venv (once for each release) ..."
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m uv --version >/dev/null 2>&1 || $(PY) -m pip install --quiet --disable-pip-version-check $(UV)
	@$(PY) -m uv pip install --quiet --python $(PY) --require-hashes -r requirements-dev.txt
	@touch $(STAMP)

env: ## write .env with new keys for docker-compose.yaml: DEMO=1 for the simulated API
	@$(PYTHON) -m include.deployment_keys write $(if $(DEMO),--demo)

demo: $(STAMP) ## process some days with real Airflow and a simulated API: JOB= FROM= TO= MODEL=
	@$(STACK) demo $(DAYS)

up: $(STAMP) ## the same stack, staying up: UI on http://127.0.0.1:8080, or PORT=; DATABASE= instead of SQLite
	@$(STACK) up --port "$(PORT)" --database "$(DATABASE)"

backfill: $(STAMP) ## process days on the stack of `make up`: JOB= FROM= TO= MODEL= DRY=1 BUDGET= BACKWARDS=1 REPROCESS= RUNS= DO=
	@$(STACK) backfill $(DAYS) $(BACKFILL)

redrive: $(STAMP) ## send the failed rows of one day again, on the stack of `make up`: JOB= DAY=
	@$(STACK) redrive --job "$(JOB)" --day "$(DAY)"

on-call: $(STAMP) ## python -m llm_batch on the stack of `make up`: ARGS="status"
	@$(STACK) on-call $(ARGS)

costs: $(STAMP) ## what a job has cost by day, or all jobs (JOB=): JOB= MONTH=2026-11
	@$(PY) -m include.local_stack.costs --job "$(JOB)" --month "$(MONTH)"

load-commits: $(STAMP) ## load a CSV of commits into source_db: CSV=path
	@$(STACK) load-commits --csv "$(CSV)"

test: $(STAMP) ## all tests but the long ones; those that need a missing service are skipped
	@$(PY) -m pytest -q -n auto --dist loadfile -m "not long and not system"
	@$(PY) -m pytest -q -m "system and not long"

faults: $(STAMP) ## every fault, proven, on all cores: some minutes, ends with a table
	@$(PY) -m pytest -q -n auto --dist worksteal tests/faults --all-faults

size: $(STAMP) ## a partition of any size through a real Airflow, on SQLite and PostgreSQL: ROWS=2000000
	@LLM_BATCH_TEST_ROWS="$(ROWS)" $(PY) -m pytest -q -s -m size

bench: $(STAMP) ## what each step costs, against its limit: BENCH="--quick" or "--write"
	@$(PY) -m include.bench $(BENCH)

bench-pages: $(STAMP) ## how fast the UI's pages answer over 5,000 batches, against their limit
	@$(PY) -m include.bench.pages

screenshots: $(STAMP) ## take the pictures of docs/ anew, from a real Airflow in Chromium
	@$(PY) -m include.local_stack.screenshots

bench-year: $(STAMP) ## what 365 small days cost on a whole Airflow; needs PostgreSQL: BENCH="--days 30"
	@$(PY) -m include.bench.year $(BENCH)

lint: $(STAMP) ## ruff, mypy, import-linter
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@PYTHONPATH=.:plugins .venv/bin/lint-imports --no-cache --no-logo

lock: $(STAMP) ## write the three requirements*.txt anew
	@$(COMPILE) -o requirements.txt requirements.in
	@$(COMPILE) -c requirements.txt -o requirements-dev.txt requirements-dev.in
	@$(COMPILE) -c requirements-dev.txt -o requirements-cluster.txt requirements-cluster.in

clean: ## delete what demo and up have left: databases, artifacts, logs
	@if test -x $(PY); then $(STACK) clean; fi

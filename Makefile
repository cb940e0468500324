# The two commands are `make up` and `make test`; `make` alone lists all.
.DEFAULT_GOAL := help
BIN := .venv/bin
# The slowest first: they are handed out file by file to so many processes, half of whose time is waiting.
SUITES := tests/acceptance tests/services tests/contract tests/unit
PROCESSES := 3
RESULTS := tests/results
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --custom-compile-command "make lock" $(UPGRADE)
export UV_SYSTEM_CERTS := 1

.PHONY: help up test check bench chaos load fuzz audit lock hooks clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1 \t/p' $(MAKEFILE_LIST) | expand -t 14

up: .venv/.run ## start the desk; ARGS="--port-offset 100 …" are its options (ARGS=--help lists them)
	@exec $(BIN)/buydesk up $(ARGS)

# Without ARGS everything runs and the gate of tests/gate.py holds.
test: .venv/.dev ## run all tests, or ARGS="tests/unit -k money"; results are in tests/results
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile -p tests.gate --cov --cov-report=term --cov-report=html:$(RESULTS)/htmlcov \
		--html=$(RESULTS)/pytest_results.html --self-contained-html $(SUITES)
else
	@exec $(BIN)/python -m pytest $(ARGS)
endif

check: .venv/.dev ## format, lint, types, imports, security, files: what .pre-commit-config.yaml lists
	@PRE_COMMIT_HOME=$(CURDIR)/.venv/.pre-commit $(BIN)/python -m pre_commit run --all-files

bench: .venv/.dev ## measure the desk beside its baselines (needs wrk); ARGS="--quick" tries it, ARGS=--help lists more
	@exec $(BIN)/python -m bench $(ARGS)

load: .venv/.load ## make load on a desk that is up, for 20 s; ARGS=--ui opens a page for it, ARGS=--help lists more
	@exec $(BIN)/python -m load $(ARGS)

fuzz: .venv/.dev ## calls made up from the OpenAPI documents, on a desk of its own; ARGS="--calls 5000 --seed 1" are fewer
	@exec $(BIN)/python -m fuzz $(ARGS)

chaos: .venv/.dev .venv/.chaos ## hurt desks under load and judge what was told; ARGS="restarts --rounds 5" is one, ARGS=--help lists them
	@exec $(BIN)/python -m chaos $(ARGS)

audit: .venv/.dev ## look the pinned packages up among known vulnerabilities (needs the network)
	@for part in setup run image load chaos; do \
		$(BIN)/pip-audit --strict --disable-pip --require-hashes -r requirements/$$part.txt || exit; done

lock: .venv/.run ## renew the pinned requirements after an edit; UPGRADE=--upgrade takes the newest
	@$(LOCK) requirements/setup.in -o requirements/setup.txt
	@$(LOCK) pyproject.toml -o requirements/run.txt
	@$(LOCK) pyproject.toml --extra sentry -c requirements/run.txt --excludes requirements/not-in-image.in \
		-o requirements/image.txt
	@$(LOCK) requirements/load.in -c requirements/run.txt -c requirements/image.txt -o requirements/load.txt
	@$(LOCK) pyproject.toml --extra sentry requirements/load.in requirements/dev.in \
		-c requirements/run.txt -c requirements/image.txt -c requirements/load.txt -o requirements/dev.txt
	@$(LOCK) requirements/chaos.in -c requirements/dev.txt -o requirements/chaos.txt

hooks: .venv/.dev ## run the checks before every commit of yours
	@$(BIN)/python -m pre_commit install

clean: ## remove what make made, not the desk's data
	@rm -rf .venv $(RESULTS) .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

.venv/.run: tools/setup requirements/setup.txt requirements/run.txt pyproject.toml
	@tools/setup run

.venv/.load: .venv/.run requirements/load.txt
	@tools/setup load

.venv/.dev: .venv/.run requirements/dev.txt
	@tools/setup dev

.venv/.chaos: .venv/.run requirements/chaos.txt
	@tools/setup chaos

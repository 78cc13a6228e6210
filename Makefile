# On a fresh machine with Python 3.11 or newer and pip, each target installs what it needs first. Run `make help`.

PYTHON ?= python3
VENV ?= .venv
VENV_BENCH ?= .venv-bench
VENV_JAX ?= .venv-jax
VENV_NEWEST ?= .venv-newest
VENV_OLDEST ?= .venv-oldest
WORKERS ?= 2
PYTEST_FLAGS ?=
SUDOKU_FLAGS ?= --board 2 --method lpgd --overwrite
SUDOKU_OUT ?= runs/sudoku4
SUDOKU9_FLAGS ?= --board 3 --method lpgd --batch-size 150 --epochs 1 --tests-per-epoch 3 --resume
SUDOKU9_OUT ?= runs/sudoku9
PATHS_FLAGS ?= --overwrite
PATHS_OUT ?= runs/shortest_path
BENCH_FLAGS ?=
BENCH_OUT ?= runs/bench
KNAPSACK_FLAGS ?=
KNAPSACK_OUT ?= runs/knapsack
VS_EXACT_FLAGS ?= --overwrite
VS_EXACT_OUT ?= runs/lpgd_vs_exact
BLIND_PNP_FLAGS ?=
BLIND_PNP_OUT ?= runs/blind_pnp
FUZZ_FLAGS ?= --count 100000 --state runs/fuzz.json
SOAK_FLAGS ?= --hours 8 --state runs/soak.json
MAROS_MESZAROS := runs/maros_meszaros.npz

BIN := $(VENV)/bin
# One BLAS thread in each test process: WORKERS processes then use WORKERS cores.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST = $(ONE_THREAD) $(1)/bin/python -m pytest -n $(WORKERS) $(PYTEST_FLAGS)

# torch by its exact version: pip takes that one build and never weighs others of several gigabytes.
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)

# $(call install,FOLDER,EXTRA,CHOICE): a virtual environment with the package; CHOICE tells pip which versions to take.
define install
$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "make PYTHON=... names a Python of at least 3.11"'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet $(3) $(TORCH)
$(1)/bin/python -m pip install --quiet $(3) $(TORCH) -e '.[$(2)]'
endef

.DEFAULT_GOAL := help
.PHONY: help venv test fuzz soak accuracy lint format sudoku sudoku9 sudoku-torchrun paths paths-torchrun scaling knapsack lpgd_vs_exact blind_pnp bench test-oldest test-newest build clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.installed ## Make the virtual environment for development (VENV, default .venv)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),dev,-c constraints.txt)
	touch $@

$(VENV_BENCH)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV_BENCH),bench,-c constraints.txt)
	touch $@

# Peers whose requirements clash with the versions that they run on.
$(VENV_BENCH)/.peers: $(VENV_BENCH)/.installed benchmarks/peers.txt
	$(VENV_BENCH)/bin/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	touch $@

$(MAROS_MESZAROS): benchmarks/extract_maros_meszaros.py benchmarks/maros_meszaros.txt
	$(PYTHON) -m venv $(VENV_JAX)
	$(VENV_JAX)/bin/python -m pip install --quiet -r benchmarks/maros_meszaros.txt
	$(VENV_JAX)/bin/python benchmarks/extract_maros_meszaros.py $@

$(VENV_OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(VENV_OLDEST),test,-c constraints-oldest.txt)
	touch $@

test: $(VENV)/.installed ## Run the tests
	$(call PYTEST,$(VENV))

fuzz: $(VENV)/.installed ## Hostile inputs to every front-end, with judged answers; goes on where it was (FUZZ_FLAGS)
	$(ONE_THREAD) $(BIN)/python -m tests.fuzz $(FUZZ_FLAGS)

soak: $(VENV)/.installed ## Hours of fuzzing, memory, interrupts, killed workers; goes on where it was (SOAK_FLAGS)
	$(ONE_THREAD) $(BIN)/python -m tests.soak $(SOAK_FLAGS)

accuracy: $(VENV)/.installed ## The largest errors that come without a warning, against sixty digits
	$(ONE_THREAD) $(BIN)/python -m tests.accuracy

lint: $(VENV)/.installed ## Check style, types and which file imports which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.installed ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

sudoku: $(VENV)/.installed ## Train the 4x4 Sudoku example, with plots (SUDOKU_FLAGS, SUDOKU_OUT)
	$(BIN)/python -m examples.sudoku.train $(SUDOKU_FLAGS) --out $(SUDOKU_OUT)

sudoku9: $(VENV)/.installed ## Train one epoch of 9x9 Sudoku, or go on with it (SUDOKU9_FLAGS, SUDOKU9_OUT)
	$(BIN)/python -m examples.sudoku.train $(SUDOKU9_FLAGS) --out $(SUDOKU9_OUT)

paths: $(VENV)/.installed ## Learn the costs of terrain through Dijkstra, by six methods, with plots (PATHS_FLAGS, PATHS_OUT)
	$(ONE_THREAD) $(BIN)/python -m examples.shortest_path.train $(PATHS_FLAGS) --out $(PATHS_OUT)

sudoku-torchrun: $(VENV)/.installed ## Train the 4x4 Sudoku example with two processes, or go on with it (SUDOKU_OUT)
	$(ONE_THREAD) $(BIN)/torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m examples.sudoku.train --resume \
		--out $(SUDOKU_OUT)-torchrun

paths-torchrun: $(VENV)/.installed ## Train a shortest-path model with two processes, or go on with it (PATHS_OUT)
	$(ONE_THREAD) $(BIN)/torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m examples.shortest_path.train --resume \
		--methods average --out $(PATHS_OUT)-torchrun

scaling: $(VENV)/.installed ## What workers gain, and what moving data costs (docs/scaling.md)
	$(BIN)/python -W ignore -m benchmarks.executors

knapsack: $(VENV)/.installed ## Learn the constraints of an integer program (KNAPSACK_FLAGS, KNAPSACK_OUT)
	$(ONE_THREAD) $(BIN)/python -m examples.knapsack.train $(KNAPSACK_FLAGS) --out $(KNAPSACK_OUT)

lpgd_vs_exact: $(VENV)/.installed ## Compare LPGD with exact gradients (VS_EXACT_FLAGS, VS_EXACT_OUT)
	$(BIN)/python -m examples.lpgd_vs_exact.run $(VS_EXACT_FLAGS) --out $(VS_EXACT_OUT)

blind_pnp: $(VENV)/.installed ## Learn which points are which through transport and pose, with plots (BLIND_PNP_FLAGS, BLIND_PNP_OUT)
	$(ONE_THREAD) $(BIN)/python -m examples.blind_pnp.train $(BLIND_PNP_FLAGS) --out $(BLIND_PNP_OUT)

bench: $(VENV_BENCH)/.peers $(MAROS_MESZAROS) ## Compare with every peer (BENCH_FLAGS="--quick --only NAME", BENCH_OUT)
	$(VENV_BENCH)/bin/python -W ignore -m benchmarks.run --out $(BENCH_OUT) --maros-meszaros $(MAROS_MESZAROS) $(BENCH_FLAGS)

test-oldest: $(VENV_OLDEST)/.installed ## Run the tests on the oldest versions of the dependencies
	$(call PYTEST,$(VENV_OLDEST))

test-newest: ## Run the tests on the newest versions of the dependencies, and list them in constraints-newest.txt
	$(call install,$(VENV_NEWEST),test,--upgrade --upgrade-strategy eager)
	echo '# The newest versions of the dependencies that make test-newest found last; torch is that of constraints.txt.' \
		> constraints-newest.txt
	$(VENV_NEWEST)/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' >> constraints-newest.txt
	$(call PYTEST,$(VENV_NEWEST))

build: $(VENV)/.installed ## Build the wheel and the source distribution in dist/
	$(BIN)/python -m build

clean: ## Remove virtual environments, builds and caches; results in runs/ stay
	rm -rf .venv .venv-bench .venv-jax .venv-newest .venv-oldest build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

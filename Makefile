# `make help` lists what there is. PYTHON=python3.12 chooses another interpreter for the virtual environment;
# TORCH_INDEX=URL takes torch from another package index (a build without CUDA is a tenth of the size).
PYTHON ?= python3
TORCH_INDEX ?=
KILLS ?= 50
RANKS ?= 2
SEED ?= 0
BIN := .venv/bin
STAMP := .venv/.installed
# Tests of functions that start no process, write no video and run no fit; `make test` runs these too.
PURE := tests/unit/test_imports.py tests/unit/data_/shards tests/unit/data_/stream tests/unit/data_/test_batch.py \
  tests/unit/data_/test_bucket.py tests/unit/trainer_/attention tests/unit/trainer_/test_ema.py \
  --ignore=tests/unit/trainer_/attention/test_operators.py \
  tests/unit/trainer_/test_objective.py tests/unit/trainer_/test_surgery.py

.DEFAULT_GOAL := help
.PHONY: help demo test check types pure bench kills

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## the whole road on two cores in minutes: clips -> shards -> base -> retraining -> runs/demo/report.html
	$(BIN)/reblock demo

test: $(STAMP) ## every test; as root on Debian it installs Slurm and the browser that some of them need first
	ALSO_INSTALL=chromium-headless-shell bash tests/cluster/slurm-lab.sh install
	$(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder

check: $(STAMP) ## format, lint, types, import direction, the tests of pure functions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory -j2 types pure

types: $(STAMP)
	$(BIN)/mypy

pure: $(STAMP)
	$(BIN)/pytest -q -m "not slow" $(PURE)

kills: $(STAMP) ## long series: a run of RANKS ranks killed KILLS times and compared, then signals and kills of encoding
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills.series --kills $(KILLS) --ranks $(RANKS) --seed $(SEED)
	LONG_SERIES=1 $(BIN)/pytest -n 0 tests/integration/test_stop_storm.py tests/integration/encode/test_encode_kill.py

bench: $(STAMP) ## step time and memory of trunk / head against the stock forward
	$(BIN)/reblock bench step

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	  "error: $(PYTHON) is not Python 3.11 or newer ($$($(PYTHON) --version 2>&1)); install one and run 'make PYTHON=python3.11 ...'." >&2; \
	  exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo \
	  "error: no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv." >&2; \
	  rm -rf .venv; exit 1; }
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

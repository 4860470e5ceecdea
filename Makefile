# make demo : create .venv, install, run the demo federation
# make docs : the documentation as a site in build/site
# make test-flower : the contract with Flower on every version that pyproject.toml allows
# make test : the same, then the quick tests; make test-all : every test; make lint : style and types; make bench : every claim of speed
# make bench-compare OLD=old.json NEW=new.json : rows that became worse by more than their spread
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLOWER_VERSIONS := 1.41 1.42
# Two processes, each with whole files: many tests wait for processes, and the limits are for two cores.
PARALLEL := -n 2 --dist loadfile

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo bench bench-compare docs test test-slow test-all test-flower lint install clean

demo: $(STAMP)
	$(BIN)/python -m simulations pretrain configs/simulations/demo.yaml
	$(BIN)/python -m simulations run configs/simulations/demo.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PARALLEL)

test-all: test test-slow

# flwr alone, beside the installed packages: its versions need the same ones.
test-flower: $(STAMP)
	@for version in $(FLOWER_VERSIONS); do \
		folder=.cache/flower-$$version; \
		test -d $$folder || $(BIN)/python -m pip install --quiet --no-deps --target $$folder "flwr==$$version.*" || exit 1; \
		PYTHONPATH=$$folder $(BIN)/python -m pytest tests/common/test_flower.py || exit 1; \
	done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --quiet --editable ".[docs]"
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

bench-compare: $(STAMP)
	$(BIN)/python -m benchmarks.regressions $(OLD) $(NEW)

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name it with: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) .cache runs build *.egg-info

# make demo: set everything up and run the main job end to end.   make test: set up and run the tests.
# Both need Python 3.12 and nothing else; they build .venv on first use and reuse it afterwards.

# the first of these that is a Python 3.12
PYTHON ?= $(firstword $(foreach p,python3.12 python3 python,$(shell $(p) -c 'import sys; sys.version_info[:2] == (3, 12) and print("$(p)")' 2>/dev/null)) python3.12)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow lint clean

demo: $(READY)
	$(BIN)/python tools/demo.py

# two files at a time: most tests wait on one core, and those of layouts start processes of their own
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1 \
	  || { echo "error: Python 3.12 is needed, and '$(PYTHON)' does not run one. Install it, or name it: make PYTHON=/path/to/python3.12 ..."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' >/dev/null 2>&1 \
	  || { echo "error: this Python lacks its venv or ensurepip module (Debian: apt-get install python3.12-venv)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) demo_out

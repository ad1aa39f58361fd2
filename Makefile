# make demo: set everything up and run the main job end to end.   make test: set up and run the tests.
# Both need Python 3.12 and nothing else; they build .venv on first use and reuse it afterwards.

# the first of these that is a Python 3.12
PYTHON ?= $(firstword $(foreach p,python3.12 python3 python,$(shell $(p) -c 'import sys; sys.version_info[:2] == (3, 12) and print("$(p)")' 2>/dev/null)) python3.12)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# a second environment, which sees the first one's packages and adds Transformer Engine: Megatron-Core behaves otherwise
# where that can be imported, and the other tests prove the path without it
VENV_TE := .venv-te
READY_TE := $(VENV_TE)/.ready
SITE := 'import sysconfig; print(sysconfig.get_path("purelib"))'
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-te test-slow lint clean

demo: $(READY)
	$(BIN)/python tools/demo.py

# two files at a time: most tests wait on one core, and those of layouts start processes of their own
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# PIP_FIND_LINKS names a folder with a wheel of transformer_engine_torch; without one it is built, with a CUDA toolkit
test-te: $(READY_TE)
	$(VENV_TE)/bin/python -m pytest tests/te

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

# Transformer Engine looks for CUDA's libraries (folder nvidia) in its own environment alone
$(READY_TE): $(READY) constraints-te.txt
	test -x $(VENV_TE)/bin/python || $(BIN)/python -m venv $(VENV_TE)
	$(VENV_TE)/bin/python -m pip install -q --disable-pip-version-check -c constraints-te.txt setuptools wheel pybind11 ninja
	first=$$($(BIN)/python -c $(SITE)); own=$$($(VENV_TE)/bin/python -c $(SITE)); \
	  echo "import site; site.addsitedir('$$first')" >$$own/first_environment.pth; ln -sfn $$first/nvidia $$own/nvidia
	$(VENV_TE)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -r constraints-te.txt
	@touch $(READY_TE)

clean:
	rm -rf $(VENV) $(VENV_TE) demo_out

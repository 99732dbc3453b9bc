# Everything needed is set up on first use, in $(VENV); a second run sets nothing up again.
#
#   make demo     the whole path on the tiny model, from build to generated text
#   make test     the tests
#   make test-unit  those that need no compiled runtime and are quick
#   make build    only the llama.cpp runtime
#   make peers    llama.cpp's and llama-cpp-python's own tests, on the patched build
#   make sanitize  the operator under ThreadSanitizer and AddressSanitizer
#   make fuzz     thousands of damaged files for the readers, and for the loader built with AddressSanitizer
#   make fuzz-all   100,000 of each, and every value of every family's config.json: takes hours
#   make fuzz-part  a smaller number, with the installed runtime
#   make browser  install chromium for the tests of HTML pages, if there is apt; without chromium they are skipped
#   make lint     ruff, the rules of imports between packages, and mypy
#   make clean    remove what these made; the downloads and objects in ~/.cache/mobe-gguf stay

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-unit browser peers sanitize fuzz fuzz-all fuzz-part build lint format clean

demo: build
	$(BIN)/mobe-gguf demo

# --test-tools: llama.cpp's own operator tests, which the suite runs on this project's operator
test: $(READY)
	$(BIN)/mobe-gguf build --test-tools
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# needs no runtime and takes a minute
test-unit: $(READY)
	$(BIN)/python -m pytest -m "unit and not slow" $(PYTEST_ARGS)

# never fails: without a browser the tests of pages are skipped
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  { timeout 300 apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1 || \
	    { timeout 100 apt-get update -qq && timeout 300 apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1; }; } || \
	  echo "no chromium: the tests of pages are skipped"

# compiles about forty test programs in the runtime's build tree; llama-cpp-python's tests need scipy
peers: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt 'scipy>=1.11,<2'
	$(BIN)/python tests/peers/run.py

# a separate program from the kernel and two files of ggml; nothing else of llama.cpp is compiled
sanitize: build
	PYTHONPATH=tests $(BIN)/python -m native.standalone.build --sanitize

fuzz: build
	$(BIN)/python tests/fuzz/readers.py
	$(BIN)/python tests/fuzz/run.py

# takes hours
fuzz-all: build
	$(BIN)/python tests/fuzz/readers.py --count 100000 --seed 1
	$(BIN)/python tests/fuzz/run.py --count 100000 --seed 1
	MOBE_GGUF_ALL=1 $(BIN)/python -m pytest -q tests/export/test_config_values.py

# the part of the two above that a change must pass: some minutes, compiles only the kernel
fuzz-part: build
	$(BIN)/python tests/fuzz/readers.py --count 2000
	$(BIN)/python tests/fuzz/run.py --count 300 --installed

# does nothing if the installed runtime already has these patches, kernels and options
build: $(READY)
	$(BIN)/mobe-gguf build

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# an existing environment is kept and updated
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .ruff_cache .hypothesis

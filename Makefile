# What a newcomer runs: `make run`. What a contributor runs: `make check`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
RUNS ?= runs
JOBS ?= 2

.PHONY: help install run test test-transformers wheel-test dist docs lint types imports check test-gpu bench-gpu train-heads bench-model bench-scale tune-gpu bench-decode bench-generation bench-prefill bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# torch first: the pin keeps the other packages from choosing another build of it
$(BIN)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info < (3, 14), f'Python 3.11 to 3.13 needed, this is {sys.version.split()[0]}'"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	echo "$(TORCH)" > $(VENV)/constraint.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraint.txt --editable ".[dev]"
	touch $@

install: $(BIN)/.installed ## create .venv and install the package in it

# --resume: a run that is there is gone on with, or left as it is when complete
run: install ## train a small model on this CPU, complete a prompt, test the memory: 2 to 7 minutes
	$(BIN)/gka train --recipe cpu --output $(RUNS)/first --resume
	$(BIN)/gka generate $(RUNS)/first --prompt "def main(" --max-new-tokens 160
	$(BIN)/gka recall --output $(RUNS)/recall
	@echo "  $(BIN)/gka inspect $(RUNS)/first --prompt-file README.md --output $(RUNS)/look   what its memory does with a text"
	@echo "  $(BIN)/gka train FOLDER --output $(RUNS)/mine                        your own texts in place of Python's library"
	@echo
	@echo "The model, metrics.json and loss.png: $(RUNS)/first. The memory test: $(RUNS)/recall."

test: install ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# transformers' own tests come with its source distribution, not with its wheel
TRANSFORMERS := transformers==5.24.0 --hash=sha256:906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3
THEIRS := $(VENV)/transformers-tests

$(THEIRS)/tests/__init__.py: $(BIN)/.installed
	mkdir -p $(THEIRS)
	echo "$(TRANSFORMERS)" > $(THEIRS)/pinned.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraint.txt parameterized
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --require-hashes --requirement $(THEIRS)/pinned.txt --dest $(THEIRS)
	tar xzf $(THEIRS)/transformers-*.tar.gz -C $(THEIRS) --strip-components 1
	touch $@

test-transformers: $(THEIRS)/tests/__init__.py ## transformers' own tests of a model, on ours
	$(BIN)/python -c "import transformers as t; assert '==' + t.__version__ in '$(firstword $(TRANSFORMERS))', t.__version__ + ' is installed, the tests are of $(firstword $(TRANSFORMERS))'"
	OMP_NUM_THREADS=1 GKA_TRANSFORMERS_TESTS=$(THEIRS) $(BIN)/python -m pytest tests/models/test_transformers_common.py -rs

wheel-test: install ## the wheel, built and used apart from the checkout (make test does this too)
	$(BIN)/python -m pytest tests/test_wheel.py

dist: install ## what would be published, checked, in dist/
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraint.txt --editable ".[dev,publish]"
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

docs: install ## the pages as a site in build/site: searchable, with formulas, read without a network
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraint.txt --editable ".[dev,docs]"
	$(BIN)/python docs/site/prepare.py build
	$(BIN)/zensical build --clean --strict --config-file build/site.yml
	$(BIN)/python docs/site/check.py build/site

lint: install ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## pyright, tests too
	$(BIN)/pyright

imports: install ## imports run downwards only
	$(BIN)/lint-imports

check: lint types imports test ## everything CI runs

# on a GPU: the python that has torch and triton, not .venv, whose torch is for CPUs
test-gpu: ## the kernels' tests on this machine's GPU, and those of recorded decoding
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest tests/kernels tests/serving/test_gpu_graph.py -s --durations=5

bench-gpu: ## the op and the layer against their peers on this machine's GPU: BENCH="--quick"
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run op --output $(RUNS)/bench-gpu $(BENCH)

train-heads: ## the model whose heads BENCH="--keys trained" reads, on this machine's GPU: minutes, once
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run heads --output $(RUNS)/bench-heads $(HEADS)

bench-model: ## training steps of whole models, by mixer and size, on this machine's GPU: MODEL="--sizes 395m --budget 500"
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run model --output $(RUNS)/bench-model $(MODEL)

bench-scale: ## training steps of the 440 M model on this machine's GPUs, shards and split sequences: SCALE="--gpus 1,2,4"
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run scale --output $(RUNS)/bench-scale $(SCALE)

tune-gpu: ## measure and store the kernels' launch configurations on this machine's GPU: TUNE="--seconds 300"
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run tune --output $(RUNS)/tune/tune.json $(TUNE)

bench-decode: ## one token a sequence, states in place, on this machine's GPU, under a minute: DECODE="--model FOLDER"
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run decode --output $(RUNS)/bench-decode $(DECODE)

bench-generation: ## tokens/s of a decoder on recurrent states, against attention, on this machine's GPU: under a minute
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run generation --output $(RUNS)/bench-generation $(GENERATION)

bench-prefill: ## reading and resuming a long prompt, on this machine's GPU if there is one: PREFILL="--size medium"
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run prefill --output $(RUNS)/bench-prefill $(PREFILL)

bench: install ## chunk-wise against token by token on this CPU
	$(BIN)/python -m benchmarks.run cpu --output $(RUNS)/bench

clean: ## remove the environment and caches, not your runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache build dist src/*.egg-info

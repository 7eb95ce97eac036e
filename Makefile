# make demo   the whole chain on the embedded mixture        make bench  ratios to the best peers
# make test   all tests but the slow ones                    make lint   ruff and mypy
# make zoo    train the embedded mixture again               make slow   the slow tests
# make audit  known vulnerabilities of the dependencies; needs a network
#
# Each target sets itself up: a virtual environment in .venv with the versions in constraints.txt.

PYTHON ?= python3.11
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test slow bench lint zoo audit

demo: .venv/ready
	$(BIN)/flexmore demo --out demo

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

bench: .venv/ready
	$(BIN)/python -m tests.benchmarks --out bench.json

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# --strict: where the database does not answer it fails, and does not call what it skipped free of vulnerabilities.
audit: .venv/ready
	test -x .venv/audit/bin/pip-audit || ($(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install --quiet pip-audit==2.10.1)
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

zoo: .venv/ready
	$(BIN)/python -m flexmore_ray.zoo.train --out build/zoo
	cp build/zoo/nano/* flexmore_ray/zoo/nano/

# PyTorch goes first and alone, so that nothing else brings a build for other hardware.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

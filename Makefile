# `make demo` sets everything up and shows dmh at work; `make test` sets everything up and passes the tests.
# Needs Python 3.11 or newer with its headers and venv, a C compiler, make and git (README.md, "Prerequisites").

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard dmh/native/*.c dmh/native/*.h dmh/native/build.py) dmh/lspt/states.py dmh/lspt/steps.py dmh/observe/names.py

.PHONY: all demo test lint check soak bench clean

all: $(VENV)/installed

# Editable, so that the tests run on this tree; again whenever the native module's sources have changed.
$(VENV)/installed: pyproject.toml setup.py $(filter-out dmh/native/generated.h dmh/native/_dmh.c,$(NATIVE))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/dmh demo

test: lint check

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: $(VENV)/installed
	$(BIN)/python -m pytest

soak: $(VENV)/installed
	$(BIN)/python -m pytest -m soak --timeout 1200

bench: $(VENV)/installed
	$(BIN)/dmh bench all

clean:
	rm -rf $(VENV) build *.egg-info dmh/native/*.so dmh/native/_dmh.c dmh/native/generated.h

# Two commands matter: `make demo` and `make test`. Both set up .venv first and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNEL_SOURCES := CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo test test-slow lint types setup docs bench clean help

help:
	@echo "make demo   compress the bundled model, write demo-out/report.html"
	@echo "make test   run the tests        make test-slow  run the long ones"
	@echo "make lint types docs bench clean"

setup: $(READY)

$(READY): $(KERNEL_SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		scikit-build-core nanobind cmake ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[test]'
	@touch $@

demo: $(READY)
	$(BIN)/gossamer compress --sparsity 0.5 --sweep 0.3,0.5,0.7 --out demo-out --overwrite

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/generate.py

bench: $(READY)
	for case in benchmarks/cases/*.py; do $(BIN)/python $$case || exit 1; done

clean:
	rm -rf $(VENV) build demo-out

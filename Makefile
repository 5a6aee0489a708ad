# Two commands matter: `make demo` and `make test`. Both set up .venv first and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNEL_SOURCES := CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: demo test test-slow test-models lint types setup docs docs-serve wheel bench claims sweep \
	sanitize fuzz clean help

help:
	@echo "make demo   compress the bundled model, write demo-out/report.html"
	@echo "make test   run the tests        make test-slow  run the long ones"
	@echo "make test-models  download small real models (285 MB) and test on them"
	@echo "make docs   write the generated pages, build the site in build/site"
	@echo "make docs-serve  show the site at http://127.0.0.1:8000"
	@echo "make wheel  build wheels into dist/, try each in a fresh environment"
	@echo "make lint types bench claims sweep clean"
	@echo "make sanitize  kernel tests under sanitizers   make fuzz  a minute each"

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

MODELS := smollm2 efficientnet-lite0 vit-s minilm
test-models: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		gguf onnx onnxruntime
	set -e; for name in $(MODELS); do $(BIN)/gossamer testbed fetch $$name; done
	$(BIN)/python -m pytest -m models

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/python tools/docstrings.py build/examples
	$(BIN)/mypy --allow-untyped-defs build/examples/*.py

# The pages made from cards and records, then the site. A warning (a broken link, say) is an error.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'gossamer[docs]'
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/site
	@echo "the site: build/site/index.html"

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site 8000

wheel:
	$(PYTHON) tools/wheel.py

bench: $(READY)
	$(BIN)/gossamer bench --suite kernels --out benchmarks/results/kernels.json
	$(BIN)/gossamer bench --suite training --out benchmarks/results/training.json
	$(BIN)/gossamer bench --suite decode --out benchmarks/results/decode.json
	for case in benchmarks/cases/*.py; do $(BIN)/python $$case || exit 1; done

# Every claim anew, then the pages that show the verdicts.
claims: $(READY)
	for file in src/gossamer/claims/*/[a-z]*.py; do \
		$(BIN)/python -m gossamer.claims $$(basename $$file .py) \
			--out benchmarks/results/claims || exit 1; done
	$(BIN)/python docs/generate.py

# Every model family anew, then its page. timm and diffusers take part where they are installed.
sweep: $(READY)
	$(BIN)/python tests/sweep/run.py --write

FUZZ_SECONDS ?= 60
FUZZ_SEED ?= $(shell date +%s)
fuzz: $(READY)
	FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/fuzz
	HYPOTHESIS_PROFILE=default $(BIN)/python -m pytest tests/core tests/io tests/ops \
		tests/engine/prune/test_structure_kinds.py

# The copy of the package beside the sanitized extension; every set of instructions in turn. Fresh
# memory is NaN, and reports go past pytest. Then the ordinary kernels with a closed page behind all
# their memory: sanitizers do not see what masked vectors and gathers touch.
SANITIZED := $(CURDIR)/build/sanitize
KERNEL_TESTS := tests/ops tests/nn tests/fuzz tests/engine/serve/test_decoder.py
PLAINLY := -p no:cacheprovider --capture=sys
sanitize: $(READY)
	rm -rf $(SANITIZED)/src && mkdir -p $(SANITIZED)/src && cp -r src/gossamer $(SANITIZED)/src/
	rm -f $(SANITIZED)/src/gossamer/_kernels*.so
	$(BIN)/cmake -S . -B $(SANITIZED)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DGOSSAMER_SANITIZE=ON \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(SANITIZED)/src/gossamer
	$(BIN)/ninja -C $(SANITIZED)/cmake
	for isa in portable avx2 avx512; do \
		GOSSAMER_ISA=$$isa $(BIN)/python -c "from gossamer.ops import _dispatch; _dispatch.isa()" \
			|| continue; \
		GOSSAMER_ISA=$$isa UBSAN_OPTIONS=print_stacktrace=1 \
			ASAN_OPTIONS=detect_leaks=0:redzone=128:max_malloc_fill_size=16777216:malloc_fill_byte=255 \
			LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
			$(BIN)/python tests/sanitized.py $(SANITIZED)/src $(PLAINLY) $(KERNEL_TESTS) || exit 1; \
	done
	$(CC) -O2 -shared -fPIC -o $(SANITIZED)/libfence.so tests/fence.c
	LD_PRELOAD=$(SANITIZED)/libfence.so $(BIN)/python -X faulthandler -m pytest $(PLAINLY) $(KERNEL_TESTS)

clean:
	rm -rf $(VENV) build dist demo-out

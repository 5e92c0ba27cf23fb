# make demo        install, generate text, bench two models against transformers, plot
# make test        the test suite                     make test-transformers  the model tests on the second version
# make lint        style, types, C++ format           make test-native        the C++ tests
#                                                     make sanitize           the same under ASan+UBSan and TSan
# make gpu-soak    10,000 steps with swaps            make gpu-sanitize       kernels under compute-sanitizer
# make bench       kernels and whole model -> bench/results
#
# VENV=     use the current environment: installs this project only, offline
# PYTHON=   the interpreter that makes the environment
# TORCH=    what to install as torch (a CPU wheel's path or a version)

PYTHON ?= python3
VENV ?= .venv
TRANSFORMERS ?= 5.17.0
TRANSFORMERS_2 ?= 5.23.0
JOBS ?= 2

HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
ifeq ($(HAS_GPU),0)
TORCH ?= torch==2.13.0
EXTRAS ?= dev,bench
else
TORCH ?= torch==2.13.0
EXTRAS ?= dev,bench,cuda13
endif

ifeq ($(VENV),)
PY := $(shell command -v $(PYTHON))
STAMP := build/.installed
else
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
endif
BIN := $(dir $(PY))
NATIVE := $(wildcard native/*.cpp native/*.h native/*/*.cpp native/*/*.h)
SOURCES := pyproject.toml CMakeLists.txt $(filter-out native/tests/%,$(NATIVE))

.PHONY: install demo test test-transformers test-native lint format bench sanitize sanitize-address sanitize-thread \
  gpu-soak gpu-sanitize clean

install: $(STAMP)

$(STAMP): $(SOURCES)
ifeq ($(VENV),)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
else
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet -e ".[$(EXTRAS)]" transformers==$(TRANSFORMERS)
endif
	@mkdir -p $(@D) && touch $@

# ---- the main job ----
demo: $(STAMP)
	@bench/demo.sh $(BIN)

bench: $(STAMP)
	bench/all.sh $(BIN)

# ---- checks ----
# As many workers as cores: more threads of each would only wait in turn.
test test-transformers: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(PY) -m pytest -n $(JOBS) --dist worksteal -q tests

# The second version lies over the first on the path: everything else in the environment suits both.
OVERLAY := .cache/transformers-$(TRANSFORMERS_2)
$(OVERLAY)/.installed: | $(STAMP)
	$(PY) -m pip install --quiet --no-deps --target $(OVERLAY) transformers==$(TRANSFORMERS_2)
	@touch $@

test-transformers: $(STAMP) $(OVERLAY)/.installed
	PYTHONPATH=$(OVERLAY) $(PY) -c 'import transformers as t; assert t.__version__ == "$(TRANSFORMERS_2)", t.__version__'
	PYTHONPATH=$(OVERLAY) $(PY) -m pytest -n $(JOBS) --dist worksteal -q tests/models tests/cli/test_generate.py \
	  tests/cli/test_encoder_decoder.py

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)clang-format --dry-run -Werror $$(git ls-files 'native/*.h' 'native/*.cpp')

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i $$(git ls-files 'native/*.h' 'native/*.cpp')

test-native: $(STAMP)
	$(BIN)cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release -DMONDE_BUILD_PYTHON=OFF -DMONDE_BUILD_TESTS=ON
	$(BIN)cmake --build build/native --target native_tests -j $(JOBS)
	$(BIN)ctest --test-dir build/native --output-on-failure

sanitize: sanitize-address sanitize-thread
sanitize-address: SANITIZERS := address,undefined,float-cast-overflow
sanitize-thread: SANITIZERS := thread
sanitize-address sanitize-thread: $(STAMP)
	$(BIN)cmake -S . -B build/$@ -DCMAKE_BUILD_TYPE=None -DMONDE_BUILD_PYTHON=OFF \
	  -DMONDE_BUILD_TESTS=ON -DMONDE_SANITIZE=$(SANITIZERS)
	$(BIN)cmake --build build/$@ --target native_tests -j $(JOBS)
	build/$@/native_tests

# ---- on a machine with a GPU ----
gpu-soak: $(STAMP)
	SOAK_STEPS=10000 $(PY) -m pytest -q --timeout 3000 tests/gpu/test_soak.py

gpu-sanitize: $(STAMP)
	.ci/gpu-sanitize $(PY)

clean:
	rm -rf build .cache demo-out .venv

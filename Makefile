# make demo     tokenizer, codes, MuToR-2D, samples and scores on real digits, from nothing, on a CPU
# make compare  the demo, and next-token prediction beside it for as many updates and for as many seconds
# make test     the whole test suite
# make lint     the linter

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo compare test lint

demo: $(VENV)/installed
	$(RUN) -m mutor_img.study --config configs/mnist/study.yaml

compare: $(VENV)/installed
	$(RUN) -m mutor_img.study --config configs/mnist/study.yaml compare=true

test: $(VENV)/installed
	$(RUN) -m pytest

lint: $(VENV)/installed
	$(RUN) -m ruff check .

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

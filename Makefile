# make demo     tokenizer, codes, MuToR-2D, samples and scores on real digits, from nothing, on a CPU
# make compare  the demo, and next-token prediction beside it for as many updates and for as many seconds
# make test     the whole test suite, in two processes; make test TEST_PROCESSES=8 where there are cores and memory
# make test-gpu the tests that need a GPU; python -m mutor_img.gpu_report prints what they check as a report
# make test-app the page of mutor_img.app in a headless Chromium; installs Gradio, playwright and, as root on Debian, Chromium
# make lint     ruff, that packages import only from lower layers (pyproject.toml), and make audit
# make audit    known vulnerabilities in requirements.lock, by pip-audit; skipped where it or a network is missing

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TEST_PROCESSES ?= 2

.PHONY: demo compare test test-gpu test-app lint audit

demo: $(VENV)/installed
	$(RUN) -m mutor_img.study --config configs/mnist/study.yaml

compare: $(VENV)/installed
	$(RUN) -m mutor_img.study --config configs/mnist/study.yaml compare=true

test: $(VENV)/installed
	$(RUN) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/installed
	$(RUN) -m pytest -m gpu

test-app: $(VENV)/installed-app
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
	  { echo "error: Chromium is missing; on Debian: sudo apt-get install chromium" >&2; exit 2; }
	$(RUN) -m pytest -m app tests/app

lint: $(VENV)/installed audit
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports

audit:
	@if ! command -v pip-audit > /dev/null; then \
	  echo "audit: skipped, pip-audit is not installed (pipx install pip-audit)"; \
	elif told=$$(pip-audit --requirement requirements.lock --no-deps --disable-pip --progress-spinner off 2>&1); then \
	  echo "audit: no known vulnerabilities in requirements.lock;" \
	       "$$(echo "$$told" | grep -c 'could not be audited') of its packages could not be audited"; \
	elif echo "$$told" | grep -q "known vulnerabilit"; then \
	  echo "$$told"; exit 1; \
	else \
	  echo "audit: skipped, pip-audit had no answer: $$(echo "$$told" | tail -n 1 | cut -c 1-200)"; \
	fi

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/installed-app: $(VENV)/installed
	$(RUN) -m pip install --quiet --editable '.[test-app]'
	touch $@

# `make run`: see the agent work on this machine. `make test`: everything that is checked. Each does its own set-up.

PYTHON ?= python3
UV := 0.13.9
export PYTHON
export UV_PYTHON := $(PYTHON)
export UV_PYTHON_DOWNLOADS := never
export UV_HTTP_RETRIES := 8

READY := .venv/ready
PYTEST := .venv/bin/python -m pytest

.PHONY: run test lint bench soak dist
.DELETE_ON_ERROR:

run: $(READY)
	.venv/bin/agent demo

test: lint
	@[ "$$CI" != true ] || packaging/deps peers
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not bench"

lint: $(READY)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: $(READY)
	$(PYTEST) -m bench tests/bench

soak: $(READY)
	$(PYTEST) --soak 600 -o faulthandler_timeout=3600 tests/faults

dist: dist/SHA256SUMS

# Made anew when something inside has changed. An environment of its own: what is frozen holds no tool of development.
FROZEN := $(shell find agent hw-profiles native packaging -type f ! -name '*.pyc' ! -name '*.so' 2>/dev/null)
dist/SHA256SUMS: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || stat -c %Y pyproject.toml)
dist/SHA256SUMS: export PYTHONHASHSEED := 1
dist/SHA256SUMS: export PYTHONNODEBUGRANGES := 1
dist/SHA256SUMS: export PYINSTALLER_CONFIG_DIR := build/pyinstaller
dist/SHA256SUMS: $(READY) $(FROZEN)
	UV_PROJECT_ENVIRONMENT=.venv-dist .venv-uv/bin/uv sync --quiet --locked --no-dev --group dist
	.venv-dist/bin/pyinstaller --clean --noconfirm --log-level=WARN packaging/agent.spec
	.venv-dist/bin/python packaging/release.py

# Made anew for another interpreter, too, but not for another name of the same.
INTERPRETER := $(shell $(PYTHON) -ISc 'import os, sys; print(os.path.realpath(sys.executable))' 2>/dev/null)
ifneq ($(shell cat .venv/ready 2>/dev/null),$(INTERPRETER))
.PHONY: $(READY)
endif

# The whole set-up. uv goes into the checkout; it builds the C module and installs what uv.lock names.
$(READY): Makefile pyproject.toml uv.lock setup.py agent/__init__.py packaging/deps $(wildcard native/*)
	packaging/deps
	@.venv-uv/bin/uv --version 2>/dev/null | grep -q '^uv $(UV) ' || \
		{ $(PYTHON) -m venv .venv-uv && .venv-uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV); }
	.venv-uv/bin/uv sync --quiet --locked
	@echo '$(INTERPRETER)' >$@

# `make run`: see the agent work on this machine. `make test`: everything that is checked. Each does its own set-up.

PYTHON ?= python3
UV := 0.13.9
export PYTHON
export UV_PYTHON := $(PYTHON)
export UV_PYTHON_DOWNLOADS := never

READY := .venv/ready
PYTEST := .venv/bin/python -m pytest

.PHONY: run test lint bench soak dist
.DELETE_ON_ERROR:

run: $(READY)
	.venv/bin/agent demo

test: lint
	@[ "$$CI" != true ] || packaging/deps peers
	$(PYTEST) -m "not bench"

lint: $(READY)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: $(READY)
	$(PYTEST) -m bench tests/bench

soak: $(READY)
	$(PYTEST) --soak 600 -o faulthandler_timeout=3600 tests/faults

# An environment of its own: what is frozen holds no tool of development.
dist: $(READY)
	UV_PROJECT_ENVIRONMENT=.venv-dist .venv-uv/bin/uv sync --quiet --locked --no-dev --group dist
	PYTHONHASHSEED=1 .venv-dist/bin/pyinstaller --clean --noconfirm packaging/agent.spec

# The whole set-up. uv goes into the checkout; it builds the C module and installs what uv.lock names.
$(READY): Makefile pyproject.toml uv.lock setup.py agent/__init__.py packaging/deps $(wildcard native/*)
	packaging/deps
	@.venv-uv/bin/uv --version 2>/dev/null | grep -q '^uv $(UV) ' || \
		{ $(PYTHON) -m venv .venv-uv && .venv-uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV); }
	.venv-uv/bin/uv sync --quiet --locked
	@touch $@

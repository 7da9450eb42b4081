# make demo, make test: each makes a virtual environment, installs and runs. Variables, with examples:
#   PYTHON=python3.12          the interpreter
#   EXTRAS=dev,oracle          what is installed for the tests; oracle adds the tests against transformers on torch
#   REQUIREMENTS=jax==0.11.2   further requirements, to pin versions
PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
EXTRAS ?= dev
REQUIREMENTS ?=
PYTEST ?= -n 2 --dist worksteal

comma := ,
bin := $(VENV)/bin
# What is installed is named in the stamp, so that other variables install again.
installed := $(VENV)/.test-$(subst $(comma),-,$(EXTRAS))-$(shell echo '$(REQUIREMENTS)' | cksum | cut -d' ' -f1)

.PHONY: demo test coverage lint clean

demo: $(VENV)/.demo
	$(bin)/zo2jax demo $(ARGS)

test: lint
	$(bin)/python -m pytest $(PYTEST) $(ARGS)

# The same tests, a quarter slower.
coverage:
	$(MAKE) test ARGS="--cov --cov-report=term $(ARGS)"

lint: $(installed)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(bin)/python -m pip install --quiet -e . $(REQUIREMENTS)
	touch $@

$(installed): pyproject.toml | $(VENV)/bin/python
	$(bin)/python -m pip install --quiet -e ".[$(EXTRAS)]" $(REQUIREMENTS)
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) dist runs .coverage .mypy_cache .ruff_cache

# make demo   convert, verify and run both bundled checkpoints, fine-tune one; without network
# make test   lint, types and all tests but those of speed
# make timing the tests of speed, one after another: for an idle machine
# make lint   ruff, its formatter and mypy, on the package as it is installed
# make format rewrite the sources as `make lint` wants them

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST ?= -q -n auto

bin := $(VENV)/bin

.PHONY: demo test timing lint format clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --upgrade pip 'setuptools>=77' wheel
	$(bin)/python -m pip install --quiet '$(TORCH)'
	$(bin)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(bin)/python examples/demo.py demo-out

test: lint
	$(bin)/python -m pytest $(PYTEST) -m 'not timing'

timing: $(VENV)/.installed
	$(bin)/python -m pytest -q -m timing

# converters/ and cli/ are installed inside rwkv_rev: types are checked in that arrangement.
lint: $(VENV)/.installed
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	rm -rf .lint
	mkdir -p .lint
	cp -r rwkv_rev .lint/rwkv_rev
	cp -r converters cli .lint/rwkv_rev/
	MYPYPATH=.lint $(bin)/mypy -p rwkv_rev

format: $(VENV)/.installed
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf build dist .lint demo-out .mypy_cache .pytest_cache .ruff_cache .hypothesis

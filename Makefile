# make demo   convert, verify and run the bundled checkpoints, fine-tune RWKV-7; without network
# make test   lint, types and all tests but those of speed
# make test-newest, make test-oldest
#             the tests with the newest versions of everything, with the oldest that pyproject.toml admits (Python 3.11)
# make test-peers
#             the suites of transformers and peft, fetched with their sources, over our classes
# make timing the tests of speed, one after another: for an idle machine
# make lint   ruff, its formatter and mypy, on the package as it is installed
# make lock   pin what pyproject.toml asks for (`make lock LOCK=--upgrade`: at the newest versions)
# make format rewrite the sources as `make lint` wants them

TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST ?= -q -n auto --dist loadfile --no-loadscope-reorder

ifeq ($(OS),Windows_NT)
PYTHON ?= python
bin = $(VENV)/Scripts
else
PYTHON ?= python3
bin = $(VENV)/bin
endif
pip = $(bin)/python -m pip install --quiet

# What each of the tests' processes compiles, the others would compile again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-newest test-oldest test-peers timing lint lock format clean
.DEFAULT_GOAL := test

# Everything but torch comes from the lock, torch's own dependencies too: after it, torch installs nothing but itself
# and the libraries of its build.
$(VENV)/.installed: pyproject.toml requirements.lock
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) --no-deps --require-hashes --requirement requirements.lock
	$(pip) '$(TORCH)'
	$(pip) --no-deps --no-build-isolation --editable .
	touch $@

# A lock for Linux, macOS and Windows. The libraries of torch's build are no part of it: they go with the build.
lock: $(VENV)/.installed
	printf '%s\n' '$(TORCH)' > $(VENV)/torch.txt
	printf '%s\n' triton cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 \
	  nvidia-nvshmem-cu13 > $(VENV)/torch-build.txt
	$(bin)/python -m uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	  --extra dev --group tools --constraint $(VENV)/torch.txt --excludes $(VENV)/torch-build.txt \
	  --no-emit-package torch --no-annotate --custom-compile-command 'make lock' $(LOCK) \
	  --output-file requirements.lock pyproject.toml

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(bin)/python examples/demo.py demo-out

# mypy keeps one core busy, so `lint` runs beside the tests; what it found is told after them.
test: $(VENV)/.installed
	@$(MAKE) --no-print-directory lint > $(VENV)/lint.log 2>&1 & lint=$$!; \
	$(bin)/python -m pytest $(PYTEST) -m 'not timing'; tests=$$?; \
	wait $$lint || { cat $(VENV)/lint.log; echo 'make lint failed'; exit 1; }; \
	exit $$tests

# Both leave the lock aside and resolve anew at every call, in an environment of their own.
test-newest: VENV = .venv-newest
test-newest:
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) --upgrade --upgrade-strategy eager pip setuptools wheel torch
	$(pip) --upgrade --upgrade-strategy eager --no-build-isolation --editable '.[dev]'
	$(bin)/python -m pytest $(PYTEST) -m 'not timing'

test-oldest: VENV = .venv-oldest
test-oldest:
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python .ci/oldest.py > $(VENV)/oldest.txt
	$(pip) --upgrade pip
	$(pip) --constraint $(VENV)/oldest.txt setuptools wheel torch
	$(pip) --constraint $(VENV)/oldest.txt --no-build-isolation --editable '.[dev]'
	$(bin)/python -m pytest $(PYTEST) -m 'not timing'

# SUITES = transformers, tokenizers, peft: all when empty.
test-peers: $(VENV)/.installed
	$(bin)/python tests/peers/run.py $(SUITES) -- $(PYTEST)

timing: $(VENV)/.installed
	$(bin)/python -m pytest -q -m timing

# converters/ and cli/ are installed inside rwkv_rev: types are checked in that arrangement, and with the architectures
# that the docs and tests would have pasted there.
lint: $(VENV)/.installed
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	rm -rf .lint
	mkdir -p .lint
	cp -r rwkv_rev .lint/rwkv_rev
	cp -r converters cli .lint/rwkv_rev/
	$(bin)/python tests/pasted.py .lint/rwkv_rev
	MYPYPATH=.lint $(bin)/mypy -p rwkv_rev

format: $(VENV)/.installed
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf build dist .lint demo-out .mypy_cache .pytest_cache .ruff_cache .hypothesis

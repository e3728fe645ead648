# `make demo` and `make test` each start from a bare python3, and install nothing twice: the
# releases in constraints.txt, which `make lock` renews.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo demo-full test test-newest test-oldest lock lint docs wheel bench frontier report
.PHONY: clean browser

PYTHON ?= python3
VENV ?= .venv
# Releases of everything; LOCK= takes the newest that pyproject.toml admits.
LOCK ?= -c constraints.txt
# Installed before anything that depends on it: a torch that the resolver picks may come with
# several GB of CUDA.
TORCH ?= torch==2.13.0
# The oldest that pyproject.toml admits.
OLDEST ?= torch==2.13.0 transformers==5.24.0
BENCH ?= step --out benchmarks/training_step.json
FRONTIER ?= all
REPORT ?= --help
TESTS ?=
# Test processes, a thread each. Each begins with half of the files in order (worksteal), so that what
# the tests of a file share is made once.
WORKERS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --no-input --disable-pip-version-check
# Tests and demo need no network, and no display for matplotlib.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export MPLBACKEND := Agg
# Tests start many processes: each would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.demo  ## train four small networks on text, time the sparse one, show a page
	$(PY) -m actsparse.cli.main demo

demo-full: $(VENV)/.demo  ## the same with all controls and five paired seeds, into benchmarks/frontier
	$(PY) -m actsparse.cli.main frontier demo --out benchmarks/frontier

test: $(VENV)/.dev browser  ## ruff, mypy, pytest with doctests; TESTS="-m slow" and the like
	@status=0; \
	$(MAKE) --no-print-directory lint || { status=1; lint="ruff or mypy failed, see above"; }; \
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(TESTS) || status=1; \
	[ -z "$$lint" ] || echo "$$lint"; \
	exit $$status

test-newest:  ## the same on the newest releases within the bounds of pyproject.toml
	@$(MAKE) --no-print-directory test VENV=.venv-newest LOCK= TORCH=torch

test-oldest:  ## the same on the oldest torch and transformers
	@$(MAKE) --no-print-directory test VENV=.venv-oldest LOCK= TORCH="$(OLDEST)"

lock:  ## renew constraints.txt: the newest releases, with $(TORCH)
	rm -rf .venv-lock
	@$(MAKE) --no-print-directory .venv-lock/.docs VENV=.venv-lock LOCK=
	@{ echo "# Written by make lock: what make test and make demo install."; \
	  .venv-lock/bin/python -m pip list --format=freeze --exclude-editable --exclude pip \
	    --exclude setuptools --disable-pip-version-check | sed 's/+.*//'; } > constraints.txt

lint: $(VENV)/.dev  ## ruff and mypy alone
	@status=0; \
	$(PY) -m ruff check . || status=1; \
	$(PY) -m ruff format --check . || status=1; \
	$(PY) -m mypy || status=1; \
	exit $$status

docs: $(VENV)/.docs  ## the site, in site/; needs no network
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html"

# One for the platform: the kernels use torch's stable ABI, so torch's release does not matter.
wheel: $(VENV)/.dev  ## dist/*.whl with the compiled CPU kernels, for machines without a compiler
	@rm -rf build/kernels
	@$(PY) -m actsparse.kernels build/kernels
	@ACTSPARSE_COMPILED=$$(echo build/kernels/*.so) $(PY) -m hatchling build -t wheel

bench: $(VENV)/.demo  ## time a training step here; BENCH="..." passes arguments
	$(PY) -m actsparse.cli.main bench $(BENCH)

frontier: $(VENV)/.demo  ## train what is missing in benchmarks/frontier; FRONTIER="..." passes arguments
	$(PY) -m actsparse.cli.main frontier --out benchmarks/frontier $(FRONTIER)

report: $(VENV)/.demo  ## a page from records; REPORT="..." passes arguments
	$(PY) -m actsparse.cli.main report $(REPORT)

clean:  ## caches, build output and the environment; never runs/
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-lock build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find actsparse lab tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The usual venv; where Debian left out ensurepip, the pip that exists fills an empty one.
$(PY):
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(PY) install --quiet --disable-pip-version-check pip; }

$(VENV)/.demo: pyproject.toml lab/pyproject.toml constraints.txt | $(PY)
	@echo "installing $(TORCH), actsparse and actsparse-lab"
	@$(PIP) $(LOCK) $(TORCH)
	@$(PIP) $(LOCK) -e . -e lab
	-@$(PY) -m actsparse.kernels
	@touch $@

$(VENV)/.dev: pyproject.toml lab/pyproject.toml constraints.txt | $(PY)
	@echo "installing $(TORCH), actsparse[dev] and actsparse-lab"
	@$(PIP) $(LOCK) $(TORCH)
	@$(PIP) $(LOCK) -e ".[dev]" -e lab
	-@$(PY) -m actsparse.kernels
	@touch $(VENV)/.demo $@

$(VENV)/.docs: $(VENV)/.dev
	@echo "installing actsparse[docs]"
	@$(PIP) $(LOCK) -e ".[docs]"
	@touch $@

# The report's page is tested in a browser where there is one. Not fatal here:
# with CI=true the test itself insists.
browser:
	@command -v chromium >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && [ -f /etc/debian_version ] && echo "installing chromium" && \
	  export DEBIAN_FRONTEND=noninteractive && \
	  apt-get update -qq </dev/null >/dev/null 2>&1 && \
	  apt-get install -qq -y --no-install-recommends chromium </dev/null >/dev/null 2>&1; \
	} || echo "no chromium: the report's browser tests cannot run here"

# The kernels built and tested under AddressSanitizer and UndefinedBehaviorSanitizer. The libraries
# come first in the process, and the build before them. Memory that nobody wrote is NaN.
.PHONY: sanitize
SOAK ?= 120
SANITIZED := hostile_calls soak products row_norms screen masks exactness mlp threshold cut_blocks at_once

sanitize: $(VENV)/.dev  ## kernel tests and a soak under ASan and UBSan (g++); SOAK=120 seconds
	@export ACTSPARSE_SANITIZE=1 ACTSPARSE_SOAK=$(SOAK) OMP_WAIT_POLICY=passive; \
	export ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255; \
	export UBSAN_OPTIONS=print_stacktrace=1 CXX=g++; \
	$(PY) -c "from actsparse.kernels.build import build; build()" && \
	LD_PRELOAD="$$(for lib in asan ubsan stdc++; do g++ -print-file-name=lib$$lib.so; done | xargs)" \
	$(PY) -m pytest --capture=sys $(SANITIZED:%=tests/kernels/test_%.py)

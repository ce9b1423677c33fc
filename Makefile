# `make help` lists the targets. Everything runs in ./.venv, made on first use.

FAMILY  ?= mixtral# of `make demo`: mixtral or deepseek
PYTHON  ?= python3# makes .venv; 3.11 or newer
BENCH   ?= $(sort $(filter-out %/synthetic.py %/peer_reap.py %/workers.py benchmarks/quality_% benchmarks/cost_%,$(wildcard benchmarks/[a-z]*.py)))# the scripts of `make bench`
TINY    ?= runs# where `make tiny` writes; moesurgeon/builtin replaces the ones that are shipped
V       ?=# V=1 shows what pip does
PIP_FLAGS   ?=# more for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=# more for pytest, such as -x or tests/surgery
WORKERS ?= 2# processes of `make test`; each takes one thread and up to 2 GB

BIN  := .venv/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check $(if $(V),,-q) install $(PIP_FLAGS) -c constraints.txt
USER_ENV := .venv/.installed
DEV_ENV  := .venv/.installed-dev
SIZE := downloads 0.4 GB the first time, or about 3 GB where pip takes torch with CUDA; V=1 shows more

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # one pip at a time in .venv
.PHONY: help demo test check docs bench tiny clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(USER_ENV)  ## top-1, profile, prune and heal a builtin checkpoint (FAMILY=mixtral or deepseek)
	@test -f recipes/demo-$(FAMILY).yaml || { echo "make: FAMILY=$(FAMILY) has no demo; take mixtral or deepseek" >&2; exit 2; }
	$(BIN)/moesurgeon run recipes/demo-$(FAMILY).yaml --overwrite -o runs/demo-$(FAMILY)

test: $(DEV_ENV)  ## all tests, offline (PYTEST_ARGS="-x tests/surgery")
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

check: $(DEV_ENV)  ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(USER_ENV)  ## write docs/cli.md from the command line's own help
	$(BIN)/python -m moesurgeon.cli.reference > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

bench: $(USER_ENV)  ## every benchmark (BENCH=benchmarks/one.py)
	@for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script || exit; done

tiny: $(USER_ENV)  ## retrain both builtin checkpoints into runs/ (45 minutes on one core each)
	$(BIN)/python recipes/tiny/train.py recipes/tiny/mixtral.yaml $(TINY)/tiny-mixtral
	$(BIN)/python recipes/tiny/train.py recipes/tiny/deepseek.yaml $(TINY)/tiny-deepseek

clean:  ## remove .venv, caches and build output; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that is there and works is kept: it may hold a torch that was chosen for this machine.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is missing or older than 3.11; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make virtual environments; install venv for it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@touch $@

$(USER_ENV): pyproject.toml constraints.txt | .venv/.made
	@echo "setting up .venv ($(SIZE))" >&2
	@$(PIP) -e .
	@touch $@

$(DEV_ENV): pyproject.toml constraints.txt | .venv/.made
	@echo "setting up .venv for development ($(SIZE))" >&2
	@$(PIP) -e '.[dev]'
	@touch $(USER_ENV) $@

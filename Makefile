# Every check in a word; `make` alone lists the words.
#
#   make test PYTHON=python3.12 VENV=.nox/py312      another Python, in a folder of its own

VENV = .venv
BIN = $(VENV)/bin
PIP = "$(BIN)/python" -m pip --disable-pip-version-check --no-input
NOX = PATH="$$(cd "$(BIN)" && pwd):$$PATH" "$(BIN)/nox" --non-interactive

export PYTHON

.DELETE_ON_ERROR:
.DEFAULT_GOAL = help
.PHONY: help venv same-python train omni demo-parity bench-peer test quick chaos lint types site package clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s%s\n", $$1, $$2 }' Makefile

venv: $(VENV)/.installed ## Install everything into .venv; a second time installs nothing.

$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --requirement requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PIP) check
	@touch "$@"

# The python3 of the PATH comes first if it is recent enough: it is the one whose wheels are likely at hand.
# ensurepip is asked for because some systems ship a Python that cannot make a virtual environment.
$(VENV)/bin/python: | same-python
	@if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; \
	else set -- python3 python3.13 python3.12 python3.11; fi; \
	for python do \
	  if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Installing requirements.lock into $(VENV) with $$("$$python" --version): a minute or more."; \
	    exec "$$python" -m venv "$(VENV)"; \
	  fi; \
	done; \
	echo "make: no Python >= 3.11 with venv among: $$*." \
	  "Install one (on Debian also its -venv package), or name it: make venv PYTHON=/path/to/python3" >&2; \
	exit 1

# An environment keeps the Python that it was made with; to ask for another one is an error, not a mixture.
same-python:
	@if [ -n "$$PYTHON" ] && [ -x "$(BIN)/python" ]; then \
	  version='import sys; print("%d.%d" % sys.version_info[:2])'; \
	  wanted=$$("$$PYTHON" -c "$$version") && found=$$("$(BIN)/python" -c "$$version") || exit 1; \
	  if [ "$$wanted" != "$$found" ]; then \
	    echo "make: $(VENV) holds Python $$found, but PYTHON=$$PYTHON is $$wanted." \
	      "Name another folder (VENV=.nox/py$$wanted), or 'make clean' first." >&2; \
	    exit 1; \
	  fi; \
	fi

train: venv ## Train the example: real images, on CPU.
	"$(BIN)/mimogrid" train examples/digits/job.toml

omni: venv ## Train the example that sees, hears, answers and draws, on CPU.
	PATH="$(BIN):$$PATH" examples/omni/run.sh

demo-parity: venv ## Show the exactness of gradients to a sceptic: ours, and means, beside one process.
	"$(BIN)/python" benchmarks/demo_parity.py

bench-peer: venv ## Time megatron-core's MimoModel and schedule beside ours; minutes.
	$(NOX) --session bench-peer

test: venv ## Run every test that needs no GPU: the core's where there is no torch, then all others.
	$(NOX) --session core shell

quick: venv ## Run the core's tests with fewer draws, and one world: half a minute.
	$(NOX) --session quick

chaos: venv ## Let nodes of a run come and go at random: 30 minutes, or MINUTES=5; what happens is drawn by SEED=N.
	PYTHONPATH=tests/support "$(BIN)/python" tests/long/chaos.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

lint: venv ## Check format, style, spelling and layers.
	$(NOX) --session lint

types: venv ## Check types: mypy on the package, pyright on the core.
	$(NOX) --session types

site: venv ## Build the documentation as a site, in build/site; a dead link is an error.
	$(NOX) --session site

package: venv ## Build sdist and wheel, and try the wheel away from the checkout.
	$(NOX) --session package

clean: ## Remove what the targets made; runs/ stays.
	rm -rf "$(VENV)" .nox .hypothesis .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache \
	  .import_linter_cache dist build
	find core shell adapters src tests -name __pycache__ -type d -prune -exec rm -rf {} +

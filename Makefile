# Every target does its own set-up; a machine needs Python >= 3.11, pip and make.
#   PYTHON=python3.12           another interpreter to create .venv from
#   TORCH_INDEX=https://...     another package index for PyTorch (a CPU or a CUDA build)
#   ARGS='--seed 1'             further arguments for the command that a target runs

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help demo test notebook docs bench lint cuda-check setup clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BASE)  ## train a few small models and show how far each generalises
	@$(RUN) looped reproduce demo --scale laptop $(ARGS)

test: $(DEV)  ## everything that continuous integration runs
	@$(RUN) bash tests/run.sh $(ARGS)

notebook: $(DEV)  ## open the notebooks in JupyterLab
	@$(RUN) python -m jupyterlab nbs $(ARGS)

docs: $(DEV)  ## build the website with Quarto; without Quarto, check its pages
	@export $(RUN); if command -v quarto > /dev/null; then nbdev_docs && python -m looped_nbs.tools.docs --readme; else \
	  echo 'Quarto is not installed (https://quarto.org), so no website: checking plain pages into _site_check.'; \
	  python -m looped_nbs.tools.docs --out _site_check $(ARGS); fi

bench: $(BASE)  ## time the operators, the tasks and the training loop on this machine
	@$(RUN) looped bench ops $(ARGS)
	@$(RUN) looped bench tasks $(ARGS)
	@$(RUN) looped bench train $(ARGS)

lint: $(DEV)  ## ruff
	@$(RUN) python -m ruff check looped_nbs tests setup.py $(ARGS)

cuda-check: $(BASE)  ## compile the CUDA sources; needs nvcc and no GPU
	@$(RUN) python -m looped_nbs.tools.doctor $(ARGS)

setup: $(DEV)  ## create .venv with everything for development

clean:  ## remove .venv and everything built, but no runs
	rm -rf $(VENV) _docs _proc _site_check build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# A PyTorch >= 2.4 of the base interpreter is kept: the environment then sees the packages of that interpreter.
# Some systems ship Python without ensurepip: then the pip of the base interpreter puts one into the environment.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"looped_nbs needs Python >= 3.11, this is {v[0]}.{v[1]}; try: make PYTHON=python3.11")'
	@if $(PYTHON) -c 'from importlib.metadata import version; import sys; \
	  sys.exit(tuple(map(int, version("torch").split(".")[:2])) < (2, 4))' 2> /dev/null; then \
	  echo 'creating $(VENV), keeping the installed PyTorch'; site=--system-site-packages; \
	  else echo 'creating $(VENV)'; site=; fi; \
	  $(PYTHON) -m venv $$site $(VENV) > /dev/null || { $(PYTHON) -m venv --clear --without-pip $$site $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check install --quiet pip; }
	@touch $@

# PyTorch comes first and by itself, so that TORCH_INDEX holds for it alone.
$(BASE): settings.ini setup.py constraints.txt | $(VENV)/.created
	@if grep -q 'include-system-site-packages = true' $(VENV)/pyvenv.cfg; \
	  then grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	  else cp constraints.txt $(VENV)/constraints.txt; echo 'installing PyTorch'; \
	  $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt); fi
	@echo 'installing looped_nbs'
	@$(PIP) -c $(VENV)/constraints.txt -e .
	@touch $@

$(DEV): $(BASE)
	@echo 'installing the tools for development'
	@$(PIP) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

# `make demo` and `make test` are all a newcomer needs. Both work in .venv, made on first use.

# The first Python that runs; a pyenv shim may exist and not run. Or: make demo PYTHON=/path/to/python
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13,$(if $(shell $(p) --version 2>/dev/null),$(p))))
BIN := .venv/bin
# Written last, so that an installation that was cut off is made again.
STAMP := .venv/.installed
# Where Debian's wordnet-base and dict-jargon install what `make tiny` reads.
WORDNET ?= /usr/share/wordnet
JARGON ?= /usr/share/dictd/jargon.index

.PHONY: help demo test tiny lint format docs clean

help:
	@echo "make demo   install into .venv, then train, compose and evaluate on the data that ships"
	@echo "make test   install into .venv, then run the test suite"
	@echo "make lint   ruff and pyright"
	@echo "make format let ruff rewrite what it can"
	@echo "make docs   write docs/cli.md from the command line's own help, docs/recipes.md from the recipes' fields"
	@echo "make tiny   make what ships as adapters/tiny again, base and all: up to two hours (WORDNET=folder JARGON=file)"
	@echo "make clean  remove .venv and what tools left behind"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found: install one, or give PYTHON=/path/to/python" >&2; exit 1; }
	@echo "installing into .venv (torch is large: some minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/lora-lexicon demo

# Two processes of one thread each: the models are too small to share a matrix product.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m typer lora_lexicon.cli.main utils docs --name lora-lexicon --output docs/cli.md
	$(BIN)/python docs/recipes.py > docs/recipes.md

tiny: $(STAMP)
	WORDNET=$(WORDNET) JARGON=$(JARGON) LEXICON=$(BIN)/lora-lexicon bash configs/tiny/make.sh

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

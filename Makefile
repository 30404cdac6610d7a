# Two commands do all their own set-up:  make demo   and   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test check nbs pytest docs clean

$(VENV)/.ready: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready  ## the main job on the toy data set: train, evaluate, predict, a picture and a report
	$(BIN)/visdet demo --out demo

test: check nbs pytest  ## everything that must hold

check: $(VENV)/.ready  ## notebooks clean, in sync, within the laws of the house
	$(BIN)/python tools/check_sync.py
	$(BIN)/python tools/check_notebooks.py

nbs: $(VENV)/.ready  ## every notebook, top to bottom
	MPLBACKEND=agg OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(WORKERS)

pytest: $(VENV)/.ready  ## what a notebook cannot hold
	MPLBACKEND=agg $(BIN)/python -m pytest tests

docs: $(VENV)/.ready  ## the site, into _docs (needs Quarto)
	$(BIN)/nbdev-docs

clean:
	rm -rf $(VENV) demo _docs _proc build dist *.egg-info

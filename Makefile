# Two commands do all their own set-up:  make demo   and   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test check nbs pytest parity coverage kernels editor readme docs clean

$(VENV)/.ready: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready  ## the main job on the toy data set: train, evaluate, predict, a picture and a report
	$(BIN)/visdet demo --out demo

test: check nbs pytest parity kernels  ## everything that must hold, without compiled kernels and with them

check: $(VENV)/.ready  ## notebooks clean, in sync, within the laws of the house
	$(BIN)/python tools/check_sync.py
	$(BIN)/python tools/check_notebooks.py
	$(BIN)/python tools/readme.py --check

nbs: $(VENV)/.ready  ## every notebook, top to bottom
	VISDET_KERNELS=off MPLBACKEND=agg OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(WORKERS)

pytest: $(VENV)/.ready  ## what a notebook cannot hold
	VISDET_KERNELS=off MPLBACKEND=agg $(BIN)/python -m pytest tests --junitxml build/pytest.xml

# Where recorded figures and real data are, every claim of the ledger must have been proved; elsewhere the tests that need them are skipped, and the report counts what is not proved
FIGURES := $(and $(wildcard $(or $(VISDET_GOLDEN),../shared/mmdet/golden)),$(wildcard $(or $(VISDET_DATA),../shared/data)))
parity: $(VENV)/.ready  ## the parity ledger against the results of `make pytest`
	$(BIN)/visdet dev parity --results build/pytest.xml $(if $(FIGURES),,--allow-skipped "set VISDET_")

AGAINST ?= $(or $(VISDET_AGAINST),main)
coverage: $(VENV)/.ready  ## which changed statements ran in tests (VISDET_COVERAGE=build/coverage make pytest) and notebooks; a report, no judgement
	VISDET_KERNELS=off MPLBACKEND=agg OMP_NUM_THREADS=1 $(BIN)/visdet dev coverage --against $(AGAINST) --data build/coverage --notebooks

kernels: export VISDET_KERNELS = $(CURDIR)/.kernels
kernels: $(VENV)/.ready  ## compile the kernels where there is a compiler, and test what uses them
	@if ! command -v g++ >/dev/null; then echo "no g++: kernels are neither built nor tested"; exit 0; fi; set -e; \
	$(BIN)/visdet kernels build; $(BIN)/visdet kernels; \
	MPLBACKEND=agg OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(WORKERS) nbs/cv; \
	MPLBACKEND=agg $(BIN)/python -m pytest tests/test_op_*.py tests/test_torchvision_parity.py

.tools/.ready: tools/yaml_server/package.json tools/yaml_server/package-lock.json
	@mkdir -p .tools; cp tools/yaml_server/package*.json .tools/
	npm ci --prefix .tools --ignore-scripts --no-audit --no-fund
	@touch $@

editor: .tools/.ready  ## the YAML language server that editors run (needs npm); tests that talk to it are skipped without it

readme:  ## README.md from nbs/index.ipynb
	$(PYTHON) tools/readme.py

docs: $(VENV)/.ready  ## the site, into _docs (needs Quarto)
	$(BIN)/nbdev-docs

clean:
	rm -rf $(VENV) .kernels .tools demo _docs _proc build dist *.egg-info

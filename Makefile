# Each target makes .venv and installs into it when pyproject.toml or constraints.txt changed; otherwise it starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: help train test soak bench bench-guard gpu-report docs notebook kernel-hub lint format picture clean

help:
	@echo "make train    train the default autoencoder on bundled photographs; ARGS=... is passed on"
	@echo "make test     run the tests"
	@echo "make soak     inject every fault many times; the figures go to benchmarks/results/soak.json"
	@echo "make bench    run the micro-benchmarks"
	@echo "make bench-guard  fail if an operation got slower against eager torch; ARGS=--update sets the limits anew"
	@echo "make gpu-report   correctness and speed on this machine's GPU, into benchmarks/results"
	@echo "make docs     the documentation as a site, in site/; a broken link fails"
	@echo "make notebook run examples/*.ipynb and keep what they print and draw"
	@echo "make kernel-hub  kernels/ as a repository of Hugging Face's kernel hub, in dist/kernel-hub/"
	@echo "make lint     ruff and pyright"
	@echo "make format   let ruff rewrite the layout"
	@echo "make picture  train photos and photos-long, redraw the README's picture and table"
	@echo "make clean    remove .venv and caches"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "Python 3.11 to 3.13 is needed, $(PYTHON) is " + sys.version.split()[0] + "; choose one with PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(STAMP)
	$(BIN)/python -m train.vae --compile $(ARGS)

# Two processes of one thread each, for two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/reliability --soak benchmarks/results/soak.json $(ARGS)
	$(BIN)/python docs/make_reliability.py

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

bench-guard: $(STAMP)
	$(BIN)/python benchmarks/guard.py $(ARGS)

gpu-report: $(STAMP)
	$(BIN)/python benchmarks/gpu_report.py $(ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "site/index.html"

notebook: $(STAMP)
	$(BIN)/python docs/make_notebook.py

kernel-hub: $(STAMP)
	$(BIN)/python docs/kernel_hub.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

picture: $(STAMP)
	$(BIN)/python -m train.vae --preset photos --name photos --resume auto
	$(BIN)/python -m train.vae --preset photos-long --name photos-long --resume auto
	$(BIN)/python docs/make_picture.py runs/photos runs/photos-long

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .benchmarks *.egg-info build dist site

# make quickstart   train a small detector from scratch and look at its detections
# make test         run all tests but the long trials
# make trials       run the long failure trials; ONLY=name chooses, SCALE=0.1 takes a tenth of the random ones
# make docs         write the API pages to docs/api
# make lint         what a commit must pass
# Each installs what it needs into .venv: the packages of requirements.lock, by hash, and for tests those of
# constraints.txt.
# Another Python: make PYTHON=python3.12 quickstart

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
ONLY ?=

.PHONY: quickstart test trials lint docs clean

quickstart: .venv/installed
	$(BIN)/python -m yolos_jax.tools.make_shapes runs/shapes
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/python eval.py --weights=$(RUN) --data=runs/shapes --output=$(RUN)/eval --report
	$(BIN)/python predict.py --weights=$(RUN) --output=$(RUN)/pictures --threshold=0.7 --overwrite \
		runs/shapes/val2017/00000000001?.jpg
	@echo "Curves: $(RUN)/curves.png  Detections: $(RUN)/pictures/  Report: $(RUN)/eval/report.html"

# a file's tests in one process: what they share is made and compiled once; and the hundred processes that they
# start do not compile the package's Python anew
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

trials: .venv/installed-test
	$(BIN)/python -m pytest -n 2 -m 'trials or row' -k '$(ONLY)'

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/installed-test
	$(BIN)/python docs/api.py docs/api

clean:
	rm -rf .venv .cache build docs/api *.egg-info

.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit('error: yolos_jax needs Python 3.11 or later; run make PYTHON=python3.12 ...' \
		if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml requirements.lock
	$(BIN)/python -m pip install -q --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@

# timm without its dependencies: its augmentation, which ours must equal, needs no torchvision
.venv/installed-test: .venv/installed constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt timm
	@touch $@

# make demo   cache, train, evaluate and report on the built-in data set
# make test   lint and every test
# make bench  speed and memory, each beside a textbook baseline
# Each sets up .venv by itself.

PYTHON ?= python3
PY = .venv/bin/python
METHODS = $(basename $(notdir $(wildcard configs/methods/*.yaml)))
CACHE = embeddings/shapes/shapes-tiny/val/meta.json
RESULTS = $(METHODS:%=results/shapes/shapes-tiny/%/seed0/shapes-retrieval.json)

.PHONY: demo test lint bench
.SECONDARY:

demo: $(RESULTS)
	$(PY) report.py --dataset shapes

results/shapes/shapes-tiny/%/seed0/shapes-retrieval.json: checkpoints/shapes/shapes-tiny/%/seed0/adaptor.pt
	$(PY) eval.py --dataset shapes --method $* --score both --quiet

checkpoints/shapes/shapes-tiny/%/seed0/adaptor.pt: configs/methods/%.yaml $(CACHE)
	$(PY) train.py --dataset shapes --method $* --overwrite
	touch $@

$(CACHE): $(wildcard configs/backbones/shapes-tiny.*) configs/datasets/shapes.yaml datasets/shapes.py datasets/embeddings.py | .venv/demo
	$(PY) cache_embeddings.py --dataset shapes --overwrite
	touch $@

test: lint
	$(PY) -m pytest

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/dev
	$(PY) -m benchmarks.run
	$(PY) -m benchmarks.caching
	$(PY) -m benchmarks.caching --precision bfloat16

.venv/demo: requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/demo requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

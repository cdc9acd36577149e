# One place for the commands; each target makes what it needs. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DIGITS := shards/data/digits/_info.json
MODEL ?=
DEMO = runs/demo$(if $(MODEL),-$(MODEL))

STUDY = $(shell $(BIN)/python -m launch.matrix.kconfig name)
CHOSEN = .config $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(ONLY),--only '$(ONLY)')
MATRIX = $(BIN)/python -m launch.matrix $(CHOSEN)
BOUNDS = runs/bounds
WINDOW = runs/gpu-window
WINDOW_MIB = 60
MAX_SHORT ?= 144
QUALITY ?= 80
WHEELS = simplejpeg
# Two files at a time, a thread each. In their order: ranks are forked before autograd has threads.
PYTEST = -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo demo-report menuconfig list-defconfigs savedefconfig test-matrix test-matrix-dry-run continue estimate \
  test-rerun summary test test-long test-bounds chaos gpu-window lint clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/.installed $(DIGITS)  ## .venv, requirements and the digit shards

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed; install it or call make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(DIGITS): shards/digits.py shards/writer.py toolkit/data/index.py | .venv/.installed
	$(BIN)/python -m shards.digits --out $(@D)
	@touch $@

demo: setup  ## the demo matrix on two CPU ranks -> runs/demo/report/ (MODEL=resnet50 for the study's model)
	$(BIN)/python -m launch.matrix launch/defconfigs/demo $(if $(MODEL),--model $(MODEL) --out $(DEMO))
	$(BIN)/python -m launch.report $(DEMO) --out $(DEMO)/report

demo-report: demo  ## the demo's report that is kept in the repository -> results/demo/
	$(BIN)/python -m launch.report runs/demo --out results/demo

menuconfig: setup  ## choose models, optimizers, pruning, sparsities, seeds -> .config
	$(BIN)/python -m launch.matrix.kconfig menuconfig

defconfig-%: setup
	$(BIN)/python -m launch.matrix.kconfig defconfig $*

list-defconfigs: setup  ## ready choices; make defconfig-<name> takes one
	@$(BIN)/python -m launch.matrix.kconfig list-defconfigs

savedefconfig: setup  ## .config -> ./defconfig, only what differs from the menu's defaults
	$(BIN)/python -m launch.matrix.kconfig savedefconfig

.config:
	@echo "make: there is no .config yet; make menuconfig, or make defconfig-<name> (make list-defconfigs)"; exit 1

test-matrix continue: .config setup  ## run what .config says; continue: the same, after a stop (EPOCHS=n ONLY='*adamw*')
	$(MATRIX)

test-matrix-dry-run: .config setup  ## print each run as one command
	@$(MATRIX) --dry-run

estimate: .config setup  ## time and memory of each run ahead
	$(BIN)/python -m launch.estimate $(CHOSEN)

test-rerun: .config setup  ## run again what failed
	$(MATRIX) --failed

summary: .config setup  ## runs/<name>/ -> results/<name>/report.html, report.md, tables and pictures
	$(BIN)/python -m launch.report runs/$(or $(STUDY),$(error .config cannot be read)) --out results/$(STUDY)

test: setup .venv/.installed-dev  ## all tests (GPU tests are skipped where there is none)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-long: setup .venv/.installed-dev  ## all of make test, and the full products of engines, methods and ranks
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "long or not long"

test-bounds:  ## make test with the lowest and the newest versions that requirements.txt allows (half an hour, 12 GB)
	mkdir -p $(BOUNDS)
	sed -E 's/>=([0-9.]+)[^#]*/==\1 /' requirements.txt > $(BOUNDS)/lowest.txt
	cp requirements.txt $(BOUNDS)/newest.txt
	failed=; for end in lowest newest; do \
	  $(PYTHON) -m venv $(BOUNDS)/$$end || exit 1; \
	  $(BOUNDS)/$$end/bin/pip install -q --upgrade -c $(BOUNDS)/$$end.txt -r requirements-dev.txt || exit 1; \
	  OMP_NUM_THREADS=1 $(BOUNDS)/$$end/bin/python $(PYTEST) || failed="$$failed $$end"; \
	done; test -z "$$failed" || { echo "make: tests fail with the versions:$$failed"; exit 1; }

chaos: setup  ## kill ranks of real runs 20 times, try nine other faults -> results/chaos.md (20 minutes)
	rm -rf runs/chaos
	$(BIN)/python -m launch.chaos --trials 20 --out results

gpu-window: setup  ## pack HEAD, DATA=<photographs>, wheels for a GPU lent for minutes (MAX_SHORT=144 QUALITY=80)
	rm -rf $(WINDOW) $(WINDOW).data
	mkdir -p $(WINDOW)/wheels
	git rev-parse HEAD > $(WINDOW)/commit
	git archive -o $(WINDOW)/code.tar.gz HEAD
	cp launch/gpu_check/window.sh $(WINDOW)
	$(BIN)/python -m shards.imagenet --partial --source $(or $(DATA),$(dir $(DIGITS))) --out $(WINDOW).data/photos --name photos \
	  --train-shards 8 --validation-shards 4 --max-short $(MAX_SHORT) --quality $(QUALITY)
	tar -C $(WINDOW).data -cJf $(WINDOW)/data.tar.xz photos
	$(BIN)/pip download -q --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
	  --platform manylinux_2_17_x86_64 -d $(WINDOW)/wheels $(WHEELS) || echo "make: no wheels; the window does without"
	@size=$$(du -sm $(WINDOW) | cut -f1); test $$size -lt $(WINDOW_MIB) || \
	  { echo "make: $(WINDOW) has $$size MiB, more than $(WINDOW_MIB); give a smaller MAX_SHORT or QUALITY"; exit 1; }; \
	  echo "$(WINDOW) has $$size MiB. Take it to the GPU's machine; there: sh $(WINDOW)/window.sh OUT 9"

lint: .venv/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## forget caches, runs and shards; .venv stays
	rm -rf runs shards/data build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Every target works on a fresh clone: it makes .venv and installs into it when needed, once.

PROFILE  ?= smoke
PROTOCOL ?=
DATA     ?=
JOBS     ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
PYTHON   ?= python3
UV       ?= $(shell command -v uv 2>/dev/null)

VENV      := .venv
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FAIRSEQ   := $(VENV)/.fairseq
EXPERIMENTS := $(filter-out claims,$(sort $(basename $(notdir $(wildcard experiments/*.yaml)))))

ifeq ($(filter smoke short short-gpu paper,$(PROFILE)),)
$(error PROFILE=$(PROFILE) is not known; choose PROFILE=smoke, PROFILE=short, PROFILE=short-gpu (table2) or PROFILE=paper)
endif

# slow networks: wait longer and try again, unless the user has said otherwise
export PIP_DEFAULT_TIMEOUT ?= 60
export PIP_RETRIES ?= 10
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export UV_HTTP_TIMEOUT ?= 120
# uv does not read pip's variable, and leaves byte code to be compiled at every start where writing it is switched off
export UV_COMPILE_BYTECODE ?= 1
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

SWEEP_OPTIONS = --profile $(PROFILE) $(if $(PROTOCOL),--protocol $(PROTOCOL)) $(if $(DATA),--data '$(DATA)') --jobs $(JOBS)
# a failed run does not keep the others' report from being drawn, but it is not forgotten either
define train_and_report
	@status=0; \
	$(BIN)/fwp sweep $(1) $(SWEEP_OPTIONS) || status=$$?; \
	$(BIN)/python -m reports $(1) || status=$$?; \
	exit $$status
endef

FAIRSEQ_LOG := $(VENV)/fairseq.log
NO_FAIRSEQ = echo "fairseq was not installed; it needs a C++ compiler and Python's headers (what pip said: $(FAIRSEQ_LOG))." \
  "Everything but the translation experiments works without it." >&2

# one sweep at a time also under `make -j`: a sweep runs JOBS processes of its own
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup test test-faults test-slurm test-server test-browser lint smoke data-wikitext2 data-wikitext103 data-wmt14 reproduce report verify status ui bench bench-gpu

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '%s\n' '' 'Options: PROFILE=smoke|short|short-gpu|paper (smoke)  PROTOCOL=released|corrected (what the experiment file names)' \
	  '         DATA=dir with train/valid/test.txt, or .en and .de, plain or gzipped (what was downloaded)  JOBS=n processes ($(JOBS) here)' \
	  '         PYTHON=python3.11 or newer, used when .venv is made' \
	  'Experiments: $(EXPERIMENTS)'

setup: $(INSTALLED) $(FAIRSEQ) ## make .venv and install the package with its tools and fairseq

test: lint $(FAIRSEQ) ## lint, then the tests, a file of them at a time in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: $(INSTALLED) ## kill sweeps, lock and fill the store, and count what was lost (nothing may be)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults -q

test-slurm: $(INSTALLED) ## start a SLURM of one node, preempt, fail and cancel jobs of a sweep; tests/slurm/cluster install, once
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm -q

test-server: $(INSTALLED) ## eight processes against an MLflow server with PostgreSQL that goes away and comes back
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m server -q

test-browser: $(INSTALLED) ## look at the runs in `mlflow ui` and at the report in Chromium; SCREENSHOTS=folder keeps the pictures
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -q

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: $(INSTALLED) ## does it work here? list the backends, train one small experiment, draw it
	$(BIN)/fwp list
	$(call train_and_report,figure4)

data-wikitext2: $(INSTALLED) ## fetch WikiText-2 (7 MB) into data/
	$(BIN)/fwp download wikitext-2

data-wikitext103: $(INSTALLED) ## fetch WikiText-103 (313 MB) into data/
	$(BIN)/fwp download wikitext-103

data-wmt14: $(INSTALLED) ## fetch WMT14 English-German (818 MB) into data/
	$(BIN)/fwp download wmt14

reproduce: $(INSTALLED) $(FAIRSEQ) ## train every experiment (what is complete is skipped), then draw all reports
	$(call train_and_report,$(EXPERIMENTS))

.SECONDEXPANSION:
reproduce-%: $(INSTALLED) $$(if $$(filter table1,$$*),$(FAIRSEQ)) ## the same for one experiment, as in `make reproduce-figure2`
	$(call train_and_report,$*)

report: $(INSTALLED) ## draw all reports from results/*.csv, without training
	$(BIN)/python -m reports

report-%: $(INSTALLED) ## the same for one experiment, as in `make report-figure2`
	$(BIN)/python -m reports $*

verify: $(INSTALLED) ## check results/*.csv and all reports against the experiment files and each other
	$(BIN)/fwp verify

status: $(INSTALLED) ## which runs are complete, running, failed or missing
	$(BIN)/fwp status

ui: $(INSTALLED) ## browse the runs with MLflow on http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
	  $(BIN)/mlflow ui --workers 1 --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1

bench: $(INSTALLED) ## measure the memories and the retrieval task on this CPU into results/benchmarks/, draw it
	$(BIN)/fwp bench --peers
	$(BIN)/python -m reports bench

bench-gpu: $(INSTALLED) ## the same on a GPU, as far as it runs there
	$(BIN)/fwp bench --device cuda
	$(BIN)/python -m reports bench

# the stamp is made last: an install that broke off is taken up again by the next target
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, but PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo 'not there');" \
	       "name another, as in: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	$(PYTHON) -m venv $(VENV)
ifneq ($(UV),)
	$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev,mt]'
else
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,mt]'
endif
	@touch $@

# fairseq's own pins (hydra-core 1.0, omegaconf 2.0) are refused by pip >= 24.1 and break pytest and Lightning on Python
# 3.11: it is installed without them, beside newer ones. It is built from source, with the versions in constraints.txt.
# Everything else works without it, so that a machine on which it cannot be built is told so and goes on; no stamp is
# made then, and the next target tries again.
$(FAIRSEQ): fairseq.txt $(INSTALLED)
	@echo "Building fairseq for the translation experiments (a minute or two, once) ..."
ifneq ($(UV),)
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --build-constraints constraints.txt -r fairseq.txt \
	  > $(FAIRSEQ_LOG) 2>&1 && touch $@ || $(NO_FAIRSEQ)
else
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	  $(BIN)/python -m pip install --quiet --no-deps -r fairseq.txt > $(FAIRSEQ_LOG) 2>&1 && touch $@ || $(NO_FAIRSEQ)
endif

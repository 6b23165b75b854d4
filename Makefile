# make             install the base into .venv, then build everything from the shipped records
# make test        install torch, diffusers and the test tools too, then run the whole suite
# make coverage    the same, and fail below 85 % of the package's lines; takes longer
# make test-slurm  run the workflow on a SLURM of its own (root, and Debian's slurmctld slurmd slurm-client munge)
# make lint        ruff, snakefmt, snakemake --lint and mypy
# make wheelhouse  gather wheelhouse/ for a GPU host without internet (WHEELHOUSE_PYTHON, WHEELHOUSE_WITHOUT)
# make install     only install the base
#
# PYTHON=... names the interpreter to make .venv from; CORES=... how many cores to use.

CORES ?= all
WHEELHOUSE_PYTHON ?= 3.12
WHEELHOUSE_WITHOUT ?=

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint envs/lock.txt
# --no-compile saves 150 MB and half a minute: what is used is compiled at first use, if that may be kept.
unexport PYTHONDONTWRITEBYTECODE
# Rules call t2v-energy and papermill by name.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"
SUITE := python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := all
.PHONY: all install test coverage test-slurm lint wheelhouse
.DELETE_ON_ERROR:

all: .venv/base.stamp
	$(IN_VENV) snakemake --cores $(CORES)

install: .venv/base.stamp

test: .venv/test.stamp
	$(IN_VENV) $(SUITE)

coverage: .venv/test.stamp
	$(IN_VENV) $(SUITE) --cov --cov-fail-under 85

test-slurm: .venv/slurm.stamp
	$(IN_VENV) python -m pytest --numprocesses 3 tests/slurm

lint: .venv/test.stamp
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) snakefmt --check Snakefile workflow
	$(IN_VENV) snakemake --lint
	$(IN_VENV) mypy

wheelhouse: .venv/base.stamp
	.venv/bin/python envs/make_wheelhouse.py --python $(WHEELHOUSE_PYTHON) --without $(WHEELHOUSE_WITHOUT)

.venv/created.stamp:
	@test -n "$(PYTHON)" || { \
		echo "t2v-energy needs Python 3.11, 3.12 or 3.13, and there is none on the PATH." >&2; \
		echo "Install one (on Debian or Ubuntu: apt-get install python3.12 python3.12-venv)," >&2; \
		echo "or say where it is: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "t2v-energy needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) lacks the modules venv and ensurepip." >&2; \
		echo "On Debian or Ubuntu: apt-get install python3-venv (for a python3.N of its own: python3.N-venv)" >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/base.stamp: .venv/created.stamp pyproject.toml envs/lock.txt
	@echo "Installing into .venv (once; about a minute) ..."
	@$(PIP) --editable .
	@touch $@

# torch first and by its pin: asked for as one requirement of many, pip may begin with its newest release.
.venv/test.stamp: .venv/base.stamp
	@echo "Installing torch, diffusers and the test tools into .venv (once; some minutes) ..."
	@$(PIP) "$$(grep '^torch==' envs/lock.txt)"
	@$(PIP) --editable '.[test]'
	@touch $@

.venv/slurm.stamp: .venv/test.stamp
	@$(PIP) --editable '.[slurm,test]'
	@touch $@

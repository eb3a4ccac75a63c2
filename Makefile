# make quickstart | test | test-e2e | test-slurm | lint | bench | gpu-check
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

# $(call packages,NAMES): Debian packages where root may install; what an installation cut short left is finished first.
packages = test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null || \
	(export DEBIAN_FRONTEND=noninteractive; dpkg --configure -a > /dev/null 2>&1; apt-get update -qq && \
	apt-get -o DPkg::Lock::Timeout=300 install -qq -y $(1) > /dev/null)

.PHONY: quickstart test test-e2e test-slurm lint bench gpu-check clean

# One file per set of extras says that it is installed; a changed list of packages installs again.
$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[watch]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.run

quickstart: $(VENV)/.run
	$(BIN)/python -m stepline.trainer.quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not e2e and not gpu"

# A report is opened in a browser, which is installed where root may do so.
test-e2e: $(VENV)/.dev
	command -v chromium > /dev/null || $(call packages,chromium) || echo "chromium cannot be installed"
	$(BIN)/python -m pytest -q -n 2 -m "e2e and not slurm"

# A real SLURM, started by the tests; its packages are installed where root may do so.
test-slurm: $(VENV)/.dev
	command -v slurmctld > /dev/null || $(call packages,slurm-wlm munge)
	$(BIN)/python -m pytest -q -m slurm

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/data.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/cpu_step.py
	$(BIN)/python benchmarks/quickstart_quality.py

# GPU_CHECK=--quick: only the shapes that targets name, with a limit for each script
gpu-check: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu_check.py $(GPU_CHECK)

clean:
	rm -rf $(VENV) build *.egg-info

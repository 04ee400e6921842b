# Every target but gpu sets itself up: a virtual environment in .venv, updated only when the requirements change.
# Flags go through ARGS, for example: make train ARGS="--preset scratch --seeds 0 1 2"

PYTHON3 ?= python3
PYTHON := .venv/bin/python
ARGS ?=

.PHONY: demo train evaluate reproduce finetuning test chaos bench gpu lint clean

demo: .venv/installed
	$(PYTHON) teacher_student_model.py --preset demo $(ARGS)
	$(PYTHON) evaluate.py --preset demo $(ARGS)

train: .venv/installed
	$(PYTHON) teacher_student_model.py $(ARGS)

evaluate: .venv/installed
	$(PYTHON) evaluate.py $(ARGS)

# The README's table of results from nothing: hours on a CPU, resumable. Its images are those of the JPEG copy.
MAIN_ROWS := teacher student student_30_epochs student_lr_3_6x student_quarter_loss kd kd_30_epochs kd_unscaled kd_unscaled_lr_3_6x kd_unscaled_30_epochs

reproduce: DATASET := data/cifar10-jpeg
reproduce: .venv/installed
	$(PYTHON) teacher_student_model.py --preset ablation --run reproduction --dataset $(DATASET) --only $(MAIN_ROWS) --jobs 2 $(ARGS)
	$(PYTHON) evaluate.py --run reproduction --only $(MAIN_ROWS) $(ARGS)
	$(PYTHON) -m experiments.compare imgs/reproduction/results.json

# The table of docs/finetuning.md from nothing: 15 hours on two CPU cores, resumable
FINETUNED := $(PYTHON) teacher_student_model.py --preset finetuning --run finetuned --jobs 2

finetuning: DATASET := data/cifar10-jpeg
finetuning: .venv/installed
	$(PYTHON) -m pip install --quiet timm
	$(PYTHON) -m experiments.imagenet_weights
	$(FINETUNED) --dataset $(DATASET) --only teacher student kd kd_unscaled kd_unscaled_lr_3_6x $(ARGS)
	$(FINETUNED) --dataset $(DATASET) --seeds 1 2 3 --only student_10_epochs kd_unscaled_10_epochs student_lr_0_001 kd_lr_0_001 kd_unscaled_lr_0_001 $(ARGS)
	$(PYTHON) evaluate.py --run finetuned $(ARGS)
	$(PYTHON) -m experiments.compare imgs/finetuned/results.json finetuning

# A process per core, each with one thread
test: .venv/installed-for-tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile $(ARGS)

chaos: .venv/installed-for-tests
	$(PYTHON) -m pytest -m chaos -s $(ARGS)

bench: .venv/installed
	$(PYTHON) -m benchmarks.speed $(ARGS)

# What there is to measure on a CUDA GPU, see docs/speed.md: in .venv if there is one, else in PYTHON3; installs nothing
gpu: DATASET := cifar10
gpu:
	$(or $(wildcard $(PYTHON)),$(PYTHON3)) -m benchmarks.gpu --dataset $(DATASET) $(ARGS)

lint: .venv/installed-for-tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

.venv/bin/python:
	$(PYTHON3) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	@echo "Installing PyTorch and its dependencies: a few minutes, and up to 6 GB where it comes with CUDA"
	$(PYTHON) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-for-tests: tests/requirements.txt .venv/installed
	$(PYTHON) -m pip install --quiet --requirement tests/requirements.txt
	touch $@

clean:
	rm -rf .venv

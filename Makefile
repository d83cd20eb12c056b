# `make demo` and `make test` set everything up on a fresh machine; the rest is for those who work here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
MINUTES ?= 5

.PHONY: help fuzz fuzz-minute demo test test-torch test-backend lint types wheel clean qemu

help:
	@echo "make demo    install, then compile, run and verify the shipped model on host and arm"
	@echo "make test    install, then run the whole suite"
	@echo "make test-torch   install torch too, then run the tests that need it"
	@echo "make test-backend every node test of onnx.backend.test, about 4 minutes of CPU time; make test runs a sixth of them"
	@echo "make fuzz    damaged files and random graphs, 5 minutes of CPU time; make fuzz MINUTES=120 for a campaign"
	@echo "make fuzz-minute  each kind of harness for a minute"
	@echo "make lint    ruff          make types   mypy"
	@echo "make wheel   build the wheel into dist/"

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("sparsec needs Python 3.11 or newer, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --only-binary :all: --editable '.[cuda]' || \
		echo "no wheels of NVIDIA's compiler for this platform: tests of what it compiles are skipped"
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/python tools/demo.py

test: $(BIN)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-torch: $(BIN)/.installed
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[torch]'
	$(BIN)/python -m pytest tests/passes/training/test_torch_graph.py tests/passes/training/test_recover.py tests/runtimes/test_torch.py

test-backend: $(BIN)/.installed
	$(BIN)/python -W ignore tools/backend_suite.py --jobs $(JOBS)

fuzz: $(BIN)/.installed
	$(BIN)/python -m fuzz.campaign --minutes $(MINUTES)

# Each kind of harness for about a minute, two at a time: what continuous integration runs beside the suite.
fuzz-minute: $(BIN)/.installed
	$(BIN)/python -m fuzz.run model recipe manifest --seconds 60 --seed 1 & readers=$$!; \
	$(BIN)/python -m fuzz.graphs --graphs 300 --seed 1 --no-shrink && $(BIN)/python -m fuzz.c.run --seconds 60 --seed 1; \
	others=$$?; wait $$readers && exit $$others

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.installed
	$(BIN)/mypy -p sparsec

wheel: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

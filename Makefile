# make demo: sets up, trains a small phi-3 on real text, shows what came of it.   make test: sets up, runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test test-slow lint format benchmarks clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.installed

demo: setup
	$(BIN)/python experiments/python_text.py --output=build/python_text_raw
	$(BIN)/phijax prepare --input=build/python_text_raw --output=build/python_text \
	  --vocab_size=2048 --block=256 --validation_fraction=0.05
	$(BIN)/phijax main --config=experiments/tiny.py --workdir=build/tiny
	@echo; echo "A text from it:"
	$(BIN)/phijax generate --checkpoint=build/tiny --prompt="The file object" --max_tokens=60
	@echo
	@echo "Checkpoints, metrics.jsonl and the plot loss.png lie in build/tiny. What to try next:"
	@echo "  $(BIN)/phijax show build/tiny/checkpoints"
	@echo "  $(BIN)/phijax show build/python_text/train --rows=2"
	@echo "  $(BIN)/phijax main --config=experiments/tiny.py --workdir=build/longer --config.data.phases[0].steps=1000"
	@echo "  $(BIN)/phijax prepare --input='FOLDER/*.txt' --output=build/mine --vocab_size=2048 --block=256   # your own text"
	@echo "  $(BIN)/phijax main --config=experiments/medium.py --dry_run   # 14B, planned"

# One line at the end that says how many passed, also for a reader of logs.
test: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest

test-slow: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.installed-test
	$(BIN)/python benchmarks/train_step_cpu.py
	$(BIN)/python benchmarks/loader.py

clean:
	rm -rf build $(VENV)

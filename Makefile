# make demo: draw 16 pictures with the embedded model.     make test: lint, type-check and test.
# Both make .venv first; run again, they go straight to work. PYTHON=... picks another interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt setup.py MANIFEST.in $(shell find csrc -type f)

# What one process may use. pytest runs two processes, so each gets one thread.
export TOKENIZERS_PARALLELISM := false
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all bench gpu-check lint format train-emoji clean

demo: $(VENV)/.installed
	$(BIN)/python -m ldmkit_emoji.demo --output out/demo.png

test: lint
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(PYTEST)

test-all: lint
	HYPOTHESIS_PROFILE=thorough $(PYTEST) -m ""

# Kernels on this CPU, with one thread and with two, beside plain torch and torch.compile; BENCH names others. On a quiet machine.
BENCH ?= $(patsubst benchmarks/%.py,%,$(wildcard $(patsubst %,benchmarks/%.py,geglu geglu_linear group_norm_silu cross_attention)))
bench: $(VENV)/.installed-dev
	@set -e; for name in $(BENCH); do for threads in 1 2; do \
		OMP_NUM_THREADS=$$threads $(BIN)/python -m benchmarks.$$name --threads $$threads; done; done

# All that takes a GPU: CUDA build, tests, `ldmkit verify`, compute-sanitizer, benchmarks. ARGS="--quick --minutes 10" for a short lease.
# With PYTHON itself, and nothing installed, where that has a torch that sees a GPU and the packages the tests need.
gpu-check:
	@if $(PYTHON) -c 'import torch, pydantic, hypothesis, pytest; torch.zeros(1).cuda()' 2>/dev/null; \
	then $(PYTHON) -m benchmarks.gpu_check $(ARGS); \
	else $(MAKE) --no-print-directory $(VENV)/.installed-dev && $(BIN)/python -m benchmarks.gpu_check $(ARGS); fi

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The embedded model, from the font to the weights in the package, in three stages; resumes where it was stopped.
EMOJI := plugins/ldmkit_emoji
train-emoji: $(VENV)/.installed-dev
	test -f runs/emoji/data/train.npz || $(BIN)/python -m ldmkit_emoji.data -o runs/emoji/data
	$(BIN)/ldmkit train autoencoder $(EMOJI)/recipes/autoencoder.yaml --out runs/emoji/autoencoder
	$(BIN)/ldmkit train diffusion $(EMOJI)/recipes/diffusion.yaml --out runs/emoji/diffusion
	test -f runs/emoji/balanced/train.npz || $(BIN)/python -m ldmkit_emoji.data -o runs/emoji/balanced \
		--seed 1 --families --white 7 --coloured 7 --scenes 14500
	$(BIN)/ldmkit train diffusion $(EMOJI)/recipes/balanced.yaml --out runs/emoji/diffusion-balanced
	$(BIN)/python -m ldmkit_emoji.bundle runs/emoji/diffusion-balanced/pipeline
	$(BIN)/python -m ldmkit_emoji.evaluate -o runs/emoji/report.json
	$(BIN)/python -m ldmkit_emoji.history runs/emoji/diffusion runs/emoji/diffusion-balanced -o runs/emoji/history

# torch comes first, and builds are not isolated, so that setup.py compiles against the torch that will run.
$(VENV)/.installed: $(SOURCES)
	@start=$$(date +%s); set -e; \
	echo "installing into $(VENV) ..."; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(PIP) setuptools wheel pybind11 ninja torch; \
	$(PIP) --no-build-isolation --editable .; \
	echo "installed and built in $$(( $$(date +%s) - start )) s"
	@touch $@

# ldmkit itself is there already: this adds what its extras name, and builds nothing again.
$(VENV)/.installed-dev: $(VENV)/.installed
	@start=$$(date +%s); $(PIP) 'ldmkit[train,dev]' && echo "test tools installed in $$(( $$(date +%s) - start )) s"
	@touch $@

clean:
	rm -rf $(VENV) build dist out ldmkit.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find ldmkit -name '_C*.so' -delete

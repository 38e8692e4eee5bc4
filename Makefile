# Everything runs in .venv, which the first target makes: python3 (3.10+), g++ and make are all that is needed.
PYTHON ?= python3
VENV_PYTHON = .venv/bin/python
PIP_INSTALL = $(VENV_PYTHON) -m pip install --disable-pip-version-check --progress-bar off
PIP_WHEEL = $(VENV_PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .
SOURCES = $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/ops/cuda/*) $(wildcard fastllm/_build/*.py) setup.py pyproject.toml

.PHONY: demo test test-all check test-asan bench bench-quick bench-all plots readme-benchmarks wheel wheel-pure docs gpu-check clean

demo: .venv/built
	$(VENV_PYTHON) -m fastllm train --layers 2 --width 128 --heads 4 --vocab-size 2048 --sequence-length 64 --steps 300 --compare

# ARGS go to pytest: make test ARGS="-k embedding"
test: .venv/built
	$(VENV_PYTHON) tests/run.py $(ARGS)

# Every test, every combination of options.
test-all: .venv/built
	$(VENV_PYTHON) tests/run.py --all $(ARGS)

check: .venv/installed
	$(VENV_PYTHON) tests/check.py

test-asan: .venv/installed
	$(VENV_PYTHON) tests/run.py --sanitize address $(ARGS)

bench: .venv/built
	$(VENV_PYTHON) benchmarks/run.py --device cpu --out auto

bench-quick: .venv/built
	$(VENV_PYTHON) benchmarks/run.py --device cpu --quick

# Every measurement, the plots, docs/benchmarks.md and README: about half an hour on two quiet cores.
bench-all: .venv/built .venv/benchmarks
	$(VENV_PYTHON) benchmarks/everything.py

# RESULTS is a folder of results; without it, the one that docs/benchmarks.md shows.
plots: .venv/built .venv/benchmarks
	$(VENV_PYTHON) benchmarks/plots.py $(RESULTS)

readme-benchmarks: .venv/built
	$(VENV_PYTHON) benchmarks/readme.py

# In dist/: with the compiled operations, for this platform, Python and torch; without them, for any.
wheel: .venv/built
	FASTLLM_REQUIRE_NATIVE=1 FASTLLM_NAME_TORCH=1 $(PIP_WHEEL)

wheel-pure: .venv/installed
	FASTLLM_PURE=1 $(PIP_WHEEL)

# The documentation site, in build/site/docs/index.html; needs no network once .venv is there.
docs: .venv/installed
	$(VENV_PYTHON) -m sphinx -W --keep-going -E -q -c docs -d build/site.doctrees . build/site

# On a machine with a GPU, in the environment of PYTHON: nothing is installed. OUT is the folder of the reports.
gpu-check:
	$(PYTHON) tests/gpu_check.py $(if $(OUT),--out $(OUT))

.venv/installed: requirements.txt docs/requirements.txt
	@echo "=== set-up: a virtual environment in .venv"
	$(PYTHON) -m venv .venv
	@echo "=== set-up: packages of requirements.txt"
	@start=$$(date +%s); $(PIP_INSTALL) -r requirements.txt && \
	touch $@ && echo "=== set-up: packages installed in $$(($$(date +%s) - start)) s"

.venv/benchmarks: .venv/installed benchmarks/requirements.txt
	$(PIP_INSTALL) --quiet -r benchmarks/requirements.txt && touch $@

# First as a build that shows its progress, which pip hides; then pip finds everything compiled.
.venv/built: .venv/installed $(SOURCES)
	@echo "=== set-up: the compiled operations"
	@start=$$(date +%s); export FASTLLM_REQUIRE_NATIVE=1; $(VENV_PYTHON) setup.py -q build_ext --inplace && \
	$(PIP_INSTALL) --quiet --no-build-isolation -e . && \
	touch $@ && echo "=== set-up: compiled and installed in $$(($$(date +%s) - start)) s"

clean:
	rm -rf .venv build dist fastllm.egg-info fastllm/_C*.so fastllm/_build_info.py

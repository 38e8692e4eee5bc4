# Everything runs in .venv, which the first target makes: python3 (3.10+), g++ and make are all that is needed.
PYTHON ?= python3
VENV_PYTHON = .venv/bin/python
SOURCES = $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h) $(wildcard fastllm/_build/*.py) setup.py pyproject.toml
PIP_WHEEL = $(VENV_PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .

.PHONY: demo test check test-asan bench bench-quick bench-all plots readme-benchmarks wheel wheel-pure gpu-check clean

demo: .venv/built
	$(VENV_PYTHON) -m fastllm train --compare-eager

test: .venv/built
	$(VENV_PYTHON) tests/run.py

check: .venv/installed
	$(VENV_PYTHON) tests/check.py

test-asan: .venv/installed
	$(VENV_PYTHON) tests/run.py --sanitize address

bench: .venv/built
	$(VENV_PYTHON) benchmarks/run.py --device cpu --out auto

bench-quick: .venv/built
	$(VENV_PYTHON) benchmarks/run.py --device cpu --quick

# Every measurement, the plots, and README: about half an hour on two quiet cores.
bench-all: .venv/built .venv/benchmarks
	$(VENV_PYTHON) benchmarks/everything.py

# RESULTS is a folder of results; without it, the one that README shows.
plots: .venv/built .venv/benchmarks
	$(VENV_PYTHON) benchmarks/plots.py $(RESULTS)

readme-benchmarks: .venv/built
	$(VENV_PYTHON) benchmarks/readme.py

# In dist/: with the compiled operations, for this platform, Python and torch; without them, for any.
wheel: .venv/built
	FASTLLM_REQUIRE_NATIVE=1 FASTLLM_NAME_TORCH=1 $(PIP_WHEEL)

wheel-pure: .venv/installed
	FASTLLM_PURE=1 $(PIP_WHEEL)

# On a machine with a GPU, in the environment of PYTHON: nothing is installed. OUT is the folder of the reports.
gpu-check:
	$(PYTHON) tests/gpu_check.py $(if $(OUT),--out $(OUT))

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt && touch $@

.venv/benchmarks: .venv/installed benchmarks/requirements.txt
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt && touch $@

.venv/built: .venv/installed $(SOURCES)
	FASTLLM_REQUIRE_NATIVE=1 $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e . && touch $@

clean:
	rm -rf .venv build dist fastllm.egg-info fastllm/_C*.so fastllm/_build_info.py

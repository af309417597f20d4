# Fresh machine: Python >= 3.11 with venv and pip is all these need.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
# Test processes. Most of a test's time is one thread that compiles; each needs some 3 GiB.
JOBS ?= 2
BIN = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart test test-slow reproduce bench verify-tpu verify-gpu lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps carry the dependency lists, so an edited pyproject.toml installs again.
$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --quiet -e .
	touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --quiet -e '.[test]'
	touch $@ $(VENV)/.installed

quickstart: $(VENV)/.installed  ## learn from language feedback on the digits world, then open the report
	$(BIN)/python launch/llf.py --config configs/ti2t/digits_llf.py --workdir $(RUN)

test: $(VENV)/.installed-test  ## the default tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.installed-test  ## every test, the slow ones too
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'slow or not slow'

reproduce: $(VENV)/.installed  ## LLF with several training seeds, wider grids, Figure 5 and Table 3
	$(BIN)/python launch/reproduce.py --config configs/ti2t/digits_llf_reproduce.py --workdir runs/reproduce

bench: $(VENV)/.installed-test  ## side-by-side measurements with their baselines
	$(BIN)/python benchmarks/llava_dpo.py
	$(BIN)/python benchmarks/dpo_memory.py

# The libtpu of JAX's own version: a newer one writes programs that an older jaxlib cannot read.
LIBTPU = import importlib.metadata as m; \
  print(next(r.split(";")[0].strip() for r in m.requires("jax") if r.startswith("libtpu")))
verify-tpu: $(VENV)/.installed  ## compiles every TPU kernel and a whole step for v5e, v5p and v6e, without one
	$(BIN)/python -m pip install --quiet --quiet --no-deps --upgrade --target build/libtpu \
	  "$$($(BIN)/python -c '$(LIBTPU)')"
	$(BIN)/python -m aa_jax.kernels.tune --check --libtpu build/libtpu/libtpu/libtpu.so
	$(BIN)/python -m aa_jax.kernels.verify --platform tpu --libtpu build/libtpu/libtpu/libtpu.so
	$(BIN)/python -m aa_jax.plan.verify --platform tpu --libtpu build/libtpu/libtpu/libtpu.so

# The plug-in must be of JAX's own version; its tools and cuDNN come without the rest of CUDA.
verify-gpu: $(VENV)/.installed  ## compiles every GPU program and a whole step for H200, without one
	rm -rf build/cuda
	$(BIN)/python -m pip install --quiet --quiet --no-deps --target build/cuda \
	  $$($(BIN)/python -c 'import jax; print(*(f"jax-cuda13-{p}=={jax.__version__}" for p in ("plugin", "pjrt")))') \
	  nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink nvidia-cuda-runtime nvidia-cuda-crt \
	  nvidia-cuda-nvrtc nvidia-cublas nvidia-cudnn-cu13
	$(BIN)/python -m aa_jax.kernels.verify --platform gpu --cuda build/cuda
	$(BIN)/python -m aa_jax.plan.verify --platform gpu --cuda build/cuda

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build *.egg-info

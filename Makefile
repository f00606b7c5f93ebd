# Every target sets up .venv first if it has to; `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python
TEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
ON_DATA = --prompts $(DATA)/prompts_mixed.jsonl --held-out $(DATA)/prompts_mixed.jsonl --screen 190 \
	  --judge-heads .cache/judge-heads

.PHONY: help
help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

.PHONY: setup
setup:  ## Create .venv from the lock file (does nothing when it is current)
	@scripts/setup.sh

.PHONY: demo
demo: setup  ## Run the whole method on real prompts with a real language model
	@$(PY) -m mora_serve demo $(DEMO_ARGS)

.PHONY: test
test: lint  ## Lint, then every test: real Redis, real Ray and real vLLM among them
	$(PY) -m pytest $(TEST_ARGS)

.PHONY: test-unit
test-unit: setup  ## Only the tests that start no Ray and no vLLM
	$(PY) -m pytest -m "not ray and not vllm and not slow" $(TEST_ARGS)

.PHONY: lint
lint: setup  ## ruff, mypy --strict, import layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

.PHONY: format
format: setup  ## Rewrite the sources in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.PHONY: bench
bench: setup  ## Throughput through the gateway against bare vLLM and bare scorers, in one run
	$(PY) -m benchmarks.gateway $(BENCH_ARGS)

.PHONY: bench-uploads
bench-uploads: setup  ## Memory of every process while large files are uploaded, within a bound
	$(PY) -m benchmarks.uploads $(BENCH_ARGS)

.PHONY: bench-scorers
bench-scorers: setup  ## Scorers: engines, precisions, batch policies, fused and separate, the plain loop
	$(PY) -m mora_serve models prepare --out .cache/models/SmolLM2-135M-Instruct
	$(PY) -m benchmarks.scorers $(BENCH_ARGS)

.PHONY: bench-batch
bench-batch: setup  ## Batches: rows a second, memory, and where the time goes, at 1k, 10k and 100k rows
	$(PY) -m benchmarks.batch $(BENCH_ARGS)

.PHONY: bench-train
bench-train: setup  ## DPO steps on a live pair stream against the same pairs from memory
	$(PY) -m benchmarks.train $(BENCH_ARGS)

.PHONY: experiment
experiment: setup  ## Does measured rewriting make a better policy? Hours, resumable; DATA=directory
	@$(if $(DATA),$(PY) -m benchmarks.judge_heads --data $(DATA))
	@$(PY) -m benchmarks.experiment $(if $(DATA),$(ON_DATA)) $(BENCH_ARGS)

.PHONY: retest
retest: setup  ## Do classes repeat on fresh rollouts? Agreement, with the embedded policy
	$(PY) -m benchmarks.retest $(BENCH_ARGS)

.PHONY: chaos
chaos: setup  ## A batch on the real stack under SIGKILLs of every kind: nothing lost, nothing twice
	$(PY) -m benchmarks.chaos $(BENCH_ARGS)

.PHONY: elasticity
elasticity: setup  ## A backlog grows every pool to its maximum, idleness brings it back to none
	$(PY) -m benchmarks.elasticity $(BENCH_ARGS)

.PHONY: adapters-test
adapters-test: setup  ## Versions as adapters side by side on one vLLM engine, minutes on CPU
	$(PY) -m pytest tests/contract/test_adapters_side_by_side.py --adapters $(TEST_ARGS)

.PHONY: helm-test
helm-test: setup  ## The chart on helm 3 and 4 against Kubernetes 1.29 to 1.37, KubeRay, checkov
	@PYTHON=$(PY) scripts/helm_tools.sh
	$(PY) -m pytest tests/chart --chart-full $(TEST_ARGS)
	@PYTHON=$(PY) scripts/chart_checkov.sh
	@echo "helm-test: passed"

.PHONY: chart-schema
chart-schema: setup  ## Write helm/values.schema.json anew from the settings
	@PYTHONPATH=. $(PY) scripts/chart_schema.py

.PHONY: helm-mutants
helm-mutants: setup  ## Do the chart's tests notice mistakes? One run per mutant, half an hour
	$(PY) -m tests.chart.mutants

.PHONY: image-check
image-check: setup  ## Build the cpu image with buildah and run it on the fake backend
	scripts/image_check.sh

COMPILE = .venv/bin/uv pip compile pyproject.toml --python-version 3.11 --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links --quiet
CPU_WHEELS = $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} --override requirements/overrides.txt

.PHONY: lock
lock: setup  ## Resolve the lock files anew, keeping what still fits
	$(COMPILE) --extra embedded --extra train --extra dev $(CPU_WHEELS) \
	  --output-file requirements/cpu.lock
	$(COMPILE) --extra embedded --extra train --extra s3 $(CPU_WHEELS) \
	  --constraint requirements/cpu.lock --output-file requirements/image-cpu.lock
	$(COMPILE) --extra gpu --extra train --python-platform x86_64-manylinux_2_34 \
	  --output-file requirements/image-gpu.lock

.PHONY: clean
clean:  ## Remove what runs and tests leave behind; .venv and .cache stay
	rm -rf runs .mora .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

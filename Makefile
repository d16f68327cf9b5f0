PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: help install demo quick test test-gpu lint docs package format bench quality memory loading experts tp dryrun compat schemas clean plan-speed composite-speed bench-rounding

help:
	@echo "make demo     serve a real model with a shipped preset and ask it a question"
	@echo "make quick    lint, and the tests that run neither SGLang nor a model: a minute"
	@echo "make test     run all tests"
	@echo "make test-gpu run the shipped presets on this machine's GPU (tests/gpu)"
	@echo "make gpu-kit  pack all of that for a machine without network, in pieces (build/gpu-kit)"
	@echo "make lint     ruff, mypy, the rules of imports, the docs, and make package"
	@echo "make docs     build the site of docs/ in build/docs, and fail on a link to nothing"
	@echo "make package  build sdist, wheel and release notes into dist, and check them"
	@echo "make format   let ruff rewrite what it can"
	@echo "make bench    measure quality, memory, speed and tensor parallel: ours, a peer's, the limit, in"
	@echo "              build/bench.json and bench.svg; PART=plan-speed measures that part alone"
	@echo "make dryrun   see what runs on which GPU, without one (docs/cuda.md)"
	@echo "make compat   see which SGLang releases the plugin fits (docs/compat.md)"
	@echo "make page     build the page of mixedprec plan --html (needs npm)"
	@echo "make unchanged compare what BEFORE=revision and this checkout convert and serve, byte for byte"
	@echo "make fuzz     ten minutes of faulty presets and checkpoints: each is read or refused;"
	@echo "              FUZZ=\"--inputs 1000000 --jobs 8\" tries as many as that"
	@echo "make clean    remove build products; 'rm -r $(VENV)' removes the environment"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there; name a Python from 3.10 to 3.12: make PYTHON=python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing SGLang, torch and the rest into $(VENV) (the first time: about 11 GB, 5 minutes)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[test,lint,demo,docs]' & \
		pip=$$!; seconds=0; trap 'kill $$pip; exit 130' INT TERM; \
		while sleep 1 && kill -0 $$pip 2>/dev/null; do \
			seconds=$$((seconds + 1)); \
			test $$((seconds % 15)) -ne 0 || echo "  $$seconds s, $$(du -sh $(VENV) | cut -f1) installed"; \
		done; wait $$pip
	@touch $@

demo: $(INSTALLED)
	@$(RUN) -m demo.run

quick: $(INSTALLED) lint
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q --quick -n 2 --dist loadfile

test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile

test-gpu:
	@sh tests/gpu/run.sh

.PHONY: gpu-kit
gpu-kit: $(INSTALLED)
	@$(RUN) -m tests.gpu.kit

lint: $(INSTALLED) docs
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports --no-cache --no-logo
	@$(MAKE) --no-print-directory package

# the release's notes are the newest part of the changelog
package: $(INSTALLED)
	@rm -rf dist
	@$(RUN) -m build --no-isolation --outdir dist . > /dev/null
	@$(RUN) -m twine check --strict dist/*
	@awk '/^## /{part++} part == 1' CHANGELOG.md > dist/NOTES.md

docs: $(INSTALLED)
	@$(RUN) -m mkdocs build --quiet --strict

format: $(INSTALLED)
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

PARTS := quality memory experts tp plan-speed page-speed quantize-speed cpu-speed composite-speed loading bench-rounding
bench: $(INSTALLED)
	@$(MAKE) --no-print-directory --keep-going $(or $(PART),$(PARTS)); code=$$?; \
		$(RUN) -m benchmarks.figures; exit $$code

.PHONY: quantize-speed
quantize-speed: $(INSTALLED)
	@$(RUN) -m benchmarks.quantize

.PHONY: cpu-speed
cpu-speed: $(INSTALLED)
	@$(RUN) -W ignore -m benchmarks.cpu_linear

quality: $(INSTALLED)
	@$(RUN) -m benchmarks.quality --out docs/quality.md

bench-rounding: $(INSTALLED)
	@$(RUN) -m benchmarks.calibration --out docs/calibration.md

bench-search: $(INSTALLED)
	@$(RUN) -m benchmarks.search --out docs/search.md

memory: $(INSTALLED)
	@$(RUN) -m benchmarks.memory --out docs/memory.md

loading: $(INSTALLED)
	@$(RUN) -m benchmarks.loading --out docs/loading.md

experts: $(INSTALLED)
	@$(RUN) -m benchmarks.experts --out docs/experts.md

tp: $(INSTALLED)
	@$(RUN) -m benchmarks.tensor_parallel --out docs/tensor_parallel.md
	@$(RUN) -W ignore -m benchmarks.rank_parts --out docs/rank_parts.md

plan-speed: $(INSTALLED)
	@$(RUN) -m benchmarks.plan

.PHONY: page-speed
page-speed: $(INSTALLED)
	@$(RUN) -m benchmarks.page

composite-speed: $(INSTALLED)
	@$(RUN) -m benchmarks.composite_experts --out docs/composite_experts.md

dryrun: $(INSTALLED)
	@$(RUN) -m tests.dryrun.matrix --out docs/cuda.md --results build/dryrun
	@MIXEDPREC_DRYRUN=build/dryrun $(RUN) -m pytest -q -m "every_card or not every_card" \
		tests/dryrun/test_matrix.py tests/dryrun/test_experts.py tests/dryrun/test_models.py

compat: $(INSTALLED)
	@$(RUN) -m compat --out docs/compat.md

.PHONY: page
page:
	@cd mixedprec_plugin/page && npm ci --silent && npm run --silent build

schemas: $(INSTALLED)
	@$(RUN) -m mixedprec_plugin.preset.schema
	@$(RUN) -m benchmarks.preset_reference

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

.PHONY: third-party
third-party: $(INSTALLED)
	@nice -n 10 $(RUN) -m benchmarks.third_party.make
	@nice -n 10 $(RUN) -m benchmarks.third_party.reference
	@$(RUN) -W ignore -m benchmarks.third_party.serve --out docs/third_party.md

.PHONY: families
families: $(INSTALLED)
	@nice -n 5 $(RUN) -W ignore -m benchmarks.families --out docs/families.md

.PHONY: fuzz
fuzz: $(INSTALLED)
	@nice -n 5 $(RUN) -m tests.fuzz $(FUZZ)

.PHONY: unchanged
unchanged: $(INSTALLED)
	@$(RUN) -m benchmarks.before_and_after --before $(or $(BEFORE),HEAD)

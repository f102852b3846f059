# SPDX-License-Identifier: MIT
# make live    the dashboard over a built-in workload
# make test    everything that is checked
# make test-kernels   tests on other kernels, in VMs
# make setup   only .venv/bin/rsplice
# make bench   what tracing costs, what librsplice gains
# make fuzz    ten minutes of random calls and faults (FUZZ_SECONDS)
BIN := .venv/bin
C_FILES := $(wildcard csrc/*.[ch] csrc/workloads/*.[ch] tests/c/*.[ch] tests/drivers/*.[ch] \
	benchmarks/*.[ch] rsplice/kernel/*.[ch])
CPPCHECK := cppcheck --quiet --std=c11 --enable=warning,performance,portability \
	--inline-suppr --error-exitcode=1
BPF_FILES := $(wildcard tracers/kmod/*.c tracers/bpf/*.[ch] tests/bpf/*.[ch])

.PHONY: live test test-kernels setup setup-test setup-bench lint bench fuzz clean

live: setup
	@.ci/as-root $(BIN)/rsplice live

setup:
	@.ci/setup.sh run

setup-test:
	@.ci/setup.sh test

setup-bench:
	@.ci/setup.sh bench

test: lint
	@.ci/as-root env PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m pytest -p no:cacheprovider

test-kernels: setup-test
	@.ci/as-root $(BIN)/python -m tests.kernels $(KERNELS)

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(C_FILES)$(BPF_FILES),$(BIN)/clang-format --dry-run -Werror $(C_FILES) $(BPF_FILES))
	$(if $(C_FILES),$(CPPCHECK) $(C_FILES))

bench: setup-bench
	@.ci/as-root env PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m benchmarks
	@.ci/as-root env PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m benchmarks.performance
	@.ci/as-root env PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m benchmarks.traces

# What it finds stands in build/fuzz/found.
FUZZ_SECONDS ?= 600
fuzz: setup-test
	@mkdir -p build/fuzz/tmp
	@.ci/as-root env TMPDIR=$(CURDIR)/build/fuzz/tmp $(MAKE) --no-print-directory -C tests/c \
		BUILD=$(CURDIR)/build/fuzz run-fuzz FUZZ_SECONDS=$(FUZZ_SECONDS)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find rsplice tracers dashboards tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# SPDX-License-Identifier: Apache-2.0
# One line a target over CMake presets; every target installs what it misses (Debian 12).
.PHONY: demo test cuda wheel bench bench-short report docs format check sanitize fuzz clean

TRACES := $(wildcard data/*.safetensors)

demo:
	@scripts/install-deps.sh
	@cmake --preset release >/dev/null && cmake --build --preset release --target misa_program
	@mkdir -p build/demo
	@build/release/cli/misa compare $(TRACES) --html build/demo/report.html

# The C++ tests, those of the program's HTML page in a headless browser, then the package's in an
# environment of its own, with PyTorch where it is found or PYTHON_EXTRAS=test,torch,transformers asks
# for it.
test:
	@scripts/install-deps.sh page python
	@cmake --preset release >/dev/null && cmake --build --preset release && ctest --preset release
	@scripts/test-page.sh
	@scripts/test-python.sh $(PYTHON_EXTRAS)

# The CUDA backends, their tests and benchmarks, and the test that needs no device; tests/gpu.sh runs
# the others where there is one.
cuda:
	@scripts/install-deps.sh
	@cmake --preset cuda >/dev/null && cmake --build --preset cuda
	@ctest --preset cuda -R '^Architectures'

# A wheel for every Python from 3.12 on, with all that it needs inside, in build/wheel; checked in an
# empty Debian 13, as root. CUDA_ARCHITECTURES=90-real compiles the CUDA backends for Hopper alone.
wheel:
	@scripts/install-deps.sh python wheel
	@scripts/wheel.sh "$(CUDA_ARCHITECTURES)"

bench:
	@scripts/install-deps.sh bench
	@cmake --preset bench >/dev/null && cmake --build --preset bench --target misa_bench misa_program
	@build/bench/bench/misa_bench --benchmark_counters_tabular=true
	@python3 -c 'import torch' 2>/dev/null && python3 -P python/misa/_bench_peers.py --misa build/bench/cli/misa || echo 'torch is not installed: the peers were left out'

# A short benchmark, and which ratios have moved since the last results; it fails for none of them.
bench-short:
	@scripts/install-deps.sh bench
	@cmake --preset bench >/dev/null && cmake --build --preset bench
	@build/bench/bench/misa_bench --benchmark_filter=select --benchmark_min_time=0.05
	@scripts/moved.py build/bench/cli/misa

# Writes bench/results of the CPU, with the peers that are installed, and renders the pages from them;
# for figures to publish, on a machine that does nothing else.
report:
	@scripts/install-deps.sh bench check python
	@cmake --preset bench >/dev/null && cmake --build --preset bench
	@scripts/report-cpu.sh
	@scripts/venv.sh && build/venv/bin/python scripts/report.py --write

# The documentation with the reference of C++, C and Python, in build/docs/html; a warning is an error.
docs:
	@scripts/install-deps.sh docs python
	@scripts/docs.sh

format:
	@scripts/install-deps.sh check python
	@git ls-files '*.cpp' '*.hpp' '*.h' '*.c' '*.cu' '*.cuh' | xargs clang-format -i
	@scripts/venv.sh && git ls-files '*.py' | xargs build/venv/bin/ruff format --quiet

# Licences, formats, linters and types: what can be said without running anything.
check:
	@scripts/install-deps.sh check python
	@scripts/check.sh

# A subset of the tests under the address and undefined sanitizers, by clang, then under the thread
# one.
sanitize:
	@scripts/install-deps.sh check python
	@scripts/sanitize.sh

# Every fuzzer for a short while, from its corpus.
fuzz:
	@scripts/install-deps.sh check python
	@scripts/fuzz.sh

clean:
	@rm -rf build

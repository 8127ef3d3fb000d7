# The commands of this repository. Everything else is CMake: see CMakePresets.json.
SHELL := /bin/bash
# One compiler process may take 2 GiB.
JOBS ?= $(shell awk -v cpus=$$(nproc) '/MemAvailable/ {n = int($$2 / 2097152); print n < 1 ? 1 : n < cpus ? n : cpus}' /proc/meminfo)
ARGS ?=
FUZZ_SECONDS ?= 60
SOURCES = $(shell git ls-files 'src/*.cpp' 'src/*.h' 'tests/*.cpp' 'tests/*.h' 'bench/*.cpp' 'bench/*.h')

.PHONY: help run build test test-all test-gpu test-gpu-checked test-long test-instruction-sets test-client sanitizers \
  fuzz check-format check-tidy dependencies development-dependencies

help:
	@echo 'make run        build, then the demo (make run ARGS=--exit ends after the conversation)'
	@echo 'make build      build the program: build/tokenspeed'
	@echo 'make test       build and run the fast tests and the goldens'
	@echo 'make test-all   also the long tests, the sanitizers, the OpenAI client and the fuzzers (a minute each)'
	@echo 'make test-gpu   build and run everything that a GPU can check'
	@echo 'make test-gpu-checked   the kernels under compute-sanitizer and with random pauses'

run: build
	build/tokenspeed demo $(ARGS)

dependencies:
	@scripts/install_dependencies.sh deps/apt.txt
development-dependencies:
	@scripts/install_dependencies.sh deps/apt.txt deps/apt-development.txt

build: dependencies
	cmake --preset release
	cmake --build --preset release --target tokenspeed -j $(JOBS)

test: dependencies
	cmake --preset release
	cmake --build --preset release -j $(JOBS)
	ctest --test-dir build/release -L fast -j $(JOBS) --output-on-failure

# Needs a GPU and a CUDA toolkit; the test program's last line is the summary.
test-gpu: dependencies
	cmake --preset release
	cmake --build --preset release --target gpu_tests -j $(JOBS)
	build/release/gpu_tests

# The same kernels under NVIDIA's checkers, and with random pauses; takes minutes.
CHECKED = compute-sanitizer --error-exitcode 9
CHECKED_TESTS = build/release/gpu_tests --gtest_filter='DecodeLayers*:FewToken*:ManyToken*:CudaDemo*:Models*:Poison*'
test-gpu-checked: dependencies
	cmake --preset release
	cmake --build --preset release --target gpu_tests gpu_delay_tests gpu_race_tests -j $(JOBS)
	build/release/gpu_delay_tests
	$(CHECKED) --tool memcheck $(CHECKED_TESTS)
	$(CHECKED) --tool initcheck $(CHECKED_TESTS)
	$(CHECKED) --tool racecheck build/release/gpu_race_tests

# The CPU kernels of older machines than this one.
test-instruction-sets: dependencies
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target kernels_tests runtime_tests
	for set in avx2 avx512; do \
	  for room in kernels runtime; do \
	    TOKENSPEED_INSTRUCTION_SET=$$set build/release/$${room}_tests --gtest_brief=1 || exit 1; done; done

test-long:
	ctest --test-dir build/release -L long --output-on-failure

# OpenAI's own Python client against the demo model.
test-client: build development-dependencies
	python3 -m venv build/venv && build/venv/bin/pip install --quiet openai
	build/venv/bin/python tests/server/openai_client_test.py --binary build/tokenspeed
	python3 tests/server/golden_completions_test.py --binary build/tokenspeed
	python3 tests/server/cancelling_clients_test.py --binary build/tokenspeed

# The fast sets of every room under AddressSanitizer with UndefinedBehaviorSanitizer, and of those that have threads
# under ThreadSanitizer, which runs fifteen times slower: one model of the runtime's stands for all there.
ASAN_ROOMS = base text compile model kernels cache runtime engine server app
TSAN_ROOMS = base kernels runtime engine server
TSAN_TESTS = -*Golden*:*/moe_*:EqualityProperty.*
sanitizers: dependencies
	cmake --preset asan-ubsan
	cmake --build --preset asan-ubsan -j $(JOBS) --target $(ASAN_ROOMS:%=%_tests)
	for room in $(ASAN_ROOMS); do build/asan-ubsan/$${room}_tests --gtest_brief=1 || exit 1; done
	cmake --preset tsan
	cmake --build --preset tsan -j $(JOBS) --target $(TSAN_ROOMS:%=%_tests)
	for room in $(TSAN_ROOMS); do build/tsan/$${room}_tests --gtest_brief=1 --gtest_filter='$(TSAN_TESTS)' || exit 1; done

fuzz: development-dependencies
	cmake --preset fuzz
	cmake --build --preset fuzz --target fuzzers -j $(JOBS)
	tests/fuzz/run_all.sh $(FUZZ_SECONDS) build/fuzz

test-all: test test-instruction-sets test-long test-client sanitizers fuzz

check-format:
	clang-format-14 --dry-run --Werror $(SOURCES)
# Every .cpp of src/ that the build compiles: those for CUDA too where there is a toolkit, whose headers they need.
check-tidy:
	sed -n 's|.*"file": "[^"]*/\(src/[^"]*\.cpp\)".*|\1|p' build/release/compile_commands.json | \
	  xargs -P $(JOBS) -n 1 clang-tidy-14 --quiet -p build/release

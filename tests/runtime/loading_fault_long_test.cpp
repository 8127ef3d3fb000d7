// The n-th open, fstat or mmap of loading fails, for every n until loading succeeds: each failure is an error that says
// what could not be had, and none leaves a mapping or a descriptor behind. The calls are caught by functions of the
// same names in this program, which the linker prefers to the C library's; the fast tests are spared that.
#include <dlfcn.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <filesystem>
#include <fstream>

#include "base/log.h"
#include "runtime/test_model.h"

namespace {

std::atomic<int64_t> calls_left{-1};  // until a call fails; -1: none does
std::atomic<bool> failed{false};

bool fails() {
  if (calls_left < 0 || calls_left-- != 0) return false;
  failed = true;
  errno = ENOMEM;
  return true;
}

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {
void* mmap(void* address, size_t length, int protection, int flags, int descriptor, off_t offset) noexcept {
  static auto* const real = next<void*(void*, size_t, int, int, int, off_t)>("mmap");
  return fails() ? MAP_FAILED : real(address, length, protection, flags, descriptor, offset);
}
int open(const char* path, int flags, ...) {
  static auto* const real = next<int(const char*, int, ...)>("open");
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0;
  va_end(arguments);
  return fails() ? -1 : real(path, flags, mode);
}
int fstat(int descriptor, struct stat* info) noexcept {
  static auto* const real = next<int(int, struct stat*)>("fstat");
  return fails() ? -1 : real(descriptor, info);
}
}

namespace tokenspeed::runtime {
namespace {

int64_t open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return std::distance(begin(all), end(all));
}

// Mapped files and mappings large enough to be a runner's memory; the allocator's own come and go.
int64_t mapped_bytes(const std::string& directory) {
  std::ifstream maps("/proc/self/maps");
  int64_t bytes = 0;
  for (std::string line; std::getline(maps, line);) {
    uint64_t from = 0;
    uint64_t to = 0;
    sscanf(line.c_str(), "%lx-%lx", &from, &to);
    const bool anonymous = line.find('/') == std::string::npos && line.find('[') == std::string::npos;
    constexpr uint64_t kLarge = uint64_t{64} << 20;
    if (line.find(directory) != std::string::npos || (anonymous && to - from >= kLarge)) {
      bytes += static_cast<int64_t>(to - from);
    }
  }
  return bytes;
}

Status load_and_run(const std::string& directory) {
  TS_ASSIGN_OR_RETURN(const model::LoadedModel loaded, model::load_model(directory, model::LoadFormat::kAuto));
  TS_ASSIGN_OR_RETURN(const compile::ModelGraph graph, model::build_graph(loaded.config));
  CpuRunnerOptions options = bfloat16_options();
  options.pages = 1 << 16;  // large enough to be told from the allocator's mappings
  return CpuRunner::create(graph, *loaded.weights, options).status();
}

class LoadingFault : public testing::TestWithParam<std::string> {};

TEST_P(LoadingFault, EveryFailedCallIsAnError) {
  spdlog::set_level(spdlog::level::off);
  const std::string& directory = GetParam();
  ASSERT_TRUE(load_and_run(directory).ok());
  const int64_t descriptors = open_descriptors();
  const int64_t mapped = mapped_bytes(directory);
  int failures = 0;
  for (int64_t n = 0; n < 1000 && !HasFailure(); ++n) {
    SCOPED_TRACE("call " + std::to_string(n));
    failed = false;
    calls_left = n;
    const Status status = load_and_run(directory);
    calls_left = -1;
    EXPECT_EQ(open_descriptors(), descriptors);
    EXPECT_EQ(mapped_bytes(directory), mapped);
    if (!failed) break;         // loading has no n-th call
    if (status.ok()) continue;  // what failed was not needed: how much memory is free
    ++failures;
    const std::string& message = status.message();
    const bool named = message.find('\'') != std::string::npos || message.find(" bytes for ") != std::string::npos;
    EXPECT_TRUE(named) << message;
  }
  RecordProperty("failures", failures);
  EXPECT_FALSE(failed) << "loading takes fewer calls than were tried";
  EXPECT_GE(failures, 10) << "three calls for each of two files, and the runner's own memory";
  EXPECT_TRUE(load_and_run(directory).ok());
}

INSTANTIATE_TEST_SUITE_P(Models, LoadingFault,
                         testing::Values(random_directory("dense-a"), random_directory("moe-a"),
                                         random_directory("moe-b"), demo_directory()),
                         [](const auto& info) { return std::to_string(info.index); });

}  // namespace
}  // namespace tokenspeed::runtime

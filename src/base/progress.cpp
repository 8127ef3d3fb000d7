#include "base/progress.h"

#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <cstdio>

#include "base/log.h"

namespace tokenspeed {
namespace {
constexpr auto kTerminalInterval = std::chrono::milliseconds(100);
constexpr auto kLogInterval = std::chrono::seconds(5);
}  // namespace

Progress::Progress(std::string label, int64_t total, std::string unit)
    : label_(std::move(label)), total_(total), unit_(std::move(unit)), terminal_(::isatty(STDERR_FILENO) == 1) {}

std::string Progress::line(int64_t done) const {
  const double elapsed = seconds();
  const double percent = total_ > 0 ? 100.0 * static_cast<double>(done) / static_cast<double>(total_) : 100.0;
  if (unit_ == "bytes") {
    return fmt::format("{}: {:.0f}%  {:.2f} GB in {:.2f} s ({:.2f} GB/s)", label_, percent,
                       static_cast<double>(done) / 1e9, elapsed, static_cast<double>(done) / 1e9 / elapsed);
  }
  return fmt::format("{}: {:.0f}%  {} {} in {:.1f} s", label_, percent, done, unit_, elapsed);
}

void Progress::advance(int64_t amount) {
  const int64_t done = done_.fetch_add(amount) + amount;
  std::unique_lock lock(mutex_, std::try_to_lock);
  const auto now = std::chrono::steady_clock::now();
  if (!lock.owns_lock() || now < next_print_) return;
  next_print_ = now + (terminal_ ? std::chrono::duration_cast<std::chrono::milliseconds>(kTerminalInterval)
                                 : std::chrono::duration_cast<std::chrono::milliseconds>(kLogInterval));
  if (terminal_) {
    std::fprintf(stderr, "\r\033[K%s", line(done).c_str());
    std::fflush(stderr);
  } else if (seconds() > 1) {
    spdlog::info("{}", line(done));
  }
}

Progress::~Progress() {
  if (terminal_) std::fprintf(stderr, "\r\033[K");
  spdlog::info("{}", line(done_.load()));
}

double Progress::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

}  // namespace tokenspeed

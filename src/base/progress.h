// Progress of a long operation (load, compile, prefill, bench): one line that redraws itself on a terminal, a log line
// every few seconds otherwise. Thread-safe: any thread may advance it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

namespace tokenspeed {

class Progress {
 public:
  // total and advance() count in `unit`s ("bytes" are printed as GB with a rate).
  Progress(std::string label, int64_t total, std::string unit = "bytes");
  // Ends the line with the seconds taken and the rate.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void advance(int64_t amount);
  double seconds() const;

 private:
  std::string line(int64_t done) const;

  const std::string label_;
  const int64_t total_;
  const std::string unit_;
  const bool terminal_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::atomic<int64_t> done_{0};
  std::mutex mutex_;
  std::chrono::steady_clock::time_point next_print_ = start_;
};

}  // namespace tokenspeed

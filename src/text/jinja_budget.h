// What one rendering may spend, so that no template or request can hold a thread or the memory. A step is one
// statement, expression or 64 bytes of data walked over or made; exceeding a limit throws TemplateError.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "text/jinja_value.h"

namespace tokenspeed::text::jinja {

struct Limits {
  uint64_t steps = 10'000'000;
  size_t output_bytes = size_t{64} << 20;
  int recursion = 1000;  // statements, expressions and macro calls inside each other
};

class Budget {
 public:
  explicit Budget(const Limits& limits) : limits_(limits) {}
  const Limits& limits() const { return limits_; }
  void step() { spend(1); }
  void bytes(uint64_t count) { spend(1 + count / 64); }

 private:
  void spend(uint64_t count) {
    if (count > limits_.steps - used_) {
      throw TemplateError("rendering took more than " + std::to_string(limits_.steps) +
                          " steps; the template loops too long or the request is too large");
    }
    used_ += count;
  }
  Limits limits_;
  uint64_t used_ = 0;
};

}  // namespace tokenspeed::text::jinja

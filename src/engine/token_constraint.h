// Narrows what a request may generate, token by token: the engine tells it each token of the output and asks it before
// each sampling which may come next. Called on the step thread only; allowed() is on the path of every step, so it
// must be quick.
#pragma once

#include <cstdint>
#include <span>

namespace tokenspeed::engine {

class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;
  // `token` was sampled.
  virtual void push(int32_t token) = 0;
  // The tokens that may come next, each below the model's vocabulary size; empty: any. Valid until the next push.
  virtual std::span<const int32_t> allowed() = 0;
};

}  // namespace tokenspeed::engine

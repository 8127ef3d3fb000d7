// The server's metrics under vLLM's names, in Prometheus' text format. Thread-safe; observing costs well under 1 µs.
#pragma once

#include <memory>
#include <string>

#include "engine/engine.h"

namespace tokenspeed::server {

class Metrics {
 public:
  explicit Metrics(const std::string& model_name);
  ~Metrics();
  void observe_first_token(double seconds);
  void observe_inter_token(double seconds);
  void observe_request(double seconds, const std::string& finished_reason);
  std::string render(const engine::Statistics& statistics);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tokenspeed::server

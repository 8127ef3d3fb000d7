// What a step of the GPU costs beside the GPU's own work: CPU time of the thread that runs it, and the time in which
// the GPU waits for the next one.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "app/runner_bench.h"
#include "runtime/runner.h"

namespace tokenspeed::app {

class StepOverheads {
 public:
  // A runner of make_gpu_runner, which must outlive this.
  explicit StepOverheads(runtime::Runner* runner) : runner_(runner) {}

  // Note the gap before each step but the first.
  BenchBatch::StepCalls noting_gaps();
  // Note CPU time without what it takes to poll for a step's end: steps are given twice `step_seconds` first.
  BenchBatch::StepCalls noting_host_time(double step_seconds);

  // Medians, seconds.
  double gap() const;
  double host() const;

 private:
  runtime::Runner* runner_;
  bool follows_ = false;  // a step that was noted
  std::vector<double> gaps_;
  double host_of_step_ = 0;
  std::vector<double> host_;
};

}  // namespace tokenspeed::app

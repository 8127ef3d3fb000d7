#include "app/step_overheads.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <utility>

#include "app/bench.h"
#include "app/device.h"

namespace tokenspeed::app {
namespace {

using Steps = std::span<const runtime::SequenceStep>;
using Results = std::vector<runtime::SequenceResult>*;

double thread_seconds() {
  timespec time = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

}  // namespace

BenchBatch::StepCalls StepOverheads::noting_gaps() {
  BenchBatch::StepCalls calls = BenchBatch::calls_of(runner_);
  calls.wait = [this](Results results) -> Status {
    TS_RETURN_IF_ERROR(runner_->wait(results));
    TS_ASSIGN_OR_RETURN(const auto times, gpu_step_times(*runner_));
    if (follows_ && times.second != 0) gaps_.push_back(static_cast<double>(times.first - times.second) * 1e-9);
    follows_ = true;
    return {};
  };
  return calls;
}

BenchBatch::StepCalls StepOverheads::noting_host_time(double step_seconds) {
  const auto submit = [this](Steps steps) -> Status {
    const double begin = thread_seconds();
    TS_RETURN_IF_ERROR(runner_->submit(steps));
    host_of_step_ += thread_seconds() - begin;
    return {};
  };
  const auto wait = [this, step_seconds](Results results) -> Status {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(2 * step_seconds);
    while (std::chrono::steady_clock::now() < end) {
    }
    const double begin = thread_seconds();
    TS_RETURN_IF_ERROR(runner_->wait(results));
    host_.push_back(std::exchange(host_of_step_, 0) + thread_seconds() - begin);
    return {};
  };
  return {submit, wait};
}

double StepOverheads::gap() const { return gaps_.empty() ? 0 : median(gaps_); }
double StepOverheads::host() const { return host_.empty() ? 0 : median(host_); }

}  // namespace tokenspeed::app

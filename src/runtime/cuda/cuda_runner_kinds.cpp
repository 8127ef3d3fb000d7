// Kinds of launches timed alone: CudaRunner::time_kinds.
#include <algorithm>
#include <string>
#include <utility>

#include "base/progress.h"
#include "compile/print.h"
#include "runtime/cuda/cuda_runner.h"

namespace tokenspeed::runtime {

// Launches that do the same with weights and caches of their own on operands in the same places of the arena. One
// after the other, each thus reads what a step has left for the first.
struct CudaRunner::LaunchKind {
  std::string name;  // of operations and places
  LaunchTime time;
  std::vector<size_t> launches;  // indices in the step, ascending
  GraphExec graph;               // the step up to the first of them, then all of them
  CudaEvent begin, end;
  std::vector<double> seconds;  // of all of them, by round
};

namespace {

std::string name_of(const compile::Program& program, std::span<const OperationPart> parts) {
  std::string name;
  const auto places = [&](const std::vector<int32_t>& values) {
    for (const int32_t id : values) name += " " + std::to_string(program.values[static_cast<size_t>(id)].offset);
  };
  for (const OperationPart& part : parts) {
    const compile::Operation& op = program.operations[static_cast<size_t>(part.operation)];
    name += compile::operation_label(op);
    places(op.inputs);
    places(op.outputs);
  }
  return name;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

}  // namespace

// Enqueues a step without its launches, and notes them.
Result<std::vector<CudaRunner::LaunchKind>> CudaRunner::list_kinds(const GraphKey& key) {
  std::vector<LaunchKind> kinds;
  size_t index = 0;
  TS_RETURN_IF_ERROR(enqueue(
      key,
      [&](std::span<const OperationPart> parts) -> Result<bool> {
        const std::string name = name_of(body_.program(), parts);
        auto kind = std::find_if(kinds.begin(), kinds.end(), [&](const LaunchKind& k) { return k.name == name; });
        if (kind == kinds.end()) {
          LaunchKind added;
          added.name = name;
          added.time.launches = 0;
          TS_ASSIGN_OR_RETURN(added.begin, make_event(true));
          TS_ASSIGN_OR_RETURN(added.end, make_event(true));
          kinds.push_back(std::move(added));
          kind = kinds.end() - 1;
        }
        ++kind->time.launches;
        kind->time.parts.insert(kind->time.parts.end(), parts.begin(), parts.end());
        kind->launches.push_back(index++);
        return false;
      },
      true));
  return kinds;
}

Status CudaRunner::capture_kind(const GraphKey& key, LaunchKind* kind) {
  const cudaStream_t stream = rank_.streams[0];
  const auto record = [&](const CudaEvent& event) {
    return cuda_check(cudaEventRecordWithFlags(event.get(), stream, cudaEventRecordExternal), "recording an event");
  };
  const auto enqueue_kind = [&]() -> Status {
    size_t index = 0;
    bool ended = false;
    TS_RETURN_IF_ERROR(enqueue(
        key,
        [&](std::span<const OperationPart>) -> Result<bool> {
          const size_t i = index++;
          if (i == kind->launches.front()) TS_RETURN_IF_ERROR(record(kind->begin));
          if (i == kind->launches.back() + 1) {
            ended = true;
            TS_RETURN_IF_ERROR(record(kind->end));
          }
          return i < kind->launches.front() || std::binary_search(kind->launches.begin(), kind->launches.end(), i);
        },
        true));
    return ended ? Status() : record(kind->end);
  };
  TS_ASSIGN_OR_RETURN(kind->graph, capture(enqueue_kind));
  return {};
}

Result<std::vector<LaunchTime>> CudaRunner::time_kinds(std::span<const SequenceStep> sequences, int32_t rounds) {
  TS_ASSIGN_OR_RETURN(const GraphKey key, begin_measured(sequences));
  const cudaStream_t stream = rank_.streams[0];
  const cudaStream_t second = std::exchange(rank_.streams[1], stream);
  const auto run = [&]() -> Result<std::vector<LaunchKind>> {
    TS_RETURN_IF_ERROR(send_input());
    TS_ASSIGN_OR_RETURN(std::vector<LaunchKind> kinds, list_kinds(key));
    for (LaunchKind& kind : kinds) TS_RETURN_IF_ERROR(capture_kind(key, &kind));
    Progress progress("timing operations", rounds + 1, "rounds");
    for (int32_t round = -1; round < rounds; ++round) {  // the first one warms up
      for (const LaunchKind& kind : kinds) {
        TS_RETURN_IF_ERROR(cuda_check(cudaGraphLaunch(kind.graph.get(), stream), "launching a kind of operation"));
      }
      TS_RETURN_IF_ERROR(cuda_check(cudaStreamSynchronize(stream), "timing kinds of operations"));
      for (LaunchKind& kind : kinds) {
        float milliseconds = 0;
        TS_RETURN_IF_ERROR(cuda_check(cudaEventElapsedTime(&milliseconds, kind.begin.get(), kind.end.get()), "timing"));
        if (round >= 0) kind.seconds.push_back(milliseconds * 1e-3);
      }
      progress.advance(1);
    }
    return kinds;
  };
  Result<std::vector<LaunchKind>> kinds = run();
  rank_.streams[1] = second;
  TS_RETURN_IF_ERROR(note_fault(kinds.status()));
  std::vector<LaunchTime> times;
  for (LaunchKind& kind : *kinds) {
    kind.time.seconds = median(std::move(kind.seconds));
    times.push_back(std::move(kind.time));
  }
  return times;
}

}  // namespace tokenspeed::runtime

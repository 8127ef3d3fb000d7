// Steps watched launch by launch: their times, and which of them made the device fail.
#include <chrono>
#include <string>
#include <thread>
#include <utility>

#include "kernels/cuda/embedding.h"
#include "runtime/cuda/cuda_call.h"
#include "runtime/cuda/cuda_runner.h"

namespace tokenspeed::runtime {
namespace {

// The stream is held up for as long as enqueuing a whole step may take, so that no launch waits for the host.
constexpr auto kEnqueueTime = std::chrono::milliseconds(20);

// What no kernel gets past: token ids at address 0.
void launch_fault(const CudaRank& rank) {
  kernels::Rows out = {rank.arena, DType::kBFloat16, 64};
  const kernels::Matrix table = {rank.arena, DType::kBFloat16, kernels::MatrixLayout::kRowMajor, 1, 64, nullptr};
  kernels::cuda::embedding({1, nullptr, table, out}, rank.streams[0]);
}

}  // namespace

std::string CudaRunner::describe_step() const {
  return "a step of " + std::to_string(batch_->batch().sequences) + " sequences and " +
         std::to_string(batch_->batch().tokens) + " tokens";
}

Status CudaRunner::note_fault(Status status) {
  if (status.code() != StatusCode::kInternal || !fault_.ok()) return status;
  // A call that reports an earlier launch's failure would blame its own operation.
  cudaGetLastError();
  const cudaError_t state = cudaDeviceSynchronize();
  if (state != cudaSuccess && !options_.debug_sync) {
    status = internal_error(cuda_check(state, "the GPU failed").message() + " in " + describe_step() +
                            "; with --debug-sync the message names the operation. The process must be started again");
  }
  fault_ = status;
  if (options_.on_fault) options_.on_fault(fault_);
  return status;
}

// Tests launch a fault; with debug_sync every launch is waited for before the next.
Status CudaRunner::enqueue_checked(const GraphKey& key) {
  std::string last = "the step's input";
  int32_t launches = 0;
  const auto check = [&]() -> Status {
    if (launches++ == options_.fault_after_launch + 1 && options_.fault_after_launch >= 0) launch_fault(rank_);
    if (!options_.debug_sync) return {};
    for (const cudaStream_t stream : rank_.streams) {
      Status status = cuda_check(cudaStreamSynchronize(stream), "running");
      if (!status.ok()) return std::move(status).with_context(last + " in " + describe_step());
    }
    return {};
  };
  TS_RETURN_IF_ERROR(enqueue(key, [&](std::span<const OperationPart> parts) -> Status {
    TS_RETURN_IF_ERROR(check());
    last = parts.empty() ? "sampling" : describe_operation(body_.program(), parts[0].operation);
    return {};
  }));
  return check();
}

Result<std::vector<LaunchTime>> CudaRunner::profile(std::span<const SequenceStep> sequences,
                                                    std::vector<SequenceResult>* results) {
  TS_ASSIGN_OR_RETURN(const GraphKey key, begin(sequences));
  if (!one_group_ || !host_rows_.empty()) {
    return invalid_argument("only greedy steps of at most " + std::to_string(body_.program().logit_rows) +
                            " tokens to sample can be profiled");
  }
  std::vector<LaunchTime> launches;
  std::vector<CudaEvent> events;
  const cudaStream_t stream = rank_.streams[0];
  const auto record = [&](std::span<const OperationPart> parts) -> Status {
    launches.push_back({std::vector<OperationPart>(parts.begin(), parts.end()), 0});
    TS_ASSIGN_OR_RETURN(CudaEvent event, make_event(true));
    events.push_back(std::move(event));
    return cuda_check(cudaEventRecord(events.back().get(), stream), "recording an event");
  };
  TS_RETURN_IF_ERROR(input_->send(stream));
  TS_RETURN_IF_ERROR(cuda_check(cudaLaunchHostFunc(
                                    stream, [](void*) { std::this_thread::sleep_for(kEnqueueTime); }, nullptr),
                                "profiling"));
  const cudaStream_t second = std::exchange(rank_.streams[1], stream);
  Status status = enqueue(key, record);
  if (status.ok()) status = record({});
  rank_.streams[1] = second;
  TS_RETURN_IF_ERROR(note_fault(std::move(status)));
  in_flight_ = true;
  TS_RETURN_IF_ERROR(wait(results));
  TS_RETURN_IF_ERROR(note_fault(cuda_check(cudaStreamSynchronize(stream), "profiling")));
  launches.pop_back();
  for (size_t i = 0; i < launches.size(); ++i) {
    float milliseconds = 0;
    TS_RETURN_IF_ERROR(
        cuda_check(cudaEventElapsedTime(&milliseconds, events[i].get(), events[i + 1].get()), "profiling"));
    launches[i].seconds = milliseconds * 1e-3;
  }
  return launches;
}

}  // namespace tokenspeed::runtime

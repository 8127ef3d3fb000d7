// Steps watched launch by launch: their times, and which of them made the device fail.
#include <chrono>
#include <string>
#include <thread>
#include <utility>

#include "kernels/cuda/embedding.h"
#include "runtime/cuda/cuda_call.h"
#include "runtime/cuda/cuda_runner.h"
#include "runtime/cuda/fault_dump.h"

namespace tokenspeed::runtime {
namespace {

// The stream is held up for as long as enqueuing a whole step may take, so that no launch waits for the host.
constexpr auto kEnqueueTime = std::chrono::milliseconds(20);

}  // namespace

// What no kernel gets past: token ids at address 0.
void CudaRunner::launch_fault(int32_t operation) {
  const compile::Operation& op = body_.program().operations[operation];
  const void* const data = op.weights.empty() ? rank_.arena : body_.weight(op, 0).matrix.data;
  kernels::Rows out = {rank_.arena, DType::kBFloat16, 64};
  const kernels::Matrix table = {data, DType::kBFloat16, kernels::MatrixLayout::kRowMajor, 1, 64, nullptr};
  kernels::cuda::embedding({1, nullptr, table, out}, rank_.streams[0]);
}

// The last one submitted; what fails while another is in flight may be either's.
std::string CudaRunner::describe_step() const {
  const std::string last = "a step of " + std::to_string(batch_->batch().sequences) + " sequences and " +
                           std::to_string(batch_->batch().tokens) + " tokens";
  return in_flight_ == 0 || options_.debug_sync ? last : last + " or the one before it";
}

// "operation 7 'router' of layer 0"; several launches may have been running.
std::string CudaRunner::describe_faulted_launches() const {
  std::string found;
  for (const LaunchParameters& parameters : take_faulted_launches()) {
    const int32_t operation = find_operation(body_, rank_, parameters);
    if (operation == compile::kNone) continue;
    const std::string one = describe_operation(body_.program(), operation);
    if (found.find(one) == std::string::npos) found += (found.empty() ? "" : " or ") + one;
  }
  return found;
}

Status CudaRunner::note_fault(Status status) {
  if (status.code() != StatusCode::kInternal || !fault_.ok()) return status;
  // A call that reports an earlier launch's failure would blame its own operation.
  cudaGetLastError();
  const cudaError_t state = cudaDeviceSynchronize();
  if (state != cudaSuccess && !options_.debug_sync) {
    const std::string launches = describe_faulted_launches();
    status =
        internal_error(cuda_check(state, "the GPU failed").message() + " in " +
                       (launches.empty() ? describe_step() + "; with --debug-faults the message names the operation"
                                         : launches + ", " + describe_step()) +
                       ". The process must be started again");
  }
  fault_ = status;
  if (options_.on_fault) options_.on_fault(fault_);
  return status;
}

Status CudaRunner::enqueue_step(const GraphKey& key) {
  const bool fails = options_.fault_after_launch >= 0 && number_ == options_.fault_in_step;
  return options_.debug_sync || fails ? enqueue_checked(key) : enqueue(key, {});
}

// Tests launch a fault; with debug_sync every launch is waited for before the next.
Status CudaRunner::enqueue_checked(const GraphKey& key) {
  std::string last = "the step's input";
  int32_t last_operation = 0;
  int32_t launches = 0;
  const auto check = [&]() -> Status {
    if (launches++ == options_.fault_after_launch + 1 && options_.fault_after_launch >= 0) launch_fault(last_operation);
    if (!options_.debug_sync) return {};
    for (const cudaStream_t stream : rank_.streams) {
      Status status = cuda_check(cudaStreamSynchronize(stream), "running");
      if (!status.ok()) return std::move(status).with_context(last + " in " + describe_step());
    }
    return {};
  };
  TS_RETURN_IF_ERROR(enqueue(key, [&](std::span<const OperationPart> parts) -> Result<bool> {
    TS_RETURN_IF_ERROR(check());
    if (!parts.empty()) last_operation = parts[0].operation;
    last = parts.empty() ? "sampling" : describe_operation(body_.program(), last_operation);
    return true;
  }));
  return check();
}

Result<CudaRunner::GraphKey> CudaRunner::begin_measured(std::span<const SequenceStep> sequences) {
  if (in_flight_ > 0) return internal_error("a step can be measured by parts when none is in flight");
  TS_ASSIGN_OR_RETURN(const GraphKey key, begin(sequences));
  if (last().one_group && last().host_rows.empty()) return key;
  return invalid_argument("only steps whose tokens the GPU chooses, at most " +
                          std::to_string(body_.program().logit_rows) + " of them, can be measured by parts");
}

Result<std::vector<LaunchTime>> CudaRunner::profile(std::span<const SequenceStep> sequences,
                                                    std::vector<SequenceResult>* results) {
  TS_ASSIGN_OR_RETURN(const GraphKey key, begin_measured(sequences));
  std::vector<LaunchTime> launches;
  std::vector<CudaEvent> events;
  const cudaStream_t stream = rank_.streams[0];
  const auto record = [&](std::span<const OperationPart> parts) -> Result<bool> {
    launches.push_back({std::vector<OperationPart>(parts.begin(), parts.end())});
    TS_ASSIGN_OR_RETURN(CudaEvent event, make_event(true));
    events.push_back(std::move(event));
    TS_RETURN_IF_ERROR(cuda_check(cudaEventRecord(events.back().get(), stream), "recording an event"));
    return true;
  };
  TS_RETURN_IF_ERROR(send_input());
  TS_RETURN_IF_ERROR(cuda_check(cudaLaunchHostFunc(
                                    stream, [](void*) { std::this_thread::sleep_for(kEnqueueTime); }, nullptr),
                                "profiling"));
  const cudaStream_t second = std::exchange(rank_.streams[1], stream);
  Status status = enqueue(key, record, true);
  if (status.ok()) status = record({}).status();
  rank_.streams[1] = second;
  TS_RETURN_IF_ERROR(note_fault(std::move(status)));
  in_flight_ = 1;
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

// Steps watched launch by launch: their times, and which of them made the device fail.
#include <chrono>
#include <string>
#include <thread>
#include <utility>

#include "runtime/cuda/cuda_call.h"
#include "runtime/cuda/cuda_runner.h"
#include "runtime/cuda/fault_dump.h"

namespace tokenspeed::runtime {
namespace {

// The stream is held up for as long as enqueuing a whole step may take, so that no launch waits for the host.
constexpr auto kEnqueueTime = std::chrono::milliseconds(20);

}  // namespace

// The last one submitted; what fails while another is in flight may be either's.
std::string CudaRunner::describe_step() const {
  const std::string last = "a step of " + std::to_string(batch_->batch().sequences) + " sequences and " +
                           std::to_string(batch_->batch().tokens) + " tokens";
  return in_flight_ == 0 || options_.debug_sync ? last : last + " or the one before it";
}

// "operation 7 'router' of layer 0"; several launches may have been running.
std::string CudaRunner::describe_faulted_launches() const {
  const auto launches = decode_.launches();
  std::string found;
  for (const LaunchParameters& parameters : take_faulted_launches()) {
    const std::vector<OperationPart> parts = find_launch(body_, rank_, launches, parameters);
    if (parts.empty()) continue;
    const std::string one = describe_operations(body_.program(), parts);
    if (found.find(one) == std::string::npos) found += (found.empty() ? "" : " or ") + one;
  }
  return found;
}

// ", which had come to operation 7 'router' of layer 0"; what runs behind the layers' launch may have failed as well.
// Nothing for steps of more tokens, which leave the progress as the last step of few tokens left it.
std::string CudaRunner::describe_progress() const {
  std::string found;
  if (!runs_fused(batch_->batch().tokens)) return found;
  for (const std::span<const OperationPart> parts : decode_.reached()) {
    found += (found.empty() ? ", which had come to " : " or ") + describe_operations(body_.program(), parts);
  }
  return found;
}

Status CudaRunner::note_fault(Status status) {
  if (status.code() != StatusCode::kInternal || !fault_.ok()) return status;
  // A call that reports an earlier launch's failure would blame its own operation.
  cudaGetLastError();
  const cudaError_t state = cudaDeviceSynchronize();
  if (state != cudaSuccess) {
    const std::string launches = describe_faulted_launches();
    std::string place = describe_step() + describe_progress();
    if (launches.empty()) {
      place += "; with --debug-sync the message names the operation";
    } else {
      place = launches + ", " + place;
    }
    // With debug_sync the status names the launch that was waited for. But while the driver writes a dump, waiting for
    // a launch that failed may end well and a later launch be the first to tell, so the dump knows better.
    if (!launches.empty() || !options_.debug_sync) {
      status = internal_error(cuda_check(state, "the GPU failed").message() + " in " + place +
                              ". The process must be started again");
    }
  }
  fault_ = status;
  if (options_.on_fault) options_.on_fault(fault_);
  return status;
}

Status CudaRunner::enqueue_step(const GraphKey& key) {
  if (number_ == options_.fault_in_step) TS_RETURN_IF_ERROR(spoil_state_slots(key));
  return options_.debug_sync ? enqueue_checked(key) : enqueue(key, {});
}

// Slot 0x01010101 is terabytes beyond the caches, where nothing is mapped.
Status CudaRunner::spoil_state_slots(const GraphKey& key) {
  const kernels::SequenceBatch batch = input_->step(key.sequences, key.tokens, 0).batch;
  return cuda_check(cudaMemsetAsync(const_cast<int32_t*>(batch.state_in), 1,
                                    static_cast<size_t>(key.sequences) * sizeof(int32_t), rank_.streams[0]),
                    "spoiling state slots");
}

// Every launch is waited for before the next.
Status CudaRunner::enqueue_checked(const GraphKey& key) {
  std::string last = "the step's input";
  const auto check = [&]() -> Status {
    for (const cudaStream_t stream : rank_.streams) {
      Status status = cuda_check(cudaStreamSynchronize(stream), "running");
      if (!status.ok()) return std::move(status).with_context(last + " in " + describe_step());
    }
    return {};
  };
  const auto observe = [&](std::span<const OperationPart> parts) -> Result<bool> {
    TS_RETURN_IF_ERROR(check());
    last = parts.empty() ? "sampling" : describe_operations(body_.program(), parts);
    return true;
  };
  TS_RETURN_IF_ERROR(enqueue(key, observe, options_.operations_apart));
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

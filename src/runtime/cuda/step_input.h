// What the host tells the GPU about a step: one block in page-locked memory, sent with one copy. Positions, sequences
// and the page table are kept on the device and worked out there; of the page table only changes travel.
// Blocks of two steps in a row are apart, on both sides, so that one can be filled and sent while the step before runs.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/step.h"
#include "runtime/cuda/cuda_program.h"
#include "runtime/cuda/device.h"
#include "runtime/step_batch.h"

namespace tokenspeed::runtime {

class StepInput {
 public:
  static Result<StepInput> allocate(const Capacity& capacity);

  // Lays the step out in the block of its number; the step of that number less two must have ended. `wanted` are rows
  // of the step. `sampling` are the parameters of the first wanted rows, at most max_sequences of them. Everything
  // below is about the step filled last.
  void fill(const StepBatch& batch, std::span<const SequenceStep> sequences, std::span<const int32_t> wanted,
            std::span<const kernels::cuda::DecodeSampleRow> sampling, uint64_t number);
  // Sends the block (not captured in graphs); the stream need not wait for the step before.
  Status send(cudaStream_t stream) const;
  // Sends long changes of the page table (not captured), behind the step before.
  Status send_pages(cudaStream_t stream) const;
  // Works the block out on the device (captured, for each block). `sampled` are the tokens of the step before, which
  // negative token ids stand for.
  Status expand(int32_t sequences, int32_t tokens, const int32_t* sampled, cudaStream_t stream) const;
  int32_t block() const { return block_; }

  // Device pointers for a step of these sizes.
  CudaStep step(int32_t sequences, int32_t tokens, int32_t wanted) const;
  const uint64_t* device_number() const { return at<const uint64_t>(device(), 0); }
  // When the GPU began the step, which expand() writes, and a place for its end; by the GPU's clock in ns.
  uint64_t* device_times() const { return at<uint64_t>(times_.data(), 0) + 2 * block_; }
  const kernels::cuda::DecodeSampleRow* device_sampling() const {
    return at<const kernels::cuda::DecodeSampleRow>(device(), layout_.sampling);
  }

 private:
  // Byte offsets in the block. The token ids come after everything whose size does not depend on the step.
  struct Layout {
    int64_t change_count, token_begin, context, state_in, state_out, sampling, changes, wanted, ids, more_wanted, bytes;
  };
  template <typename T>
  static T* at(std::byte* base, int64_t offset) {
    return reinterpret_cast<T*>(base + offset);
  }
  std::byte* host() const { return host_[block_].data(); }
  std::byte* device() const { return device_[block_].data(); }
  void note_pages(int32_t sequence, const SequenceStep& step);
  bool few_wanted(int32_t count) const { return count <= capacity_.max_sequences; }

  Capacity capacity_;
  int64_t pages_per_sequence_ = 0;
  Layout layout_ = {};
  int32_t block_ = 0;
  PinnedMemory host_[kMostStepsInFlight];
  PinnedMemory long_pages_[kMostStepsInFlight];  // long changes, in their places in the table
  DeviceMemory device_[kMostStepsInFlight];
  DeviceMemory position_, sequence_, table_, times_;
  std::vector<int32_t> table_mirror_;  // what the device's page table holds when the step runs
  int64_t used_bytes_ = 0;
  struct Range {
    int64_t begin, size;
  };
  std::vector<Range> long_changes_;  // of the table, copied whole
};

}  // namespace tokenspeed::runtime

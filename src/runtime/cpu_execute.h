// A Program bound to a CPU rank's weights, and its execution: one kernel call per operation, in the order of the list
// (streams are for devices that run several operations at once).
// Cost besides the kernels: well under a microsecond per operation; nothing is allocated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/thread_pool.h"
#include "compile/program.h"
#include "kernels/types.h"
#include "runtime/caches.h"
#include "runtime/cpu_weights.h"
#include "runtime/host_memory.h"

namespace tokenspeed::runtime {

using CpuCaches = Caches<HostMemory>;

// What a step gives the operations besides the arena.
struct CpuStep {
  const kernels::SequenceBatch* batch = nullptr;
  const int32_t* token_ids = nullptr;  // [T]
  const int32_t* wanted = nullptr;     // rows whose logits the head computes
  int32_t wanted_count = 0;            // at most the Program's logit_rows
  double* seconds = nullptr;           // by the Program's index: each operation adds its time, where measured
};

// Where a Program runs; shared by the Programs of a rank, which run one at a time.
struct CpuRank {
  std::byte* arena = nullptr;
  void* workspace = nullptr;
  const CpuCaches* caches = nullptr;
  ThreadPool* pool = nullptr;
  bool reference_kernels = false;
};

class CpuProgram {
 public:
  CpuProgram() = default;
  // The weights must hold all that the Program names.
  CpuProgram(compile::Program program, const CpuWeights& weights);

  const compile::Program& program() const { return program_; }
  // Of the greatest operation at the Program's greatest number of rows.
  int64_t workspace_bytes() const;

  // Everything up to the rows after the final norm, for batch->tokens <= program().tokens rows.
  void run_body(const CpuRank& rank, const CpuStep& step) const;
  // The logits of the wanted rows of the last run_body.
  void run_head(const CpuRank& rank, const CpuStep& step) const;

  // One operation by its index. Collectives do nothing here: they belong to whoever holds all ranks.
  void run_operation(const CpuRank& rank, const CpuStep& step, size_t index) const;

  // Row `row` of a value in the arena.
  kernels::Rows rows(const CpuRank& rank, int32_t value, int64_t row = 0) const;

 private:
  compile::Program program_;
  std::vector<LoadedWeight> weights_;  // by the Program's index
};

}  // namespace tokenspeed::runtime

// What a Program costs on a device: bytes, FLOPs and predicted time of each operation and of a step, memory per rank,
// whether it fits and what a million tokens cost.
//
// Model: an operation takes max(bytes / read bandwidth, FLOPs / peak), each at the share that the device's kernels for
// this family and number of tokens reach, plus a fixed time (compile/calibration.h); a collective its latency plus
// bytes / link bandwidth. With few or some tokens the fixed time is paid once per phase (compile/phases.h) by the
// operation that moves most bytes in it; with many, once per operation, and operations on different streams overlap,
// but share the memory's bandwidth. FLOPs are those of matrix products, attention, the convolution and the recurrence;
// element-wise work is not counted, it hides behind its bytes. Writes count like reads.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compile/device.h"
#include "compile/program.h"

namespace tokenspeed::compile {

// One step: the Program's `tokens` spread evenly over the sequences, each with `context` tokens before them; one row of
// logits wanted per sequence.
struct Workload {
  int64_t sequences = 1;  // 1 .. tokens
  int64_t context = 0;
  double price_per_hour = 0;  // of one device, in any currency; 0: not asked
};

struct OperationCost {
  int64_t weight_bytes = 0;  // experts: of the distinct experts expected
  int64_t cache_bytes = 0;   // KV pages and state slots, read and written
  int64_t activation_bytes = 0;
  int64_t link_bytes = 0;  // sent to other ranks
  double flops = 0;
  double byte_seconds = 0;  // the bytes at the read bandwidth
  double flop_seconds = 0;  // the FLOPs at the peak
  int32_t phases = 0;       // times the fixed time is paid
  double seconds = 0;       // predicted, alone
  double floor_seconds() const { return byte_seconds > flop_seconds ? byte_seconds : flop_seconds; }
  int64_t bytes() const { return weight_bytes + cache_bytes + activation_bytes; }
};

// Bytes on one rank.
struct MemoryNeed {
  int64_t weights = 0;
  int64_t arena = 0;
  int64_t state_per_sequence = 0;
  int64_t kv_per_token = 0;
  int64_t available = 0;  // of the device, less what driver, code and workspaces take
  int64_t kv_tokens = 0;  // KV positions that fit beside all else, for the workload's number of sequences
  bool fits = false;      // with the workload's context for each of its sequences
};

struct Cost {
  Workload workload;
  std::vector<OperationCost> operations;  // by the Program's index
  OperationCost total;                    // seconds: predicted for the step
  double phase_floor_seconds = 0;         // the bytes and the least a dependent phase costs; 0 with many tokens
  double roofline_seconds = 0;            // every byte at the read bandwidth, or every FLOP at its peak if that is more
  MemoryNeed memory;
  double tokens_per_second() const;  // new tokens of the step over its predicted time
  double roofline_tokens_per_second() const;
  double price_per_million_tokens() const;  // over all ranks; 0 when no price was given
  int64_t tokens = 0;
  int64_t ranks = 1;
};

// invalid_argument: sequences outside [1, program.tokens] or a negative context or price.
Result<Cost> estimate_cost(const Program& program, const DeviceSpec& device, const Workload& workload = {});

// Predicted seconds of a prompt of `tokens` in steps of at most `chunk`, on an empty cache, to the first sampled token.
// `options` but for its numbers of tokens and rows. Compiles one or two Programs.
Result<double> estimate_prompt_seconds(const Graph& graph, CompileOptions options, const DeviceSpec& device,
                                       int64_t tokens, int64_t chunk);

// Experts of `experts` that at least one of `tokens` tokens chooses, each choosing top_k at random.
double expected_distinct_experts(int64_t experts, int64_t top_k, int64_t tokens);

// Bytes of all weights of the Programs, those with the same name once.
int64_t weight_memory(std::span<const Program* const> programs);

}  // namespace tokenspeed::compile

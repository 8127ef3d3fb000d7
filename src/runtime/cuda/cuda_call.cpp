#include "runtime/cuda/cuda_call.h"

#include <algorithm>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/gated_delta_net.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mlp.h"
#include "kernels/cuda/norm.h"

namespace tokenspeed::runtime {
namespace {

using compile::Operation;
using compile::OpKind;
namespace cuda = kernels::cuda;

// A stand-in for a collective that gathers or scatters columns: the columns this rank has itself.
Status copy_share(const CudaProgram& program, const CudaRank& rank, const CudaStep& step, const Operation& op) {
  const compile::ProgramValue& input = program.program().values[op.inputs[0]];
  const compile::ProgramValue& output = program.program().values[op.outputs[0]];
  const kernels::Rows from = program.rows(rank, op.inputs[0]);
  const kernels::Rows to = program.rows(rank, op.outputs[0]);
  const int64_t element = static_cast<int64_t>(dtype_size(from.dtype));
  const int64_t width = std::min(input.columns, output.columns);
  const int64_t rows = output.rows == compile::RowSymbol::kTokens ? step.batch.tokens : step.wanted_count;
  // Of a gather every share is this rank's: what is left in the arena there could be read as a NaN.
  for (int64_t at = 0; at + width <= output.columns; at += width) {
    TS_RETURN_IF_ERROR(
        cuda_check(cudaMemcpy2DAsync(static_cast<std::byte*>(to.data) + at * element, to.stride * element, from.data,
                                     from.stride * element, width * element, rows, cudaMemcpyDeviceToDevice,
                                     rank.streams[op.stream]),
                   "copying"));
  }
  return {};
}

Status execute(const CudaProgram& program, const CudaRank& rank, const CudaStep& step, const Operation& op) {
  const OperationMemory memory = {program.program(), program.weights(), rank.arena,     rank.workspace[op.stream],
                                  *rank.caches,      step.batch,        step.token_ids, step.wanted,
                                  step.wanted_count};
  const OperationArguments arguments(memory, op);
  const cudaStream_t stream = rank.streams[op.stream];
  switch (op.kind) {
    case OpKind::kEmbedding:
      return cuda::embedding(arguments.embedding(), stream);
    case OpKind::kRmsNorm:
    case OpKind::kAllReduceRmsNorm:
      cuda::rms_norm(arguments.rms_norm(), stream);
      break;
    case OpKind::kLinear:
      return cuda::linear(arguments.linear(), stream);
    case OpKind::kSplitQueryGate:
      cuda::split_query_gate(arguments.split_query_gate(), stream);
      break;
    case OpKind::kHeadRmsNorm:
      cuda::head_rms_norm(arguments.head_rms_norm(), stream);
      break;
    case OpKind::kRope:
      cuda::rope(arguments.rope(), stream);
      break;
    case OpKind::kKvWrite:
      cuda::kv_write(arguments.kv_write(), stream);
      break;
    case OpKind::kAttention:
      cuda::paged_attention(arguments.attention(), stream);
      break;
    case OpKind::kSigmoidMultiply:
      cuda::sigmoid_multiply(arguments.sigmoid_multiply(), stream);
      break;
    case OpKind::kCausalConv:
      cuda::causal_conv(arguments.causal_conv(), stream);
      break;
    case OpKind::kGdnGates:
      cuda::gdn_gates(arguments.gdn_gates(), stream);
      break;
    case OpKind::kGdnL2Norm:
      cuda::gdn_l2_norm(arguments.gdn_l2_norm(), stream);
      break;
    case OpKind::kGatedDeltaRule:
      cuda::gated_delta_rule(arguments.gated_delta_rule(), stream);
      break;
    case OpKind::kGatedRmsNorm:
      cuda::gated_rms_norm(arguments.gated_rms_norm(), stream);
      break;
    case OpKind::kSwiGlu:
      cuda::swiglu(arguments.swiglu(), stream);
      break;
    case OpKind::kRouter:
      cuda::moe_router(arguments.router(), stream);
      break;
    case OpKind::kExperts:
      cuda::moe_experts(arguments.experts(), stream);
      break;
    case OpKind::kScaleRowsBySigmoid:
      cuda::scale_rows_by_sigmoid(arguments.scale_rows_by_sigmoid(), stream);
      break;
    case OpKind::kAdd:
      cuda::add(arguments.add(), stream);
      break;
    case OpKind::kGatherRows:
      return cuda::gather_rows(arguments.gather_rows(), stream);
    case OpKind::kAttentionPrepare:
      cuda::attention_prepare(arguments.attention_prepare(), stream);
      break;
    case OpKind::kGdnMixer:
      cuda::gdn_mixer(arguments.gdn_mixer(), stream);
      break;
    case OpKind::kSharedExpertCombine:
      cuda::shared_expert_combine(arguments.shared_expert_combine(), stream);
      break;
    case OpKind::kAllReduce:
      break;
    case OpKind::kAllGather:
    case OpKind::kReduceScatter:
      return copy_share(program, rank, step, op);
  }
  return cuda_check(cudaPeekAtLastError(), "launching the kernel");
}

// How many of an operation's addresses are among a launch's parameters.
struct KnownAddresses {
  int own = 0;     // of weights and caches
  int values = 0;  // in the arena, where others have theirs at other times
};

KnownAddresses known_addresses(const CudaProgram& program, const CudaRank& rank, const Operation& op,
                               const std::set<uint64_t>& words) {
  const auto known = [&](const void* address) {
    return address != nullptr && words.contains(reinterpret_cast<uint64_t>(address)) ? 1 : 0;
  };
  KnownAddresses found;
  for (size_t i = 0; i < op.weights.size(); ++i) {
    const kernels::Matrix& matrix = program.weight(op, i).matrix;
    found.own += known(matrix.data) + known(matrix.scale);
  }
  const compile::Attributes& a = op.attributes;
  if (a.kv_layer != compile::kNone) found.own += known(rank.caches->kv(a.kv_layer).keys);
  if (a.state_layer != compile::kNone) found.own += known(rank.caches->state(a.state_layer).recurrent);
  for (const int32_t value : op.inputs) found.values += known(program.rows(rank, value).data);
  for (const int32_t value : op.outputs) found.values += known(program.rows(rank, value).data);
  return found;
}

}  // namespace

std::string describe_operation(const compile::Program& program, int32_t index) {
  const Operation& op = program.operations[index];
  const std::string layer = op.layer == compile::kNone ? "" : " of layer " + std::to_string(op.layer);
  return "operation " + std::to_string(index) + " '" + op.name + "'" + layer;
}

std::string describe_operations(const compile::Program& program, std::span<const OperationPart> parts) {
  const auto [first, last] = std::minmax_element(
      parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.operation < b.operation; });
  if (first->operation == last->operation) return describe_operation(program, first->operation);
  const auto numbered = [&](const OperationPart& part) {
    return std::to_string(part.operation) + " '" + program.operations[part.operation].name + "'";
  };
  const int32_t from = program.operations[first->operation].layer;
  const int32_t to = program.operations[last->operation].layer;
  const std::string layers = from == to ? " of layer " + std::to_string(from)
                                        : " of layers " + std::to_string(from) + " to " + std::to_string(to);
  return "operations " + numbered(*first) + " to " + numbered(*last) + layers;
}

std::vector<OperationPart> find_launch(const CudaProgram& program, const CudaRank& rank,
                                       std::span<const std::span<const OperationPart>> launches,
                                       std::span<const uint64_t> parameters) {
  const std::set<uint64_t> words(parameters.begin(), parameters.end());
  const auto& operations = program.program().operations;
  std::vector<KnownAddresses> known;
  known.reserve(operations.size());
  for (const Operation& op : operations) known.push_back(known_addresses(program, rank, op, words));

  std::vector<OperationPart> best;
  std::tuple<int, int, bool, int> best_rank = {0, 0, false, 0};
  const auto consider = [&](std::span<const OperationPart> parts, bool planned) {
    std::set<int32_t> distinct;  // two parts may be shares of one operation
    for (const OperationPart& part : parts) distinct.insert(part.operation);
    KnownAddresses all;
    for (const int32_t operation : distinct) {
      all.own += known[operation].own;
      all.values += known[operation].values;
    }
    if (all.own + all.values == 0) return;
    const std::tuple rank_of = {all.own, -static_cast<int>(distinct.size()), planned && all.own > 0, all.values};
    if (!best.empty() && rank_of <= best_rank) return;
    best.assign(parts.begin(), parts.end());
    best_rank = rank_of;
  };
  for (const std::span<const OperationPart> parts : launches) consider(parts, true);
  for (int32_t i = 0; i < static_cast<int32_t>(operations.size()); ++i) {
    const OperationPart part = {.operation = i};
    consider({&part, 1}, false);
  }
  return best;
}

Status call_operation(const CudaProgram& program, const CudaRank& rank, const CudaStep& step, int32_t index) {
  Status status = execute(program, rank, step, program.program().operations[index]);
  return status.ok() ? std::move(status) : std::move(status).with_context(describe_operation(program.program(), index));
}

}  // namespace tokenspeed::runtime

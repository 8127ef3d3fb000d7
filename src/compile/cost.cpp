#include "compile/cost.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <string>

#include "compile/phases.h"

namespace tokenspeed::compile {
namespace {

// The rest goes to the driver, code, workspaces and what the allocator cannot use.
constexpr double kUsableMemory = 0.92;

class Estimate {
 public:
  Estimate(const Program& program, const DeviceSpec& device, const Workload& workload)
      : program_(program), device_(device), workload_(workload), regime_(regime_of(program.tokens)) {}

  Cost run() {
    Cost cost;
    cost.workload = workload_;
    cost.tokens = program_.tokens;
    cost.ranks = program_.mesh.size(Axis::kTensor);
    for (size_t i = 0; i < program_.operations.size(); ++i) {
      cost.operations.push_back(times(count(program_.operations[i]), runs(i)));
    }
    assign_phases(&cost);
    for (size_t i = 0; i < program_.operations.size(); ++i) {
      OperationCost& one = cost.operations[i];
      one.seconds = work(i, one) + fixed(i) * one.phases;
      add(one, &cost.total);
    }
    if (!by_phases()) cost.total.seconds = overlapped_seconds(cost.operations);
    cost.total.seconds += device_.calibration.step_seconds[static_cast<size_t>(regime_)];
    cost.roofline_seconds = cost.total.floor_seconds();
    cost.memory = memory();
    return cost;
  }

 private:
  int64_t logit_rows() const { return std::min(program_.logit_rows, workload_.sequences); }
  // The head runs once per group of wanted rows.
  int64_t runs(size_t operation) const {
    if (static_cast<int32_t>(operation) < program_.head_begin) return 1;
    return (workload_.sequences + logit_rows() - 1) / logit_rows();
  }
  double tokens() const { return static_cast<double>(program_.tokens); }
  double sequences() const { return static_cast<double>(workload_.sequences); }
  double ranks() const { return static_cast<double>(program_.mesh.size(Axis::kTensor)); }

  int64_t rows(const ProgramValue& value) const {
    return value.rows == RowSymbol::kTokens ? program_.tokens : logit_rows();
  }
  int64_t value_bytes(int32_t id) const {
    const ProgramValue& value = program_.values[id];
    return rows(value) * value.columns * static_cast<int64_t>(dtype_size(value.dtype));
  }

  static OperationCost times(OperationCost cost, int64_t runs) {
    cost.weight_bytes *= runs;
    cost.activation_bytes *= runs;
    cost.link_bytes *= runs;
    cost.flops *= static_cast<double>(runs);
    cost.byte_seconds *= static_cast<double>(runs);
    cost.flop_seconds *= static_cast<double>(runs);
    return cost;
  }
  static void add(const OperationCost& one, OperationCost* total) {
    total->weight_bytes += one.weight_bytes;
    total->cache_bytes += one.cache_bytes;
    total->activation_bytes += one.activation_bytes;
    total->link_bytes += one.link_bytes;
    total->flops += one.flops;
    total->byte_seconds += one.byte_seconds;
    total->flop_seconds += one.flop_seconds;
    total->phases += one.phases;
    total->seconds += one.seconds;
  }

  double peak(const Operation& operation) const {
    const bool fp8 = !operation.weights.empty() && program_.weights[operation.weights[0]].dtype == DType::kFloat8E4M3;
    return fp8 ? device_.fp8_flops : device_.bf16_flops;
  }

  OperationCost count(const Operation& operation) const {
    OperationCost cost;
    for (int32_t id : operation.inputs) cost.activation_bytes += value_bytes(id);
    for (int32_t id : operation.outputs) cost.activation_bytes += value_bytes(id);
    cost.weight_bytes = weight_bytes(operation);
    cost.cache_bytes = cache_bytes(operation);
    cost.link_bytes = link_bytes(operation);
    cost.flops = flops(operation);
    cost.byte_seconds = static_cast<double>(cost.bytes()) / device_.read_bandwidth;
    cost.flop_seconds = cost.flops / peak(operation);
    return cost;
  }

  const FamilyRate& rate(size_t operation) const {
    return device_.calibration.rate(regime_, family_of(program_.operations[operation].kind));
  }
  double work(size_t operation, const OperationCost& cost) const {
    const FamilyRate& reached = rate(operation);
    return std::max(cost.byte_seconds / reached.bandwidth_share, cost.flop_seconds / reached.flops_share) +
           static_cast<double>(cost.link_bytes) / device_.collective_bandwidth;
  }
  double fixed(size_t operation) const {
    if (is_collective(program_.operations[operation].kind)) return device_.collective_seconds;
    const FamilyRate& reached = rate(operation);
    return device_.operation_seconds + reached.fixed_seconds + reached.token_seconds * tokens();
  }

  bool by_phases() const { return regime_ != TokenRegime::kMany; }
  // Which operations pay for a phase, and the least that all phases cost.
  void assign_phases(Cost* cost) const {
    if (!by_phases()) {
      for (size_t i = 0; i < cost->operations.size(); ++i) cost->operations[i].phases = static_cast<int32_t>(runs(i));
      return;
    }
    for (const OperationCost& one : cost->operations) {
      cost->phase_floor_seconds +=
          one.floor_seconds() + static_cast<double>(one.link_bytes) / device_.collective_bandwidth;
    }
    for (const Phase& phase : group_into_phases(program_)) {
      auto heaviest = static_cast<size_t>(phase.steps.front().operation);
      for (const PhaseStep& step : phase.steps) {
        const auto operation = static_cast<size_t>(step.operation);
        if (phase.communication ? is_collective(program_.operations[operation].kind)
                                : cost->operations[operation].bytes() > cost->operations[heaviest].bytes()) {
          heaviest = operation;
        }
      }
      cost->operations[heaviest].phases += static_cast<int32_t>(runs(heaviest));
      cost->phase_floor_seconds += static_cast<double>(runs(heaviest)) *
                                   (phase.communication ? device_.collective_seconds : device_.operation_seconds);
    }
  }

  int64_t weight_bytes(const Operation& operation) const {
    int64_t bytes = 0;
    for (int32_t id : operation.weights) {
      const ProgramWeight& weight = program_.weights[id];
      if (operation.kind == OpKind::kEmbedding) {
        bytes += program_.tokens * weight.columns * static_cast<int64_t>(dtype_size(weight.dtype));
      } else if (operation.kind == OpKind::kExperts) {
        const Attributes& moe = operation.attributes;
        const double distinct = expected_distinct_experts(moe.experts, moe.top_k, program_.tokens);
        bytes += std::llround(distinct * static_cast<double>(weight.bytes()) / static_cast<double>(weight.count));
      } else {
        bytes += weight.bytes();
      }
    }
    return bytes;
  }

  int64_t cache_bytes(const Operation& operation) const {
    const Attributes& attributes = operation.attributes;
    const auto kv = [&] { return program_.kv.bytes_per_position(attributes.kv_layer); };
    const auto recurrent = [&] { return 4 * attributes.value_heads * attributes.value_dim * attributes.key_dim; };
    const auto conv = [&] {
      const StateShape& shape = program_.state.layers[attributes.state_layer].shape;
      return shape.conv_rows * shape.channels * static_cast<int64_t>(dtype_size(program_.state.conv_dtype));
    };
    switch (operation.kind) {
      case OpKind::kKvWrite:
      case OpKind::kAttentionPrepare:
        return program_.tokens * kv();
      case OpKind::kAttention:
        return (workload_.sequences * workload_.context + program_.tokens) * kv();
      case OpKind::kCausalConv:
        return 2 * workload_.sequences * conv();
      case OpKind::kGatedDeltaRule:
        return 2 * workload_.sequences * recurrent();
      case OpKind::kGdnMixer:
        return 2 * workload_.sequences * (recurrent() + conv());
      default:
        return 0;
    }
  }

  int64_t link_bytes(const Operation& operation) const {
    const double others = (ranks() - 1) / ranks();
    switch (operation.kind) {
      case OpKind::kAllReduce:
        return std::llround(2 * others * static_cast<double>(value_bytes(operation.inputs[0])));
      case OpKind::kAllReduceRmsNorm:
        return std::llround(2 * others * static_cast<double>(value_bytes(operation.inputs[1])));
      case OpKind::kAllGather:
        return std::llround(others * static_cast<double>(value_bytes(operation.outputs[0])));
      case OpKind::kReduceScatter:
        return std::llround(others * static_cast<double>(value_bytes(operation.inputs[0])));
      default:
        return 0;
    }
  }

  double flops(const Operation& operation) const {
    const Attributes& attributes = operation.attributes;
    const auto matrix = [&](int32_t id) {
      return 2.0 * static_cast<double>(program_.weights[id].rows) * static_cast<double>(program_.weights[id].columns);
    };
    const auto rule = [&] {
      // Decay, read, difference, rank-1 update and output: 7 per element of the state.
      return 7.0 * static_cast<double>(attributes.value_heads * attributes.value_dim * attributes.key_dim) * tokens();
    };
    const auto conv = [&] {
      return 2.0 *
             static_cast<double>(attributes.conv_kernel *
                                 program_.state.layers[attributes.state_layer].shape.channels) *
             tokens();
    };
    switch (operation.kind) {
      case OpKind::kLinear:
        return matrix(operation.weights[0]) * static_cast<double>(rows(program_.values[operation.outputs[0]]));
      case OpKind::kExperts:
        return (matrix(operation.weights[0]) + matrix(operation.weights[1])) * static_cast<double>(attributes.top_k) *
               tokens();
      case OpKind::kSharedExpertCombine:
        return matrix(operation.weights[0]) * tokens();
      case OpKind::kAttention: {
        const double seen = static_cast<double>(workload_.context) + (tokens() / sequences() + 1) / 2;
        return 4.0 * static_cast<double>(attributes.query_heads * attributes.head_dim) * tokens() * seen;
      }
      case OpKind::kCausalConv:
        return conv();
      case OpKind::kGatedDeltaRule:
        return rule();
      case OpKind::kGdnMixer:
        return conv() + rule();
      default:
        return 0;
    }
  }

  // Plays the list: an operation starts when its stream is free and its inputs are written; its bytes queue behind
  // those of the operations that started before it.
  double overlapped_seconds(const std::vector<OperationCost>& costs) const {
    std::vector<double> written(program_.values.size(), 0);
    std::vector<double> free;
    double memory_free = 0;
    double end_of_step = 0;
    for (size_t i = 0; i < program_.operations.size(); ++i) {
      const Operation& operation = program_.operations[i];
      free.resize(std::max<size_t>(free.size(), static_cast<size_t>(operation.stream) + 1), 0);
      double start = free[operation.stream];
      for (int32_t id : operation.inputs) start = std::max(start, written[program_.values[id].root]);
      memory_free = std::max(memory_free, start) + costs[i].byte_seconds;
      const double end = std::max(start + costs[i].seconds, memory_free + fixed(i) * costs[i].phases);
      free[operation.stream] = end;
      for (int32_t id : operation.outputs) {
        double& at = written[program_.values[id].root];
        at = std::max(at, end);
      }
      end_of_step = std::max(end_of_step, end);
    }
    return end_of_step;
  }

  MemoryNeed memory() const {
    MemoryNeed need;
    const Program* const program = &program_;
    need.weights = weight_memory({&program, 1});
    need.arena = program_.arena_bytes;
    need.state_per_sequence = program_.state.bytes_per_slot;
    need.kv_per_token = program_.kv.bytes_per_position();
    need.available = static_cast<int64_t>(kUsableMemory * static_cast<double>(device_.memory_bytes));
    const int64_t rest = need.available - need.weights - need.arena - workload_.sequences * need.state_per_sequence;
    need.kv_tokens = need.kv_per_token > 0 ? std::max<int64_t>(0, rest / need.kv_per_token) : 0;
    const int64_t positions = workload_.sequences * workload_.context + program_.tokens;
    need.fits = rest >= positions * need.kv_per_token;
    return need;
  }

  const Program& program_;
  const DeviceSpec& device_;
  const Workload& workload_;
  const TokenRegime regime_;
};

}  // namespace

double Cost::tokens_per_second() const { return static_cast<double>(tokens) / total.seconds; }

double Cost::roofline_tokens_per_second() const { return static_cast<double>(tokens) / roofline_seconds; }

double Cost::price_per_million_tokens() const {
  return workload.price_per_hour * static_cast<double>(ranks) / 3600.0 / tokens_per_second() * 1e6;
}

Result<Cost> estimate_cost(const Program& program, const DeviceSpec& device, const Workload& workload) {
  if (workload.sequences < 1 || workload.sequences > program.tokens) {
    return invalid_argument("a step of " + std::to_string(program.tokens) + " tokens cannot be of " +
                            std::to_string(workload.sequences) + " sequences; give 1 to " +
                            std::to_string(program.tokens));
  }
  if (workload.context < 0) {
    return invalid_argument("the context is " + std::to_string(workload.context) + " tokens; it cannot be negative");
  }
  if (!(workload.price_per_hour >= 0)) return invalid_argument("the price per hour must be zero or more");
  return Estimate(program, device, workload).run();
}

Result<double> estimate_prompt_seconds(const Graph& graph, CompileOptions options, const DeviceSpec& device,
                                       int64_t tokens, int64_t chunk) {
  if (tokens < 1 || chunk < 1) {
    return invalid_argument("a prompt of " + std::to_string(tokens) + " tokens in steps of " + std::to_string(chunk) +
                            "; both must be at least 1");
  }
  options.logit_rows = 1;
  double seconds = 0;
  Program program;
  for (int64_t context = 0; context < tokens; context += chunk) {
    options.tokens = std::min(chunk, tokens - context);
    if (program.tokens != options.tokens) {
      TS_ASSIGN_OR_RETURN(program, compile_program(graph, options));
    }
    TS_ASSIGN_OR_RETURN(const Cost cost, estimate_cost(program, device, {.context = context}));
    seconds += cost.total.seconds;
    if (context + chunk >= tokens) break;
    const auto head = cost.operations.begin() + program.head_begin;  // of the last step only
    seconds -= std::accumulate(head, cost.operations.end(), 0.0,
                               [](double sum, const OperationCost& one) { return sum + one.seconds; });
  }
  return seconds;
}

double expected_distinct_experts(int64_t experts, int64_t top_k, int64_t tokens) {
  const double all = static_cast<double>(experts);
  return all * (1 - std::pow(1 - static_cast<double>(top_k) / all, static_cast<double>(tokens)));
}

int64_t weight_memory(std::span<const Program* const> programs) {
  std::set<std::string> seen;
  int64_t bytes = 0;
  for (const Program* program : programs) {
    for (const ProgramWeight& weight : program->weights) {
      if (seen.insert(weight.name).second) bytes += weight.bytes();
    }
  }
  return bytes;
}

}  // namespace tokenspeed::compile

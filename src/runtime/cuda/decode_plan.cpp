#include "runtime/cuda/decode_plan.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/norm.h"
#include "runtime/cuda/cuda_call.h"

namespace tokenspeed::runtime {

using compile::kNone;
using compile::Operation;
using compile::OpKind;
using kernels::Rows;
namespace cuda = kernels::cuda;

// Gate and up of an expert are as large as each other and as down.
constexpr double kGateUpShare = 2.0 / 3;

constexpr int64_t kBatchContext = 32768;  // that kBatchTokens sequences may always have

// Walks the operations in order and replaces what belongs together by one call.
class DecodePlanBuilder {
 public:
  DecodePlanBuilder(const CudaProgram& program, int64_t max_context)
      : program_(program),
        operations_(program.program().operations),
        max_context_(max_context),
        done_(operations_.size(), false) {}

  Result<DecodePlan> build() {
    plan_.program_ = &program_;
    TS_RETURN_IF_ERROR(allocate());
    for (int32_t i = 0; i < program_.program().head_begin; ++i) {
      if (done_[i]) continue;
      TS_ASSIGN_OR_RETURN(const bool known, place(i));
      if (!known) return DecodePlan();
    }
    plan_.group_calls();
    place_head();
    return std::move(plan_);
  }

 private:
  using Context = DecodePlan::Context;

  Status allocate() {
    int64_t bytes = 0;
    const auto take = [&](int64_t size) {
      const int64_t at = bytes;
      bytes += (size + 255) / 256 * 256;
      return at;
    };
    int64_t h_columns = 0, attention = 0, gates = 0, batch_experts = 0, widest = 0;
    const int64_t hidden = program_.program().hidden_size;
    plan_.batches_ = true;
    for (const Operation& op : operations_) {
      if (op.kind == OpKind::kExperts) {
        const compile::Attributes& a = op.attributes;
        h_columns = std::max(h_columns, (a.top_k + 1) * std::max(a.width, shared_width(op)));
        batch_experts =
            std::max(batch_experts, cuda::batch_experts_workspace_bytes(cuda::kBatchTokens, a.experts, a.top_k, hidden,
                                                                        a.width, shared_width(op)));
      }
      if (op.kind == OpKind::kAttention) {
        const kernels::AttentionShape shape = attention_shape(op);
        plan_.attention_shape_ = shape;
        const auto bytes_of = [&](int64_t tokens, int64_t context) {
          return cuda::decode_attention_workspace_bytes(shape, tokens, context);
        };
        attention = std::max({attention, bytes_of(cuda::kDecodeTokens, max_context_),
                              bytes_of(cuda::kBatchTokens, std::min(max_context_, kBatchContext))});
      }
      if (op.kind == OpKind::kSharedExpertCombine) ++gates;
      if (op.kind == OpKind::kLinear) widest = std::max(widest, program_.program().values[op.inputs[0]].columns);
    }
    plan_.attention_bytes_ = attention;
    const int64_t logits = take(cuda::kBatchTokens * cuda::kDecodeExperts * 4);
    const int64_t gate_logits = take(cuda::kBatchTokens * 8 * 4);
    const int64_t h = take(cuda::kDecodeTokens * h_columns * 2);
    const int64_t attention_at = take(attention);
    const int64_t gate_weights = take(gates * hidden * 2);
    const int64_t normed = take(cuda::kBatchTokens * hidden * 2);
    const int64_t split = take(cuda::batch_split_bytes(cuda::kBatchTokens, widest));
    const int64_t experts = take(batch_experts);
    TS_ASSIGN_OR_RETURN(plan_.scratch_, DeviceMemory::allocate(bytes, "decoding"));
    if (h_columns > 0) {
      TS_ASSIGN_OR_RETURN(plan_.layers_, DeviceMemory::allocate(cuda::kDecodeLayersWorkspaceBytes, "decoding"));
      TS_ASSIGN_OR_RETURN(plan_.progress_, PinnedMemory::allocate(2 * sizeof(uint32_t), "decoding"));
    }
    std::byte* base = plan_.scratch_.data();
    router_logits_ = reinterpret_cast<float*>(base + logits);
    gate_logits_ = reinterpret_cast<float*>(base + gate_logits);
    plan_.batch_ = {base + normed, base + split, base + experts};
    h_ = base + h;
    attention_workspace_ = base + attention_at;
    next_gate_ = base + gate_weights;
    return {};
  }

  // Operations that read the value's memory.
  std::vector<int32_t> readers(int32_t value) const {
    std::vector<int32_t> found;
    for (int32_t i = 0; i < static_cast<int32_t>(operations_.size()); ++i) {
      const auto& inputs = operations_[i].inputs;
      if (std::find(inputs.begin(), inputs.end(), value) != inputs.end()) found.push_back(i);
    }
    return found;
  }
  int32_t reader_of_kind(int32_t value, OpKind kind) const {
    for (int32_t i : readers(value)) {
      if (operations_[i].kind == kind) return i;
    }
    return kNone;
  }
  // The sum over ranks before a norm is left out where a rank runs alone.
  int32_t reader_that_norms(int32_t value) const {
    const int32_t norm = reader_of_kind(value, OpKind::kRmsNorm);
    return norm != kNone ? norm : reader_of_kind(value, OpKind::kAllReduceRmsNorm);
  }
  int32_t writer(int32_t value) const {
    for (int32_t i = 0; i < static_cast<int32_t>(operations_.size()); ++i) {
      const auto& outputs = operations_[i].outputs;
      if (std::find(outputs.begin(), outputs.end(), value) != outputs.end()) return i;
    }
    return kNone;
  }
  int64_t shared_width(const Operation& experts) const {
    for (int32_t i : readers(experts.inputs[0])) {
      if (operations_[i].kind == OpKind::kLinear && operations_[i].stream == 1) {
        return program_.program().values[operations_[i].outputs[0]].columns / 2;
      }
    }
    return 0;
  }

  void push(std::vector<OperationPart> parts, std::function<DecodePlan::Phase(const Context&)> phase) {
    plan_.calls_.push_back({std::move(parts), std::move(phase), {}});
  }
  void push_plain(std::vector<OperationPart> parts, std::function<Status(const Context&)> run) {
    plan_.calls_.push_back({std::move(parts), {}, std::move(run), true});
  }

  Result<bool> place(int32_t index) {
    const Operation& op = operations_[index];
    switch (op.kind) {
      case OpKind::kEmbedding:
      case OpKind::kSwiGlu:
      case OpKind::kAllReduce:
        generic(index);
        return true;
      case OpKind::kRmsNorm:
      case OpKind::kAllReduceRmsNorm:
        return norm(index);
      case OpKind::kLinear:
        return op.attributes.fused_norm ? projections(index, op.inputs[0], program_.weight(op, 1).vector(), {index})
                                        : branch(index);
      case OpKind::kGdnMixer:
        return mixer(index);
      case OpKind::kAttentionPrepare:
        return true;  // the attention takes it along
      case OpKind::kAttention:
        return attention(index);
      default:
        return false;
    }
  }

  void generic(int32_t index) {
    push_plain({{index}}, [program = &program_, index](const Context& c) {
      return call_operation(*program, c.rank, c.step, index);
    });
  }

  // The residual sum has been made by the branch before; what reads the norm follows with it.
  Result<bool> norm(int32_t index) {
    const Operation& op = operations_[index];
    const int32_t combine = reader_of_kind(op.outputs[0], OpKind::kSharedExpertCombine);
    if (combine != kNone) return experts(index, combine);
    std::vector<int32_t> linears;
    for (int32_t i : readers(op.outputs[0])) {
      if (operations_[i].kind != OpKind::kLinear) continue;
      linears.push_back(i);
      done_[i] = true;
    }
    const float* weight = program_.weight(op, 0).vector();
    if (!linears.empty()) return projections(index, op.inputs[0], weight, linears);
    push_plain({{index}}, [program = &program_, op, weight](const Context& c) {
      cuda::rms_norm({.rows = c.step.batch.tokens,
                      .columns = program->program().hidden_size,
                      .x = program->rows(c.rank, op.inputs[0]),
                      .add = {},
                      .weight = weight,
                      .epsilon = op.attributes.epsilon,
                      .out = program->rows(c.rank, op.outputs[0])},
                     c.rank.streams[0]);
      return cuda_check(cudaPeekAtLastError(), "launching the norm");
    });
    return true;
  }

  Result<bool> projections(int32_t index, int32_t x, const float* weight, const std::vector<int32_t>& linears) {
    if (linears.size() > cuda::kDecodeSegments) return false;
    const float epsilon = operations_[index].attributes.epsilon;
    std::vector<OperationPart> parts;
    parts.reserve(linears.size());
    for (int32_t i : linears) parts.push_back({i});
    push(std::move(parts), [program = &program_, x, weight, epsilon, linears](const Context& c) {
      cuda::DecodeLinear args;
      args.rows = c.step.batch.tokens;
      args.x = program->rows(c.rank, x);
      args.norm_weight = weight;
      args.norm_epsilon = epsilon;
      for (int32_t i : linears) {
        const Operation& op = program->program().operations[i];
        args.segments[args.segment_count++] = {program->weight(op, 0).matrix, program->rows(c.rank, op.outputs[0]),
                                               false};
      }
      return args;
    });
    return true;
  }

  // A projection whose result is added to the residual stream.
  Result<bool> branch(int32_t index) {
    const Operation& op = operations_[index];
    const int32_t next = reader_that_norms(op.outputs[0]);
    if (next == kNone || operations_[next].inputs.size() != 2 || operations_[next].inputs[1] != op.outputs[0])
      return false;
    const int32_t residual = operations_[next].inputs[0];
    push({{index}}, [program = &program_, op, residual](const Context& c) {
      cuda::DecodeLinear args;
      args.rows = c.step.batch.tokens;
      args.x = program->rows(c.rank, op.inputs[0]);
      args.segment_count = 1;
      args.segments[0] = {program->weight(op, 0).matrix, program->rows(c.rank, residual), true};
      return args;
    });
    return true;
  }

  Result<bool> mixer(int32_t index) {
    const Operation& op = operations_[index];
    const compile::Attributes& a = op.attributes;
    if (a.key_dim != 128 || a.value_dim != 128 || a.value_heads / a.key_heads > 4) return false;
    push({{index}}, [program = &program_, op](const Context& c) {
      const auto rows = [&](int32_t value) { return program->rows(c.rank, value); };
      return kernels::GdnMixer{gdn_shape(op),
                               c.step.batch,
                               c.rank.caches->state(op.attributes.state_layer),
                               rows(op.inputs[0]),
                               rows(op.inputs[1]),
                               rows(op.inputs[2]),
                               rows(op.inputs[3]),
                               program->weight(op, 0).vector(),
                               program->weight(op, 1).vector(),
                               program->weight(op, 2).vector(),
                               program->weight(op, 3).vector(),
                               op.attributes.epsilon,
                               rows(op.outputs[0]),
                               nullptr};
    });
    return true;
  }

  Result<bool> attention(int32_t index) {
    const Operation& op = operations_[index];
    const int32_t before = writer(op.inputs[0]);
    if (before == kNone || operations_[before].kind != OpKind::kAttentionPrepare) return false;
    const compile::Attributes& a = op.attributes;
    if (a.head_dim != 256 || a.query_heads / a.kv_heads > 16) return false;
    push({{index}, {before}},
         [program = &program_, op, prepare = operations_[before], workspace = attention_workspace_](const Context& c) {
           cuda::DecodeAttention args;
           args.shape = attention_shape(op);
           args.batch = c.step.batch;
           args.pages = c.rank.caches->kv(op.attributes.kv_layer);
           args.q_gate = program->rows(c.rank, prepare.inputs[0]);
           args.key = program->rows(c.rank, prepare.inputs[1]);
           args.value = program->rows(c.rank, prepare.inputs[2]);
           args.query_norm = program->weight(prepare, 0).vector();
           args.key_norm = program->weight(prepare, 1).vector();
           args.epsilon = prepare.attributes.epsilon;
           args.out = program->rows(c.rank, op.outputs[0]);
           args.max_context = c.max_context;
           args.workspace = workspace;
           return args;
         });
    plan_.calls_.back().alone = true;
    return true;
  }

  // The final norm and the head in the launch of the last layers, where decode_layers takes them.
  void place_head() {
    const int32_t gather = program_.program().head_begin;
    const int32_t linear = gather + 1;
    const int32_t norm = writer(program_.program().hidden);
    if (plan_.layers_.size() == 0 || linear >= static_cast<int32_t>(operations_.size()) ||
        operations_[gather].kind != OpKind::kGatherRows || operations_[linear].kind != OpKind::kLinear ||
        norm == kNone || plan_.calls_.back().parts[0].operation != norm || plan_.layer_runs_.size() < 2) {
      return;
    }
    cuda::DecodeLinear head;
    head.rows = cuda::kDecodeTokens;
    head.x = {nullptr, DType::kBFloat16, program_.program().hidden_size};
    head.norm_weight = program_.weight(operations_[norm], 0).vector();
    head.norm_epsilon = operations_[norm].attributes.epsilon;
    head.segment_count = 1;
    head.segments[0] = {program_.weight(operations_[linear], 0).matrix,
                        {nullptr, DType::kFloat32, program_.program().values[operations_[linear].outputs[0]].columns},
                        false};
    if (!cuda::decode_layers_takes(head)) return;
    plan_.add_head({{norm}, {gather}, {linear}}, [program = &program_, head, x = operations_[norm].inputs[0],
                                                  y = operations_[linear].outputs[0]](const Context& c) {
      cuda::DecodeLinear args = head;
      args.rows = c.step.batch.tokens;
      args.x = program->rows(c.rank, x);
      args.segments[0].y = program->rows(c.rank, y);
      args.wanted = c.step.wanted;
      args.wanted_count = c.step.wanted_count;
      return args;
    });
  }

  // The shared expert's gate is a float32 vector in the Program; the fused projection takes it as a row of bfloat16.
  Result<kernels::Matrix> gate_row(const Operation& combine) {
    const int64_t hidden = program_.program().hidden_size;
    std::vector<float> wide(static_cast<size_t>(hidden));
    std::vector<BFloat16> narrow(wide.size());
    TS_RETURN_IF_ERROR(cuda_check(
        cudaMemcpy(wide.data(), program_.weight(combine, 0).vector(), wide.size() * 4, cudaMemcpyDeviceToHost),
        "reading a gate"));
    std::transform(wide.begin(), wide.end(), narrow.begin(), to_bfloat16);
    std::byte* at = std::exchange(next_gate_, next_gate_ + hidden * 2);
    TS_RETURN_IF_ERROR(
        cuda_check(cudaMemcpy(at, narrow.data(), narrow.size() * 2, cudaMemcpyHostToDevice), "writing a gate"));
    return kernels::Matrix{at, DType::kBFloat16, kernels::MatrixLayout::kRowMajor, 1, hidden, nullptr};
  }

  Result<bool> experts(int32_t index, int32_t combine_index) {
    const Operation& norm_op = operations_[index];
    const Operation& combine = operations_[combine_index];
    const int32_t experts_index = writer(combine.inputs[2]);
    const int32_t down_index = writer(combine.inputs[1]);
    if (experts_index == kNone || operations_[experts_index].kind != OpKind::kExperts || down_index == kNone)
      return false;
    const int32_t swiglu_index = writer(operations_[down_index].inputs[0]);
    if (swiglu_index == kNone || operations_[swiglu_index].kind != OpKind::kSwiGlu) return false;
    const int32_t up_index = writer(operations_[swiglu_index].inputs[0]);
    const int32_t router_index = writer(operations_[experts_index].inputs[1]);
    if (up_index == kNone || router_index == kNone) return false;
    const int32_t logits_index = writer(operations_[router_index].inputs[0]);
    const int32_t next = reader_that_norms(combine.outputs[0]);
    if (logits_index == kNone || operations_[logits_index].kind != OpKind::kLinear || next == kNone) return false;
    const Operation& experts_op = operations_[experts_index];
    const compile::Attributes& a = experts_op.attributes;
    if (a.width % 64 != 0 || shared_width(experts_op) % 64 != 0) return false;
    for (int32_t i : {combine_index, experts_index, down_index, swiglu_index, up_index, router_index, logits_index})
      done_[i] = true;
    TS_ASSIGN_OR_RETURN(const kernels::Matrix gate, gate_row(combine));

    const kernels::Matrix router = program_.weight(operations_[logits_index], 0).matrix;
    push({{logits_index}, {index}, {router_index}},
         [program = &program_, norm_op, router, gate, logits = router_logits_, gates = gate_logits_](const Context& c) {
           cuda::DecodeLinear args;
           args.rows = c.step.batch.tokens;
           args.x = program->rows(c.rank, norm_op.inputs[0]);
           args.norm_weight = program->weight(norm_op, 0).vector();
           args.norm_epsilon = norm_op.attributes.epsilon;
           args.normed = program->rows(c.rank, norm_op.outputs[0]);
           args.segment_count = 2;
           args.segments[0] = {router, {logits, DType::kFloat32, router.n}, false};
           args.segments[1] = {gate, {gates, DType::kFloat32, 1}, false};
           return args;
         });
    const cuda::DecodeExperts routed = {a.experts,
                                        a.top_k,
                                        a.normalize_top_k,
                                        router_logits_,
                                        router.n,
                                        program_.weight(experts_op, 0).matrix,
                                        program_.weight(experts_op, 1).matrix};
    const int64_t shared = shared_width(experts_op);
    const int64_t hidden = program_.program().hidden_size;
    const kernels::Matrix shared_up = program_.weight(operations_[up_index], 0).matrix;
    const kernels::Matrix shared_down = program_.weight(operations_[down_index], 0).matrix;
    cuda::DecodeGateUp sizes;
    sizes.hidden = hidden;
    sizes.width = a.width;
    sizes.routed = routed;
    sizes.shared_gate_up = shared_up;
    sizes.shared_width = shared;
    plan_.batches_ = plan_.batches_ && BatchPhases::takes(sizes);
    push({{experts_index, kGateUpShare}, {up_index}, {swiglu_index}},
         [program = &program_, norm_op, routed, shared_up, shared, hidden, width = a.width, h = h_](const Context& c) {
           cuda::DecodeGateUp args;
           args.rows = c.step.batch.tokens;
           args.hidden = hidden;
           args.width = width;
           args.x = program->rows(c.rank, norm_op.outputs[0]);
           args.routed = routed;
           args.shared_gate_up = shared_up;
           args.shared_width = shared;
           args.h = h;
           return args;
         });
    const int32_t residual = operations_[next].inputs[0];
    push({{down_index}, {experts_index, 1 - kGateUpShare}, {combine_index}},
         [program = &program_, residual, routed, shared_down, shared, hidden, width = a.width, h = h_,
          gates = gate_logits_](const Context& c) {
           cuda::DecodeDown args;
           args.rows = c.step.batch.tokens;
           args.hidden = hidden;
           args.width = width;
           args.routed = routed;
           args.shared_down = shared_down;
           args.shared_width = shared;
           args.shared_gate_logit = gates;
           args.h = h;
           args.y = program->rows(c.rank, residual);
           return args;
         });
    return true;
  }

  const CudaProgram& program_;
  const std::vector<Operation>& operations_;
  const int64_t max_context_;
  std::vector<bool> done_;
  DecodePlan plan_;
  float* router_logits_ = nullptr;
  float* gate_logits_ = nullptr;
  std::byte* h_ = nullptr;
  std::byte* attention_workspace_ = nullptr;
  std::byte* next_gate_ = nullptr;
};

bool DecodePlan::takes_batch(int32_t sequences, int32_t tokens, int64_t max_context) const {
  if (!batches_ || sequences != tokens || tokens > cuda::kBatchTokens) return false;
  return !attention_shape_ ||
         cuda::decode_attention_workspace_bytes(*attention_shape_, tokens, max_context) <= attention_bytes_;
}

Result<DecodePlan> DecodePlan::build(const CudaProgram& program, int64_t max_context) {
  return DecodePlanBuilder(program, max_context).build();
}

namespace {

struct LaunchPhase {
  cuda::Launch launch;
  Status operator()(const cuda::DecodeLinear& args) const { return cuda::decode_linear(args, launch); }
  Status operator()(const kernels::GdnMixer& args) const { return cuda::decode_gdn(args, launch); }
  Status operator()(const cuda::DecodeAttention& args) const { return cuda::decode_attention(args, launch); }
  Status operator()(const cuda::DecodeGateUp& args) const { return cuda::decode_gate_up(args, launch); }
  Status operator()(const cuda::DecodeDown& args) const { return cuda::decode_down(args, launch); }
};

}  // namespace

Status DecodePlan::run_body(const CudaRank& rank, const CudaStep& step, int64_t max_context,
                            const LaunchObserver& observe, bool apart) const {
  const Context context = {rank, step, max_context};
  return runs_layers(step, apart) ? run_layers(context, observe) : run_apart(context, observe);
}

bool DecodePlan::runs_layers(const CudaStep& step, bool apart) const {
  return step.batch.tokens <= cuda::kDecodeTokens && !apart && layers_.size() > 0;
}

// More wanted rows than the head takes at once are left to a runner that goes through them in groups.
bool DecodePlan::head_along(const CudaStep& step, bool apart) const {
  return head_run_ && runs_layers(step, apart) && step.wanted_count > 0 &&
         step.wanted_count <= program_->program().logit_rows;
}

// The calls between two attentions are one call of decode_layers.
void DecodePlan::group_calls() {
  for (size_t i = 0; i < calls_.size(); ++i) {
    const bool joins = i > 0 && !calls_[i].alone && !calls_[i - 1].alone;
    if (!joins) layer_runs_.push_back({i, i, {}});
    LayerRun& run = layer_runs_.back();
    run.end = i + 1;
    run.parts.insert(run.parts.end(), calls_[i].parts.begin(), calls_[i].parts.end());
  }
}

// parts: the head's, the norm's before them.
void DecodePlan::add_head(std::vector<OperationPart> parts, std::function<Phase(const Context&)> phase) {
  LayerRun layers = layer_runs_[layer_runs_.size() - 2];
  layers.parts.insert(layers.parts.end(), parts.begin(), parts.end());
  head_run_ = HeadRun{std::move(layers), std::move(parts), std::move(phase)};
}

std::vector<std::span<const OperationPart>> DecodePlan::launches() const {
  std::vector<std::span<const OperationPart>> launches;
  for (const Call& call : calls_) launches.emplace_back(call.parts);
  if (layers_.size() == 0) return launches;
  for (const LayerRun& run : layer_runs_) launches.emplace_back(run.parts);
  if (head_run_) launches.emplace_back(head_run_->layers.parts);
  return launches;
}

std::vector<std::span<const OperationPart>> DecodePlan::reached() const {
  std::vector<std::span<const OperationPart>> found;
  if (layers_.size() == 0) return found;
  const auto* const told = reinterpret_cast<const volatile uint32_t*>(progress_.data());
  const size_t begun = told[0], last = std::max<size_t>(begun, told[1]);
  for (size_t i = begun == 0 ? 1 : begun - 1; i <= last && i < calls_.size(); ++i) {
    const bool head = head_run_ && i + 1 == calls_.size();  // in the norm's place
    found.emplace_back(head ? head_run_->parts : calls_[i].parts);
  }
  return found;
}

Status DecodePlan::run_layers(const Context& context, const LaunchObserver& observe) const {
  const bool head = head_along(context.step, false);
  for (size_t i = 0; i + (head ? 2 : 0) < layer_runs_.size(); ++i) {
    TS_RETURN_IF_ERROR(run_layer_run(layer_runs_[i], {}, context, observe));
  }
  return head ? run_layer_run(head_run_->layers, head_run_->phase, context, observe) : Status();
}

// head: what follows the run's calls in their launch, or nothing.
Status DecodePlan::run_layer_run(const LayerRun& run, const std::function<Phase(const Context&)>& head,
                                 const Context& context, const LaunchObserver& observe) const {
  TS_ASSIGN_OR_RETURN(const bool launched, shall_launch(observe, run.parts));
  if (!launched) return {};
  Status status;
  if (!calls_[run.begin].phase) {
    status = calls_[run.begin].run(context);
  } else {
    std::vector<Phase> phases;
    for (size_t i = run.begin; i < run.end; ++i) phases.push_back(calls_[i].phase(context));
    if (head) phases.push_back(head(context));
    status = cuda::decode_layers(phases, layers_.data(), {.stream = context.rank.streams[0]},
                                 {reinterpret_cast<uint32_t*>(progress_.data()), static_cast<uint32_t>(run.begin)});
  }
  if (!status.ok()) return std::move(status).with_context(describe_operations(program_->program(), run.parts));
  return {};
}

Status DecodePlan::run_apart(const Context& context, const LaunchObserver& observe) const {
  const cuda::Launch launch = {.stream = context.rank.streams[0]};
  const bool few = context.step.batch.tokens <= cuda::kDecodeTokens;
  BatchPhases batch(context.rank, batch_);
  for (const Call& call : calls_) {
    TS_ASSIGN_OR_RETURN(const bool launched, shall_launch(observe, call.parts));
    if (!launched) continue;
    Status status;
    if (!call.phase) {
      status = batch.finish();
      if (status.ok()) status = call.run(context);
    } else {
      status = few ? std::visit(LaunchPhase{launch}, call.phase(context)) : std::visit(batch, call.phase(context));
    }
    if (status.ok()) continue;
    return std::move(status).with_context(describe_operations(program_->program(), call.parts));
  }
  return {};
}

Status DecodePlan::run_head(const CudaRank& rank, const CudaStep& step, const LaunchObserver& observe,
                            bool apart) const {
  const compile::Program& program = program_->program();
  const int32_t done = head_along(step, apart) ? 2 : 0;  // the choice of rows and the projection
  for (int32_t i = program.head_begin + done; i < static_cast<int32_t>(program.operations.size()); ++i) {
    const Operation& op = program.operations[i];
    const OperationPart part = {.operation = i};
    TS_ASSIGN_OR_RETURN(const bool launched, shall_launch(observe, {&part, 1}));
    if (!launched) continue;
    if (op.kind != OpKind::kLinear) {
      TS_RETURN_IF_ERROR(call_operation(*program_, rank, step, i));
      continue;
    }
    cuda::DecodeLinear args;
    args.rows = step.wanted_count;
    args.x = program_->rows(rank, op.inputs[0]);
    args.segment_count = 1;
    args.segments[0] = {program_->weight(op, 0).matrix, program_->rows(rank, op.outputs[0]), false};
    Status status = cuda::decode_linear(args, {rank.streams[0]});
    if (!status.ok()) return std::move(status).with_context(describe_operation(program, i));
  }
  return {};
}

}  // namespace tokenspeed::runtime

#include "runtime/cuda/batch_phases.h"

#include <utility>

#include "kernels/cuda/gated_delta_net.h"
#include "kernels/cuda/linear.h"

namespace tokenspeed::runtime {
namespace {

namespace cuda = kernels::cuda;

cuda::BatchExperts batch_experts_of(const cuda::DecodeGateUp& up, const cuda::DecodeDown& down, void* workspace) {
  cuda::BatchExperts args;
  args.rows = up.rows;
  args.experts = up.routed.experts;
  args.top_k = up.routed.top_k;
  args.normalize = up.routed.normalize;
  args.router_logits = up.routed.router_logits;
  args.router_stride = up.routed.router_stride;
  args.hidden = up.hidden;
  args.width = up.width;
  args.x = up.x;
  args.gate_up = up.routed.gate_up;
  args.down = up.routed.down;
  args.shared_gate_up = up.shared_gate_up;
  args.shared_down = down.shared_down;
  args.shared_width = up.shared_width;
  args.workspace = workspace;
  return args;
}

bool has_fp8(const cuda::DecodeLinear& args) {
  for (int32_t i = 0; i < args.segment_count; ++i) {
    if (args.segments[i].weight.dtype == DType::kFloat8E4M3) return true;
  }
  return false;
}

}  // namespace

bool BatchPhases::takes(const cuda::DecodeGateUp& up) {
  cuda::DecodeDown down;
  down.shared_down.dtype = up.shared_gate_up.dtype;
  return up.norm_weight == nullptr && batch_experts_fits(batch_experts_of(up, down, nullptr));
}

Status BatchPhases::finish() {
  if (!unadded_) return {};
  return cuda::batch_norm(*std::exchange(unadded_, std::nullopt), launch_);
}

Status BatchPhases::operator()(const cuda::DecodeLinear& args) {
  cuda::BatchLinear linear;
  linear.rows = args.rows;
  linear.x = args.x;
  for (int32_t i = 0; i < args.segment_count; ++i)
    linear.segments[linear.segment_count++] = {args.segments[i].weight, args.segments[i].y,
                                               args.segments[i].accumulate};
  const bool fits = batch_linear_fits(linear);
  if (fits && has_fp8(args)) linear.split = scratch_.split;
  if (unadded_ && (args.norm_weight == nullptr || unadded_->x.data != args.x.data)) TS_RETURN_IF_ERROR(finish());
  if (args.norm_weight != nullptr) {
    cuda::BatchNorm norm = unadded_.value_or(cuda::BatchNorm());
    unadded_.reset();
    norm.rows = args.rows;
    norm.columns = args.segments[0].weight.k;
    norm.x = args.x;
    norm.norm_weight = args.norm_weight;
    norm.epsilon = args.norm_epsilon;
    norm.out = args.normed.data ? args.normed : kernels::Rows{scratch_.normed, DType::kBFloat16, norm.columns};
    norm.split = const_cast<void*>(linear.split);
    TS_RETURN_IF_ERROR(cuda::batch_norm(norm, launch_));
    linear.x = norm.out;
  } else if (linear.split && split_rows_ != args.x.data) {
    TS_RETURN_IF_ERROR(cuda::batch_split(args.x, args.rows, args.segments[0].weight.k, scratch_.split, launch_));
  }
  split_rows_ = nullptr;
  if (fits) return cuda::batch_linear(linear, launch_);
  for (int32_t i = 0; i < args.segment_count; ++i) {
    kernels::Linear one;
    one.rows = args.rows;
    one.x = linear.x;
    one.weight = args.segments[i].weight;
    one.y = args.segments[i].y;
    one.accumulate = args.segments[i].accumulate;
    one.workspace = rank_.workspace[0];
    TS_RETURN_IF_ERROR(cuda::linear(one, launch_.stream));
  }
  return {};
}

Status BatchPhases::operator()(const kernels::GdnMixer& args) {
  if (cuda::batch_gdn_fits(args.shape)) {
    split_rows_ = args.out.data;
    return cuda::batch_gdn(args, scratch_.split, launch_);
  }
  kernels::GdnMixer mixer = args;
  mixer.workspace = rank_.workspace[0];
  cuda::gdn_mixer(mixer, launch_.stream);
  return cuda::cuda_status(cudaPeekAtLastError(), "gdn_mixer");
}

Status BatchPhases::operator()(const cuda::DecodeAttention& args) { return cuda::decode_attention(args, launch_); }

// Waits for the other half: one launch does both.
Status BatchPhases::operator()(const cuda::DecodeGateUp& args) {
  up_ = args;
  return {};
}

Status BatchPhases::operator()(const cuda::DecodeDown& args) {
  const cuda::BatchExperts experts = batch_experts_of(up_, args, scratch_.experts);
  TS_RETURN_IF_ERROR(cuda::batch_experts(experts, launch_));
  cuda::BatchNorm sum;
  sum.rows = args.rows;
  sum.columns = args.hidden;
  sum.x = args.y;
  sum.experts = batch_experts_output(experts);
  sum.top_k = args.routed.top_k;
  sum.shared_gate_logit = args.shared_down.data ? args.shared_gate_logit : nullptr;
  sum.shared_gate_stride = args.shared_gate_stride;
  unadded_ = sum;
  return {};
}

}  // namespace tokenspeed::runtime

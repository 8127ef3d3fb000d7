#include "kernels/cuda/mlp.h"

#include "kernels/cuda/device.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxExpertsPerLane = 16;

unsigned blocks_for(int64_t work) { return static_cast<unsigned>(ceil_div(work, kThreads)); }

// Where thread's eight elements of a [rows, columns] op lie; false past the end.
struct Element {
  int64_t row;
  int64_t column;
};
__device__ inline bool element8(int64_t rows, int64_t columns, Element* at) {
  const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (index >= rows * (columns / 8)) return false;
  *at = {index / (columns / 8), index % (columns / 8) * 8};
  return true;
}

__device__ inline bf16* address(const Rows& rows, const Element& at) {
  return static_cast<bf16*>(rows.data) + at.row * rows.stride + at.column;
}

__global__ void swiglu_kernel(SwiGlu args) {
  Element at;
  if (!element8(args.rows, args.width, &at)) return;
  float gate[8], up[8];
  load8(address(args.gate_up, at), gate);
  load8(address(args.gate_up, at) + args.width, up);
#pragma unroll
  for (int i = 0; i < 8; ++i) gate[i] = silu(gate[i]) * up[i];
  store8(address(args.out, at), gate);
}

__global__ void add_kernel(Add args) {
  Element at;
  if (!element8(args.rows, args.columns, &at)) return;
  float a[8], b[8];
  load8(address(args.a, at), a);
  load8(address(args.b, at), b);
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i] += b[i];
  store8(address(args.out, at), a);
}

__global__ void scale_kernel(ScaleRowsBySigmoid args) {
  Element at;
  if (!element8(args.rows, args.columns, &at)) return;
  const float gate = sigmoid(__bfloat162float(static_cast<const bf16*>(args.gate_logit.data)[at.row * args.gate_logit.stride]));
  float x[8];
  load8(address(args.x, at), x);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= gate;
  store8(address(args.x, at), x);
}

// One block per row.
__global__ void combine_kernel(SharedExpertCombine args) {
  const Element row = {blockIdx.x, 0};
  float logit = 0;
  for (int c = threadIdx.x * 8; c < args.hidden; c += kThreads * 8) {
    float x[8];
    load8(address(args.x, row) + c, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) logit += x[i] * args.gate_weight[c + i];
  }
  const float gate = sigmoid(block_sum<kThreads>(logit));
  for (int c = threadIdx.x * 8; c < args.hidden; c += kThreads * 8) {
    float shared[8], routed[8];
    load8(address(args.shared, row) + c, shared);
    load8(address(args.routed, row) + c, routed);
#pragma unroll
    for (int i = 0; i < 8; ++i) routed[i] += shared[i] * gate;
    if (args.residual.data) {
      load8(address(args.residual, row) + c, shared);
#pragma unroll
      for (int i = 0; i < 8; ++i) routed[i] += shared[i];
    }
    store8(address(args.y, row) + c, routed);
  }
}

// One warp per row. Lane l holds experts l, l + 32, ...; each round takes the greatest left, ties to the lower id.
__global__ void router_kernel(MoeRouter args) {
  const int64_t row = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp;
  if (row >= args.rows) return;
  const int lane = threadIdx.x % kWarp;
  const int experts = static_cast<int>(args.experts);
  const float* logits = args.logits + row * experts;
  float value[kMaxExpertsPerLane];
  float greatest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMaxExpertsPerLane; ++i) {
    const int expert = i * kWarp + lane;
    value[i] = expert < experts ? logits[expert] : -INFINITY;
    greatest = fmaxf(greatest, value[i]);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, offset));
  float all = 0;
#pragma unroll
  for (int i = 0; i < kMaxExpertsPerLane; ++i) all += expf(value[i] - greatest);
  all = warp_sum(all);

  const int top_k = static_cast<int>(args.top_k);
  float chosen = 0;  // of round `lane`
  int chosen_id = 0;
  float sum = 0;
  for (int round = 0; round < top_k; ++round) {
    float best = -INFINITY;
    int best_id = experts;
#pragma unroll
    for (int i = 0; i < kMaxExpertsPerLane; ++i) {
      if (value[i] > best) {
        best = value[i];
        best_id = i * kWarp + lane;
      }
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(~0u, best, offset);
      const int other_id = __shfl_xor_sync(~0u, best_id, offset);
      if (other > best || (other == best && other_id < best_id)) {
        best = other;
        best_id = other_id;
      }
    }
    // A row of NaNs chooses nothing by comparison; any valid id will do, its result is NaN.
    if (best_id >= experts) best_id = round;
#pragma unroll
    for (int i = 0; i < kMaxExpertsPerLane; ++i) {
      if (i * kWarp + lane == best_id) value[i] = -INFINITY;
    }
    const float share = expf(best - greatest) / all;
    sum += share;
    if (lane == round) {
      chosen = share;
      chosen_id = best_id;
    }
  }
  if (lane < top_k) {
    args.expert_ids[row * top_k + lane] = chosen_id;
    args.expert_weights[row * top_k + lane] = args.normalize ? chosen / sum : chosen;
  }
}

}  // namespace

void swiglu(const SwiGlu& args, cudaStream_t stream) {
  swiglu_kernel<<<blocks_for(args.rows * args.width / 8), kThreads, 0, stream>>>(args);
}

void add(const Add& args, cudaStream_t stream) {
  add_kernel<<<blocks_for(args.rows * args.columns / 8), kThreads, 0, stream>>>(args);
}

void scale_rows_by_sigmoid(const ScaleRowsBySigmoid& args, cudaStream_t stream) {
  scale_kernel<<<blocks_for(args.rows * args.columns / 8), kThreads, 0, stream>>>(args);
}

void shared_expert_combine(const SharedExpertCombine& args, cudaStream_t stream) {
  combine_kernel<<<static_cast<unsigned>(args.rows), kThreads, 0, stream>>>(args);
}

void moe_router(const MoeRouter& args, cudaStream_t stream) {
  router_kernel<<<blocks_for(args.rows * kWarp), kThreads, 0, stream>>>(args);
}

}  // namespace tokenspeed::kernels::cuda

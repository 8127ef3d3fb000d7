// decode_argmax: blocks over slices of a row fold (value, lower id first) into one 64-bit maximum per row; the last
// block of a row writes the token and leaves the workspace as it found it.
#include <string>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocks = 32;  // per row

struct ArgmaxState {
  unsigned long long best;
  unsigned bad;
  unsigned finished;
};

__device__ inline unsigned long long candidate(float value, int id) {
  return static_cast<unsigned long long>(ordered_bits(value)) << 32 | static_cast<uint32_t>(~id);
}

__global__ void __launch_bounds__(kThreads)
    decode_argmax_kernel(const float* logits, int64_t stride, int vocabulary, int32_t* tokens, ArgmaxState* states) {
  __shared__ unsigned long long best_of_warp[kThreads / kWarp];
  wait_for_predecessor();
  allow_successor();
  const float* const row = logits + blockIdx.y * stride;
  ArgmaxState& state = states[blockIdx.y];
  unsigned long long best = 0;
  bool bad = false;
  for (int id = blockIdx.x * kThreads + threadIdx.x; id < vocabulary; id += kBlocks * kThreads) {
    const float value = row[id];
    bad |= !(value < INFINITY);
    best = max(best, candidate(value, id));
  }
  const bool any_bad = __syncthreads_or(bad);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(~0u, best, offset));
  if (threadIdx.x % kWarp == 0) best_of_warp[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) best = max(best, best_of_warp[i]);
  atomicMax(&state.best, best);
  if (any_bad) atomicOr(&state.bad, 1u);
  __threadfence();
  if (atomicAdd(&state.finished, 1u) + 1 < kBlocks) return;
  __threadfence();
  const unsigned long long winner = atomicExch(&state.best, 0ull);
  const bool nothing = winner >> 32 == ordered_bits(-INFINITY);
  tokens[blockIdx.y] =
      atomicExch(&state.bad, 0u) != 0 || nothing ? -1 : static_cast<int32_t>(~static_cast<uint32_t>(winner));
  atomicExch(&state.finished, 0u);
}

}  // namespace

int64_t decode_argmax_workspace_bytes(int64_t rows) { return rows * static_cast<int64_t>(sizeof(ArgmaxState)); }

Status decode_argmax(const DecodeArgmax& args, const Launch& launch) {
  if (args.rows < 1 || args.rows > kDecodeTokens || args.vocabulary < 1) {
    return invalid_argument("decode_argmax: rows is " + std::to_string(args.rows) + ", 1 to 8 are taken");
  }
  return launch_kernel("decode_argmax", launch, decode_argmax_kernel, dim3(kBlocks, static_cast<unsigned>(args.rows)),
                       kThreads, 0, 1, args.logits, args.stride, static_cast<int>(args.vocabulary), args.tokens,
                       static_cast<ArgmaxState*>(args.workspace));
}

}  // namespace tokenspeed::kernels::cuda

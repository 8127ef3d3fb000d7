// decode_down: a block owns 16 rows of the result and multiplies them with every chosen expert's down projection. A
// (expert, half of its width) is one warp's task, so an expert's sum is the same wherever it stands in the list; at the
// end each row of the step adds its own experts in the order of its choices.
#include <algorithm>
#include <string>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_routing.cuh"
#include "kernels/cuda/decode_stream.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

struct DownMatrix {
  const uint8_t* data;
  const float* scale;
  int width;
};

struct DownParameters {
  RouterParameters router;
  DownMatrix routed;
  DownMatrix shared;  // data null: none
  const float* gate_logit;
  int64_t gate_stride;
  const bf16* h;
  int h_width;
  int rows;
  int hidden;
  bf16* y;
  int64_t y_stride;
  bool accumulate;
};

constexpr int kParts = 2;

template <bool kFp8, int kStages>
__global__ void __launch_bounds__(kStreamThreads, 2) decode_down_kernel(const __grid_constant__ DownParameters p) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Routing routing;
  const int rows = p.rows;
  const int places = p.router.top_k + 1;
  const int row_bytes = staged_row_bytes(p.h_width);
  uint8_t* const staged = shared + WeightRing<kStages>::kBytes;
  float* const partial = reinterpret_cast<float*>(staged + rows * places * row_bytes);

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int row = blockIdx.x * kTileRows;
  const bool has_shared = p.shared.data != nullptr;

  // The logits are two launches old here.
  if (p.router.logits != nullptr) {
    route_rows(p.router, rows, routing);
  } else {
    if (threadIdx.x == 0) routing.count = 0;
    __syncthreads();
  }
  const int entries = routing.count + has_shared;
  const int tasks = entries * kParts;

  // Task j: part j % kParts of entry j / kParts; the shared expert is the last entry.
  struct Task {
    const uint8_t* lo;
    const uint8_t* hi;
    const float* scale;
    int chunk;
    int chunk_end;
  };
  const auto open = [&](int task) {
    const int entry = task / kParts;
    const bool is_shared = entry == routing.count;
    const DownMatrix& m = is_shared ? p.shared : p.routed;
    const int expert = is_shared ? 0 : routing.distinct[entry];
    const int64_t bytes = kFp8 ? m.width : 2 * m.width;
    const int chunks = static_cast<int>(bytes / kChunkBytes);
    Task t;
    t.lo = m.data + (static_cast<int64_t>(expert) * p.hidden + row + lane / 4) * bytes + lane % 4 * 16;
    t.hi = t.lo + 8 * bytes;
    const int columns = (m.width + 127) / 128;
    t.scale =
        kFp8 ? m.scale + (static_cast<int64_t>(expert) * ((p.hidden + 127) / 128) + row / 128) * columns : nullptr;
    t.chunk = task % kParts * chunks / kParts;
    t.chunk_end = (task % kParts + 1) * chunks / kParts;
    return t;
  };

  WeightRing<kStages> ring(shared);
  int next_task = warp;
  Task source = {};
  const auto advance = [&] {
    for (; next_task < tasks; next_task += kStreamWarps) {
      source = open(next_task);
      if (source.chunk < source.chunk_end) break;
    }
  };
  advance();
  const auto push = [&] {
    if (next_task >= tasks) {
      ring.pad();
      return;
    }
    const float* const block = kFp8 ? source.scale + source.chunk / 2 : nullptr;
    ring.push(source.lo + source.chunk * kChunkBytes, source.hi + source.chunk * kChunkBytes, block, block);
    if (++source.chunk == source.chunk_end) {
      next_task += kStreamWarps;
      advance();
    }
  };
  for (int i = 0; i < kStages; ++i) push();

  wait_for_predecessor();
  allow_successor();
  const int outputs = kTileRows * rows;
  const int element = threadIdx.x;
  float old = 0;
  float gate = 1;
  if (element < outputs) {
    const int t = element % rows;
    if (p.accumulate) old = __bfloat162float(p.y[t * p.y_stride + row + element / rows]);
    if (p.gate_logit != nullptr) gate = sigmoid(p.gate_logit[t * p.gate_stride]);
  }
  const int vectors = p.h_width / 8;
  for (int i = threadIdx.x; i < rows * places * vectors; i += kStreamThreads) {
    uint4 raw = *reinterpret_cast<const uint4*>(p.h + static_cast<int64_t>(i) * 8);
    if (kFp8) raw = stage_for_fp8(raw);
    *reinterpret_cast<uint4*>(staged + i / vectors * row_bytes + i % vectors * 16) = raw;
  }
  __syncthreads();

  for (int task = warp; task < tasks; task += kStreamWarps) {
    const int entry = task / kParts;
    const bool is_shared = entry == routing.count;
    const int width = is_shared ? p.shared.width : p.routed.width;
    const int chunks = (kFp8 ? width : 2 * width) / kChunkBytes;
    const int column = lane / 4;
    const int place = column >= rows ? -1 : is_shared ? p.router.top_k : routing.slot[entry][column];
    const uint32_t x = shared_address(staged) + (column * places + place) * row_bytes + lane % 4 * (kFp8 ? 32 : 16);
    float acc[4] = {};
    const int end = (task % kParts + 1) * chunks / kParts;
    for (int c = task % kParts * chunks / kParts; c < end; ++c) {
      uint4 lo, hi;
      float2 scale;
      ring.pop(lo, hi, scale);
      push();
      if constexpr (kFp8) {
        multiply_fp8_chunk(acc, lo, hi, scale, x + c * 128, place >= 0);
      } else {
        multiply_bf16_chunk(acc, lo, hi, x + c * 64, place >= 0, false);
      }
    }
    store_partial(partial + task * outputs, acc, rows);
  }
  __syncthreads();
  if (element >= outputs) return;
  const int t = element % rows;
  const float scale = unstage_scale(kFp8);
  const auto product = [&](int entry) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) sum += partial[(entry * kParts + part) * outputs + element];
    return sum * scale;
  };
  float sum = 0;
  for (int i = 0; i < p.router.top_k; ++i) {
    const int pair = t * p.router.top_k + i;
    const int entry = routing.index_of_pair[routing.first_pair[routing.ids[pair]]];
    sum += routing.weights[pair] * product(entry);
  }
  if (has_shared) sum += gate * product(routing.count);
  p.y[t * p.y_stride + row + element / rows] = __float2bfloat16_rn(old + sum);
}

template <bool kFp8>
Status launch_down(const DownParameters& p, const Launch& launch) {
  const int places = p.router.top_k + 1;
  const int entries = std::min(p.router.experts, p.rows * p.router.top_k) + 1;
  const size_t rest = static_cast<size_t>(p.rows) * places * staged_row_bytes(p.h_width) +
                      sizeof(float) * static_cast<size_t>(entries) * kParts * kTileRows * p.rows;
  const int blocks = p.hidden / kTileRows;
  constexpr int kDeep = 6;
  constexpr int kShallow = 3;
  if (rest + WeightRing<kDeep>::kBytes + sizeof(Routing) <= kSharedLimit) {
    return launch_kernel("decode_down", launch, decode_down_kernel<kFp8, kDeep>, dim3(blocks), kStreamThreads,
                         rest + WeightRing<kDeep>::kBytes, 1, p);
  }
  if (rest + WeightRing<kShallow>::kBytes + sizeof(Routing) <= kSharedLimit) {
    return launch_kernel("decode_down", launch, decode_down_kernel<kFp8, kShallow>, dim3(blocks), kStreamThreads,
                         rest + WeightRing<kShallow>::kBytes, 1, p);
  }
  return invalid_argument("decode_down: the experts' inputs of " + std::to_string(p.rows) +
                          " rows do not fit in shared memory; run fewer rows per launch");
}

}  // namespace

Status decode_down(const DecodeDown& args, const Launch& launch) {
  const auto bad = [](const std::string& what) { return invalid_argument("decode_down: " + what); };
  const bool routed = args.routed.experts > 0;
  const Matrix& m = routed ? args.routed.down : args.shared_down;
  const bool fp8 = m.dtype == DType::kFloat8E4M3;
  if (args.rows < 1 || args.rows > kDecodeTokens)
    return bad("rows is " + std::to_string(args.rows) + ", the limit is 8");
  if (args.hidden % kTileRows != 0) return bad("hidden must be a multiple of 16");
  if (args.routed.experts > kDecodeExperts || args.routed.top_k > kDecodeTopK)
    return bad("at most 512 experts, top 16");
  if ((routed && args.width % 64 != 0) || args.shared_width % 64 != 0) return bad("widths must be multiples of 64");
  if (!fp8 && m.dtype != DType::kBFloat16) return bad("weights must be bfloat16 or float8_e4m3");
  if (args.shared_down.data != nullptr && args.shared_down.dtype != m.dtype) return bad("experts of two dtypes");
  DownParameters p = {};
  if (routed) {
    p.router = {args.routed.router_logits, args.routed.router_stride, static_cast<int>(args.routed.experts),
                static_cast<int>(args.routed.top_k), args.routed.normalize};
    p.routed = {static_cast<const uint8_t*>(args.routed.down.data), args.routed.down.scale,
                static_cast<int>(args.width)};
  }
  p.shared = {static_cast<const uint8_t*>(args.shared_down.data), args.shared_down.scale,
              static_cast<int>(args.shared_width)};
  p.gate_logit = args.shared_gate_logit;
  p.gate_stride = args.shared_gate_stride;
  p.h = static_cast<const bf16*>(args.h);
  p.h_width = static_cast<int>(std::max(routed ? args.width : 0, args.shared_width));
  p.rows = static_cast<int>(args.rows);
  p.hidden = static_cast<int>(args.hidden);
  p.y = static_cast<bf16*>(args.y.data);
  p.y_stride = args.y.stride;
  p.accumulate = args.accumulate;
  return fp8 ? launch_down<true>(p, launch) : launch_down<false>(p, launch);
}

}  // namespace tokenspeed::kernels::cuda

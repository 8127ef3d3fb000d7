// decode_gate_up: tiles of 8 gate rows and the matching 8 up rows of one expert, so silu(gate) * up is formed where the
// sums are. Tiles of the shared expert come first: their weights are fetched before the router's result is known.
#include <algorithm>
#include <string>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_routing.cuh"
#include "kernels/cuda/decode_stream.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kUnitRows = kTileRows / 2;  // rows of h per tile

struct ExpertMatrix {
  const uint8_t* data;
  const float* scale;
  int width;
  int row_bytes;
};

struct GateUpParameters {
  StagedInput input;
  RouterParameters router;
  ExpertMatrix routed;
  ExpertMatrix shared;
  int shared_tiles;
  int routed_tiles;  // of one expert
  bf16* h;
  int h_width;
  int32_t* expert_ids;
  float* expert_weights;
  int slots;
};

// This lane's weights of a tile.
struct Unit {
  const uint8_t* lo;
  const uint8_t* hi;
  const float* scale_lo;
  const float* scale_hi;

  __device__ Unit(const GateUpParameters& p, const Routing& routing, int unit) {
    const bool is_shared = unit < p.shared_tiles;
    const ExpertMatrix& m = is_shared ? p.shared : p.routed;
    const int tile = is_shared ? unit : (unit - p.shared_tiles) % p.routed_tiles;
    const int expert = is_shared ? 0 : routing.distinct[(unit - p.shared_tiles) / p.routed_tiles];
    const int lane = threadIdx.x % kWarp;
    const int row = tile * kUnitRows;
    const uint8_t* const begin = m.data + static_cast<int64_t>(expert) * 2 * m.width * m.row_bytes + lane % 4 * 16;
    lo = begin + static_cast<int64_t>(row + lane / 4) * m.row_bytes;
    hi = lo + static_cast<int64_t>(m.width) * m.row_bytes;
    scale_lo = scale_hi = nullptr;
    if (m.scale != nullptr) {
      const int columns = (m.row_bytes + 127) / 128;
      const float* const scales = m.scale + static_cast<int64_t>(expert) * ((2 * m.width + 127) / 128) * columns;
      scale_lo = scales + row / 128 * columns;
      scale_hi = scales + (m.width + row) / 128 * columns;
    }
  }
};

template <bool kFp8, int kStages>
__global__ void __launch_bounds__(kStreamThreads, 2) decode_gate_up_kernel(const __grid_constant__ GateUpParameters p) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Routing routing;
  const int rows = p.input.rows;
  uint8_t* const staged = shared + WeightRing<kStages>::kBytes;
  float* const sums = reinterpret_cast<float*>(staged + rows * staged_row_bytes(p.input.k));
  float* const partial = sums + kStageSums;

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int chunks = (kFp8 ? p.input.k : 2 * p.input.k) / kChunkBytes;
  const int chunk_begin = warp * chunks / kStreamWarps;
  const int chunk_end = (warp + 1) * chunks / kStreamWarps;

  WeightRing<kStages> ring(shared);
  int pushed = 0;
  int unit = blockIdx.x;
  int chunk = chunk_begin;
  int units = p.shared_tiles;
  Unit source(p, routing, min(unit, max(units - 1, 0)));
  const auto push = [&] {
    ++pushed;
    if (unit >= units || chunk_begin == chunk_end) {
      ring.pad();
      return;
    }
    const int block = chunk / 2;
    ring.push(source.lo + chunk * kChunkBytes, source.hi + chunk * kChunkBytes,
              kFp8 ? source.scale_lo + block : nullptr, kFp8 ? source.scale_hi + block : nullptr);
    if (++chunk == chunk_end) {
      chunk = chunk_begin;
      unit += gridDim.x;
      if (unit < units) source = Unit(p, routing, unit);
    }
  };
  while (pushed < kStages && unit < units && chunk_begin < chunk_end) push();
  NormWeights norm;
  norm.fetch(p.input.norm_weight, p.input.k);

  wait_for_predecessor();
  allow_successor();
  // Before more weights are asked for: behind 96 KB of them in the memory system the rows would take microseconds.
  stage_rows(p.input, norm, staged, sums);
  if (p.router.logits != nullptr) {
    route_rows(p.router, rows, routing);
    units += routing.count * p.routed_tiles;
    if (unit < units) source = Unit(p, routing, unit);
    if (p.expert_ids != nullptr && blockIdx.x == 0) {
      for (int i = threadIdx.x; i < rows * p.router.top_k; i += kStreamThreads) {
        p.expert_ids[i] = routing.ids[i];
        p.expert_weights[i] = routing.weights[i];
      }
    }
  }
  while (pushed < kStages) push();

  const bool active = lane / 4 < rows;
  const uint32_t x = shared_address(staged) + lane / 4 * staged_row_bytes(p.input.k) + lane % 4 * (kFp8 ? 32 : 16);
  const int per_warp = kTileRows * rows;
  const float scale_out = unstage_scale(kFp8);
  int slot = 0;
  int batch = blockIdx.x;
  for (int current = blockIdx.x; current < units; current += gridDim.x) {
    float acc[4] = {};
    for (int c = chunk_begin; c < chunk_end; ++c) {
      uint4 lo, hi;
      float2 scale;
      ring.pop(lo, hi, scale);
      push();
      if constexpr (kFp8) {
        multiply_fp8_chunk(acc, lo, hi, scale, x + c * 128, active);
      } else {
        multiply_bf16_chunk(acc, lo, hi, x + c * 64, active, false);
      }
    }
    store_partial(partial + (slot * kStreamWarps + warp) * per_warp, acc, rows);
    if (++slot < p.slots && current + static_cast<int>(gridDim.x) < units) continue;
    __syncthreads();
    const int per_tile = kUnitRows * rows;
    for (int i = threadIdx.x; i < slot * per_tile; i += kStreamThreads) {
      const int at = i / per_tile;
      const int element = i % per_tile;  // row of h and t
      const float* const from = partial + at * kStreamWarps * per_warp + element;
      float gate = 0, up = 0;
#pragma unroll
      for (int w = 0; w < kStreamWarps; ++w) {
        gate += from[w * per_warp];
        up += from[w * per_warp + per_tile];
      }
      const int of = batch + at * gridDim.x;
      const int t = element % rows;
      const bool is_shared = of < p.shared_tiles;
      const int routed = of - p.shared_tiles;
      const int place = is_shared ? p.router.top_k : routing.slot[routed / p.routed_tiles][t];
      if (place < 0) continue;
      const int n = (is_shared ? of : routed % p.routed_tiles) * kUnitRows + element / rows;
      p.h[static_cast<int64_t>(t * (p.router.top_k + 1) + place) * p.h_width + n] =
          __float2bfloat16_rn(silu(gate * scale_out) * (up * scale_out));
    }
    __syncthreads();
    slot = 0;
    batch = current + gridDim.x;
  }
}

Status check(const DecodeGateUp& a) {
  const auto bad = [](const std::string& what) { return invalid_argument("decode_gate_up: " + what); };
  if (a.rows < 1 || a.rows > kDecodeTokens) return bad("rows is " + std::to_string(a.rows) + ", the limit is 8");
  if (a.hidden % 64 != 0) return bad("hidden must be a multiple of 64");
  if (a.routed.experts == 0 && a.shared_gate_up.data == nullptr) return bad("neither routed nor shared experts");
  if (a.routed.experts > kDecodeExperts || a.routed.top_k > kDecodeTopK) return bad("at most 512 experts and top 16");
  if (a.width % kUnitRows != 0 || a.shared_width % kUnitRows != 0) return bad("widths must be multiples of 8");
  const Matrix& m = a.routed.experts > 0 ? a.routed.gate_up : a.shared_gate_up;
  if (a.shared_gate_up.data != nullptr && a.shared_gate_up.dtype != m.dtype) return bad("experts of two dtypes");
  if (m.dtype != DType::kFloat8E4M3 && m.dtype != DType::kBFloat16)
    return bad("weights must be bfloat16 or float8_e4m3");
  if (a.norm_weight != nullptr && a.hidden > kNormLimit) return bad("a fused norm takes at most 8192 columns");
  return {};
}

template <bool kFp8>
Status launch_gate_up(GateUpParameters& p, int most_units, const Launch& launch) {
  const int blocks = std::min(most_units, multiprocessors());
  const int per_tile = kStreamWarps * kTileRows * p.input.rows;
  constexpr int kPartialFloats = 8192;
  p.slots = std::max(1, std::min((most_units + blocks - 1) / blocks, kPartialFloats / per_tile));
  const size_t rest = static_cast<size_t>(p.input.rows) * staged_row_bytes(p.input.k) +
                      sizeof(float) * (kStageSums + static_cast<size_t>(p.slots) * per_tile);
  constexpr int kStages = 6;
  static_assert(sizeof(Routing) < 6 * 1024, "counted with the dynamic shared memory below");
  if (rest + WeightRing<kStages>::kBytes + sizeof(Routing) > kSharedLimit) {
    return invalid_argument("decode_gate_up: the rows do not fit in shared memory; run fewer rows per launch");
  }
  return launch_kernel("decode_gate_up", launch, decode_gate_up_kernel<kFp8, kStages>, dim3(blocks), kStreamThreads,
                       rest + WeightRing<kStages>::kBytes, 1, p);
}

}  // namespace

Status decode_gate_up(const DecodeGateUp& args, const Launch& launch) {
  TS_RETURN_IF_ERROR(check(args));
  GateUpParameters p = {};
  const bool routed = args.routed.experts > 0;
  const bool fp8 = (routed ? args.routed.gate_up : args.shared_gate_up).dtype == DType::kFloat8E4M3;
  const int row_bytes = static_cast<int>(args.hidden * (fp8 ? 1 : 2));
  p.input = {static_cast<const bf16*>(args.x.data),
             args.x.stride,
             args.norm_weight,
             args.norm_epsilon,
             nullptr,
             0,
             static_cast<int>(args.rows),
             static_cast<int>(args.hidden),
             fp8};
  if (routed) {
    p.router = {args.routed.router_logits, args.routed.router_stride, static_cast<int>(args.routed.experts),
                static_cast<int>(args.routed.top_k), args.routed.normalize};
    p.routed = {static_cast<const uint8_t*>(args.routed.gate_up.data), args.routed.gate_up.scale,
                static_cast<int>(args.width), row_bytes};
    p.routed_tiles = static_cast<int>(args.width) / kUnitRows;
  }
  if (args.shared_gate_up.data != nullptr) {
    p.shared = {static_cast<const uint8_t*>(args.shared_gate_up.data), args.shared_gate_up.scale,
                static_cast<int>(args.shared_width), row_bytes};
    p.shared_tiles = static_cast<int>(args.shared_width) / kUnitRows;
  }
  p.h = static_cast<bf16*>(args.h);
  p.h_width = static_cast<int>(std::max(routed ? args.width : 0, args.shared_width));
  p.expert_ids = args.expert_ids;
  p.expert_weights = args.expert_weights;
  const int most = p.shared_tiles + p.routed_tiles * std::min<int>(p.router.experts, p.input.rows * p.router.top_k);
  return fp8 ? launch_gate_up<true>(p, most, launch) : launch_gate_up<false>(p, most, launch);
}

}  // namespace tokenspeed::kernels::cuda

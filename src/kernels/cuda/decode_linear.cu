// decode_linear: see decode_stream.cuh for the scheme. Tiles of all segments are dealt to the blocks in turn, so at any
// time the device reads one contiguous region; every warp of a block works on the same tile, on its own share of k.
#include <algorithm>
#include <cstddef>
#include <string>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_stream.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

struct SegmentParameters {
  const uint8_t* weight;
  const float* scale;
  void* y;
  int64_t y_stride;
  int n;
  int tile_end;  // first tile of the next segment
  int row_bytes;
  bool fp8;
  bool y_float;
  bool accumulate;
};

struct LinearParameters {
  StagedInput input;
  int tiles;
  int slots;  // tiles whose partial sums are held before they are added
  int segment_count;
  SegmentParameters segments[kDecodeSegments];
};

// A tile and this warp's chunks of it.
struct Tile {
  int index;
  int segment;
  int row;  // first row in the segment
  int chunk;
  int chunk_end;

  __device__ void open(const LinearParameters& p, int tile) {
    index = tile;
    segment = 0;
    int begin = 0;
    while (segment + 1 < p.segment_count && tile >= p.segments[segment].tile_end)
      begin = p.segments[segment++].tile_end;
    row = (tile - begin) * kTileRows;
    const int warp = threadIdx.x / kWarp;
    const int chunks = p.segments[segment].row_bytes / kChunkBytes;
    chunk = warp * chunks / kStreamWarps;
    chunk_end = (warp + 1) * chunks / kStreamWarps;
  }
};

// Walks this warp's chunks of all tiles of the block and sends them into the ring.
template <int kStages>
struct Producer {
  const LinearParameters& p;
  Tile tile;
  const uint8_t* lo;
  const uint8_t* hi;
  const float* scale;

  __device__ explicit Producer(const LinearParameters& parameters) : p(parameters) { open(blockIdx.x); }
  __device__ void open(int index) {
    for (; index < p.tiles; index += gridDim.x) {
      tile.open(p, index);
      if (tile.chunk < tile.chunk_end) break;
    }
    if (index >= p.tiles) {
      tile.index = index;
      return;
    }
    const SegmentParameters& s = p.segments[tile.segment];
    const int lane = threadIdx.x % kWarp;
    const int last = s.n - 1;
    lo = s.weight + static_cast<int64_t>(min(tile.row + lane / 4, last)) * s.row_bytes + lane % 4 * 16;
    hi = s.weight + static_cast<int64_t>(min(tile.row + lane / 4 + 8, last)) * s.row_bytes + lane % 4 * 16;
    scale = s.fp8 ? s.scale + static_cast<int64_t>(tile.row / 128) * ((s.row_bytes + 127) / 128) : nullptr;
  }
  __device__ void push(WeightRing<kStages>& ring) {
    if (tile.index >= p.tiles) {
      ring.pad();
      return;
    }
    const float* const block = scale == nullptr ? nullptr : scale + tile.chunk / 2;
    ring.push(lo + tile.chunk * kChunkBytes, hi + tile.chunk * kChunkBytes, block, block);
    if (++tile.chunk == tile.chunk_end) open(tile.index + gridDim.x);
  }
};

struct Output {
  void* at;
  bool is_float;
  bool accumulate;
  float scale;
};

// Where element (row of tile, t) goes; at is null beyond the matrix.
__device__ inline Output locate(const LinearParameters& p, int tile, int row, int t) {
  int segment = 0;
  int begin = 0;
  while (segment + 1 < p.segment_count && tile >= p.segments[segment].tile_end) begin = p.segments[segment++].tile_end;
  const SegmentParameters& s = p.segments[segment];
  const int n = (tile - begin) * kTileRows + row;
  if (n >= s.n) return {nullptr, false, false, 0};
  const int64_t at = t * s.y_stride + n;
  void* const y = s.y_float ? static_cast<void*>(static_cast<float*>(s.y) + at) : static_cast<bf16*>(s.y) + at;
  return {y, s.y_float, s.accumulate, unstage_scale(p.input.fp8)};
}
__device__ inline float load_output(const Output& y) {
  return y.is_float ? *static_cast<const float*>(y.at) : __bfloat162float(*static_cast<const bf16*>(y.at));
}

// Adds the warps' sums of `count` tiles from `first` on, in order of k, and writes them.
__device__ inline void finish_tiles(const LinearParameters& p, const float* partial, int first, int count,
                                    const float* residual) {
  const int rows = p.input.rows;
  const int per_warp = kTileRows * rows;
  for (int i = threadIdx.x; i < count * per_warp; i += kStreamThreads) {
    const int slot = i / per_warp;
    const int element = i % per_warp;
    const float* const from = partial + slot * kStreamWarps * per_warp + element;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kStreamWarps; ++w) sum += from[w * per_warp];
    const Output y = locate(p, first + slot * gridDim.x, element / rows, element % rows);
    if (y.at == nullptr) continue;
    sum *= y.scale;
    if (y.accumulate) sum += residual != nullptr && i == threadIdx.x ? *residual : load_output(y);
    if (y.is_float) {
      *static_cast<float*>(y.at) = sum;
    } else {
      *static_cast<bf16*>(y.at) = __float2bfloat16_rn(sum);
    }
  }
}

template <int kStages>
__global__ void __launch_bounds__(kStreamThreads, 2) decode_linear_kernel(const __grid_constant__ LinearParameters p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int rows = p.input.rows;
  uint8_t* const staged = shared + WeightRing<kStages>::kBytes;
  float* const sums = reinterpret_cast<float*>(staged + rows * staged_row_bytes(p.input.k));
  float* const partial = sums + kStageSums;

  WeightRing<kStages> ring(shared);
  Producer<kStages> producer(p);
  for (int i = 0; i < kStages; ++i) producer.push(ring);
  NormWeights norm;
  norm.fetch(p.input.norm_weight, p.input.k);

  // Where this thread's first output goes and its old value, so that neither is met at the end.
  const int per_warp = kTileRows * rows;
  const int first_tile = blockIdx.x + static_cast<int>(threadIdx.x) / per_warp * gridDim.x;
  Output first = {};
  if (first_tile < p.tiles)
    first = locate(p, first_tile, static_cast<int>(threadIdx.x) % per_warp / rows, threadIdx.x % rows);
  const bool has_residual = threadIdx.x < p.slots * per_warp && first.at != nullptr && first.accumulate;

  wait_for_predecessor();
  allow_successor();
  const float residual = has_residual ? load_output(first) : 0.0f;
  stage_rows(p.input, norm, staged, sums);

  const int lane = threadIdx.x % kWarp;
  const bool active = lane / 4 < rows;
  const uint32_t x = shared_address(staged) + lane / 4 * staged_row_bytes(p.input.k);
  int slot = 0;
  int batch = blockIdx.x;
  bool first_batch = true;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    Tile tile;
    tile.open(p, index);
    float acc[4] = {};
    const bool fp8 = p.segments[tile.segment].fp8;
    for (; tile.chunk < tile.chunk_end; ++tile.chunk) {
      uint4 lo, hi;
      float2 scale;
      ring.pop(lo, hi, scale);
      producer.push(ring);
      if (fp8) {
        multiply_fp8_chunk(acc, lo, hi, scale, x + tile.chunk * 128 + lane % 4 * 32, active);
      } else {
        multiply_bf16_chunk(acc, lo, hi, x + tile.chunk * 64 + lane % 4 * 16, active, p.input.fp8);
      }
    }
    store_partial(partial + (slot * kStreamWarps + threadIdx.x / kWarp) * per_warp, acc, rows);
    if (++slot == p.slots || index + static_cast<int>(gridDim.x) >= p.tiles) {
      __syncthreads();
      finish_tiles(p, partial, batch, slot, first_batch && has_residual ? &residual : nullptr);
      __syncthreads();
      slot = 0;
      batch = index + gridDim.x;
      first_batch = false;
    }
  }
}

Status check(const DecodeLinear& a) {
  const auto bad = [](const std::string& what) { return invalid_argument("decode_linear: " + what); };
  if (a.rows < 1 || a.rows > kDecodeTokens) return bad("rows is " + std::to_string(a.rows) + ", the limit is 8");
  if (a.segment_count < 1 || a.segment_count > kDecodeSegments) return bad("1 to 4 segments are taken");
  const int64_t k = a.segments[0].weight.k;
  if (k % 64 != 0) return bad("k is " + std::to_string(k) + ", it must be a multiple of 64");
  if (a.norm_weight != nullptr && k > kNormLimit) return bad("a fused norm takes at most 8192 columns");
  if (a.x.dtype != DType::kBFloat16) return bad("x must be bfloat16");
  if (a.wanted != nullptr) return bad("rows are chosen by decode_layers only");
  for (int i = 0; i < a.segment_count; ++i) {
    const DecodeSegment& s = a.segments[i];
    if (s.weight.k != k || s.weight.n < 1) return bad("all segments must have x's columns");
    if (s.weight.layout != MatrixLayout::kRowMajor) return bad("weights must be row-major");
    const bool fp8 = s.weight.dtype == DType::kFloat8E4M3;
    if (!fp8 && s.weight.dtype != DType::kBFloat16) return bad("weights must be bfloat16 or float8_e4m3");
    if (fp8 && s.weight.scale == nullptr) return bad("float8_e4m3 weights need block scales");
    if (s.y.dtype != DType::kBFloat16 && s.y.dtype != DType::kFloat32) return bad("y must be bfloat16 or float32");
  }
  return {};
}

Rows from_row(Rows rows, int64_t row) {
  if (rows.data != nullptr) {
    rows.data = static_cast<std::byte*>(rows.data) + row * rows.stride * static_cast<int64_t>(dtype_size(rows.dtype));
  }
  return rows;
}
DecodeLinear rows_of(DecodeLinear args, int64_t row, int64_t count) {
  args.rows = count;
  args.x = from_row(args.x, row);
  args.normed = from_row(args.normed, row);
  for (DecodeSegment& segment : args.segments) segment.y = from_row(segment.y, row);
  return args;
}

}  // namespace

Status decode_linear(const DecodeLinear& args, const Launch& launch) {
  TS_RETURN_IF_ERROR(check(args));
  LinearParameters p = {};
  p.segment_count = args.segment_count;
  for (int i = 0; i < args.segment_count; ++i) {
    const DecodeSegment& s = args.segments[i];
    const bool fp8 = s.weight.dtype == DType::kFloat8E4M3;
    p.tiles += static_cast<int>((s.weight.n + kTileRows - 1) / kTileRows);
    p.segments[i] = {static_cast<const uint8_t*>(s.weight.data),
                     s.weight.scale,
                     s.y.data,
                     s.y.stride,
                     static_cast<int>(s.weight.n),
                     p.tiles,
                     static_cast<int>(s.weight.k * (fp8 ? 1 : 2)),
                     fp8,
                     s.y.dtype == DType::kFloat32,
                     s.accumulate};
    p.input.fp8 |= fp8;
  }
  p.input.x = static_cast<const bf16*>(args.x.data);
  p.input.stride = args.x.stride;
  p.input.norm_weight = args.norm_weight;
  p.input.epsilon = args.norm_epsilon;
  p.input.normed = static_cast<bf16*>(args.normed.data);
  p.input.normed_stride = args.normed.stride;
  p.input.rows = static_cast<int>(args.rows);
  p.input.k = static_cast<int>(args.segments[0].weight.k);

  const int blocks = std::min(p.tiles, multiprocessors());
  const int per_tile = kStreamWarps * kTileRows * p.input.rows;
  constexpr int kPartialFloats = 8192;
  p.slots = std::max(1, std::min((p.tiles + blocks - 1) / blocks, kPartialFloats / per_tile));
  const size_t rest = static_cast<size_t>(p.input.rows) * staged_row_bytes(p.input.k) +
                      sizeof(float) * (kStageSums + static_cast<size_t>(p.slots) * per_tile);
  constexpr int kDeep = 6;
  constexpr int kShallow = 3;
  if (rest + WeightRing<kDeep>::kBytes <= kSharedLimit) {
    return launch_kernel("decode_linear", launch, decode_linear_kernel<kDeep>, dim3(blocks), kStreamThreads,
                         rest + WeightRing<kDeep>::kBytes, 1, p);
  }
  if (rest + WeightRing<kShallow>::kBytes <= kSharedLimit) {
    return launch_kernel("decode_linear", launch, decode_linear_kernel<kShallow>, dim3(blocks), kStreamThreads,
                         rest + WeightRing<kShallow>::kBytes, 1, p);
  }
  if (args.rows == 1) {
    return invalid_argument("decode_linear: a row of " + std::to_string(p.input.k) +
                            " columns does not fit in shared memory; the limit is about 60000");
  }
  const int64_t half = args.rows / 2;
  TS_RETURN_IF_ERROR(decode_linear(rows_of(args, 0, half), launch));
  return decode_linear(rows_of(args, half, args.rows - half), launch);
}

}  // namespace tokenspeed::kernels::cuda

#include "kernels/cuda/gemm.h"

#include <cuda_fp8.h>

#include "kernels/cuda/warpgroup.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kThreads = 2 * kWarpgroup;
constexpr int kRowBytes = 128;                       // of a tile along k
constexpr int kTileBytes = kGemmTile * kRowBytes;    // one operand, one stage
// FP8 keeps two sets of sums in registers, so one block has a multiprocessor for itself; two blocks share it otherwise.
constexpr int stages(bool fp8) { return fp8 ? 6 : 3; }
constexpr int shared_bytes(bool fp8) { return stages(fp8) * 2 * kTileBytes + 1024; }
constexpr int kChunksPerThread = kGemmTile * 8 / kThreads;
constexpr int kRaster = 8;                           // row tiles that share the weights' tiles in the L2 cache

// Both operands of one k step: each thread copies one 16-byte column of kChunksPerThread rows of a and of b.
struct Loader {
  const std::byte* a[kChunksPerThread];
  const std::byte* b[kChunksPerThread];
  uint32_t target;
  int64_t k_bytes;

  __device__ void load(uint32_t stage, int step) const {
    const int64_t at = static_cast<int64_t>(step) * kRowBytes + threadIdx.x % 8 * 16;
#pragma unroll
    for (int i = 0; i < kChunksPerThread; ++i) {
      const uint32_t to = stage + target + i * (kThreads / 8) * kRowBytes;
      const bool inside = at < k_bytes;
      copy16_async(to, inside && a[i] ? a[i] + at : nullptr, inside && a[i] != nullptr);
      copy16_async(to + kTileBytes, inside && b[i] ? b[i] + at : nullptr, inside && b[i] != nullptr);
    }
  }
};

__device__ inline bool find_tile(const TileGemm& args, int index, GemmTile* tile) {
  if (args.tiles == nullptr) {
    *tile = {0, index * kGemmTile, static_cast<int32_t>(args.rows)};
    return true;
  }
  if (index >= *args.tile_count) return false;
  *tile = args.tiles[index];
  return true;
}

// Row of one weight that is column `column` of the tile: with swiglu the first half are gate rows, the second up rows.
template <bool kSwiGlu>
__device__ inline int64_t weight_row(const TileGemm& args, int column_tile, int column) {
  if constexpr (!kSwiGlu) return static_cast<int64_t>(column_tile) * kGemmTile + column;
  const int half = kGemmTile / 2;
  return static_cast<int64_t>(column_tile) * half + column % half + (column >= half ? args.n / 2 : 0);
}

template <bool kSwiGlu>
__device__ inline bool is_weight_row(const TileGemm& args, int column_tile, int column) {
  if constexpr (!kSwiGlu) return static_cast<int64_t>(column_tile) * kGemmTile + column < args.n;
  return static_cast<int64_t>(column_tile) * (kGemmTile / 2) + column % (kGemmTile / 2) < args.n / 2;
}

__device__ inline void store_pair(const TileGemm& args, int64_t row, int64_t column, int64_t columns, float x, float y) {
  const int64_t at = row * args.y_stride + column;
  if (args.y_dtype == DType::kFloat32) {
    float* out = static_cast<float*>(args.y) + at;
    out[0] = args.accumulate ? out[0] + x : x;
    if (column + 1 < columns) out[1] = args.accumulate ? out[1] + y : y;
    return;
  }
  __nv_bfloat162* out = reinterpret_cast<__nv_bfloat162*>(static_cast<bf16*>(args.y) + at);
  if (args.accumulate) {
    const float2 old = __bfloat1622float2(*out);
    x += old.x;
    y += old.y;
  }
  *out = __floats2bfloat162_rn(x, y);
}

template <bool kSwiGlu>
__device__ inline void store_tile(const TileGemm& args, const GemmTile& tile, int column_tile, const float (&d)[kAccumulators]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = tile.first + static_cast<int>(threadIdx.x) / kWarp * 16 + lane / 4 + 8 * i;
    if (row >= tile.end) continue;
    const int64_t to = args.y_rows ? args.y_rows[row] : row;
    constexpr int kGroups = kSwiGlu ? kAccumulators / 8 : kAccumulators / 4;
    const int64_t columns = kSwiGlu ? args.n / 2 : args.n;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int64_t column = static_cast<int64_t>(column_tile) * (kGroups * 8) + j * 8 + lane % 4 * 2;
      if (column >= columns) continue;
      float x = d[4 * j + 2 * i];
      float y = d[4 * j + 2 * i + 1];
      if constexpr (kSwiGlu) {
        x = silu(x) * d[4 * (j + kGroups) + 2 * i];
        y = silu(y) * d[4 * (j + kGroups) + 2 * i + 1];
      }
      store_pair(args, to, column, columns, x, y);
    }
  }
}

template <bool kFp8, bool kSwiGlu>
__global__ void __launch_bounds__(kThreads, kFp8 ? 1 : 2) tile_gemm_kernel(TileGemm args, int row_tiles, int column_tiles) {
  constexpr int kStages = stages(kFp8);
  extern __shared__ unsigned char memory[];
  const uint32_t shared = (shared_address(memory) + 1023) & ~1023u;

  // Blocks walk kRaster row tiles before they move on to the next columns.
  const int band = static_cast<int>(blockIdx.x) / (kRaster * column_tiles);
  const int band_rows = min(kRaster, row_tiles - band * kRaster);
  const int in_band = static_cast<int>(blockIdx.x) - band * kRaster * column_tiles;
  const int column_tile = in_band / band_rows;
  GemmTile tile;
  if (!find_tile(args, band * kRaster + in_band % band_rows, &tile)) return;

  constexpr int kElement = kFp8 ? 1 : 2;
  Loader loader;
  loader.k_bytes = args.k * kElement;
  loader.target = swizzled<kRowBytes>(threadIdx.x / 8, threadIdx.x % 8);
  const std::byte* b = static_cast<const std::byte*>(args.b) + tile.group * args.b_group_stride;
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int in_tile = static_cast<int>(threadIdx.x) / 8 + i * (kThreads / 8);
    const int row = tile.first + in_tile;
    loader.a[i] = nullptr;
    if (row < tile.end) {
      const int64_t from = args.a_rows ? args.a_rows[row] / args.a_divisor : row;
      loader.a[i] = static_cast<const std::byte*>(args.a) + from * args.a_stride * kElement;
    }
    loader.b[i] = is_weight_row<kSwiGlu>(args, column_tile, in_tile)
                      ? b + weight_row<kSwiGlu>(args, column_tile, in_tile) * loader.k_bytes
                      : nullptr;
  }

  const int steps = static_cast<int>((loader.k_bytes + kRowBytes - 1) / kRowBytes);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) loader.load(shared + s * 2 * kTileBytes, s);
    commit_copies();
  }

  // FP8: scales of this thread's two rows and of the weights' blocks.
  const int lane = threadIdx.x % kWarp;
  const float* a_scale[2] = {};
  const float* b_scale[2] = {};
  if constexpr (kFp8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(tile.first + static_cast<int>(threadIdx.x) / kWarp * 16 + lane / 4 + 8 * i, tile.end - 1);
      const int64_t from = args.a_rows ? args.a_rows[row] / args.a_divisor : row;
      a_scale[i] = args.a_scale + from * steps;
      const int64_t block = weight_row<kSwiGlu>(args, column_tile, i * (kGemmTile / 2)) / 128;
      b_scale[i] = args.b_scale + tile.group * args.b_scale_group_stride + block * steps;
    }
  }

  const int warpgroup = threadIdx.x / kWarpgroup;
  float total[kAccumulators];
  float part[kFp8 ? kAccumulators : 1];
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) total[i] = 0;
  for (int step = 0; step < steps; ++step) {
    float scales[2][2];
    if constexpr (kFp8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) scales[i][j] = a_scale[i][step] * b_scale[j][step];
      }
    }
    wait_copies<kStages - 2>();
    publish_shared();
    __syncthreads();
    if (step + kStages - 1 < steps) {
      loader.load(shared + (step + kStages - 1) % kStages * 2 * kTileBytes, step + kStages - 1);
    }
    commit_copies();
    const uint32_t stage = shared + step % kStages * 2 * kTileBytes;
    const uint64_t a_tile = tile_descriptor(stage + warpgroup * (kTileBytes / 2));
    const uint64_t b_tile = tile_descriptor(stage + kTileBytes);
    warpgroup_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kFp8) {
        multiply_fp8(part, a_tile + 2 * i, b_tile + 2 * i, i > 0);
      } else {
        multiply_bf16(total, a_tile + 2 * i, b_tile + 2 * i, true);
      }
    }
    warpgroup_commit();
    warpgroup_wait<0>();
    if constexpr (kFp8) {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) total[i] += part[i] * scales[i / 2 % 2][i >= kAccumulators / 2];
    }
  }
  store_tile<kSwiGlu>(args, tile, column_tile, total);
}

template <bool kFp8, bool kSwiGlu>
void launch(const TileGemm& args, cudaStream_t stream) {
  const int64_t row_tiles = args.tiles ? args.max_tiles : ceil_div(args.rows, kGemmTile);
  const int64_t column_tiles = ceil_div(args.n, kGemmTile);
  constexpr int kSharedBytes = shared_bytes(kFp8);
  cudaFuncSetAttribute(tile_gemm_kernel<kFp8, kSwiGlu>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  tile_gemm_kernel<kFp8, kSwiGlu><<<static_cast<unsigned>(row_tiles * column_tiles), kThreads, kSharedBytes, stream>>>(
      args, static_cast<int>(row_tiles), static_cast<int>(column_tiles));
}

constexpr int kBlockColumns = 128;
constexpr int kQuantizeThreads = 256;
constexpr float kGreatestFp8 = 448.0f;

// 16 threads hold the 128 columns that share a scale.
__global__ void quantize_kernel(const bf16* x, int64_t x_stride, int64_t rows, int64_t columns, uint2* out, float* scale) {
  const int64_t index = blockIdx.x * int64_t{kQuantizeThreads} + threadIdx.x;
  const int64_t row = min(index / (columns / 8), rows - 1);
  const int64_t column = index % (columns / 8) * 8;
  float v[8];
  load8(x + row * x_stride + column, v);
  float greatest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) greatest = fmaxf(greatest, fabsf(v[i]));
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, offset));
  if (index >= rows * (columns / 8)) return;
  const float factor = greatest > 0 ? kGreatestFp8 / greatest : 0.0f;
  alignas(8) __nv_fp8x2_storage_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    packed[i] = __nv_cvt_float2_to_fp8x2(make_float2(v[2 * i] * factor, v[2 * i + 1] * factor), __NV_SATFINITE, __NV_E4M3);
  }
  out[index] = *reinterpret_cast<const uint2*>(packed);
  if (column % kBlockColumns == 0) scale[row * (columns / kBlockColumns) + column / kBlockColumns] = greatest / kGreatestFp8;
}

}  // namespace

void tile_gemm(const TileGemm& args, cudaStream_t stream) {
  if (args.dtype == DType::kFloat8E4M3) {
    args.swiglu ? launch<true, true>(args, stream) : launch<true, false>(args, stream);
  } else {
    args.swiglu ? launch<false, true>(args, stream) : launch<false, false>(args, stream);
  }
}

void quantize_rows(const void* x, int64_t x_stride, int64_t rows, int64_t columns, void* out, float* scale, cudaStream_t stream) {
  quantize_kernel<<<static_cast<unsigned>(ceil_div(rows * columns / 8, kQuantizeThreads)), kQuantizeThreads, 0, stream>>>(
      static_cast<const bf16*>(x), x_stride, rows, columns, static_cast<uint2*>(out), scale);
}

}  // namespace tokenspeed::kernels::cuda

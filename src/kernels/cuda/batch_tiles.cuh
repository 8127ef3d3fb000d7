// What the kernels for 9 to 64 rows share: matrix products whose 64 rows are weights and whose few columns are the
// step's rows, and the staging of those rows.
//
// FP8 weights meet rows of bfloat16 without loss: a row's 128 elements are scaled by a power of two (the greatest to
// [128, 256)) and split in two e4m3 terms, x = hi + lo / 32. hi keeps four significant bits, the rest of bfloat16's
// eight fits in lo; only what is 2^-22 of the greatest element is lost. The two are neighbouring columns of one
// product. Sums of 128 products come from the matrix unit, are scaled and added in fp32 in order of k.
//
// A chunk is 128 bytes along k of a tile's rows; operand tiles are those of warpgroup.cuh.
#pragma once

#include <cstdint>

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/warpgroup.cuh"

namespace tokenspeed::kernels::cuda {

inline constexpr int kBatchChunk = 128;              // bytes along k
inline constexpr int kBatchTile = 64 * kBatchChunk;  // bytes of one weight operand
inline constexpr float kLowTerm = 0x1p-5f;           // the second term's unit over the first's
template <bool kFp8>
inline constexpr int kColumnsPerRow = kFp8 ? 2 : 1;
template <bool kFp8>
inline constexpr int kChunkElements = kFp8 ? kBatchChunk : kBatchChunk / 2;

#define TS_PREDICATE(operand) "{\n.reg .pred p;\nsetp.ne.b32 p, " operand ", 0;\n"
#define TS_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TS_D16(d, i) TS_D4(d, i), TS_D4(d, i + 4), TS_D4(d, i + 8), TS_D4(d, i + 12)
#define TS_N4 "{%0,%1,%2,%3}"
#define TS_N8 "{%0,%1,%2,%3,%4,%5,%6,%7}"
#define TS_N16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define TS_N32                                                                                                  \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31}"
#define TS_N64                                                                                                   \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"  \
  "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
  "%56,%57,%58,%59,%60,%61,%62,%63}"
#define TS_MULTIPLY(columns, names, a_operand, b_operand, keep_operand, ...)                                       \
  if constexpr (kFp8) {                                                                                            \
    asm volatile(TS_PREDICATE(keep_operand) "wgmma.mma_async.sync.aligned.m64n" columns "k32.f32.e4m3.e4m3 " names \
                                            ", " a_operand ", " b_operand ", p, 1, 1;\n}\n"                        \
                 : __VA_ARGS__                                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(keep)));                                                   \
  } else {                                                                                                         \
    asm volatile(TS_PREDICATE(keep_operand) "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 " names \
                                            ", " a_operand ", " b_operand ", p, 1, 1, 0, 0;\n}\n"                  \
                 : __VA_ARGS__                                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(keep)));                                                   \
  }

// d[64 x kColumns] = a b^T (+ d when keep) over 32 bytes of k.
template <bool kFp8, int kColumns>
__device__ inline void multiply_columns(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool keep) {
  if constexpr (kColumns == 8) {
    TS_MULTIPLY("8", TS_N4, "%4", "%5", "%6", TS_D4(d, 0))
  } else if constexpr (kColumns == 16) {
    TS_MULTIPLY("16", TS_N8, "%8", "%9", "%10", TS_D4(d, 0), TS_D4(d, 4))
  } else if constexpr (kColumns == 32) {
    TS_MULTIPLY("32", TS_N16, "%16", "%17", "%18", TS_D16(d, 0))
  } else if constexpr (kColumns == 64) {
    TS_MULTIPLY("64", TS_N32, "%32", "%33", "%34", TS_D16(d, 0), TS_D16(d, 16))
  } else {
    static_assert(kColumns == 128);
    TS_MULTIPLY("128", TS_N64, "%64", "%65", "%66", TS_D16(d, 0), TS_D16(d, 16), TS_D16(d, 32), TS_D16(d, 48))
  }
}
#undef TS_PREDICATE
#undef TS_D4
#undef TS_D16
#undef TS_N4
#undef TS_N8
#undef TS_N16
#undef TS_N32
#undef TS_N64
#undef TS_MULTIPLY

// A chunk of 64 weight rows times the columns; complete after warpgroup_wait.
template <bool kFp8, int kColumns>
__device__ inline void multiply_chunk(float (&d)[kColumns / 2], uint32_t weights, uint32_t rows, bool keep) {
  const uint64_t a = tile_descriptor(weights);
  const uint64_t b = tile_descriptor(rows);
#pragma unroll
  for (int i = 0; i < 4; ++i) multiply_columns<kFp8, kColumns>(d, a + 2 * i, b + 2 * i, keep || i > 0);
}

// The sums a thread of a warpgroup keeps for kColumns columns: for each of kRows of the step's rows, of the weight rows
// r and r + 8, r = 16 * warp + lane / 4. Row i of the thread is step row row_of(i).
template <bool kFp8, int kColumns>
struct RowSums {
  static constexpr int kRows = kFp8 ? kColumns / 8 : kColumns / 4;
  float at[kRows][2];

  __device__ static int row_of(int i) {
    const int quarter = static_cast<int>(threadIdx.x) % 4;
    return kFp8 ? 4 * i + quarter : 8 * (i / 2) + 2 * quarter + i % 2;
  }
};

// What one 16-byte piece of a row becomes: for FP8 its share of hi and lo and the row's scale (equal in the 16 lanes
// that hold the row's 128 elements; NaN when an element is not finite).
struct SplitPiece {
  uint2 high;
  uint2 low;
  float scale;
};
__device__ inline SplitPiece split_piece(const uint4& raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  uint32_t greatest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) greatest = __vmaxu2(greatest, words[i] & 0x7fff7fffu);
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) greatest = __vmaxu2(greatest, __shfl_xor_sync(~0u, greatest, offset));
  const uint32_t exponent = max(max(greatest & 0xffffu, greatest >> 16) >> 7, 8u);
  const float factor = __uint_as_float((261u - exponent) << 23);
  SplitPiece piece;
  piece.scale = exponent == 255 ? __uint_as_float(0x7fc00000u) : __uint_as_float((exponent - 7) << 23);
  uint16_t high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t value, back, rest;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;"
        : "=r"(value)
        : "f"(bf16_high(words[i]) * factor), "f"(bf16_low(words[i]) * factor));
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(high[i]) : "r"(value));
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(back) : "h"(high[i]));
    asm("{.reg .b32 r, s; mov.b32 s, 0x50005000; sub.rn.f16x2 r, %1, %2; mul.rn.f16x2 %0, r, s;}"
        : "=r"(rest)
        : "r"(value), "r"(back));
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(low[i]) : "r"(rest));
  }
  piece.high = {high[0] | uint32_t{high[1]} << 16, high[2] | uint32_t{high[3]} << 16};
  piece.low = {low[0] | uint32_t{low[1]} << 16, low[2] | uint32_t{low[3]} << 16};
  return piece;
}

__device__ inline void store_shared8(uint32_t address, uint2 value) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}
__device__ inline void store_shared16(uint32_t address, const uint4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Lanes that hold one row of a chunk: 16 bytes of bfloat16 each.
template <bool kFp8>
inline constexpr int kLanesPerRow = kChunkElements<kFp8> / 8;

// Writes this lane's piece of row `row` of a chunk to the operand tile at `tile`; `scales` takes the row's scale. All
// lanes of the warp must call; those with !valid write nothing.
template <bool kFp8>
__device__ inline void stage_piece(const uint4& raw, int row, bool valid, uint32_t tile, float* scales) {
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerRow<kFp8>;
  if constexpr (kFp8) {
    const SplitPiece piece = split_piece(raw);
    if (!valid) return;
    const int inside = lane % 2 * 8;
    store_shared8(tile + swizzled<kBatchChunk>(2 * row, lane / 2) + inside, piece.high);
    store_shared8(tile + swizzled<kBatchChunk>(2 * row + 1, lane / 2) + inside, piece.low);
    if (lane == 0) scales[row] = piece.scale;
  } else {
    if (valid) store_shared16(tile + swizzled<kBatchChunk>(row, lane), raw);
  }
}

// Split rows in memory: for each 128 of k the tile of all columns, rows padded to 16, 32 or 64; behind the tiles the
// scales [k / 128][padded rows].
__host__ __device__ constexpr int padded_rows(int64_t rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }
struct SplitRows {
  unsigned char* tiles;
  int padded;
  int chunks;

  __host__ __device__ SplitRows(const void* memory, int64_t rows, int64_t columns)
      : tiles(static_cast<unsigned char*>(const_cast<void*>(memory))),
        padded(padded_rows(rows)),
        chunks(static_cast<int>(columns / 128)) {}
  __host__ __device__ int tile_bytes() const { return 2 * padded * kBatchChunk; }
  __host__ __device__ unsigned char* tile(int chunk) const {
    return tiles + static_cast<int64_t>(chunk) * tile_bytes();
  }
  __host__ __device__ float* scales(int chunk) const { return reinterpret_cast<float*>(tile(chunks)) + chunk * padded; }
  __host__ __device__ int64_t bytes() const { return int64_t{chunks} * (tile_bytes() + padded * 4); }

  // This lane's 16 bytes of bfloat16 from column 8 * index on; all lanes of the warp must call.
  __device__ void write(const uint4& raw, int row, int index, bool valid) const {
    const SplitPiece piece = split_piece(raw);
    if (!valid) return;
    const int lane = index % 16;
    unsigned char* const to = tile(index / 16) + lane % 2 * 8;
    *reinterpret_cast<uint2*>(to + swizzled<kBatchChunk>(2 * row, lane / 2)) = piece.high;
    *reinterpret_cast<uint2*>(to + swizzled<kBatchChunk>(2 * row + 1, lane / 2)) = piece.low;
    if (lane == 0) scales(index / 16)[row] = piece.scale;
  }
};

// sums += part * scales, part the fp32 sums of one FP8 chunk; scale_low/high of the weight rows r and r + 8.
template <int kColumns>
__device__ inline void add_scaled(RowSums<true, kColumns>& sums, const float (&part)[kColumns / 2], const float* scales,
                                  float weight_low, float weight_high) {
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
    const float scale = scales[RowSums<true, kColumns>::row_of(i)];
    sums.at[i][0] += (part[4 * i] + kLowTerm * part[4 * i + 1]) * (scale * weight_low);
    sums.at[i][1] += (part[4 * i + 2] + kLowTerm * part[4 * i + 3]) * (scale * weight_high);
  }
}

}  // namespace tokenspeed::kernels::cuda

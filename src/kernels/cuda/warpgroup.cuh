// Hopper's warpgroup matrix products (wgmma): 64 rows from operands in shared memory or registers.
//
// An operand tile is rows of 128 bytes along k, eight rows to 1024 bytes, chunks swizzled as swizzled<128>() does, and
// begins at a multiple of 1024 bytes. Accumulators: thread t of the warpgroup holds rows 16 (t / 32) + t % 32 / 4 (+ 8)
// and, of every 8 columns, 2 (t % 4) and the next: d[4 j + 0, 1] the first row's, d[4 j + 2, 3] the second's. A first
// operand of 16 columns in registers lies as four neighbouring pairs of such sums rounded to bfloat16: a[i] = pair i of
// d[8 j ..].
#pragma once

#include <cstdint>

#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kTileColumns = 128;
inline constexpr int kAccumulators = kTileColumns / 2;

__device__ inline uint64_t tile_descriptor(uint32_t shared) {
  constexpr uint64_t kLeading = uint64_t{1} << 16;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kEightRows | kLeading | ((shared & 0x3ffff) >> 4);
}

// A second operand whose rows of 128 bytes are steps of k and hold 64 of its columns; the next 64 columns lie
// column_bytes on.
__device__ inline uint64_t transposed_descriptor(uint32_t shared, uint32_t column_bytes) {
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kEightRows | uint64_t{column_bytes >> 4} << 16 | ((shared & 0x3ffff) >> 4);
}

__device__ inline void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After a wait, before the sums are used: keeps the compiler from moving their uses above the wait.
template <int kCount>
__device__ inline void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define TS_8(d, i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define TS_64_OPERANDS(d) \
  TS_8(d, 0), TS_8(d, 8), TS_8(d, 16), TS_8(d, 24), TS_8(d, 32), TS_8(d, 40), TS_8(d, 48), TS_8(d, 56)
#define TS_64_NAMES                                                                                                   \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%"  \
  "30,%31,"                                                                                                           \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%" \
  "60,%61,"                                                                                                           \
  "%62,%63}"

// d = a b^T (+ d when keep): 16 bfloat16 along k.
__device__ inline void multiply_bf16(float (&d)[kAccumulators], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " TS_64_NAMES ", %64, %65, p, 1, 1, 0, 0;\n}\n"
      : TS_64_OPERANDS(d)
      : "l"(a), "l"(b), "r"(static_cast<int>(keep)));
}
// The same with 32 float8_e4m3 along k.
__device__ inline void multiply_fp8(float (&d)[kAccumulators], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " TS_64_NAMES ", %64, %65, p, 1, 1;\n}\n"
      : TS_64_OPERANDS(d)
      : "l"(a), "l"(b), "r"(static_cast<int>(keep)));
}
// d[64 x 64] = a b^T (+ d when keep): 16 bfloat16 along k.
__device__ inline void multiply_bf16(float (&d)[32], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%"
      "30,%31}"
      ", %32, %33, p, 1, 1, 0, 0;\n}\n"
      : TS_8(d, 0), TS_8(d, 8), TS_8(d, 16), TS_8(d, 24)
      : "l"(a), "l"(b), "r"(static_cast<int>(keep)));
}
// The same with 32 float8_e4m3 along k.
__device__ inline void multiply_fp8(float (&d)[32], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%"
      "30,%31}"
      ", %32, %33, p, 1, 1;\n}\n"
      : TS_8(d, 0), TS_8(d, 8), TS_8(d, 16), TS_8(d, 24)
      : "l"(a), "l"(b), "r"(static_cast<int>(keep)));
}
#define TS_128_NAMES                                                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%" \
  "30,%31,"                                                                                                          \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63,"                                                                                                 \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
  "%92,%93,%94,%95,"                                                                                                 \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%" \
  "119,%120,%121,%122,%123,%124,%125,%126,%127}"
#define TS_MULTIPLY_ADD_256(d, a, b, types)                                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." types " " TS_128_NAMES                                   \
               ", {%128,%129,%130,%131}, %132, 1, 1, 1, 1;\n"                                                          \
               : TS_8(d, 0), TS_8(d, 8), TS_8(d, 16), TS_8(d, 24), TS_8(d, 32), TS_8(d, 40), TS_8(d, 48), TS_8(d, 56), \
                 TS_8(d, 64), TS_8(d, 72), TS_8(d, 80), TS_8(d, 88), TS_8(d, 96), TS_8(d, 104), TS_8(d, 112),          \
                 TS_8(d, 120)                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// d[64 x 256] += a b for a of 16 columns in registers and a transposed b.
__device__ inline void multiply_add_bf16(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {
  TS_MULTIPLY_ADD_256(d, a, b, "bf16.bf16");
}
// The same with float16.
__device__ inline void multiply_add_half(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {
  TS_MULTIPLY_ADD_256(d, a, b, "f16.f16");
}
#undef TS_MULTIPLY_ADD_256
#undef TS_128_NAMES
#undef TS_8
#undef TS_64_OPERANDS
#undef TS_64_NAMES

}  // namespace tokenspeed::kernels::cuda

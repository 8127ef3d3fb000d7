// fp32 FMA over float32 or widened bfloat16 weights.
#include <immintrin.h>

#include "kernels/cpu/linear_tile.h"

namespace tokenspeed::kernels::cpu {
namespace {

struct FmaFormat {
  using Vector = __m512;
  static constexpr DType kXType = DType::kFloat32;
  static constexpr int kMaxRows = 8;
  static constexpr int kStreamPanels = 2;
  // 24 accumulators and the weights of a step fit the 32 registers. Blocks of several tiles have at least four rows in
  // each.
  static constexpr int max_panels(int rows) { return rows < 4 ? kStreamPanels : 3; }

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }

  // sums += w * x[.][element] of the step's packed line.
  template <int P, int R>
  static void add(Vector (&sums)[P][R], const Vector (&w)[P], const std::byte* x, int element) {
    for (int r = 0; r < R; ++r) {
      float value;
      std::memcpy(&value, x + r * kLineBytes + element * sizeof value, sizeof value);
      const Vector broadcast = _mm512_set1_ps(value);
      for (int p = 0; p < P; ++p) sums[p][r] = _mm512_fmadd_ps(w[p], broadcast, sums[p][r]);
    }
  }
};

struct Float32Format : FmaFormat {
  static constexpr int64_t kStepK = 1;
  static constexpr int kXBytes = 4;

  template <int P, int R>
  static void multiply(Vector (&sums)[P][R], const std::byte* weights, int64_t panel_bytes, const std::byte* x) {
    Vector w[P];
    for (int p = 0; p < P; ++p) w[p] = _mm512_loadu_ps(weights + p * panel_bytes);
    add<P, R>(sums, w, x, 0);
  }
};

struct BFloat16Format : FmaFormat {
  static constexpr int64_t kStepK = 2;
  static constexpr int kXBytes = 8;

  static __v16su line(const std::byte* from) { return (__v16su)_mm512_loadu_si512(from); }

  template <int P, int R>
  static void multiply(Vector (&sums)[P][R], const std::byte* weights, int64_t panel_bytes, const std::byte* x) {
    // Vector operators: GCC 12 warns about its own intrinsics for these.
    Vector w[P];
    for (int p = 0; p < P; ++p) w[p] = (Vector)(line(weights + p * panel_bytes) << 16);
    add<P, R>(sums, w, x, 0);
    for (int p = 0; p < P; ++p) w[p] = (Vector)(line(weights + p * panel_bytes) & 0xffff0000u);
    add<P, R>(sums, w, x, 1);
  }
};

}  // namespace

const LinearKernels& avx512_kernels(DType weight) {
  static const LinearKernels float32 = make_kernels<Float32Format>();
  static const LinearKernels bfloat16 = make_kernels<BFloat16Format>();
  return weight == DType::kFloat32 ? float32 : bfloat16;
}

}  // namespace tokenspeed::kernels::cpu

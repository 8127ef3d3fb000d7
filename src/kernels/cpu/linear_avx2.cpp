// fp32 FMA over float32 or widened bfloat16 weights, half a panel a register.
#include <immintrin.h>

#include "kernels/cpu/linear_tile.h"

namespace tokenspeed::kernels::cpu {
namespace {

struct FmaFormat {
  struct Vector {
    __m256 low;
    __m256 high;
  };
  static constexpr DType kXType = DType::kFloat32;
  // 12 accumulators, a weight line and a broadcast fit the 16 registers.
  static constexpr int kMaxRows = 6;
  static constexpr int kStreamPanels = 2;
  static constexpr int max_panels(int rows) { return rows <= 3 ? 2 : 1; }

  static Vector zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vector load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static void store(float* to, Vector value) {
    _mm256_storeu_ps(to, value.low);
    _mm256_storeu_ps(to + 8, value.high);
  }

  // sums += w * x[.][element] of the step's packed line.
  template <int P, int R>
  static void add(Vector (&sums)[P][R], const Vector (&w)[P], const std::byte* x, int element) {
    for (int r = 0; r < R; ++r) {
      float value;
      std::memcpy(&value, x + r * kLineBytes + element * sizeof value, sizeof value);
      const __m256 broadcast = _mm256_set1_ps(value);
      for (int p = 0; p < P; ++p) {
        sums[p][r].low = _mm256_fmadd_ps(w[p].low, broadcast, sums[p][r].low);
        sums[p][r].high = _mm256_fmadd_ps(w[p].high, broadcast, sums[p][r].high);
      }
    }
  }
};

struct Float32Format : FmaFormat {
  static constexpr int64_t kStepK = 1;
  static constexpr int kXBytes = 4;

  template <int P, int R>
  static void multiply(Vector (&sums)[P][R], const std::byte* weights, int64_t panel_bytes, const std::byte* x) {
    Vector w[P];
    for (int p = 0; p < P; ++p) w[p] = load(reinterpret_cast<const float*>(weights + p * panel_bytes));
    add<P, R>(sums, w, x, 0);
  }
};

struct BFloat16Format : FmaFormat {
  static constexpr int64_t kStepK = 2;
  static constexpr int kXBytes = 8;

  static __m256i half(const std::byte* line, int index) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + index);
  }

  template <int P, int R>
  static void multiply(Vector (&sums)[P][R], const std::byte* weights, int64_t panel_bytes, const std::byte* x) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    Vector w[P];
    for (int p = 0; p < P; ++p) {
      const std::byte* line = weights + p * panel_bytes;
      w[p] = {_mm256_castsi256_ps(_mm256_slli_epi32(half(line, 0), 16)),
              _mm256_castsi256_ps(_mm256_slli_epi32(half(line, 1), 16))};
    }
    add<P, R>(sums, w, x, 0);
    for (int p = 0; p < P; ++p) {
      const std::byte* line = weights + p * panel_bytes;
      w[p] = {_mm256_castsi256_ps(_mm256_and_si256(half(line, 0), upper)),
              _mm256_castsi256_ps(_mm256_and_si256(half(line, 1), upper))};
    }
    add<P, R>(sums, w, x, 1);
  }
};

}  // namespace

const LinearKernels& avx2_kernels(DType weight) {
  static const LinearKernels float32 = make_kernels<Float32Format>();
  static const LinearKernels bfloat16 = make_kernels<BFloat16Format>();
  return weight == DType::kFloat32 ? float32 : bfloat16;
}

}  // namespace tokenspeed::kernels::cpu

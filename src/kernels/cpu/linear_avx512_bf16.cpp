// bfloat16 x bfloat16 with VDPBF16PS: two products a lane and step, added to an fp32 accumulator.
#include <immintrin.h>

#include "kernels/cpu/linear_tile.h"

namespace tokenspeed::kernels::cpu {
namespace {

struct DotFormat {
  using Vector = __m512;
  static constexpr int64_t kStepK = 2;
  static constexpr int kXBytes = 4;
  static constexpr DType kXType = DType::kBFloat16;
  static constexpr int kMaxRows = 8;
  static constexpr int kStreamPanels = 1;
  // 24 accumulators and the weights of a step fit the 32 registers. Blocks of several tiles have at least four rows in
  // each.
  static constexpr int max_panels(int rows) { return rows < 4 ? kStreamPanels : 3; }

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }

  template <int P, int R>
  static void multiply(Vector (&sums)[P][R], const std::byte* weights, int64_t panel_bytes, const std::byte* x) {
    __m512i w[P];
    for (int p = 0; p < P; ++p) w[p] = _mm512_loadu_si512(weights + p * panel_bytes);
    for (int r = 0; r < R; ++r) {
      int pair;
      std::memcpy(&pair, x + r * kLineBytes, sizeof pair);
      const __m512i broadcast = _mm512_set1_epi32(pair);
      for (int p = 0; p < P; ++p) {
        sums[p][r] = _mm512_dpbf16_ps(sums[p][r], (__m512bh)w[p], (__m512bh)broadcast);
      }
    }
  }
};

}  // namespace

const LinearKernels& avx512_bf16_dot_kernels() {
  static const LinearKernels kernels = make_kernels<DotFormat>();
  return kernels;
}

}  // namespace tokenspeed::kernels::cpu

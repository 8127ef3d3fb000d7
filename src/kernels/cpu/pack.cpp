#include <emmintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/linear.h"

namespace tokenspeed::kernels {
namespace {

using cpu::kPanelRows;

constexpr int64_t pair_of(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 1; }

float convert(float value, float) { return value; }
float convert(BFloat16 value, float) { return to_float(value); }
BFloat16 convert(float value, BFloat16) { return to_bfloat16(value); }
BFloat16 convert(BFloat16 value, BFloat16) { return value; }

// One panel of `rows` real rows, a source line's worth of steps at a time: rows whose distance is a power of two share
// a cache set, so a line must be used up before the other lanes' lines push it out.
template <typename Source, typename Target>
void pack_panel(const Source* source, int64_t stride, int64_t rows, int64_t k, Target* out) {
  constexpr int64_t kPair = sizeof(Target) == sizeof(BFloat16) ? 2 : 1;
  constexpr int64_t kBlock = 16;
  const int64_t whole = k / kPair;
  if (rows < kPanelRows || k % kPair != 0) std::fill_n(out, (whole + k % kPair) * kPanelRows * kPair, Target{});
  for (int64_t begin = 0; begin < whole; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, whole);
    for (int64_t lane = 0; lane < rows; ++lane) {
      const Source* from = source + lane * stride;
      for (int64_t step = begin; step < end; ++step) {
        Target* to = out + (step * kPanelRows + lane) * kPair;
        for (int64_t i = 0; i < kPair; ++i) to[i] = convert(from[step * kPair + i], Target{});
      }
    }
  }
  if (k % kPair == 0) return;
  for (int64_t lane = 0; lane < rows; ++lane) {
    out[(whole * kPanelRows + lane) * kPair] = convert(source[lane * stride + k - 1], Target{});
  }
}

// The same for a whole panel that needs no conversion: a step of a row is 4 bytes, and 16 rows of `steps` become
// `steps` lines. Packing runs once over all weights, mostly into memory not yet in a cache: lines are written past it,
// which saves reading them first. The caller fences. `out` is on 16 bytes.
void transpose_panel(const std::byte* source, int64_t row_bytes, int64_t steps, std::byte* out) {
  constexpr int64_t kStep = 4;
  constexpr int64_t kLine = kPanelRows * kStep;
  constexpr int64_t kSquare = 4;
  const int64_t whole = steps / kSquare * kSquare;
  for (int64_t step = 0; step < whole; step += kSquare) {
    for (int64_t lane = 0; lane < kPanelRows; lane += kSquare) {
      const std::byte* from = source + lane * row_bytes + step * kStep;
      const auto row = [&](int64_t i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * row_bytes));
      };
      const auto store = [&](int64_t i, __m128i values) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + (step + i) * kLine + lane * kStep), values);
      };
      const __m128i low_01 = _mm_unpacklo_epi32(row(0), row(1));
      const __m128i high_01 = _mm_unpackhi_epi32(row(0), row(1));
      const __m128i low_23 = _mm_unpacklo_epi32(row(2), row(3));
      const __m128i high_23 = _mm_unpackhi_epi32(row(2), row(3));
      store(0, _mm_unpacklo_epi64(low_01, low_23));
      store(1, _mm_unpackhi_epi64(low_01, low_23));
      store(2, _mm_unpacklo_epi64(high_01, high_23));
      store(3, _mm_unpackhi_epi64(high_01, high_23));
    }
  }
  for (int64_t step = whole; step < steps; ++step) {
    for (int64_t lane = 0; lane < kPanelRows; ++lane) {
      std::memcpy(out + step * kLine + lane * kStep, source + lane * row_bytes + step * kStep, kStep);
    }
  }
}

template <typename Source, typename Target>
void pack(const Source* source, int64_t stride, int64_t n, int64_t k, int64_t begin, int64_t end, Target* out) {
  constexpr int64_t kPair = sizeof(Target) == sizeof(BFloat16) ? 2 : 1;
  const int64_t panel_elements = (k + kPair - 1) / kPair * kPair * kPanelRows;
  const bool transposes =
      std::is_same_v<Source, Target> && k % kPair == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(__m128i) == 0;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int64_t rows = std::clamp<int64_t>(n - row, 0, kPanelRows);
    const Source* from = source + row * stride;
    Target* to = out + panel * panel_elements;
    if (transposes && rows == kPanelRows) {
      transpose_panel(reinterpret_cast<const std::byte*>(from), stride * static_cast<int64_t>(sizeof(Source)),
                      k / kPair, reinterpret_cast<std::byte*>(to));
    } else {
      pack_panel(from, stride, rows, k, to);
    }
  }
  _mm_sfence();
}

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k, DType dtype) {
  const int64_t pair = pair_of(dtype);
  return (n + kPanelRows - 1) / kPanelRows * kPanelRows * ((k + pair - 1) / pair * pair) *
         static_cast<int64_t>(dtype_size(dtype));
}

void pack_panels(const void* source, DType source_dtype, int64_t source_stride, int64_t n, int64_t k, DType target,
                 int64_t panel_begin, int64_t panel_end, void* out) {
  const auto from = [&](const auto* typed) {
    if (target == DType::kBFloat16) {
      pack(typed, source_stride, n, k, panel_begin, panel_end, static_cast<BFloat16*>(out));
    } else {
      pack(typed, source_stride, n, k, panel_begin, panel_end, static_cast<float*>(out));
    }
  };
  if (source_dtype == DType::kBFloat16) {
    from(static_cast<const BFloat16*>(source));
  } else {
    from(static_cast<const float*>(source));
  }
}

}  // namespace tokenspeed::kernels

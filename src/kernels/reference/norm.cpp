#include "kernels/norm.h"

#include <cmath>

#include "kernels/elements.h"

namespace tokenspeed::kernels::reference {
namespace {

// 1 / root of the mean square of `columns` elements of x from (row, begin) on.
float inverse_root_mean_square(const Rows& x, int64_t row, int64_t begin, int64_t columns, float epsilon) {
  double sum = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const double value = load_element(x, row, begin + i);
    sum += value * value;
  }
  return static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(columns) + epsilon));
}

void zero_centred_norm(const Rows& x, const Rows& out, int64_t row, int64_t begin, int64_t columns, const float* weight,
                       float epsilon) {
  const float scale = inverse_root_mean_square(x, row, begin, columns, epsilon);
  for (int64_t i = 0; i < columns; ++i) {
    store_element(out, row, begin + i, load_element(x, row, begin + i) * scale * (1.0f + weight[i]));
  }
}

}  // namespace

void rms_norm(const RmsNorm& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    if (args.add.data != nullptr) {
      for (int64_t i = 0; i < args.columns; ++i) {
        store_element(args.x, row, i, load_element(args.x, row, i) + load_element(args.add, row, i));
      }
    }
    zero_centred_norm(args.x, args.out, row, 0, args.columns, args.weight, args.epsilon);
  }
}

void gated_rms_norm(const GatedRmsNorm& args) {
  for (int64_t token = 0; token < args.tokens; ++token) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const int64_t begin = head * args.columns;
      const float scale = inverse_root_mean_square(args.x, token, begin, args.columns, args.epsilon);
      for (int64_t i = 0; i < args.columns; ++i) {
        const float z = load_element(args.z, token, begin + i);
        const float silu = z / (1.0f + std::exp(-z));
        store_element(args.out, token, begin + i,
                      load_element(args.x, token, begin + i) * scale * args.weight[i] * silu);
      }
    }
  }
}

void head_rms_norm(const HeadRmsNorm& args) {
  for (int64_t token = 0; token < args.tokens; ++token) {
    for (int64_t head = 0; head < args.heads; ++head) {
      zero_centred_norm(args.x, args.x, token, head * args.head_stride, args.columns, args.weight, args.epsilon);
    }
  }
}

}  // namespace tokenspeed::kernels::reference

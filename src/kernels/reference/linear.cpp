#include "kernels/linear.h"

#include <vector>

#include "kernels/elements.h"
#include "kernels/norm.h"

namespace tokenspeed::kernels::reference {

void linear(const Linear& args) {
  const int64_t k = args.weight.k;
  Rows x = args.x;
  if (args.norm_weight != nullptr) {
    x = {args.workspace, args.x.dtype, k};
    rms_norm({.rows = args.rows,
              .columns = k,
              .x = args.x,
              .weight = args.norm_weight,
              .epsilon = args.norm_epsilon,
              .out = x});
  }
  // Each element is widened once, not once per product.
  std::vector<float> inputs(static_cast<size_t>(args.rows * k));
  for (int64_t t = 0; t < args.rows; ++t) {
    for (int64_t i = 0; i < k; ++i) inputs[t * k + i] = load_element(x, t, i);
  }
  std::vector<float> weights(static_cast<size_t>(k));
  for (int64_t n = 0; n < args.weight.n; ++n) {
    for (int64_t i = 0; i < k; ++i) weights[i] = matrix_element(args.weight, n, i);
    for (int64_t t = 0; t < args.rows; ++t) {
      double sum = args.accumulate ? load_element(args.y, t, n) : 0.0;
      const float* input = inputs.data() + t * k;
      for (int64_t i = 0; i < k; ++i) sum += static_cast<double>(input[i]) * weights[i];
      store_element(args.y, t, n, static_cast<float>(sum));
    }
  }
}

}  // namespace tokenspeed::kernels::reference

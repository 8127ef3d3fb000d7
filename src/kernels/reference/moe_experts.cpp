#include <cmath>
#include <vector>

#include "kernels/elements.h"
#include "kernels/mlp.h"

namespace tokenspeed::kernels::reference {
namespace {

Matrix expert_matrix(const Matrix& first, int64_t stride, int64_t expert) {
  Matrix matrix = first;
  matrix.data = static_cast<const std::byte*>(first.data) + expert * stride;
  return matrix;
}

double dot(const Matrix& matrix, int64_t row, const std::vector<float>& x) {
  double sum = 0;
  for (int64_t i = 0; i < matrix.k; ++i) sum += static_cast<double>(x[i]) * matrix_element(matrix, row, i);
  return sum;
}

// y += weight * expert(x)
void add_expert(const MoeExperts& args, int64_t expert, float weight, const std::vector<float>& x,
                std::vector<float>& y) {
  const Matrix gate_up = expert_matrix(args.gate_up, args.gate_up_stride, expert);
  const Matrix down = expert_matrix(args.down, args.down_stride, expert);
  std::vector<float> activation(static_cast<size_t>(args.width));
  for (int64_t i = 0; i < args.width; ++i) {
    const double gate = dot(gate_up, i, x);
    const double up = dot(gate_up, args.width + i, x);
    activation[i] = round_to(args.x.dtype, static_cast<float>(gate / (1.0 + std::exp(-gate)) * up));
  }
  for (int64_t i = 0; i < args.hidden; ++i) y[i] += weight * static_cast<float>(dot(down, i, activation));
}

}  // namespace

void moe_experts(const MoeExperts& args) {
  std::vector<float> x(static_cast<size_t>(args.hidden));
  std::vector<float> y(static_cast<size_t>(args.hidden));
  for (int64_t t = 0; t < args.rows; ++t) {
    for (int64_t i = 0; i < args.hidden; ++i) x[i] = load_element(args.x, t, i);
    y.assign(y.size(), 0.0f);
    for (int64_t i = 0; i < args.top_k; ++i) {
      const int32_t expert = args.expert_ids[t * args.top_k + i];
      if (expert < 0 || expert >= args.experts) continue;
      add_expert(args, expert, args.expert_weights[t * args.top_k + i], x, y);
    }
    for (int64_t i = 0; i < args.hidden; ++i) store_element(args.y, t, i, y[i]);
  }
}

}  // namespace tokenspeed::kernels::reference

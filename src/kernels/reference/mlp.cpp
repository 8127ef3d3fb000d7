#include "kernels/mlp.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/elements.h"

namespace tokenspeed::kernels::reference {
namespace {

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

}  // namespace

void swiglu(const SwiGlu& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t i = 0; i < args.width; ++i) {
      const float gate = load_element(args.gate_up, row, i);
      store_element(args.out, row, i, gate * sigmoid(gate) * load_element(args.gate_up, row, args.width + i));
    }
  }
}

void add(const Add& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t i = 0; i < args.columns; ++i) {
      store_element(args.out, row, i, load_element(args.a, row, i) + load_element(args.b, row, i));
    }
  }
}

void moe_router(const MoeRouter& args) {
  std::vector<int32_t> order(static_cast<size_t>(args.experts));
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* logits = args.logits + row * args.experts;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    const double greatest = logits[order[0]];
    double total = 0;
    for (int64_t i = 0; i < (args.normalize ? args.top_k : args.experts); ++i) {
      total += std::exp(logits[order[static_cast<size_t>(i)]] - greatest);
    }
    for (int64_t i = 0; i < args.top_k; ++i) {
      const int32_t expert = order[static_cast<size_t>(i)];
      args.expert_ids[row * args.top_k + i] = expert;
      args.expert_weights[row * args.top_k + i] = static_cast<float>(std::exp(logits[expert] - greatest) / total);
    }
  }
}

void shared_expert_combine(const SharedExpertCombine& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    double dot = 0;
    for (int64_t i = 0; i < args.hidden; ++i) {
      dot += static_cast<double>(load_element(args.x, row, i)) * args.gate_weight[i];
    }
    const float gate = sigmoid(static_cast<float>(dot));
    for (int64_t i = 0; i < args.hidden; ++i) {
      float sum = load_element(args.routed, row, i) + load_element(args.shared, row, i) * gate;
      if (args.residual.data != nullptr) sum += load_element(args.residual, row, i);
      store_element(args.y, row, i, sum);
    }
  }
}

void scale_rows_by_sigmoid(const ScaleRowsBySigmoid& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const float gate = sigmoid(load_element(args.gate_logit, row, 0));
    for (int64_t i = 0; i < args.columns; ++i) store_element(args.x, row, i, load_element(args.x, row, i) * gate);
  }
}

}  // namespace tokenspeed::kernels::reference

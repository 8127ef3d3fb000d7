#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <vector>

#include "kernels/sampling_noise.h"

namespace tokenspeed::kernels::reference {
namespace {

std::vector<float> adjusted_logits(const SampleRow& row) {
  std::vector<float> logits(row.logits, row.logits + row.vocabulary);
  const auto inside = [&](int32_t id) { return id >= 0 && id < row.vocabulary; };
  for (const auto& [id, bias] : row.logit_bias) {
    if (inside(id)) logits[static_cast<size_t>(id)] += bias;
  }
  std::set<int32_t> seen(row.prompt.begin(), row.prompt.end());
  seen.insert(row.output.begin(), row.output.end());
  for (const int32_t id : seen) {
    if (!inside(id)) continue;
    float& logit = logits[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  }
  std::map<int32_t, int> counts;
  for (const int32_t id : row.output) ++counts[id];
  for (const auto& [id, count] : counts) {
    if (!inside(id)) continue;
    logits[static_cast<size_t>(id)] -= row.frequency_penalty * static_cast<float>(count) + row.presence_penalty;
  }
  return logits;
}

// How many ids step 4 keeps: `order` is all ids in descending order of logit, `weight` their exp(l - max) in that
// order.
size_t kept_count(const SampleRow& row, const std::vector<double>& weight) {
  size_t kept = weight.size();
  if (row.top_k > 0) kept = std::min(kept, static_cast<size_t>(row.top_k));
  size_t count = 0;
  while (count < kept && weight[count] >= std::min(1.0, static_cast<double>(row.min_p))) ++count;
  kept = std::max<size_t>(count, 1);
  double total = 0;
  for (size_t i = 0; i < kept; ++i) total += weight[i];
  if (row.top_p >= 1.0f) return kept;
  double sum = 0;
  for (size_t i = 0; i < kept; ++i) {
    sum += weight[i];
    if (sum >= static_cast<double>(row.top_p) * total) return i + 1;
  }
  return kept;
}

}  // namespace

Sampled sample(const SampleRow& row) {
  const std::vector<float> logits = adjusted_logits(row);
  std::vector<int32_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == HUGE_VALF) return {-1};
    order[i] = static_cast<int32_t>(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  if (order.empty() || logits[static_cast<size_t>(order[0])] == -HUGE_VALF) return {-1};
  if (row.temperature == 0) return {order[0]};
  const double greatest = logits[static_cast<size_t>(order[0])];
  std::vector<double> scaled(order.size());
  std::vector<double> weight(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    scaled[i] = (logits[static_cast<size_t>(order[i])] - greatest) / static_cast<double>(row.temperature);
    weight[i] = std::exp(scaled[i]);
  }
  const size_t kept = kept_count(row, weight);
  Sampled best;
  double best_key = 0;
  for (size_t i = 0; i < kept; ++i) {
    const double key = scaled[i] + gumbel_noise(row.seed, row.position, order[i]);
    if (best.token < 0 || key > best_key || (key == best_key && order[i] < best.token)) {
      best.token = order[i];
      best_key = key;
    }
  }
  return best;
}

}  // namespace tokenspeed::kernels::reference

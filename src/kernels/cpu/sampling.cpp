#include "kernels/sampling.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/cpu/vector_kernels.h"
#include "kernels/sampling_noise.h"

namespace tokenspeed::kernels::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A kept id with its (logit - greatest) / temperature and the exp of that.
struct Candidate {
  int32_t id = 0;
  double scaled = 0;
  double weight = 0;
};

bool is_adjusted(const SampleRow& row) {
  return !row.logit_bias.empty() || row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f ||
         row.frequency_penalty != 0.0f;
}

// A copy of the logits with bias and penalties. counts is all zero before and after.
void adjust(const SampleRow& row, std::vector<float>& logits) {
  thread_local std::vector<int32_t> counts;
  counts.resize(static_cast<size_t>(row.vocabulary));
  logits.assign(row.logits, row.logits + row.vocabulary);
  const auto inside = [&](int32_t id) { return id >= 0 && id < row.vocabulary; };
  for (const auto& [id, bias] : row.logit_bias) {
    if (inside(id)) logits[static_cast<size_t>(id)] += bias;
  }
  // -1 marks a token that only the prompt holds, so that each is penalised once.
  for (const int32_t id : row.output) {
    if (inside(id)) ++counts[static_cast<size_t>(id)];
  }
  const auto penalise = [&](int32_t id, bool in_output) {
    float& logit = logits[static_cast<size_t>(id)];
    int32_t& count = counts[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    if (in_output) logit -= row.frequency_penalty * static_cast<float>(count) + row.presence_penalty;
    count = in_output ? 0 : -1;
  };
  for (const int32_t id : row.prompt) {
    if (inside(id) && counts[static_cast<size_t>(id)] == 0) penalise(id, false);
  }
  for (const int32_t id : row.output) {
    if (inside(id) && counts[static_cast<size_t>(id)] > 0) penalise(id, true);
  }
  for (const int32_t id : row.prompt) {
    if (inside(id)) counts[static_cast<size_t>(id)] = 0;
  }
}

class Sampler {
 public:
  Sampler(const SampleRow& row, const float* logits, float greatest)
      : row_(row),
        logits_(logits),
        greatest_(greatest),
        // Bounded so that no product overflows; it only ever selects candidates, generously.
        inverse_temperature_(static_cast<float>(std::min(1.0 / static_cast<double>(row.temperature), 1e30))) {}

  Sampled sample() {
    const bool has_top_k = row_.top_k > 0 && row_.top_k < row_.vocabulary;
    if (!has_top_k && row_.top_p >= 1.0f && row_.min_p <= 0.0f) return sample_all();
    thread_local std::vector<Candidate> candidates;
    if (has_top_k) {
      collect_top(row_.top_k, &candidates);
    } else if (row_.min_p > 0.0f) {
      // A little below the exact bound, which keep() applies.
      const double bound = static_cast<double>(row_.temperature) * (std::log(static_cast<double>(row_.min_p)) - 1e-3);
      collect(static_cast<float>(static_cast<double>(greatest_) + bound), &candidates);
    } else {
      return sample_top_p(&candidates);
    }
    keep(candidates);
    return best_of(candidates);
  }

 private:
  // All ids at least `bound`, at most all.
  void collect(float bound, std::vector<Candidate>* out) const {
    thread_local std::vector<int32_t> ids;
    if (std::isnan(bound)) bound = -kInfinity;
    ids.resize(static_cast<size_t>(row_.vocabulary));
    const int64_t count = vector_kernels().at_least(logits_, row_.vocabulary, bound, ids.data(), row_.vocabulary);
    out->clear();
    for (int64_t i = 0; i < count; ++i) out->push_back(candidate(ids[static_cast<size_t>(i)]));
  }

  Candidate candidate(int32_t id) const {
    const double scaled = scaled_logit(id);
    return {id, scaled, std::exp(scaled)};
  }
  double scaled_logit(int32_t id) const {
    return (static_cast<double>(logits_[id]) - static_cast<double>(greatest_)) / static_cast<double>(row_.temperature);
  }

  bool before(const Candidate& a, const Candidate& b) const {
    return logits_[a.id] > logits_[b.id] || (logits_[a.id] == logits_[b.id] && a.id < b.id);
  }
  // Puts the best `middle - begin` candidates before `middle`, in no order.
  void split_at(std::vector<Candidate>& candidates, size_t begin, size_t middle, size_t end) const {
    const auto at = [&](size_t i) { return candidates.begin() + static_cast<int64_t>(i); };
    if (middle < end) {
      std::nth_element(at(begin), at(middle), at(end),
                       [this](const Candidate& a, const Candidate& b) { return before(a, b); });
    }
  }

  // The k greatest: bounds go down in growing steps until enough ids lie above.
  void collect_top(int64_t k, std::vector<Candidate>* out) const {
    float bound = greatest_;
    for (float distance = 1.0f; vector_kernels().at_least(logits_, row_.vocabulary, bound, nullptr, 0) < k;
         distance *= 1.5f) {
      bound = distance < 1e4f ? greatest_ - distance : -kInfinity;
    }
    collect(bound, out);
    split_at(*out, 0, static_cast<size_t>(k), out->size());
    out->resize(static_cast<size_t>(k));
  }

  // Drops candidates by min_p, then by top_p of what is left.
  void keep(std::vector<Candidate>& candidates) const {
    const double least = std::min(1.0, static_cast<double>(row_.min_p));  // the greatest, weight 1, always stays
    std::erase_if(candidates, [&](const Candidate& each) { return each.weight < least; });
    if (row_.top_p >= 1.0f) return;
    double total = 0;
    for (const Candidate& each : candidates) total += each.weight;
    candidates.resize(prefix(candidates, static_cast<double>(row_.top_p) * total));
  }

  // Length of the shortest descending prefix whose weights reach `mass`, all when none does. Reorders the candidates so
  // that the prefix comes first: halves are split off without sorting them.
  size_t prefix(std::vector<Candidate>& candidates, double mass) const {
    size_t begin = 0;
    size_t end = candidates.size();
    double sum = 0;
    while (end - begin > 1) {
      const size_t middle = begin + (end - begin) / 2;
      split_at(candidates, begin, middle, end);
      double half = 0;
      for (size_t i = begin; i < middle; ++i) half += candidates[i].weight;
      if (sum + half >= mass) {
        end = middle;
      } else {
        sum += half;
        begin = middle;
      }
    }
    return end;
  }

  // A logit such that the ids at or above it hold at least `mass` of the weights, with few ids below the border:
  // weights are added up in bins of an eighth of an octave, the sign, exponent and three upper fraction bits of a
  // float.
  float bound_of_mass(const std::vector<float>& weights, double mass) const {
    constexpr int kShift = 20;
    std::array<double, (0x3f800000u >> kShift) + 1> bins{};
    for (const float weight : weights) bins[std::bit_cast<uint32_t>(std::min(weight, 1.0f)) >> kShift] += weight;
    double sum = 0;
    size_t bin = bins.size();
    while (bin > 0 && sum < mass) sum += bins[--bin];
    if (bin == 0) return -kInfinity;
    const double edge = std::log(static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bin << kShift))));
    return static_cast<float>(static_cast<double>(greatest_) + static_cast<double>(row_.temperature) * (edge - 1e-3));
  }

  // top_p of the whole vocabulary. The total comes from fast float sums; where their error could move the border, it is
  // computed again in double.
  Sampled sample_top_p(std::vector<Candidate>* candidates) const {
    constexpr double kTotalError = 1e-5;
    thread_local std::vector<float> weights;
    weights.resize(static_cast<size_t>(row_.vocabulary));
    const double mass =
        static_cast<double>(row_.top_p) *
        vector_kernels().exp_sum(logits_, row_.vocabulary, greatest_, inverse_temperature_, weights.data());
    collect(bound_of_mass(weights, mass * (1 + 2 * kTotalError)), candidates);
    size_t count = prefix(*candidates, mass * (1 + kTotalError));
    if (count != prefix(*candidates, mass * (1 - kTotalError))) {
      double total = 0;
      for (int32_t id = 0; id < row_.vocabulary; ++id) total += std::exp(scaled_logit(id));
      count = prefix(*candidates, static_cast<double>(row_.top_p) * total);
    }
    candidates->resize(count);
    return best_of(*candidates);
  }

  void consider(int32_t id, double scaled, Sampled* best, double* best_key) const {
    const double key = scaled + gumbel_noise(row_.seed, row_.position, id);
    if (best->token < 0 || key > *best_key || (key == *best_key && id < best->token)) {
      best->token = id;
      *best_key = key;
    }
  }

  Sampled best_of(const std::vector<Candidate>& candidates) const {
    Sampled best;
    double key = 0;
    for (const Candidate& each : candidates) consider(each.id, each.scaled, &best, &key);
    return best;
  }

  // Nothing is filtered: only ids whose noise can lift them above the best so far are looked at closely.
  Sampled sample_all() const {
    constexpr int64_t kBlock = 4096;
    int32_t ids[kBlock];
    Sampled best;
    double key = 0;
    vector_kernels().at_least(logits_, row_.vocabulary, greatest_, ids, 1);
    consider(ids[0], 0.0, &best, &key);
    for (int64_t begin = 0; begin < row_.vocabulary; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, row_.vocabulary);
      const int64_t count = vector_kernels().gumbel_candidates(logits_, begin, end, greatest_, inverse_temperature_,
                                                               row_.seed, row_.position, static_cast<float>(key), ids);
      for (int64_t i = 0; i < count; ++i) consider(ids[i], scaled_logit(ids[i]), &best, &key);
    }
    return best;
  }

  const SampleRow& row_;
  const float* logits_;
  float greatest_;
  float inverse_temperature_;
};

}  // namespace

Sampled sample(const SampleRow& row) {
  thread_local std::vector<float> adjusted;
  const float* logits = row.logits;
  if (is_adjusted(row)) {
    adjust(row, adjusted);
    logits = adjusted.data();
  }
  bool invalid = false;
  const float greatest = vector_kernels().greatest(logits, row.vocabulary, &invalid);
  if (invalid || greatest == -kInfinity) return {-1};
  if (row.temperature == 0) {
    int32_t id = -1;
    vector_kernels().at_least(logits, row.vocabulary, greatest, &id, 1);
    return {id};
  }
  return Sampler(row, logits, greatest).sample();
}

float logprobs(const float* logits, int64_t vocabulary, int32_t token, int32_t top, std::vector<TokenLogprob>* best,
               int32_t* rank) {
  const VectorKernels& vector = vector_kernels();
  bool invalid = false;
  const float greatest = vector.greatest(logits, vocabulary, &invalid);
  const double log_total = std::log(vector.exp_sum(logits, vocabulary, greatest, 1.0f, nullptr));
  const auto logprob = [&](int32_t id) {
    return static_cast<float>(static_cast<double>(logits[id]) - static_cast<double>(greatest) - log_total);
  };
  *rank = static_cast<int32_t>(1 + vector.count_greater(logits, vocabulary, logits[token]));
  best->clear();
  // A short list of the best ids so far, best first; an equal later id goes behind.
  const size_t wanted = static_cast<size_t>(std::clamp<int64_t>(top, 0, vocabulary));
  for (int32_t id = 0; wanted > 0 && id < vocabulary; ++id) {
    if (best->size() == wanted && !(logits[id] > logits[best->back().token])) continue;
    if (best->size() == wanted) best->pop_back();
    auto at = best->end();
    while (at != best->begin() && logits[id] > logits[(at - 1)->token]) --at;
    best->insert(at, {id, 0.0f});
  }
  for (TokenLogprob& each : *best) each.logprob = logprob(each.token);
  return logprob(token);
}

}  // namespace tokenspeed::kernels::cpu

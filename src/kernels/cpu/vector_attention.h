// Attention of a few queries over one partition of keys. Include from files of one instruction set only.
//
// A score is one dot product in a fixed order; scores go in blocks of kAttentionBlock positions counted from 0, each
// block's weighted values are added key by key. Tiling over rows only decides what is loaded together.
#pragma once

#include "kernels/cpu/vector_delta.h"

namespace tokenspeed::kernels::cpu {
namespace {

constexpr int64_t kKeyBlock = 64;                     // kAttentionBlock
constexpr int64_t kRowTile = kLanes == 16 ? 4 : 2;    // rows that share a load of keys and values
constexpr int64_t kValueVecs = kLanes == 16 ? 4 : 2;  // registers of a row's sums held at once

// scores[r][j] = query_r . key_j * scale for R rows and `count` keys.
template <int R, typename T>
inline void block_scores(const float* query, int64_t head_dim, const T* keys, const int64_t* offset, int64_t count,
                         float scale, float (*scores)[kKeyBlock]) {
  for (int64_t j = 0; j < count; j += 4) {
    const T* key[4];
    for (int64_t i = 0; i < 4; ++i) key[i] = keys + offset[j + i < count ? j + i : count - 1];
    Vec dots[R][4];
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 4; ++i) dots[r][i] = splat(0);
    }
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const Vec k[4] = {load(key[0] + d), load(key[1] + d), load(key[2] + d), load(key[3] + d)};
      for (int r = 0; r < R; ++r) {
        const Vec q = load(query + r * head_dim + d);
        for (int i = 0; i < 4; ++i) dots[r][i] = fma(q, k[i], dots[r][i]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const __m128 sums = sum_lanes(dots[r][0], dots[r][1], dots[r][2], dots[r][3]);
      _mm_storeu_ps(scores[r] + j, _mm_mul_ps(sums, _mm_set1_ps(scale)));
    }
  }
}

// sum_r += sum_j weight[r][j] value_j over keys [begin, end) and V registers from d on.
template <int R, int V, typename T>
inline void add_values(const float (*weight)[kKeyBlock], const T* values, const int64_t* offset, int64_t begin,
                       int64_t end, int64_t d, int64_t head_dim, float* sum) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = load(sum + r * head_dim + d + v * kLanes);
  }
  for (int64_t j = begin; j < end; ++j) {
    const T* value = values + offset[j] + d;
    Vec x[V];
    for (int v = 0; v < V; ++v) x[v] = load(value + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec w = splat(weight[r][j]);
      for (int v = 0; v < V; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(sum + r * head_dim + d + v * kLanes, sums[r][v]);
  }
}

template <int R, typename T>
inline void add_values(const float (*weight)[kKeyBlock], const T* values, const int64_t* offset, int64_t begin,
                       int64_t end, int64_t head_dim, float* sum) {
  int64_t d = 0;
  for (; d + kValueVecs * kLanes <= head_dim; d += kValueVecs * kLanes) {
    add_values<R, kValueVecs>(weight, values, offset, begin, end, d, head_dim, sum);
  }
  for (; d < head_dim; d += kLanes) add_values<R, 1>(weight, values, offset, begin, end, d, head_dim, sum);
}

// Turns the first `count` scores of a row into weights exp(score - greatest so far) and rescales the row's sums when
// the greatest grows. The scores beyond count become zero weights.
inline void weigh_scores(float* scores, int64_t count, float* greatest, float* total, float* sum, int64_t head_dim) {
  for (int64_t j = count; j < kKeyBlock; ++j) scores[j] = -__builtin_inff();
  Vec top = splat(*greatest);
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) top = max(top, load(scores + j));
  const float now = max_lanes(top);
  if (now > *greatest) {
    float correction[kLanes];
    store(correction, exp(splat(*greatest - now)));
    *total *= correction[0];
    for (int64_t d = 0; d < head_dim; d += kLanes) store(sum + d, load(sum + d) * splat(correction[0]));
    *greatest = now;
  }
  Vec added = splat(0);
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
    const Vec weight = exp(load(scores + j) - splat(now));
    store(scores + j, weight);
    added = added + weight;
  }
  *total += sum_lanes(added);
}

// R rows from `row` on over the block of keys [begin, end).
template <int R, typename T>
inline void attend_block(const AttentionPart& args, int64_t row, int64_t begin, int64_t end) {
  const int64_t head_dim = args.head_dim;
  const int64_t* offset = args.offset + (begin - args.begin);
  int64_t seen[R];
  int64_t most = 0;
  int64_t least = kKeyBlock;
  for (int r = 0; r < R; ++r) {
    const int64_t last = args.position[row + r] + 1 < end ? args.position[row + r] + 1 : end;
    seen[r] = last > begin ? last - begin : 0;
    most = seen[r] > most ? seen[r] : most;
    least = seen[r] < least ? seen[r] : least;
  }
  if (most == 0) return;
  alignas(64) float weight[R][kKeyBlock];
  float* sum = args.sum + row * head_dim;
  block_scores<R>(args.query + row * head_dim, head_dim, static_cast<const T*>(args.keys.data), offset, most,
                  args.scale, weight);
  for (int r = 0; r < R; ++r) {
    if (seen[r] == 0) continue;
    weigh_scores(weight[r], seen[r], &args.greatest[row + r], &args.total[row + r], sum + r * head_dim, head_dim);
  }
  const T* values = static_cast<const T*>(args.values.data);
  add_values<R>(weight, values, offset, 0, least, head_dim, sum);
  // Keys that only some rows see are added to those alone: a zero weight would still carry a NaN or a sign of zero.
  for (int r = 0; r < R; ++r) {
    if (seen[r] > least) add_values<1>(&weight[r], values, offset, least, seen[r], head_dim, sum + r * head_dim);
  }
}

template <typename T>
inline void attend_rows(const AttentionPart& args) {
  for (int64_t block = args.begin; block < args.end; block += kKeyBlock) {
    const int64_t end = block + kKeyBlock < args.end ? block + kKeyBlock : args.end;
    int64_t row = 0;
    for (; row + kRowTile <= args.rows; row += kRowTile) attend_block<kRowTile, T>(args, row, block, end);
    for (; row < args.rows; ++row) attend_block<1, T>(args, row, block, end);
  }
}

void attend(const AttentionPart& args) {
  for (int64_t i = 0; i < args.rows; ++i) {
    args.greatest[i] = -__builtin_inff();
    args.total[i] = 0;
  }
  for (int64_t i = 0; i < args.rows * args.head_dim; ++i) args.sum[i] = 0;
  if (args.keys.is_bfloat16) {
    attend_rows<uint16_t>(args);
  } else {
    attend_rows<float>(args);
  }
}

void merge(float greatest, float total, const float* sum, int64_t n, float* into_greatest, float* into_total,
           float* into_sum) {
  if (total == 0) return;  // the row sees no key of this partition
  const float top = greatest > *into_greatest ? greatest : *into_greatest;
  float scale[kLanes];
  store(scale, exp(splat(*into_greatest - top)));
  const float old_scale = scale[0];
  store(scale, exp(splat(greatest - top)));
  const float new_scale = scale[0];
  *into_greatest = top;
  *into_total = *into_total * old_scale + total * new_scale;
  for (int64_t d = 0; d < n; d += kLanes) {
    store(into_sum + d, fma(load(sum + d), splat(new_scale), load(into_sum + d) * splat(old_scale)));
  }
}

void finish_attention(const float* sum, float total, Elements gate, int64_t n, Elements out) {
  const Vec scale = splat(1.0f / total);
  for_each_vec(n, [&](int64_t i, int64_t left) {
    Vec value = load(sum + i) * scale;
    if (gate.data != nullptr) value = value * sigmoid(load(gate, i, left));
    store(out, i, left, value);
  });
}

}  // namespace
}  // namespace tokenspeed::kernels::cpu

#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/elements.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"

namespace tokenspeed::kernels::reference {

void split_query_gate(const SplitQueryGate& args) {
  const int64_t head_dim = args.shape.head_dim;
  for (int64_t token = 0; token < args.tokens; ++token) {
    for (int64_t head = 0; head < args.shape.query_heads; ++head) {
      for (int64_t d = 0; d < head_dim; ++d) {
        const int64_t from = head * 2 * head_dim + d;
        const int64_t to = head * head_dim + d;
        store_element(args.query, token, to, load_element(args.q_gate, token, from));
        store_element(args.gate, token, to, load_element(args.q_gate, token, from + head_dim));
      }
    }
  }
}

void rope(const Rope& args) {
  const int64_t half = args.shape.rotary_dim / 2;
  for (int64_t token = 0; token < args.tokens; ++token) {
    for (int64_t pair = 0; pair < half; ++pair) {
      const Rotation turn = rotation(rotary_frequency(args.shape, pair), args.position[token], args.x.dtype);
      for (int64_t head = 0; head < args.heads; ++head) {
        const int64_t low = head * args.shape.head_dim + pair;
        const float x = load_element(args.x, token, low);
        const float y = load_element(args.x, token, low + half);
        store_element(args.x, token, low, x * turn.cosine - y * turn.sine);
        store_element(args.x, token, low + half, y * turn.cosine + x * turn.sine);
      }
    }
  }
}

void kv_write(const KvWrite& args) {
  for (int64_t token = 0; token < args.batch.tokens; ++token) {
    for (int64_t head = 0; head < args.shape.kv_heads; ++head) {
      const int64_t to =
          kv_element_index(args.pages, args.batch, args.batch.sequence[token], args.batch.position[token], head);
      for (int64_t d = 0; d < args.shape.head_dim; ++d) {
        const int64_t from = head * args.shape.head_dim + d;
        store_element(args.pages.dtype, args.pages.keys, to + d, load_element(args.key, token, from));
        store_element(args.pages.dtype, args.pages.values, to + d, load_element(args.value, token, from));
      }
    }
  }
}

void sigmoid_multiply(const SigmoidMultiply& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t i = 0; i < args.columns; ++i) {
      const float gate = 1.0f / (1.0f + std::exp(-load_element(args.gate, row, i)));
      store_element(args.out, row, i, load_element(args.x, row, i) * gate);
    }
  }
}

void attention_prepare(const AttentionPrepare& args) {
  const AttentionShape& shape = args.shape;
  const int64_t tokens = args.batch.tokens;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t i = 0; i < shape.query_heads * shape.head_dim; ++i) {
      const int64_t from = i / shape.head_dim * 2 * shape.head_dim + i % shape.head_dim;
      store_element(args.query, token, i, load_element(args.q_gate, token, from));
    }
  }
  // The key's row is an input only: it is normalised and turned in a copy of its dtype.
  const int64_t key_columns = shape.kv_heads * shape.head_dim;
  std::vector<std::byte> copy(static_cast<size_t>(tokens * key_columns) * dtype_size(args.key.dtype));
  const Rows key{copy.data(), args.key.dtype, key_columns};
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t i = 0; i < key_columns; ++i) store_element(key, token, i, load_element(args.key, token, i));
  }
  head_rms_norm({tokens, shape.query_heads, shape.head_dim, shape.head_dim, args.query, args.query_norm, args.epsilon});
  head_rms_norm({tokens, shape.kv_heads, shape.head_dim, shape.head_dim, key, args.key_norm, args.epsilon});
  rope({shape, shape.query_heads, tokens, args.batch.position, args.query});
  rope({shape, shape.kv_heads, tokens, args.batch.position, key});
  kv_write({shape, args.batch, args.pages, key, args.value});
}

void paged_attention(const PagedAttention& args) {
  const AttentionShape& shape = args.shape;
  const SequenceBatch& batch = args.batch;
  const double scale = 1.0 / std::sqrt(static_cast<double>(shape.head_dim));
  std::vector<double> scores;
  std::vector<double> sum(static_cast<size_t>(shape.head_dim));
  for (int64_t token = 0; token < batch.tokens; ++token) {
    const int64_t sequence = batch.sequence[token];
    const int64_t keys = batch.position[token] + 1;
    for (int64_t head = 0; head < shape.query_heads; ++head) {
      const int64_t kv_head = head / (shape.query_heads / shape.kv_heads);
      const int64_t column = head * shape.head_dim;
      scores.assign(static_cast<size_t>(keys), 0);
      double greatest = -std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t key = kv_element_index(args.pages, batch, sequence, j, kv_head);
        double dot = 0;
        for (int64_t d = 0; d < shape.head_dim; ++d) {
          dot += static_cast<double>(load_element(args.query, token, column + d)) *
                 load_element(args.pages.dtype, args.pages.keys, key + d);
        }
        scores[static_cast<size_t>(j)] = dot * scale;
        greatest = std::max(greatest, dot * scale);
      }
      double total = 0;
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t j = 0; j < keys; ++j) {
        const double weight = std::exp(scores[static_cast<size_t>(j)] - greatest);
        const int64_t value = kv_element_index(args.pages, batch, sequence, j, kv_head);
        total += weight;
        for (int64_t d = 0; d < shape.head_dim; ++d) {
          sum[static_cast<size_t>(d)] += weight * load_element(args.pages.dtype, args.pages.values, value + d);
        }
      }
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        double result = sum[static_cast<size_t>(d)] / total;
        if (args.gate.data != nullptr) {
          const float gate = load_element(args.gate, token, head * args.gate_head_stride + d);
          result /= 1.0 + std::exp(-static_cast<double>(gate));
        }
        store_element(args.out, token, column + d, static_cast<float>(result));
      }
    }
  }
}

}  // namespace tokenspeed::kernels::reference

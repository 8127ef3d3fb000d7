#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/rows.h"
#include "kernels/rotary.h"

namespace tokenspeed::kernels::cpu {
namespace {

// cos and sin of every pair of one position.
class Angles {
 public:
  explicit Angles(const AttentionShape& shape) : half_(shape.rotary_dim / 2) {
    for (int64_t pair = 0; pair < half_; ++pair) frequency_.push_back(rotary_frequency(shape, pair));
  }
  // Fills cosine[half] and sine[half].
  void at(int32_t position, DType dtype, float* cosine, float* sine) const {
    for (int64_t pair = 0; pair < half_; ++pair) {
      const Rotation turn = rotation(frequency_[static_cast<size_t>(pair)], position, dtype);
      cosine[pair] = turn.cosine;
      sine[pair] = turn.sine;
    }
  }
  int64_t half() const { return half_; }

 private:
  int64_t half_;
  std::vector<float> frequency_;
};

constexpr int64_t kMaxHeadDim = 256;

void write_page_row(const KvPages& pages, void* to, int64_t index, Elements from, int64_t head_dim) {
  if (pages.dtype == DType::kFloat8E4M3) {
    alignas(64) float wide[kMaxHeadDim] = {};
    vector_kernels().convert(from, head_dim, {wide, false});
    for (int64_t d = 0; d < head_dim; ++d) store_element(pages.dtype, to, index + d, wide[d]);
    return;
  }
  vector_kernels().convert(from, head_dim, elements(pages.dtype, to, index));
}

}  // namespace

void split_query_gate(const SplitQueryGate& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  const int64_t head_dim = args.shape.head_dim;
  for_each_row(pool, args.tokens, 2 * args.shape.query_heads * head_dim, [&](int64_t token) {
    for (int64_t head = 0; head < args.shape.query_heads; ++head) {
      const int64_t from = 2 * head * head_dim;
      vector.convert(elements(args.q_gate, token, from), head_dim, elements(args.query, token, head * head_dim));
      vector.convert(elements(args.q_gate, token, from + head_dim), head_dim,
                     elements(args.gate, token, head * head_dim));
    }
  });
}

void rope(const Rope& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  const Angles angles(args.shape);
  for_each_row(pool, args.tokens, args.heads * args.shape.head_dim, [&](int64_t token) {
    float cosine[kMaxHeadDim / 2];
    float sine[kMaxHeadDim / 2];
    angles.at(args.position[token], args.x.dtype, cosine, sine);
    for (int64_t head = 0; head < args.heads; ++head) {
      vector.rotate(elements(args.x, token, head * args.shape.head_dim), cosine, sine, angles.half());
    }
  });
}

void kv_write(const KvWrite& args, ThreadPool& pool) {
  const SequenceBatch& batch = args.batch;
  for_each_row(pool, batch.tokens, 2 * args.shape.kv_heads * args.shape.head_dim, [&](int64_t token) {
    for (int64_t head = 0; head < args.shape.kv_heads; ++head) {
      const int64_t to = kv_element_index(args.pages, batch, batch.sequence[token], batch.position[token], head);
      const int64_t from = head * args.shape.head_dim;
      write_page_row(args.pages, args.pages.keys, to, elements(args.key, token, from), args.shape.head_dim);
      write_page_row(args.pages, args.pages.values, to, elements(args.value, token, from), args.shape.head_dim);
    }
  });
}

void sigmoid_multiply(const SigmoidMultiply& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  for_each_row(pool, args.rows, args.columns, [&](int64_t row) {
    vector.sigmoid_multiply(elements(args.x, row), elements(args.gate, row), args.columns, elements(args.out, row));
  });
}

// Each head is normalised and turned in its own dtype, as the separate operations would: the results are the same bits.
void attention_prepare(const AttentionPrepare& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  const AttentionShape& shape = args.shape;
  const SequenceBatch& batch = args.batch;
  const int64_t head_dim = shape.head_dim;
  const Angles angles(shape);
  for_each_row(pool, batch.tokens, 2 * (shape.query_heads + shape.kv_heads) * head_dim, [&](int64_t token) {
    float cosine[kMaxHeadDim / 2];
    float sine[kMaxHeadDim / 2];
    angles.at(batch.position[token], args.query.dtype, cosine, sine);
    for (int64_t head = 0; head < shape.query_heads; ++head) {
      const Elements query = elements(args.query, token, head * head_dim);
      // Through the query's dtype first, should it differ from the projection's.
      vector.convert(elements(args.q_gate, token, 2 * head * head_dim), head_dim, query);
      vector.rms_norm(query, args.query_norm, args.epsilon, head_dim, query);
      vector.rotate(query, cosine, sine, angles.half());
    }
    if (args.key.dtype != args.query.dtype) angles.at(batch.position[token], args.key.dtype, cosine, sine);
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      alignas(64) float scratch[kMaxHeadDim];
      const Elements key = elements(args.key.dtype, scratch, 0);
      vector.rms_norm(elements(args.key, token, head * head_dim), args.key_norm, args.epsilon, head_dim, key);
      vector.rotate(key, cosine, sine, angles.half());
      const int64_t to = kv_element_index(args.pages, batch, batch.sequence[token], batch.position[token], head);
      write_page_row(args.pages, args.pages.keys, to, key, head_dim);
      write_page_row(args.pages, args.pages.values, to, elements(args.value, token, head * head_dim), head_dim);
    }
  });
}

}  // namespace tokenspeed::kernels::cpu

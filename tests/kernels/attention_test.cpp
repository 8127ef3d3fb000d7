#include "kernels/attention.h"

#include "base/thread_pool.h"
#include "kernels/norm.h"
#include "kernels/test_rows.h"

namespace tokenspeed::kernels {
namespace {

// Scores of magnitude ~3 in fp32 go through exp: their absolute error becomes relative.
constexpr float kAttentionTolerance = 3e-5f;

// Pages of NaN but for the positions of the batch's contexts and new tokens.
struct Cache {
  Cache(const TestBatch& batch, const AttentionShape& shape, DType dtype, int32_t page_size, std::mt19937& random)
      : keys(dtype, batch.pages() * page_size, shape.kv_heads * shape.head_dim, 0), values(keys) {
    pages = {keys.view().data,
             values.view().data,
             dtype,
             page_size,
             static_cast<int32_t>(shape.kv_heads),
             static_cast<int32_t>(shape.head_dim)};
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const SequenceBatch view = batch.view();
    for (int32_t s = 0; s < view.sequences; ++s) {
      const int64_t length = view.context[s] + view.token_begin[s + 1] - view.token_begin[s];
      for (int64_t j = 0; j < length * shape.kv_heads; ++j) {
        const int64_t at = kv_element_index(pages, view, s, j / shape.kv_heads, j % shape.kv_heads);
        for (int64_t d = 0; d < shape.head_dim; ++d) {
          store_element(dtype, pages.keys, at + d, normal(random));
          store_element(dtype, pages.values, at + d, normal(random));
        }
      }
    }
  }
  TestRows keys;
  TestRows values;
  KvPages pages;
};

struct Case {
  std::vector<int32_t> counts;
  std::vector<int32_t> contexts;
  AttentionShape shape;
  int32_t page_size;
  DType cache_dtype;
};

const Case kCases[] = {
    {{1}, {0}, {8, 2, 256}, 16, DType::kBFloat16},
    {{1}, {1500}, {8, 2, 256}, 64, DType::kBFloat16},
    {{0, 3, 1, 0}, {4, 0, 700, 0}, {3, 1, 64, 16}, 7, DType::kFloat32},
    {{70, 5}, {0, 510}, {6, 1, 128, 32}, 16, DType::kBFloat16},
    {{20, 1, 9}, {63, 64, 505}, {4, 4, 16, 8}, 48, DType::kFloat32},
    {{1}, {1500}, {8, 2, 256}, 64, DType::kFloat8E4M3},
    {{70, 5}, {0, 510}, {6, 1, 128, 32}, 16, DType::kFloat8E4M3},
};

TEST(PagedAttention, EqualsTheReference) {
  ThreadPool pool(3);
  uint32_t seed = 600;
  for (const Case& each : kCases) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      SCOPED_TRACE(testing::Message() << "seed " << ++seed << ' ' << dtype_name(dtype));
      std::mt19937 random(seed);
      const TestBatch batch(each.counts, each.contexts, each.page_size, seed);
      const Cache cache(batch, each.shape, each.cache_dtype, each.page_size, random);
      const int64_t tokens = batch.token_begin.back();
      const int64_t columns = each.shape.query_heads * each.shape.head_dim;
      const TestRows query = TestRows(dtype, tokens, columns).fill(random);
      const TestRows q_gate = TestRows(dtype, tokens, 2 * columns).fill(random, 2.0f);
      Rows gate = q_gate.view();
      gate.data = static_cast<std::byte*>(gate.data) + each.shape.head_dim * static_cast<int64_t>(dtype_size(dtype));
      for (const bool gated : {false, true}) {
        TestRows actual(dtype, tokens, columns);
        TestRows expected(dtype, tokens, columns);
        PagedAttention args{each.shape,   batch.view(),          cache.pages,
                            query.view(), gated ? gate : Rows{}, 2 * each.shape.head_dim,
                            actual.view()};
        cpu::paged_attention(args, pool);
        args.out = expected.view();
        reference::paged_attention(args);
        actual.expect_near(expected, dtype == DType::kBFloat16 ? kBFloat16Tolerance : kAttentionTolerance);
      }
    }
  }
}

// A prompt whole, in chunks, token by token, with other threads and beside another sequence: the same bits.
void check_bits(DType cache_dtype) {
  const AttentionShape shape{6, 2, 64, 16};
  constexpr int32_t kLength = 1100;
  std::mt19937 random(650);
  const TestBatch whole({kLength}, {0}, 16, 650);
  const Cache cache(whole, shape, cache_dtype, 16, random);
  const int64_t columns = 6 * 64;
  const TestRows query = TestRows(DType::kFloat32, kLength, columns).fill(random);
  ThreadPool one(1);
  ThreadPool many(4);
  TestRows expected(DType::kFloat32, kLength, columns);
  cpu::paged_attention({shape, whole.view(), cache.pages, query.view(), {}, 0, expected.view()}, one);
  for (const int32_t chunk : {1, 3, 64, 517}) {
    TestRows actual(DType::kFloat32, kLength, columns);
    for (int32_t begin = 0; begin < kLength; begin += chunk) {
      TestBatch part({std::min(chunk, kLength - begin)}, {begin}, 16, 650);
      part.page_table = whole.page_table;
      part.pages_per_sequence = whole.pages_per_sequence;
      cpu::paged_attention({shape, part.view(), cache.pages, query.view(begin), {}, 0, actual.view(begin)},
                           begin % 2 == 0 ? many : one);
    }
    EXPECT_TRUE(actual == expected) << "chunks of " << chunk;
  }
  // The last 40 rows beside an earlier part of the same sequence as a second one.
  TestBatch both({40, 25}, {kLength - 40, 500}, 16);
  both.page_table = whole.page_table;
  both.page_table.insert(both.page_table.end(), whole.page_table.begin(), whole.page_table.end());
  both.pages_per_sequence = whole.pages_per_sequence;
  TestRows queries(DType::kFloat32, 65, columns);
  for (int64_t row = 0; row < 65; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      store_element(queries.view(), row, i, query.at(row < 40 ? kLength - 40 + row : 460 + row, i));
    }
  }
  TestRows actual(DType::kFloat32, 65, columns);
  cpu::paged_attention({shape, both.view(), cache.pages, queries.view(), {}, 0, actual.view()}, many);
  for (int64_t row = 0; row < 65; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      ASSERT_EQ(actual.at(row, i), expected.at(row < 40 ? kLength - 40 + row : 460 + row, i)) << row;
    }
  }
}

TEST(PagedAttention, BitsDoNotDependOnChunksThreadsOrNeighbours) {
  for (const DType cache_dtype : {DType::kBFloat16, DType::kFloat8E4M3}) {
    SCOPED_TRACE(dtype_name(cache_dtype));
    check_bits(cache_dtype);
  }
}

TEST(AttentionPrepare, FusedEqualsSeparateBitForBitAndTheReference) {
  ThreadPool pool(2);
  const AttentionShape shape{4, 2, 128, 32};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const DType cache_dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat8E4M3}) {
      std::mt19937 random(660);
      const TestBatch batch({30, 1}, {5, 200000}, 16);
      const int64_t tokens = 31;
      const TestRows q_gate = TestRows(dtype, tokens, 2 * 4 * 128).fill(random);
      const TestRows key = TestRows(dtype, tokens, 2 * 128).fill(random);
      const TestRows value = TestRows(dtype, tokens, 2 * 128).fill(random);
      const std::vector<float> query_norm = random_floats(random, 128);
      const std::vector<float> key_norm = random_floats(random, 128);
      // Pages are reached through a table of few pages: only those of the new tokens exist.
      TestBatch paged = batch;
      paged.page_table.assign(paged.page_table.size(), 0);
      for (size_t i = 0; i < 3; ++i) paged.page_table[i] = static_cast<int32_t>(i);
      paged.page_table[static_cast<size_t>(paged.pages_per_sequence + 200000 / 16)] = 3;
      TestRows empty(cache_dtype, 4 * 16, 2 * 128, 0);
      TestRows keys[3] = {empty, empty, empty};
      TestRows values[3] = {empty, empty, empty};
      const auto pages = [&](int i) {
        return KvPages{keys[i].view().data, values[i].view().data, cache_dtype, 16, 2, 128};
      };
      TestRows queries[3] = {TestRows(dtype, tokens, 512), TestRows(dtype, tokens, 512), TestRows(dtype, tokens, 512)};
      AttentionPrepare args{shape,        paged.view(),      pages(0),        q_gate.view(), key.view(),
                            value.view(), query_norm.data(), key_norm.data(), 1e-6f,         queries[0].view()};
      cpu::attention_prepare(args, pool);
      args.pages = pages(1);
      args.query = queries[1].view();
      reference::attention_prepare(args);
      TestRows gate(dtype, tokens, 512);
      TestRows turned = key;
      const int32_t* position = paged.position.data();
      cpu::split_query_gate({shape, tokens, q_gate.view(), queries[2].view(), gate.view()}, pool);
      cpu::head_rms_norm({tokens, 4, 128, 128, queries[2].view(), query_norm.data(), 1e-6f}, pool);
      cpu::head_rms_norm({tokens, 2, 128, 128, turned.view(), key_norm.data(), 1e-6f}, pool);
      cpu::rope({shape, 4, tokens, position, queries[2].view()}, pool);
      cpu::rope({shape, 2, tokens, position, turned.view()}, pool);
      cpu::kv_write({shape, paged.view(), pages(2), turned.view(), value.view()}, pool);
      EXPECT_TRUE(queries[0] == queries[2]);
      EXPECT_TRUE(keys[0] == keys[2]);
      EXPECT_TRUE(values[0] == values[2]);
      EXPECT_TRUE(values[0] == values[1]);
      queries[0].expect_near(queries[1], 2 * tolerance_of(dtype));  // rounded twice
      const float tolerance = 2 * std::max(tolerance_of(dtype), tolerance_of(cache_dtype));
      for (int32_t t = 0; t < tokens; ++t) {
        const int64_t at = kv_element_index(pages(0), paged.view(), paged.sequence[t], paged.position[t], 1);
        for (int64_t d = 0; d < 128; ++d) {
          const float expected = load_element(cache_dtype, keys[1].view().data, at + d);
          const float greatest = cache_dtype == DType::kFloat8E4M3 ? std::max(std::fabs(expected), 0x1p-6f) : 8.0f;
          ASSERT_NEAR(load_element(cache_dtype, keys[0].view().data, at + d), expected, greatest * tolerance);
        }
      }
      for (int64_t t = 0; t < tokens; ++t) {
        ASSERT_EQ(gate.at(t, 3 * 128 + 5), q_gate.at(t, 7 * 128 + 5));
      }
    }
  }
}

TEST(SigmoidMultiply, EqualsTheReferenceInPlace) {
  ThreadPool pool(2);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    std::mt19937 random(670);
    TestRows x(dtype, 17, 100);
    x.fill(random);
    const TestRows gate = TestRows(dtype, 17, 100).fill(random, 3.0f);
    TestRows expected(dtype, 17, 100);
    reference::sigmoid_multiply({17, 100, x.view(), gate.view(), expected.view()});
    cpu::sigmoid_multiply({17, 100, x.view(), gate.view(), x.view()}, pool);
    x.expect_near(expected, tolerance_of(dtype));
  }
}

}  // namespace
}  // namespace tokenspeed::kernels

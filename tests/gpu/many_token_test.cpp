// The CUDA kernels for any number of tokens against the plain references, on fresh random inputs. Seeds are printed.
#include <gtest/gtest.h>

#include <algorithm>
#include <tuple>

#include "gpu/device_data.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/gated_delta_net.h"
#include "kernels/cuda/gdn_stages.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mlp.h"
#include "kernels/cuda/norm.h"

namespace tokenspeed::kernels {
namespace {

constexpr double kRoundingTolerance = 3e-3;      // one bfloat16 rounding of the result, now and then the other way
constexpr double kTwoRoundingsTolerance = 6e-3;  // the separate reference steps round between them
constexpr double kFp8PageTolerance = 1e-2;       // neighbours that rounding chose differently
constexpr double kAttentionTolerance = 6e-3;     // probabilities in bfloat16
constexpr double kStateTolerance = 5e-3;         // recurrent state from bfloat16 q, k, v
constexpr double kAlikeTolerance = 3e-2;         // chunked rule, all keys alike: bfloat16 differences that telescope
constexpr double kMixerTolerance = 1.5e-2;
constexpr double kExpertsTolerance = 8e-3;
constexpr double kFp8Tolerance = 5e-2;         // activations quantised to e4m3
constexpr double kFp8ExpertsTolerance = 8e-2;  // twice
constexpr double kFloatTolerance = 1e-5;

using Bf16Rows = Activations<BFloat16>;

uint32_t fresh_seed() {
  const uint32_t seed = std::random_device()();
  testing::Test::RecordProperty("seed", static_cast<int>(seed));
  printf("seed %u\n", seed);
  return seed;
}

void finish() {
  expect_ok(cudaGetLastError());
  expect_ok(cudaDeviceSynchronize());
}

TEST(ManyTokenNorm, RmsNormWithAndWithoutSum) {
  Random random(fresh_seed());
  for (const auto& [rows, columns] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 192}, {7, 128}, {33, 2048}, {3, 5120}}) {
    for (const bool with_sum : {false, true}) {
      Bf16Rows x(random.bfloat16s(rows * columns), columns), sum(random.bfloat16s(rows * columns), columns);
      Bf16Rows out(random.bfloat16s(rows * columns), columns);
      Both<float> weight(random.floats(columns, 0.3f));
      out.poison();
      RmsNorm args{
          .rows = rows, .columns = columns, .x = x.device_rows(), .weight = weight.device(), .out = out.device_rows()};
      if (with_sum) args.add = sum.device_rows();
      cuda::rms_norm(args, nullptr);
      finish();
      args.x = x.host_rows();
      if (with_sum) args.add = sum.host_rows();
      args.weight = weight.host.data();
      args.out = out.host_rows();
      reference::rms_norm(args);
      EXPECT_CLOSE(out.download(), out.host, kRoundingTolerance);
      EXPECT_CLOSE(x.download(), x.host, 0);
    }
  }
}

TEST(ManyTokenNorm, PerHead) {
  Random random(fresh_seed());
  for (const int64_t columns : {32, 64, 128, 256}) {
    const int64_t tokens = 13, heads = 5, stride = heads * columns + 8;
    Bf16Rows x(random.bfloat16s(tokens * stride), stride), z(random.bfloat16s(tokens * stride), stride);
    Both<float> weight(random.floats(columns, 0.3f));
    Bf16Rows out(random.bfloat16s(tokens * stride), stride);
    GatedRmsNorm gated{tokens,          heads,           columns, x.device_rows(),
                       z.device_rows(), weight.device(), 1e-6f,   out.device_rows()};
    cuda::gated_rms_norm(gated, nullptr);
    finish();
    reference::gated_rms_norm(
        {tokens, heads, columns, x.host_rows(), z.host_rows(), weight.host.data(), 1e-6f, out.host_rows()});
    EXPECT_CLOSE(out.download(), out.host, kTwoRoundingsTolerance);
    cuda::head_rms_norm({tokens, heads, columns, columns, x.device_rows(), weight.device(), 1e-6f}, nullptr);
    finish();
    reference::head_rms_norm({tokens, heads, columns, columns, x.host_rows(), weight.host.data(), 1e-6f});
    EXPECT_CLOSE(x.download(), x.host, kRoundingTolerance);
  }
}

TEST(ManyTokenEmbedding, Lookup) {
  Random random(fresh_seed());
  const int64_t vocabulary = 1000, columns = 192, rows = 50;
  Both<BFloat16> table(random.bfloat16s(vocabulary * columns));
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < rows; ++i) ids.push_back(static_cast<int32_t>(random.below(vocabulary)));
  Both<int32_t> index(ids);
  Bf16Rows out(random.bfloat16s(rows * columns), columns);
  out.poison();
  Embedding args{rows,
                 index.device(),
                 {table.device(), DType::kBFloat16, MatrixLayout::kRowMajor, vocabulary, columns, nullptr},
                 out.device_rows()};
  ASSERT_TRUE(cuda::embedding(args, nullptr).ok());
  finish();
  args.ids = index.host.data();
  args.table.data = table.host.data();
  args.out = out.host_rows();
  reference::embedding(args);
  EXPECT_CLOSE(out.download(), out.host, 0);
}

struct AttentionCase {
  int64_t query_heads, kv_heads, head_dim;
  std::vector<int32_t> lengths, contexts;
  int32_t page_size = 16;
};

const AttentionCase kAttentionCases[] = {
    {3, 1, 64, {17, 1, 64}, {0, 5, 63}},
    {4, 2, 128, {1, 130, 2}, {300, 0, 64}},
    {16, 2, 256, {40, 1, 1}, {100, 0, 511}},
    {2, 1, 256, {300}, {17}},
    {8, 2, 256, {33, 5}, {90, 2}, 8},
    {6, 2, 256, {70, 1, 128}, {0, 64, 31}, 32},
    {8, 1, 256, {1, 200, 63, 64}, {257, 0, 1, 500}, 64},
    {4, 1, 256, {150, 9}, {130, 300}, 128},
    {4, 2, 256, {20, 61}, {7, 0}, 24},
};

// Keys and values of every position, in place of what earlier steps wrote.
template <typename T>  // BFloat16, or uint8_t for FP8
struct Pages {
  Pages(Random* random, const Batch& batch, const AttentionCase& shape, int32_t page_size)
      : count(int64_t{batch.pages} * page_size * shape.kv_heads * shape.head_dim),
        keys(elements(random, count)),
        values(elements(random, count)),
        layout{nullptr,
               nullptr,
               kFp8 ? DType::kFloat8E4M3 : DType::kBFloat16,
               page_size,
               static_cast<int32_t>(shape.kv_heads),
               static_cast<int32_t>(shape.head_dim)} {}
  // What lies behind the last token of a sequence may be anything.
  void spoil(const Batch& batch, int32_t page_size) {
    const int64_t row = int64_t{layout.heads} * layout.head_dim;
    for (size_t s = 0; s < batch.context.host.size(); ++s) {
      const int64_t end = batch.context.host[s] + batch.token_begin.host[s + 1] - batch.token_begin.host[s];
      for (int64_t p = end; p < int64_t{batch.pages_per_sequence} * page_size; ++p) {
        const int64_t page = batch.page_table.host[s * batch.pages_per_sequence + p / page_size];
        for (int64_t i = 0; i < row; ++i) {
          const int64_t at = (page * page_size + p % page_size) * row + i;
          store_element(layout.dtype, keys.host.data(), at, NAN);
          store_element(layout.dtype, values.host.data(), at, NAN);
        }
      }
    }
    keys.upload();
    values.upload();
  }
  KvPages on_host() { return with(keys.host.data(), values.host.data()); }
  KvPages on_device() const { return with(keys.device(), values.device()); }
  KvPages with(void* k, void* v) const {
    KvPages pages = layout;
    pages.keys = k;
    pages.values = v;
    return pages;
  }
  static constexpr bool kFp8 = sizeof(T) == 1;
  static std::vector<T> elements(Random* random, int64_t count) {
    const std::vector<BFloat16> wide = random->bfloat16s(count);
    std::vector<T> values(wide.size());
    for (size_t i = 0; i < wide.size(); ++i)
      store_element(kFp8 ? DType::kFloat8E4M3 : DType::kBFloat16, values.data(), static_cast<int64_t>(i),
                    to_float(wide[i]));
    return values;
  }
  std::vector<BFloat16> wide(const std::vector<T>& values) const {
    std::vector<BFloat16> all(values.size());
    for (size_t i = 0; i < all.size(); ++i)
      all[i] = to_bfloat16(load_element(layout.dtype, values.data(), static_cast<int64_t>(i)));
    return all;
  }
  int64_t count;
  Both<T> keys, values;
  KvPages layout;
};

template <typename T>
void check_prepare_then_attend() {
  Random random(fresh_seed());
  for (const AttentionCase& shape : kAttentionCases) {
    const AttentionShape attention{shape.query_heads, shape.kv_heads, shape.head_dim, shape.head_dim / 4, 1e7f};
    SCOPED_TRACE(testing::Message() << shape.query_heads << "/" << shape.kv_heads << " heads of " << shape.head_dim
                                    << ", pages of " << shape.page_size);
    Batch batch(&random, shape.lengths, shape.contexts, shape.page_size);
    Pages<T> pages(&random, batch, shape, shape.page_size);
    const int64_t tokens = batch.tokens();
    const int64_t query = shape.query_heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
    const int64_t stride = 2 * query + 2 * kv;
    Bf16Rows projected(random.bfloat16s(tokens * stride), stride), queries(random.bfloat16s(tokens * query), query);
    Bf16Rows out(random.bfloat16s(tokens * query), query);
    Both<float> query_norm(random.floats(shape.head_dim, 0.3f)), key_norm(random.floats(shape.head_dim, 0.3f));
    queries.poison();
    out.poison();
    const auto part = [](Rows rows, int64_t column) {
      rows.data = static_cast<BFloat16*>(rows.data) + column;
      return rows;
    };
    const auto prepare = [&](const Rows& p, const SequenceBatch& b, const KvPages& kv_pages, const float* qn,
                             const float* kn, Rows q) {
      return AttentionPrepare{attention, b, kv_pages, p, part(p, 2 * query), part(p, 2 * query + kv), qn, kn, 1e-6f, q};
    };
    const auto attend = [&](const Rows& p, const SequenceBatch& b, const KvPages& kv_pages, Rows q, Rows o) {
      return PagedAttention{attention, b, kv_pages, q, part(p, shape.head_dim), 2 * shape.head_dim, o};
    };
    cuda::attention_prepare(prepare(projected.device_rows(), batch.on_device(), pages.on_device(), query_norm.device(),
                                    key_norm.device(), queries.device_rows()),
                            nullptr);
    finish();
    reference::attention_prepare(prepare(projected.host_rows(), batch.on_host(), pages.on_host(),
                                         query_norm.host.data(), key_norm.host.data(), queries.host_rows()));
    EXPECT_CLOSE(queries.download(), queries.host, kTwoRoundingsTolerance);
    EXPECT_CLOSE(pages.wide(pages.keys.download()), pages.wide(pages.keys.host),
                 pages.kFp8 ? kFp8PageTolerance : kTwoRoundingsTolerance);
    EXPECT_CLOSE(pages.wide(pages.values.download()), pages.wide(pages.values.host), 0);
    queries.upload();
    pages.spoil(batch, shape.page_size);
    cuda::paged_attention(
        attend(projected.device_rows(), batch.on_device(), pages.on_device(), queries.device_rows(), out.device_rows()),
        nullptr);
    finish();
    reference::paged_attention(
        attend(projected.host_rows(), batch.on_host(), pages.on_host(), queries.host_rows(), out.host_rows()));
    EXPECT_CLOSE(out.download(), out.host, kAttentionTolerance);
  }
}

TEST(ManyTokenAttention, PrepareThenAttend) { check_prepare_then_attend<BFloat16>(); }
TEST(ManyTokenAttention, PrepareThenAttendWithFp8Pages) { check_prepare_then_attend<uint8_t>(); }

template <typename T>
void check_separate_steps() {
  Random random(fresh_seed());
  for (const AttentionCase& shape : kAttentionCases) {
    const AttentionShape attention{shape.query_heads, shape.kv_heads, shape.head_dim, shape.head_dim / 4, 1e7f};
    Batch batch(&random, shape.lengths, shape.contexts, 64);
    Pages<T> pages(&random, batch, shape, 64);
    const int64_t tokens = batch.tokens();
    const int64_t columns = shape.query_heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
    Bf16Rows q_gate(random.bfloat16s(tokens * 2 * columns), 2 * columns),
        query(random.bfloat16s(tokens * columns), columns);
    Bf16Rows gate(random.bfloat16s(tokens * columns), columns), key(random.bfloat16s(tokens * kv), kv);
    Bf16Rows value(random.bfloat16s(tokens * kv), kv);
    cuda::split_query_gate({attention, tokens, q_gate.device_rows(), query.device_rows(), gate.device_rows()}, nullptr);
    cuda::rope({attention, shape.query_heads, tokens, batch.position.device(), query.device_rows()}, nullptr);
    cuda::kv_write({attention, batch.on_device(), pages.on_device(), key.device_rows(), value.device_rows()}, nullptr);
    cuda::sigmoid_multiply({tokens, columns, query.device_rows(), gate.device_rows(), query.device_rows()}, nullptr);
    finish();
    reference::split_query_gate({attention, tokens, q_gate.host_rows(), query.host_rows(), gate.host_rows()});
    reference::rope({attention, shape.query_heads, tokens, batch.position.host.data(), query.host_rows()});
    reference::kv_write({attention, batch.on_host(), pages.on_host(), key.host_rows(), value.host_rows()});
    reference::sigmoid_multiply({tokens, columns, query.host_rows(), gate.host_rows(), query.host_rows()});
    EXPECT_CLOSE(query.download(), query.host, kTwoRoundingsTolerance);
    EXPECT_CLOSE(gate.download(), gate.host, 0);
    EXPECT_CLOSE(pages.wide(pages.keys.download()), pages.wide(pages.keys.host), 0);
    EXPECT_CLOSE(pages.wide(pages.values.download()), pages.wide(pages.values.host), 0);
  }
}

TEST(ManyTokenAttention, SeparateSteps) { check_separate_steps<BFloat16>(); }
TEST(ManyTokenAttention, SeparateStepsWithFp8Pages) { check_separate_steps<uint8_t>(); }

struct GdnCase {
  GdnShape shape;
  std::vector<int32_t> lengths, contexts;
};

const GdnCase kGdnCases[] = {
    {{2, 4, 32, 32, 4}, {1, 2, 37}, {0, 9, 4}},
    {{2, 4, 64, 64, 4}, {70, 1}, {0, 3}},
    {{4, 8, 128, 128, 4}, {5, 200, 1, 64}, {8, 0, 100, 1}},
    {{4, 12, 128, 128, 4}, {31, 32, 33, 129, 320}, {0, 3, 0, 7, 9}},
    {{4, 8, 128, 128, 4}, std::vector<int32_t>(40, 1), std::vector<int32_t>(40, 6)},
};

// One layer's slots; contents random.
struct Slots {
  Slots(Random* random, const GdnShape& shape, int32_t count)
      : recurrent_bytes(shape.value_heads * shape.value_dim * shape.key_dim * 4),
        stride(recurrent_bytes + 3 * shape.channels() * 2),
        memory(std::vector<std::byte>(static_cast<size_t>(stride * count))) {
    for (int32_t slot = 0; slot < count; ++slot) {
      const std::vector<float> recurrent = random->floats(recurrent_bytes / 4, 0.1f);
      const std::vector<BFloat16> conv = random->bfloat16s(3 * shape.channels());
      std::memcpy(memory.host.data() + slot * stride, recurrent.data(), recurrent_bytes);
      std::memcpy(memory.host.data() + slot * stride + recurrent_bytes, conv.data(), conv.size() * 2);
    }
    memory.upload();
  }
  GdnState state(std::byte* base) const { return {base, base + recurrent_bytes, DType::kBFloat16, stride}; }
  GdnState on_host() { return state(memory.host.data()); }
  GdnState on_device() const { return state(memory.device()); }
  template <typename T>
  std::vector<T> of(const std::vector<std::byte>& bytes, int32_t slot, int64_t offset, int64_t size) const {
    std::vector<T> values(static_cast<size_t>(size) / sizeof(T));
    std::memcpy(values.data(), bytes.data() + slot * stride + offset, static_cast<size_t>(size));
    return values;
  }
  void compare(const Batch& batch, double tolerance = kStateTolerance) {
    const std::vector<std::byte> got = memory.download();
    for (const int32_t slot : batch.state_out.host) {
      EXPECT_CLOSE(of<float>(got, slot, 0, recurrent_bytes), of<float>(memory.host, slot, 0, recurrent_bytes),
                   tolerance);
      const int64_t size = stride - recurrent_bytes;
      EXPECT_CLOSE(of<BFloat16>(got, slot, recurrent_bytes, size),
                   of<BFloat16>(memory.host, slot, recurrent_bytes, size), 0);
    }
  }
  int64_t recurrent_bytes, stride;
  Both<std::byte> memory;
};

TEST(ManyTokenGdn, Mixer) {
  Random random(fresh_seed());
  for (const GdnCase& c : kGdnCases) {
    const GdnShape& shape = c.shape;
    Batch batch(&random, c.lengths, c.contexts, 16);
    Slots slots(&random, shape, batch.slots);
    const int64_t tokens = batch.tokens(), values = shape.value_heads * shape.value_dim;
    const int64_t stride = shape.channels() + values + 2 * shape.value_heads;
    Bf16Rows projected(random.bfloat16s(tokens * stride), stride), out(random.bfloat16s(tokens * values), values);
    Both<float> conv(random.floats(shape.channels() * 4, 0.5f)), a_log(random.floats(shape.value_heads)),
        dt_bias(random.floats(shape.value_heads)), norm(random.floats(shape.value_dim));
    const auto part = [](Rows rows, int64_t column) {
      rows.data = static_cast<BFloat16*>(rows.data) + column;
      return rows;
    };
    const auto args = [&](const SequenceBatch& b, const GdnState& state, const Rows& p, bool device, const Rows& o,
                          void* workspace) {
      const auto pick = [&](Both<float>& array) { return device ? array.device() : array.host.data(); };
      return GdnMixer{shape,
                      b,
                      state,
                      p,
                      part(p, shape.channels()),
                      part(p, shape.channels() + values),
                      part(p, shape.channels() + values + shape.value_heads),
                      pick(conv),
                      pick(a_log),
                      pick(dt_bias),
                      pick(norm),
                      1e-6f,
                      o,
                      workspace};
    };
    out.poison();
    Both<std::byte> workspace(std::vector<std::byte>(cuda::gdn_mixer_workspace_bytes(shape, tokens)));
    workspace.poison();
    cuda::gdn_mixer(args(batch.on_device(), slots.on_device(), projected.device_rows(), true, out.device_rows(),
                         workspace.device()),
                    nullptr);
    finish();
    std::vector<std::byte> host_workspace(gdn_mixer_workspace_bytes(shape, tokens));
    reference::gdn_mixer(
        args(batch.on_host(), slots.on_host(), projected.host_rows(), false, out.host_rows(), host_workspace.data()));
    EXPECT_CLOSE(out.download(), out.host, kMixerTolerance);
    slots.compare(batch);
  }
}

TEST(ManyTokenGdn, SeparateSteps) {
  Random random(fresh_seed());
  for (const GdnCase& c : kGdnCases) {
    const GdnShape& shape = c.shape;
    Batch batch(&random, c.lengths, c.contexts, 16);
    Slots slots(&random, shape, batch.slots);
    const int64_t tokens = batch.tokens(), values = shape.value_heads * shape.value_dim;
    Bf16Rows qkv(random.bfloat16s(tokens * shape.channels()), shape.channels());
    Bf16Rows conv_out(random.bfloat16s(tokens * shape.channels()), shape.channels());
    Bf16Rows b(random.bfloat16s(tokens * shape.value_heads), shape.value_heads),
        a(random.bfloat16s(tokens * shape.value_heads), shape.value_heads);
    Bf16Rows out(random.bfloat16s(tokens * values), values);
    Both<float> conv(random.floats(shape.channels() * 4, 0.5f)), a_log(random.floats(shape.value_heads)),
        dt_bias(random.floats(shape.value_heads)), beta(random.floats(tokens * shape.value_heads)),
        decay(random.floats(tokens * shape.value_heads));
    out.poison();
    cuda::causal_conv(
        {shape, batch.on_device(), slots.on_device(), qkv.device_rows(), conv.device(), conv_out.device_rows()},
        nullptr);
    cuda::gdn_gates({tokens, shape.value_heads, b.device_rows(), a.device_rows(), a_log.device(), dt_bias.device(),
                     beta.device(), decay.device()},
                    nullptr);
    cuda::gdn_l2_norm({shape, tokens, conv_out.device_rows()}, nullptr);
    cuda::gated_delta_rule({shape, batch.on_device(), slots.on_device(), conv_out.device_rows(), beta.device(),
                            decay.device(), out.device_rows()},
                           nullptr);
    finish();
    reference::causal_conv(
        {shape, batch.on_host(), slots.on_host(), qkv.host_rows(), conv.host.data(), conv_out.host_rows()});
    reference::gdn_gates({tokens, shape.value_heads, b.host_rows(), a.host_rows(), a_log.host.data(),
                          dt_bias.host.data(), beta.host.data(), decay.host.data()});
    reference::gdn_l2_norm({shape, tokens, conv_out.host_rows()});
    reference::gated_delta_rule({shape, batch.on_host(), slots.on_host(), conv_out.host_rows(), beta.host.data(),
                                 decay.host.data(), out.host_rows()});
    EXPECT_CLOSE(conv_out.download(), conv_out.host, kTwoRoundingsTolerance);
    EXPECT_CLOSE(beta.download(), beta.host, kFloatTolerance);
    EXPECT_CLOSE(decay.download(), decay.host, kFloatTolerance);
    EXPECT_CLOSE(out.download(), out.host, kTwoRoundingsTolerance);
    slots.compare(batch);
  }
}

// By chunks of 64 tokens: partial chunks, several sequences, some too short for it (left to recurrent_rule), states
// from before. With `alike` all keys are nearly one, betas near 1 and decays near none: the hardest triangular systems.
TEST(ManyTokenGdn, ChunkedRule) {
  Random random(fresh_seed());
  for (const int64_t group : {1, 2, 3, 4}) {
    for (const bool alike : {false, true}) {
      SCOPED_TRACE(testing::Message() << "group " << group << (alike ? " alike" : ""));
      const GdnShape shape{2, 2 * group, 128, 128, 4};
      Batch batch(&random, {64, 3, 150, 32, 31, 1, 63, 65, 400}, {9, 0, 0, 5, 70, 4, 0, 3, 8}, 16);
      Slots slots(&random, shape, batch.slots);
      const int64_t tokens = batch.tokens(), values = shape.value_heads * 128, heads = shape.value_heads;
      Bf16Rows qkv(random.bfloat16s(tokens * shape.channels()), shape.channels());
      Bf16Rows out(random.bfloat16s(tokens * values), values);
      Both<float> beta(random.floats(tokens * heads)), decay(random.floats(tokens * heads));
      for (float& b : beta.host) b = alike ? 0.97f : 1.0f / (1.0f + std::exp(-b));
      for (float& d : decay.host) d = alike ? 0.9995f : random.below(50) == 0 ? 0.0f : std::exp(-std::abs(d));
      beta.upload();
      decay.upload();
      if (alike) {
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t c = 0; c < 2 * 128; ++c) {
            BFloat16& key = qkv.host[t * shape.channels() + 2 * 128 + c];
            key = to_bfloat16(static_cast<float>(c % 7) - 3 + 0.2f * to_float(key));
          }
        }
      }
      reference::gdn_l2_norm({shape, tokens, qkv.host_rows()});
      qkv.upload();
      out.poison();
      Both<std::byte> workspace(std::vector<std::byte>(cuda::chunked_rule_workspace_bytes(shape, tokens)));
      workspace.poison();
      const GatedDeltaRule args{shape,         batch.on_device(), slots.on_device(), qkv.device_rows(),
                                beta.device(), decay.device(),    out.device_rows()};
      cuda::chunked_rule(args, workspace.device(), nullptr);
      cuda::recurrent_rule(args, cuda::kChunkedRuleTokens, nullptr);
      finish();
      reference::gated_delta_rule({shape, batch.on_host(), slots.on_host(), qkv.host_rows(), beta.host.data(),
                                   decay.host.data(), out.host_rows()});
      EXPECT_CLOSE(out.download(), out.host, alike ? kAlikeTolerance : kStateTolerance);
      slots.compare(batch, alike ? kAlikeTolerance : kStateTolerance);
    }
  }
}

TEST(ManyTokenMlp, Elementwise) {
  Random random(fresh_seed());
  const int64_t rows = 37, width = 320;
  Bf16Rows a(random.bfloat16s(rows * 2 * width), 2 * width), b(random.bfloat16s(rows * width), width);
  Bf16Rows out(random.bfloat16s(rows * width), width), gate(random.bfloat16s(rows * 8), 8);
  cuda::swiglu({rows, width, a.device_rows(), out.device_rows()}, nullptr);
  cuda::add({rows, width, out.device_rows(), b.device_rows(), b.device_rows()}, nullptr);
  cuda::scale_rows_by_sigmoid({rows, width, gate.device_rows(), b.device_rows()}, nullptr);
  finish();
  reference::swiglu({rows, width, a.host_rows(), out.host_rows()});
  reference::add({rows, width, out.host_rows(), b.host_rows(), b.host_rows()});
  reference::scale_rows_by_sigmoid({rows, width, gate.host_rows(), b.host_rows()});
  EXPECT_CLOSE(out.download(), out.host, kRoundingTolerance);
  EXPECT_CLOSE(b.download(), b.host, kTwoRoundingsTolerance);
}

TEST(ManyTokenMlp, SharedExpertCombine) {
  Random random(fresh_seed());
  const int64_t rows = 19, hidden = 2048;
  Bf16Rows x(random.bfloat16s(rows * hidden), hidden), shared(random.bfloat16s(rows * hidden), hidden);
  Bf16Rows routed(random.bfloat16s(rows * hidden), hidden), y(random.bfloat16s(rows * hidden), hidden);
  Both<float> weight(random.floats(hidden, 0.05f));
  y.poison();
  cuda::shared_expert_combine(
      {rows, hidden, x.device_rows(), weight.device(), shared.device_rows(), routed.device_rows(), {}, y.device_rows()},
      nullptr);
  finish();
  reference::shared_expert_combine(
      {rows, hidden, x.host_rows(), weight.host.data(), shared.host_rows(), routed.host_rows(), {}, y.host_rows()});
  EXPECT_CLOSE(y.download(), y.host, kRoundingTolerance);
}

TEST(ManyTokenMlp, Router) {
  Random random(fresh_seed());
  for (const auto& [experts, top_k] : std::vector<std::pair<int64_t, int64_t>>{{8, 2}, {16, 4}, {256, 8}, {512, 10}}) {
    const int64_t rows = 300;
    std::vector<float> logits = random.floats(rows * experts);
    for (float& logit : logits) logit = std::round(logit * 16) / 16;  // many ties
    Both<float> input(logits), weights(random.floats(rows * top_k));
    Both<int32_t> ids(std::vector<int32_t>(rows * top_k));
    cuda::moe_router({rows, experts, top_k, true, input.device(), ids.device(), weights.device()}, nullptr);
    finish();
    reference::moe_router({rows, experts, top_k, true, input.host.data(), ids.host.data(), weights.host.data()});
    EXPECT_EQ(ids.download(), ids.host);
    EXPECT_CLOSE(weights.download(), weights.host, kFloatTolerance);
  }
}

// A weight on both sides, bfloat16 or FP8 with block scales; `count` of them one after the other.
struct Weight {
  Weight(Random* random, bool fp8, int64_t n, int64_t k, int64_t count = 1)
      : fp8(fp8),
        n(n),
        k(k),
        wide(fp8 ? std::vector<BFloat16>(1) : random->bfloat16s(count * n * k, 0.1f)),
        narrow(fp8 ? random->fp8s(count * n * k) : std::vector<uint8_t>(1)),
        scale(std::vector<float>(fp8 ? count * ((n + 127) / 128) * ((k + 127) / 128) : 1)) {
    for (float& value : scale.host) value = 0.0005f + 0.001f * std::abs(random->normal());
    scale.upload();
  }
  Matrix matrix(const void* data, const float* scales) const {
    return {data, fp8 ? DType::kFloat8E4M3 : DType::kBFloat16, MatrixLayout::kRowMajor, n, k, fp8 ? scales : nullptr};
  }
  Matrix on_host(int64_t index = 0) const {
    const void* data =
        fp8 ? static_cast<const void*>(narrow.host.data() + index * n * k) : wide.host.data() + index * n * k;
    return matrix(data, scale.host.data() + index * ((n + 127) / 128) * ((k + 127) / 128));
  }
  Matrix on_device() const {
    return matrix(fp8 ? static_cast<const void*>(narrow.device()) : wide.device(), scale.device());
  }
  int64_t bytes() const { return n * k * (fp8 ? 1 : 2); }
  bool fp8;
  int64_t n, k;
  Both<BFloat16> wide;
  Both<uint8_t> narrow;
  Both<float> scale;
};

TEST(ManyTokenLinear, AgainstReference) {
  Random random(fresh_seed());
  struct Case {
    bool fp8;
    int64_t rows, n, k;
    bool norm, accumulate, wide_output;
  };
  for (const Case& c : {Case{false, 1, 512, 192, false, false, false}, Case{false, 130, 320, 256, true, false, false},
                        Case{false, 65, 384, 512, false, true, false}, Case{false, 9, 1000, 128, false, false, true},
                        Case{true, 1, 256, 128, false, false, false}, Case{true, 200, 384, 512, false, false, false},
                        Case{true, 129, 640, 1024, true, true, false}, Case{true, 300, 128, 256, false, false, true},
                        Case{true, 3000, 1152, 1280, false, false, false}}) {
    SCOPED_TRACE(testing::Message() << c.fp8 << " " << c.rows << "x" << c.n << "x" << c.k);
    Weight weight(&random, c.fp8, c.n, c.k);
    Bf16Rows x(random.bfloat16s(c.rows * c.k), c.k), y(random.bfloat16s(c.rows * c.n), c.n);
    Activations<float> wide(random.floats(c.rows * c.n), c.n);
    Both<float> norm(random.floats(c.k, 0.3f));
    Both<std::byte> workspace(std::vector<std::byte>(cuda::linear_workspace_bytes(c.rows, c.k)));
    Linear args{.rows = c.rows,
                .x = x.device_rows(),
                .weight = weight.on_device(),
                .y = c.wide_output ? wide.device_rows() : y.device_rows(),
                .accumulate = c.accumulate,
                .norm_weight = c.norm ? norm.device() : nullptr,
                .workspace = workspace.device()};
    if (!c.accumulate) {
      y.poison();
      wide.poison();
    }
    const Status status = cuda::linear(args, nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    finish();
    std::vector<std::byte> host_workspace(c.rows * c.k * 4);
    args.x = x.host_rows();
    args.weight = weight.on_host();
    args.y = c.wide_output ? wide.host_rows() : y.host_rows();
    args.norm_weight = c.norm ? norm.host.data() : nullptr;
    args.workspace = host_workspace.data();
    reference::linear(args);
    const double tolerance = c.fp8 ? kFp8Tolerance : kRoundingTolerance;
    if (c.wide_output) {
      EXPECT_CLOSE(wide.download(), wide.host, tolerance);
    } else {
      EXPECT_CLOSE(y.download(), y.host, tolerance);
    }
  }
}

TEST(ManyTokenExperts, AgainstReference) {
  Random random(fresh_seed());
  struct Case {
    bool fp8;
    int64_t rows, experts, top_k, hidden, width;
  };
  for (const Case& c :
       {Case{false, 5, 16, 4, 128, 32}, Case{false, 150, 8, 2, 256, 128}, Case{false, 33, 16, 8, 256, 64},
        Case{false, 500, 3, 2, 328, 200}, Case{true, 40, 8, 2, 256, 128}, Case{true, 200, 4, 2, 512, 256},
        Case{true, 700, 5, 2, 512, 384}, Case{false, 1200, 40, 8, 64, 64}}) {
    SCOPED_TRACE(testing::Message() << c.fp8 << " " << c.rows << " rows, width " << c.width);
    Weight gate_up(&random, c.fp8, 2 * c.width, c.hidden, c.experts),
        down(&random, c.fp8, c.hidden, c.width, c.experts);
    Bf16Rows x(random.bfloat16s(c.rows * c.hidden), c.hidden), y(random.bfloat16s(c.rows * c.hidden), c.hidden);
    std::vector<int32_t> chosen;
    for (int64_t t = 0; t < c.rows; ++t) {
      const int64_t first = random.below(c.experts);
      for (int64_t i = 0; i < c.top_k; ++i) {
        // Now and then another rank's expert.
        chosen.push_back(
            static_cast<int32_t>(random.below(20) == 0 ? c.experts + 3 : (first + i * (1 + t % 2)) % c.experts));
      }
    }
    Both<int32_t> ids(chosen);
    Both<float> weights(random.floats(c.rows * c.top_k, 0.5f));
    Both<std::byte> workspace(
        std::vector<std::byte>(cuda::moe_experts_workspace_bytes(c.rows, c.experts, c.top_k, c.hidden, c.width)));
    workspace.poison();
    y.poison();
    MoeExperts args{.rows = c.rows,
                    .experts = c.experts,
                    .top_k = c.top_k,
                    .hidden = c.hidden,
                    .width = c.width,
                    .x = x.device_rows(),
                    .gate_up = gate_up.on_device(),
                    .gate_up_stride = gate_up.bytes(),
                    .down = down.on_device(),
                    .down_stride = down.bytes(),
                    .expert_ids = ids.device(),
                    .expert_weights = weights.device(),
                    .y = y.device_rows(),
                    .workspace = workspace.device()};
    cuda::moe_experts(args, nullptr);
    finish();
    // Expert by expert, since the reference has one scale pointer for all.
    std::vector<float> sum(c.rows * c.hidden);
    for (int64_t expert = 0; expert < c.experts; ++expert) {
      std::vector<int32_t> only(chosen);
      for (int32_t& id : only) id = id == expert ? 0 : -1;
      Activations<float> part(std::vector<float>(c.rows * c.hidden), c.hidden);
      args.x = x.host_rows();
      args.experts = 1;
      args.gate_up = gate_up.on_host(expert);
      args.down = down.on_host(expert);
      args.expert_ids = only.data();
      args.expert_weights = weights.host.data();
      args.y = part.host_rows();
      reference::moe_experts(args);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += part.host[i];
    }
    for (size_t i = 0; i < sum.size(); ++i) y.host[i] = to_bfloat16(sum[i]);
    EXPECT_CLOSE(y.download(), y.host, c.fp8 ? kFp8ExpertsTolerance : kExpertsTolerance);
  }
}

}  // namespace
}  // namespace tokenspeed::kernels

#include <bit>
#include <numeric>

#include "emulation/decode_layers_check.h"

namespace tokenspeed::kernels {
namespace {

TEST(DecodeLayers, ReferenceAndRowInvariance) {
  Random random(kData);
  for (const bool fp8 : {true, false}) {
    check_layer(&random, {{512, 2, 8, 12, 4, 128, fp8}, 4, {1}, {5}});
    check_layer(&random, {{256, 2, 8, 12, 4, 128, fp8}, 5, {3}, {0}});
    check_layer(&random, {{256, 2, 8, 12, 4, 128, fp8}, 18, {2}, {1}});  // a mixer's tasks are half heads
    check_layer(&random, {{256, 2, 8, 40, 10, 256, fp8}, 11, {1, 2, 1, 4}, {3, 0, 1, 2}});
    check_layer(&random, {{256, 2, 8, 12, 8, 128, fp8}, 8, {1, 1, 1, 1, 1, 1, 1, 1}, {1, 0, 1, 1, 1, 1, 0, 1}});
  }
  check_layer(&random, {{256, 2, 8, 12, 8, 128, true}, 9, {5, 1}, {1, 0}});
  check_layer(&random, {{256, 2, 8, 12, 4, 128, true}, 7, {2, 0, 1}, {5, 1, 0}});  // one without tokens
}

// Rows of more chunks than there are warps.
TEST(DecodeLayers, SeveralTurns) {
  Random random(kData);
  check_layer(&random, {{256, 6, 24, 12, 4, 128, true}, 4, {1}, {5}});
  check_layer(&random, {{256, 6, 24, 12, 4, 128, true}, 6, {2}, {5}});
  check_layer(&random, {{1280, 2, 8, 12, 4, 128, false}, 10, {1}, {5}});
  check_layer(&random, {{1280, 2, 8, 12, 4, 128, false}, 12, {1, 1}, {5, 0}});
}

// Of some phases a block may have no part.
TEST(DecodeLayers, MoreBlocksThanTasks) {
  Random random(kData);
  check_layer(&random, {{1280, 2, 8, 12, 4, 128, true}, 40, {1}, {5}});
  check_layer(&random, {{512, 2, 8, 12, 4, 128, false}, 68, {1, 1}, {5, 0}});
}

TEST(DecodeLayers, MergedProjections) {
  Random random(kData);
  for (const bool fp8 : {true, false}) {
    LayerShape shape = {256, 2, 8, 12, 4, 128, fp8};
    shape.merged = true;
    check_layer(&random, {shape, 4, {3}, {5}});
  }
}

TEST(DecodeLayers, EqualLogits) {
  Random random(kData);
  for (const int64_t levels : {1, 3}) {
    for (const int32_t rows : {1, 2}) {
      check_layer(&random, {{256, 2, 8, 100, 10, 128, true, true, true, levels}, 26, {rows}, {1}});
    }
  }
}

// One row's choice against a sort. levels: different logits, 0: as many as experts; so many equal ones as do not fit
// among the candidates are chosen another way.
template <int kKeys>
void check_choice(Random* random, int experts, int top_k, int levels) {
  constexpr unsigned kLaunch = 7;
  std::vector<float> logits = random->floats(experts);
  for (float& logit : logits) {
    if (levels > 0) logit = static_cast<float>(random->below(levels) - levels / 2);
  }
  std::vector<uint2> words;
  for (const float logit : logits) words.push_back({std::bit_cast<uint32_t>(logit), kLaunch});
  std::vector<int> order(static_cast<size_t>(experts));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });

  cuda::GateUpPhase phase = {};
  phase.logits = words.data();
  phase.experts = experts;
  phase.top_k = top_k;
  const emulation::Grid grid = {1, 32, sizeof(cuda::LayerRouting), kData};
  const std::string failure = emulation::run(grid, [&] {
    auto& routing = *reinterpret_cast<cuda::LayerRouting*>(cuda::dynamic_shared());
    cuda::choose_row<kKeys>(phase, routing, kLaunch, 0, routing.ids, false);
    if (threadIdx.x != 0) return;
    for (int i = 0; i < top_k; ++i) {
      EXPECT_EQ(routing.ids[i], order[static_cast<size_t>(i)]) << experts << " experts, " << levels << " levels";
      EXPECT_EQ(cuda::float_of_ordered(routing.choice[0].chosen[i]), logits[order[static_cast<size_t>(i)]]);
    }
  });
  EXPECT_TRUE(failure.empty()) << failure;
}
TEST(DecodeLayers, ChoiceAgainstASort) {
  Random random(kData);
  for (int round = 0; round < 20; ++round) {
    for (const int levels : {0, 2, 8, 40}) {
      check_choice<cuda::kLayerFewKeys>(&random, 256, 8, levels);
      check_choice<cuda::kLayerFewKeys>(&random, 40, 16, levels);
      check_choice<cuda::kLayerManyKeys>(&random, 512, 10, levels);
    }
  }
}

TEST(DecodeLayers, ManyExperts) {
  Random random(kData);
  check_layer(&random, {{256, 2, 8, 260, 10, 128, true}, 66, {1}, {1}});
}

// A row of NaN ends like any other and changes nothing in its neighbours.
TEST(DecodeLayers, RowOfNaN) {
  Random random(kData);
  for (const bool fp8 : {true, false}) {
    const Layer layer(&random, {256, 2, 8, 40, 10, 128, fp8});
    const Sequences sequences({1, 1, 1}, {4, 4, 4});
    Memory together = layer.memory(&random, 3, sequences.slots());
    std::fill_n(together.x.begin() + layer.s.hidden, layer.s.hidden, to_bfloat16(NAN));
    Memory alone = together;
    Multiprocessors gpu(11);
    gpu.run(layer_ops(layer, sequences.view(), {0, 3}, sequences, &together), 1);
    run_alone(layer, sequences, &gpu, &alone);
    for (const int64_t row : {0, 2}) {
      const size_t begin = static_cast<size_t>(row * layer.s.hidden);
      const size_t bytes = static_cast<size_t>(layer.s.hidden) * sizeof(BFloat16);
      EXPECT_EQ(std::memcmp(&together.x[begin], &alone.x[begin], bytes), 0) << row;
    }
    EXPECT_TRUE(std::isnan(to_float(together.x[static_cast<size_t>(layer.s.hidden)])));
  }
}

TEST(DecodeLayers, WithoutASharedExpert) {
  Random random(kData);
  for (const bool normalize : {true, false}) {
    for (const int32_t rows : {1, 2}) {
      check_layer(&random, {{256, 4, 8, 40, 4, 128, true, false, normalize}, 20, {rows}, {1}});
    }
  }
}

// More phases than one launch takes; more blocks than some phases have tiles.
TEST(DecodeLayers, SeveralLayers) {
  Random random(kData);
  check_layers(&random, {{256, 2, 8, 12, 4, 128, true}, 24, {1}, {5}}, 5);
  check_layers(&random, {{256, 2, 8, 12, 4, 128, false}, 7, {2, 1}, {0, 3}}, 5);
}

// What is launched before and behind an attention op: experts and a projection to plain rows; x += one, and experts.
void check_around_attention(Random* random, const LayerShape& shape, int64_t rows, int blocks) {
  const Layer layer(random, shape);
  const Memory start = layer.memory(random, rows, 1);
  const Range range = {0, rows};
  const int64_t channels = layer.gdn.channels();
  std::vector<BFloat16> inner = random->bfloat16s(rows * layer.values);
  std::vector<BFloat16> wide(static_cast<size_t>(rows * channels)), wide_expected(wide);
  Memory expected = start;
  bool certain = feed_forward(layer, rows, &expected);
  project(x_of(layer, range, &expected), rows, layer.qkv_matrix(), rows_of(wide_expected, channels), layer.norm.data());
  project(rows_of(inner, layer.values), rows, layer.w_out.matrix(), x_of(layer, range, &expected), nullptr, true);
  certain &= feed_forward(layer, rows, &expected);
  if (!certain) return check_around_attention(random, shape, rows, blocks);

  Memory got = start;
  Multiprocessors gpu(blocks);
  Ops before, behind;
  add_experts(layer, range, &got, &before);
  cuda::DecodeLinear in = {.rows = rows, .x = x_of(layer, range, &got), .norm_weight = layer.norm.data()};
  in.segment_count = 1;
  in.segments[0] = {layer.qkv_matrix(), rows_of(wide, channels)};
  before.push_back(in);
  cuda::DecodeLinear out = {.rows = rows, .x = rows_of(inner, layer.values), .segment_count = 1};
  out.segments[0] = {layer.w_out.matrix(), x_of(layer, range, &got), true};
  behind.push_back(out);
  add_experts(layer, range, &got, &behind);
  gpu.run(before, 1);
  gpu.run(behind, 2);
  expect_close(layer, got, expected);
  expect_close("projection", floats_of(wide), floats_of(wide_expected), kLayerTolerance);
}

// The head behind the experts: float32 results of the wanted rows, each with the bits that it has alone.
void check_head(Random* random, const LayerShape& shape, int64_t rows, const std::vector<int32_t>& wanted, int blocks) {
  constexpr int64_t kVocabulary = 200;  // half a tile at the end
  const Layer layer(random, shape);
  const Weights head(random, false, kVocabulary, shape.hidden);
  const Memory start = layer.memory(random, rows, 1);
  Memory expected = start;
  if (!feed_forward(layer, rows, &expected)) return check_head(random, shape, rows, wanted, blocks);
  const std::vector<float> untouched(static_cast<size_t>(rows * kVocabulary), -1.0f);
  std::vector<float> logits_expected(untouched);
  project(rows_of(expected.x, shape.hidden), rows, head.matrix(), rows_of(logits_expected, kVocabulary),
          layer.norm.data());

  Multiprocessors gpu(blocks);
  uint64_t launches = 0;
  const auto run = [&](const Range& range, const std::vector<int32_t>* chosen) {
    Memory memory = start;
    std::vector<float> logits = untouched;
    Ops ops;
    add_experts(layer, range, &memory, &ops);
    cuda::DecodeLinear op = {.rows = range.count, .x = x_of(layer, range, &memory), .norm_weight = layer.norm.data()};
    op.segment_count = 1;
    op.segments[0] = {head.matrix(), rows_of(logits, kVocabulary)};
    if (chosen != nullptr) {
      op.wanted = chosen->data();
      op.wanted_count = static_cast<int32_t>(chosen->size());
    }
    ops.push_back(op);
    gpu.run(ops, ++launches);
    return logits;
  };
  const std::vector<float> all = run({0, rows}, nullptr);
  const std::vector<float> some = run({0, rows}, &wanted);
  expect_close("logits", all, logits_expected, kLayerTolerance);
  const std::vector<int32_t> first = {0};
  for (size_t i = 0; i < static_cast<size_t>(rows); ++i) {
    const auto row_of = [&](const std::vector<float>& from, size_t row) {
      return std::span(from).subspan(row * kVocabulary, kVocabulary);
    };
    const bool has_row = i < wanted.size();
    EXPECT_TRUE(std::ranges::equal(row_of(some, i),
                                   has_row ? row_of(all, static_cast<size_t>(wanted[i])) : row_of(untouched, i)));
    if (!has_row) continue;
    EXPECT_TRUE(std::ranges::equal(row_of(run({wanted[i], 1}, &first), 0), row_of(some, i)));
  }
}

TEST(DecodeLayers, Head) {
  Random random(kData);
  for (const bool fp8 : {true, false}) {
    check_head(&random, {256, 2, 8, 12, 4, 128, fp8}, 1, {0}, 5);
    check_head(&random, {256, 2, 8, 12, 4, 128, fp8}, 3, {0, 2}, 4);
    check_head(&random, {512, 2, 8, 12, 4, 128, fp8}, 5, {4}, 16);
  }
}

TEST(DecodeLayers, AroundAttention) {
  Random random(kData);
  for (const bool fp8 : {true, false}) {
    check_around_attention(&random, {512, 2, 8, 12, 4, 128, fp8}, 1, 6);
    check_around_attention(&random, {256, 2, 8, 12, 4, 128, fp8}, 3, 9);
  }
}

}  // namespace
}  // namespace tokenspeed::kernels

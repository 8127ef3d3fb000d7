#include "kernels/gated_delta_net.h"

#include "base/thread_pool.h"
#include "kernels/norm.h"
#include "kernels/test_rows.h"

namespace tokenspeed::kernels {
namespace {

// fp32 against double sums, over some dozens of tokens whose errors decay with the state.
constexpr float kRecurrenceTolerance = 5e-5f;
// The mixer's o is rounded to bfloat16 before its norm and again after.
constexpr float kMixerBFloat16Tolerance = 3 * 0x1.0p-8f;

// Slots of one layer: recurrent state, then conv state; filled with NaN or random values.
struct Slots {
  Slots(const GdnShape& shape, DType conv_dtype, int32_t count, std::mt19937& random) {
    const int64_t recurrent = shape.value_heads * shape.value_dim * shape.key_dim;
    const int64_t conv = 3 * shape.channels();
    stride = recurrent * 4 + conv * static_cast<int64_t>(dtype_size(conv_dtype));
    stride = (stride + 63) / 64 * 64;
    bytes.assign(static_cast<size_t>(stride * count), std::byte{0xff});
    state = {bytes.data(), bytes.data() + recurrent * 4, conv_dtype, stride};
    std::normal_distribution<float> normal(0.0f, 0.3f);
    for (int32_t slot = 0; slot + 1 < count; ++slot) {  // the last one stays NaN: only ever written
      for (int64_t i = 0; i < recurrent; ++i) {
        store_element(DType::kFloat32, state.recurrent + slot * stride, i, normal(random));
      }
      for (int64_t i = 0; i < conv; ++i) store_element(conv_dtype, state.conv + slot * stride, i, normal(random));
    }
  }
  Slots(const Slots& other) : bytes(other.bytes), state(other.state), stride(other.stride) {
    state.recurrent = bytes.data();
    state.conv = bytes.data() + (other.state.conv - other.state.recurrent);
  }
  std::vector<std::byte> bytes;
  GdnState state;
  int64_t stride;
};

void expect_near_states(const Slots& actual, const Slots& expected, const GdnShape& shape, int32_t slot,
                        float tolerance) {
  const int64_t recurrent = shape.value_heads * shape.value_dim * shape.key_dim;
  for (int64_t i = 0; i < recurrent; ++i) {
    const float wanted = load_element(DType::kFloat32, expected.state.recurrent + slot * expected.stride, i);
    const float got = load_element(DType::kFloat32, actual.state.recurrent + slot * actual.stride, i);
    ASSERT_NEAR(got, wanted, tolerance) << "recurrent state " << i;
  }
  for (int64_t i = 0; i < 3 * shape.channels(); ++i) {
    ASSERT_EQ(load_element(actual.state.conv_dtype, actual.state.conv + slot * actual.stride, i),
              load_element(expected.state.conv_dtype, expected.state.conv + slot * expected.stride, i));
  }
}

// Inputs of a mixer over `tokens` rows.
struct Inputs {
  Inputs(const GdnShape& shape, DType dtype, int64_t tokens, std::mt19937& random)
      : qkv(dtype, tokens, shape.channels()),
        z(dtype, tokens, shape.value_heads * shape.value_dim),
        b(dtype, tokens, shape.value_heads),
        a(dtype, tokens, shape.value_heads),
        conv_weight(random_floats(random, shape.channels() * 4, 0.5f)),
        a_log(random_floats(random, shape.value_heads)),
        dt_bias(random_floats(random, shape.value_heads)),
        norm_weight(random_floats(random, shape.value_dim)),
        workspace(static_cast<size_t>(gdn_mixer_workspace_bytes(shape, tokens)), std::byte{0xff}) {
    qkv.fill(random);
    z.fill(random);
    b.fill(random);
    a.fill(random);
    if (tokens > 0) store_element(a.view(), 0, 0, 40.0f);  // softplus' linear branch
  }
  GdnMixer args(const GdnShape& shape, const SequenceBatch& batch, const GdnState& state, Rows out, int64_t row = 0) {
    return {shape,
            batch,
            state,
            qkv.view(row),
            z.view(row),
            b.view(row),
            a.view(row),
            conv_weight.data(),
            a_log.data(),
            dt_bias.data(),
            norm_weight.data(),
            1e-6f,
            out,
            workspace.data()};
  }
  TestRows qkv, z, b, a;
  std::vector<float> conv_weight, a_log, dt_bias, norm_weight;
  std::vector<std::byte> workspace;
};

// The separate operations, in the dtype of the rows.
template <typename Conv, typename Gates, typename Norm, typename Rule>
void run_separate(const GdnMixer& args, DType dtype, const Conv& conv, const Gates& gates, const Norm& norm,
                  const Rule& rule, Rows out) {
  const int64_t tokens = args.batch.tokens;
  TestRows mixed(dtype, tokens, args.shape.channels());
  std::vector<float> beta(static_cast<size_t>(tokens * args.shape.value_heads), NAN);
  std::vector<float> decay = beta;
  conv(CausalConv{args.shape, args.batch, args.state, args.qkv, args.conv_weight, mixed.view()});
  gates(GdnGates{tokens, args.shape.value_heads, args.b, args.a, args.a_log, args.dt_bias, beta.data(), decay.data()});
  norm(GdnL2Norm{args.shape, tokens, mixed.view()});
  rule(GatedDeltaRule{args.shape, args.batch, args.state, mixed.view(), beta.data(), decay.data(), out});
}

struct Case {
  GdnShape shape;
  std::vector<int32_t> counts;
  std::vector<int32_t> state_in;
  std::vector<int32_t> state_out;
};

const Case kCases[] = {
    {{2, 4, 128, 128}, {1}, {0}, {0}},
    {{2, 2, 128, 128}, {1}, {-1}, {3}},
    {{2, 4, 32, 32}, {37, 0, 2, 1}, {-1, 2, 0, 1}, {3, 2, 0, 4}},
    {{1, 3, 64, 32}, {17, 3}, {1, -1}, {1, 4}},
    {{2, 4, 128, 128}, {50, 1, 4}, {-1, 1, 2}, {4, 1, 3}},
};

TEST(GdnMixer, FusedAndSeparateEqualTheReference) {
  ThreadPool pool(3);
  uint32_t seed = 700;
  for (const Case& each : kCases) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      SCOPED_TRACE(testing::Message() << "seed " << ++seed << ' ' << dtype_name(dtype));
      std::mt19937 random(seed);
      TestBatch batch(each.counts, std::vector<int32_t>(each.counts.size(), 0), 64);
      batch.state_in = each.state_in;
      batch.state_out = each.state_out;
      const int64_t tokens = batch.token_begin.back();
      const int64_t columns = each.shape.value_heads * each.shape.value_dim;
      Inputs inputs(each.shape, dtype, tokens, random);
      const Slots start(each.shape, dtype, 6, random);
      Slots actual_slots = start;
      Slots expected_slots = start;
      TestRows actual(dtype, tokens, columns);
      TestRows expected(dtype, tokens, columns);
      cpu::gdn_mixer(inputs.args(each.shape, batch.view(), actual_slots.state, actual.view()), pool);
      reference::gdn_mixer(inputs.args(each.shape, batch.view(), expected_slots.state, expected.view()));
      actual.expect_near(expected, dtype == DType::kBFloat16 ? kMixerBFloat16Tolerance : kRecurrenceTolerance);
      for (size_t s = 0; s < each.counts.size(); ++s) {
        if (each.counts[s] == 0) continue;
        expect_near_states(actual_slots, expected_slots, each.shape, each.state_out[s], kRecurrenceTolerance);
      }
      // Slots that no sequence writes keep their bits.
      for (int32_t slot = 0; slot < 6; ++slot) {
        bool written = false;
        for (size_t s = 0; s < each.counts.size(); ++s) written |= each.counts[s] > 0 && each.state_out[s] == slot;
        const size_t at = static_cast<size_t>(slot * start.stride);
        const size_t size = static_cast<size_t>(start.stride);
        if (written) continue;
        EXPECT_EQ(std::memcmp(&start.bytes[at], &actual_slots.bytes[at], size), 0) << slot;
      }

      Slots separate_slots = start;
      Slots reference_slots = start;
      TestRows separate(dtype, tokens, columns);
      TestRows separate_reference(dtype, tokens, columns);
      const auto with_pool = [&](auto function) {
        return [&pool, function](const auto& args) { function(args, pool); };
      };
      run_separate(inputs.args(each.shape, batch.view(), separate_slots.state, {}), dtype, with_pool(cpu::causal_conv),
                   with_pool(cpu::gdn_gates), with_pool(cpu::gdn_l2_norm), with_pool(cpu::gated_delta_rule),
                   separate.view());
      run_separate(inputs.args(each.shape, batch.view(), reference_slots.state, {}), dtype, reference::causal_conv,
                   reference::gdn_gates, reference::gdn_l2_norm, reference::gated_delta_rule,
                   separate_reference.view());
      separate.expect_near(separate_reference,
                           dtype == DType::kBFloat16 ? kMixerBFloat16Tolerance : kRecurrenceTolerance);
      cpu::gated_rms_norm({tokens, each.shape.value_heads, each.shape.value_dim, separate.view(), inputs.z.view(),
                           inputs.norm_weight.data(), 1e-6f, separate.view()},
                          pool);
      if (dtype == DType::kFloat32) {
        EXPECT_TRUE(separate == actual);
        EXPECT_EQ(separate_slots.bytes, actual_slots.bytes);
      }
    }
  }
}

// A prompt whole, in chunks, with other threads or beside another sequence: outputs and states have the same bits.
TEST(GdnMixer, BitsDoNotDependOnChunksThreadsOrNeighbours) {
  for (const GdnShape& shape : {GdnShape{2, 4, 128, 128}, GdnShape{2, 4, 32, 32}}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      constexpr int32_t kLength = 75;
      std::mt19937 random(750);
      ThreadPool one(1);
      ThreadPool many(4);
      const int64_t columns = shape.value_heads * shape.value_dim;
      Inputs inputs(shape, dtype, kLength, random);
      const Slots start(shape, dtype, 3, random);
      const auto run = [&](Slots& slots, TestRows& out, int32_t begin, int32_t end, int32_t in, ThreadPool& pool) {
        TestBatch batch({end - begin}, {begin}, 64);
        batch.state_in = {in};
        batch.state_out = {1};
        cpu::gdn_mixer(inputs.args(shape, batch.view(), slots.state, out.view(begin), begin), pool);
      };
      Slots whole_slots = start;
      TestRows whole(dtype, kLength, columns);
      run(whole_slots, whole, 0, kLength, -1, one);
      for (const int32_t chunk : {1, 2, 16, 31}) {
        Slots slots = start;
        TestRows out(dtype, kLength, columns);
        for (int32_t begin = 0; begin < kLength; begin += chunk) {
          run(slots, out, begin, std::min(begin + chunk, kLength), begin == 0 ? -1 : 1, many);
        }
        EXPECT_TRUE(out == whole) << "chunks of " << chunk;
        EXPECT_EQ(slots.bytes, whole_slots.bytes) << "chunks of " << chunk;
      }
      // Rows [0, 30) as one sequence and [30, 75) as a second one that continues a slot.
      Slots alone_slots = start;
      TestRows alone(dtype, kLength, columns);
      run(alone_slots, alone, 30, kLength, 0, one);
      TestBatch both({30, 45}, {0, 0}, 64);
      both.state_in = {-1, 0};
      both.state_out = {2, 1};
      Slots slots = start;
      TestRows out(dtype, kLength, columns);
      cpu::gdn_mixer(inputs.args(shape, both.view(), slots.state, out.view()), many);
      for (int64_t row = 0; row < kLength; ++row) {
        for (int64_t i = 0; i < columns; ++i) ASSERT_EQ(out.at(row, i), (row < 30 ? whole : alone).at(row, i)) << row;
      }
      const size_t slot = static_cast<size_t>(start.stride);
      EXPECT_EQ(std::memcmp(&slots.bytes[slot], &alone_slots.bytes[slot], slot), 0);
    }
  }
}

}  // namespace
}  // namespace tokenspeed::kernels

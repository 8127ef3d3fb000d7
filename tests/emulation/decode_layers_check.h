// decode_layers run by the machine, for its tests: a layer against the plain references, T rows together against each
// row alone, and different interleavings against each other, both bit for bit. Data are always the same, as some are
// such that a rounding decides on much (a token whose k and q are nearly at right angles); interleavings are new every
// time.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "emulation/machine.h"
#include "kernels/cuda/decode_layers_kernel.cuh"
#include "kernels/elements.h"
#include "kernels/linear.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"

namespace tokenspeed::kernels {

inline constexpr double kTailTolerance = 5e-3;     // one bfloat16 rounding, now and then the other way
inline constexpr double kStateTolerance = 5e-3;    // projections rounded the other way go into the state
inline constexpr double kLayerTolerance = 1.6e-2;  // several roundings to bfloat16 one after the other
inline constexpr int64_t kGateStride = 64;         // of the rows of a and b
inline constexpr uint32_t kData = 17;
inline constexpr float kLeastLogit = 0.05f;
inline constexpr double kChunkCycles = 5;  // copies are spread

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t below(int64_t limit) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(limit)); }
  std::vector<float> floats(int64_t count, float scale = 1.0f) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = scale * distribution_(engine_);
    return values;
  }
  std::vector<BFloat16> bfloat16s(int64_t count, float scale = 1.0f) {
    std::vector<BFloat16> values;
    for (const float value : floats(count, scale)) values.push_back(to_bfloat16(value));
    return values;
  }
  std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> values(static_cast<size_t>(count));
    for (uint8_t& value : values) value = static_cast<uint8_t>(engine_());
    return values;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> distribution_;
};

// `count` matrices [n, k] one after the other.
class Weights {
 public:
  Weights(Random* random, bool fp8, int64_t n, int64_t k, int64_t count = 1)
      : n_(n), k_(k), fp8_(fp8), bytes_(random->bytes(n * k * count * (fp8 ? 1 : 2))) {
    if (!fp8) {
      for (size_t i = 1; i < bytes_.size(); i += 2)
        bytes_[i] = static_cast<uint8_t>((bytes_[i] & 0x81) | 0x3c);  // 2^-7
      return;
    }
    for (uint8_t& code : bytes_) code = static_cast<uint8_t>(code - ((code & 0x7f) == 0x7f));  // no NaN
    for (int64_t i = 0; i < scale_count() * count; ++i) {
      scales_.push_back(1e-4f * (1.0f + static_cast<float>(random->below(100)) * 0.01f));
    }
  }
  Matrix matrix(int64_t index = 0) const {
    return {bytes_.data() + index * n_ * k_ * (fp8_ ? 1 : 2),
            fp8_ ? DType::kFloat8E4M3 : DType::kBFloat16,
            MatrixLayout::kRowMajor,
            n_,
            k_,
            fp8_ ? scales_.data() + index * scale_count() : nullptr};
  }
  // Rows `first` (a multiple of 128 unless bfloat16) to first + n.
  Matrix rows(int64_t first, int64_t n) const {
    Matrix part = matrix();
    part.n = n;
    part.data = bytes_.data() + first * k_ * (fp8_ ? 1 : 2);
    if (fp8_) part.scale += first / 128 * (k_ / 128);
    return part;
  }

 private:
  int64_t scale_count() const { return (n_ + 127) / 128 * ((k_ + 127) / 128); }
  int64_t n_, k_;
  bool fp8_;
  std::vector<uint8_t> bytes_;
  std::vector<float> scales_;
};

struct LayerShape {
  int64_t hidden, key_heads, value_heads, experts, top_k, width;
  bool fp8;
  bool shared = true;
  bool normalize = true;
  int64_t logit_levels = 1000;
  bool merged = false;  // the mixer's input projections are two matrices, not four
};

// Sequences of new tokens; a sequence without a context starts from the zero state.
struct Sequences {
  Sequences(const std::vector<int32_t>& lengths, const std::vector<int32_t>& contexts) {
    token_begin.push_back(0);
    for (size_t s = 0; s < lengths.size(); ++s) {
      const auto slot = static_cast<int32_t>(2 * s);
      token_begin.push_back(token_begin.back() + lengths[s]);
      state_in.push_back(contexts[s] == 0 ? -1 : slot);
      state_out.push_back(s % 2 == 0 ? slot + 1 : slot);  // elsewhere and in place
    }
  }
  SequenceBatch view() const {
    SequenceBatch made;
    made.sequences = static_cast<int32_t>(state_in.size());
    made.tokens = token_begin.back();
    made.token_begin = token_begin.data();
    made.state_in = state_in.data();
    made.state_out = state_out.data();
    return made;
  }
  int64_t slots() const { return 2 * static_cast<int64_t>(state_in.size()); }
  std::vector<int32_t> token_begin, state_in, state_out;
};

// The router's rows are multiples of one, so that only the sign of the logits decides; data on which it is in doubt are
// not tested with (kLeastLogit).
// levels: so many rows are different, of the others some are equal.
inline std::vector<BFloat16> parallel_rows(Random* random, int64_t experts, int64_t hidden, int64_t levels) {
  const std::vector<float> direction = random->floats(hidden, 0.05f);
  std::vector<BFloat16> rows;
  for (int64_t e = 0; e < experts; ++e) {
    const float factor = static_cast<float>(1 + e * 7 % levels) / static_cast<float>(levels);
    for (const float value : direction) rows.push_back(to_bfloat16(value * factor));
  }
  return rows;
}

// What a layer keeps from step to step or hands on.
struct Memory {
  std::vector<BFloat16> x;
  std::vector<std::byte> slots;
  bool operator==(const Memory& other) const {
    return slots == other.slots && std::memcmp(x.data(), other.x.data(), x.size() * sizeof(BFloat16)) == 0;
  }
};

struct Layer {
  Layer(Random* random, const LayerShape& shape)
      : s(shape),
        gdn{shape.key_heads, shape.value_heads, 128, 128, 4},
        values(shape.value_heads * 128),
        state_bytes(values * 128 * 4),
        slot(state_bytes + 3 * gdn.channels() * 2),
        norm(random->floats(s.hidden, 0.3f)),
        conv(random->floats(gdn.channels() * 4, 0.5f)),
        a_log(random->floats(s.value_heads, 0.5f)),
        dt_bias(random->floats(s.value_heads, 0.5f)),
        head_norm(random->floats(128, 0.5f)),
        router(parallel_rows(random, s.experts, s.hidden, std::min(s.experts, s.logit_levels))),
        w_qkv_z(random, s.fp8, gdn.channels() + values, s.hidden),
        w_b_a(random, false, 2 * s.value_heads, s.hidden),
        w_out(random, s.fp8, s.hidden, values),
        w_gate(random, false, 1, s.hidden),
        w_up(random, s.fp8, 2 * s.width, s.hidden, s.experts),
        w_down(random, s.fp8, s.hidden, s.width, s.experts),
        w_shared_up(random, s.fp8, 2 * s.width, s.hidden),
        w_shared_down(random, s.fp8, s.hidden, s.width) {}

  Memory memory(Random* random, int64_t rows, int64_t slot_count) const {
    // Small, so that x is soon what the layer makes of it.
    Memory m = {random->bfloat16s(rows * s.hidden, 0.05f),
                std::vector<std::byte>(static_cast<size_t>(slot * slot_count))};
    for (int64_t i = 0; i < slot_count; ++i) {
      const std::vector<float> state = random->floats(values * 128, 0.1f);
      const std::vector<BFloat16> tail = random->bfloat16s(3 * gdn.channels());
      std::memcpy(m.slots.data() + i * slot, state.data(), static_cast<size_t>(state_bytes));
      std::memcpy(m.slots.data() + i * slot + state_bytes, tail.data(), tail.size() * 2);
    }
    return m;
  }
  // Slot 0 of which is slot `first` of the memory.
  GdnState state(Memory* memory, int64_t first) const {
    std::byte* const begin = memory->slots.data() + first * slot;
    return {begin, begin + state_bytes, DType::kBFloat16, slot};
  }
  int64_t slots_of(const Memory& memory) const { return static_cast<int64_t>(memory.slots.size()) / slot; }
  Matrix qkv_matrix() const { return w_qkv_z.rows(0, gdn.channels()); }
  Matrix z_matrix() const { return w_qkv_z.rows(gdn.channels(), values); }
  Matrix b_matrix() const { return w_b_a.rows(0, s.value_heads); }
  Matrix a_matrix() const { return w_b_a.rows(s.value_heads, s.value_heads); }
  Matrix router_matrix() const {
    return {router.data(), DType::kBFloat16, MatrixLayout::kRowMajor, s.experts, s.hidden, nullptr};
  }

  const LayerShape s;
  const GdnShape gdn;
  const int64_t values, state_bytes, slot;
  const std::vector<float> norm, conv, a_log, dt_bias, head_norm;
  const std::vector<BFloat16> router;
  const Weights w_qkv_z, w_b_a, w_out, w_gate, w_up, w_down, w_shared_up, w_shared_down;
};

// ---- the references ----

template <typename T>
Rows rows_of(std::vector<T>& values, int64_t stride) {
  return {values.data(), std::is_same_v<T, float> ? DType::kFloat32 : DType::kBFloat16, stride};
}

inline void project(const Rows& x, int64_t rows, const Matrix& weight, const Rows& y, const float* norm = nullptr,
                    bool accumulate = false) {
  std::vector<BFloat16> workspace(static_cast<size_t>(rows * weight.k));
  reference::linear({rows, x, weight, y, accumulate, norm, 1e-6f, workspace.data()});
}

inline void mix(const Layer& layer, const SequenceBatch& batch, const GdnState& state, Memory* memory) {
  const int64_t rows = batch.tokens;
  const auto sized = [&](int64_t columns) { return std::vector<BFloat16>(static_cast<size_t>(rows * columns)); };
  std::vector<BFloat16> qkv = sized(layer.gdn.channels()), z = sized(layer.values), mixed = sized(layer.values);
  std::vector<BFloat16> b = sized(kGateStride), a = sized(kGateStride);
  const Rows x = rows_of(memory->x, layer.s.hidden);
  const float* const norm = layer.norm.data();
  project(x, rows, layer.qkv_matrix(), rows_of(qkv, layer.gdn.channels()), norm);
  project(x, rows, layer.z_matrix(), rows_of(z, layer.values), norm);
  project(x, rows, layer.b_matrix(), rows_of(b, kGateStride), norm);
  project(x, rows, layer.a_matrix(), rows_of(a, kGateStride), norm);
  const int64_t bytes = gdn_mixer_workspace_bytes(layer.gdn, rows);
  std::vector<std::byte> workspace(static_cast<size_t>(bytes));
  reference::gdn_mixer({layer.gdn, batch, state, rows_of(qkv, layer.gdn.channels()), rows_of(z, layer.values),
                        rows_of(b, kGateStride), rows_of(a, kGateStride), layer.conv.data(), layer.a_log.data(),
                        layer.dt_bias.data(), layer.head_norm.data(), 1e-6f, rows_of(mixed, layer.values),
                        workspace.data()});
  project(rows_of(mixed, layer.values), rows, layer.w_out.matrix(), x, nullptr, true);
}

// y += weight * down(silu(gate x) * up x)
inline void add_expert(const Layer& layer, const Rows& x, const Matrix& gate_up, const Matrix& down, float weight,
                       std::vector<float>* y) {
  std::vector<float> product(static_cast<size_t>(2 * layer.s.width)), part(y->size());
  std::vector<BFloat16> h(static_cast<size_t>(layer.s.width));
  project(x, 1, gate_up, rows_of(product, 2 * layer.s.width));
  reference::swiglu({1, layer.s.width, rows_of(product, 2 * layer.s.width), rows_of(h, layer.s.width)});
  project(rows_of(h, layer.s.width), 1, down, rows_of(part, layer.s.hidden));
  for (size_t i = 0; i < part.size(); ++i) (*y)[i] += weight * part[i];
}

// Returns the size of the greatest logit.
inline float feed_forward(const Layer& layer, BFloat16* x) {
  const LayerShape& s = layer.s;
  std::vector<BFloat16> normed(static_cast<size_t>(s.hidden));
  const Rows in = rows_of(normed, s.hidden);
  reference::rms_norm({1, s.hidden, {x, DType::kBFloat16, s.hidden}, {}, layer.norm.data(), 1e-6f, in});
  std::vector<float> logits(static_cast<size_t>(s.experts)), gate(1), weights(static_cast<size_t>(s.top_k));
  std::vector<int32_t> ids(static_cast<size_t>(s.top_k));
  project(in, 1, layer.router_matrix(), rows_of(logits, s.experts));
  project(in, 1, layer.w_gate.matrix(), rows_of(gate, 1));
  reference::moe_router({1, s.experts, s.top_k, s.normalize, logits.data(), ids.data(), weights.data()});
  std::vector<float> y;
  for (int64_t i = 0; i < s.hidden; ++i) y.push_back(to_float(x[i]));
  for (size_t i = 0; i < ids.size(); ++i) {
    add_expert(layer, in, layer.w_up.matrix(ids[i]), layer.w_down.matrix(ids[i]), weights[i], &y);
  }
  if (s.shared) {
    add_expert(layer, in, layer.w_shared_up.matrix(), layer.w_shared_down.matrix(), 1 / (1 + std::exp(-gate[0])), &y);
  }
  for (int64_t i = 0; i < s.hidden; ++i) x[i] = to_bfloat16(y[static_cast<size_t>(i)]);
  return std::fabs(std::ranges::max(logits, {}, [](float logit) { return std::fabs(logit); }));
}
// Of rows one after the other: false when the router's choice is in doubt.
inline bool feed_forward(const Layer& layer, int64_t rows, Memory* memory) {
  bool certain = true;
  for (int64_t t = 0; t < rows; ++t) {
    certain &= feed_forward(layer, memory->x.data() + t * layer.s.hidden) > kLeastLogit;
  }
  return certain;
}

inline bool run_reference(const Layer& layer, const Sequences& sequences, Memory* memory) {
  mix(layer, sequences.view(), layer.state(memory, 0), memory);
  return feed_forward(layer, sequences.token_begin.back(), memory);
}

// ---- the kernel ----

// Rows that the kernel does not write: it needs their addresses alone, `column` elements behind the beginning.
inline Rows unwritten(const char* name, DType dtype = DType::kBFloat16, int64_t column = 0) {
  static std::map<std::string, std::vector<BFloat16>> places;
  std::vector<BFloat16>& place = places[name];
  place.resize(1 << 16);
  return {place.data() + column, dtype, 1 << 15};
}

// Which rows of x the ops are about: [first, first + count).
struct Range {
  int64_t first, count;
};
inline Rows x_of(const Layer& layer, const Range& range, Memory* memory) {
  return {memory->x.data() + range.first * layer.s.hidden, DType::kBFloat16, layer.s.hidden};
}

using Ops = std::vector<cuda::DecodePhase>;

inline void add_mixer(const Layer& layer, const SequenceBatch& batch, const Range& range, const GdnState& state,
                      Memory* memory, Ops* ops) {
  const Rows x = x_of(layer, range, memory);
  cuda::DecodeLinear in = {.rows = range.count, .x = x, .norm_weight = layer.norm.data()};
  GdnMixer mixer = {.shape = layer.gdn, .batch = batch, .state = state};
  mixer.qkv = unwritten("qkv");
  mixer.b = unwritten("b");
  if (layer.s.merged) {
    mixer.z = unwritten("qkv", DType::kBFloat16, layer.gdn.channels());
    mixer.a = unwritten("b", DType::kBFloat16, layer.s.value_heads);
    in.segment_count = 2;
    in.segments[0] = {layer.w_qkv_z.matrix(), mixer.qkv};
    in.segments[1] = {layer.w_b_a.matrix(), mixer.b};
  } else {
    mixer.z = unwritten("z");
    mixer.a = unwritten("a");
    in.segment_count = 4;
    in.segments[0] = {layer.qkv_matrix(), mixer.qkv};
    in.segments[1] = {layer.z_matrix(), mixer.z};
    in.segments[2] = {layer.b_matrix(), mixer.b};
    in.segments[3] = {layer.a_matrix(), mixer.a};
  }
  ops->push_back(in);
  mixer.conv_weight = layer.conv.data();
  mixer.a_log = layer.a_log.data();
  mixer.dt_bias = layer.dt_bias.data();
  mixer.norm_weight = layer.head_norm.data();
  mixer.out = unwritten("mixed");
  ops->push_back(mixer);
  cuda::DecodeLinear out = {.rows = range.count, .x = mixer.out, .segment_count = 1};
  out.segments[0] = {layer.w_out.matrix(), x, true};
  ops->push_back(out);
}

inline void add_experts(const Layer& layer, const Range& range, Memory* memory, Ops* ops) {
  const LayerShape& s = layer.s;
  const Rows x = x_of(layer, range, memory);
  cuda::DecodeLinear route = {.rows = range.count, .x = x, .norm_weight = layer.norm.data()};
  route.normed = unwritten("normed");
  route.segment_count = s.shared ? 2 : 1;
  route.segments[0] = {layer.router_matrix(), unwritten("logits", DType::kFloat32)};
  if (s.shared) route.segments[1] = {layer.w_gate.matrix(), unwritten("gate", DType::kFloat32)};
  ops->push_back(route);
  cuda::DecodeGateUp up = {.rows = range.count, .hidden = s.hidden, .width = s.width, .x = route.normed};
  up.h = unwritten("h").data;
  up.routed = {s.experts,
               s.top_k,
               s.normalize,
               static_cast<const float*>(route.segments[0].y.data),
               64,
               layer.w_up.matrix(),
               layer.w_down.matrix()};
  cuda::DecodeDown down = {.rows = range.count, .hidden = s.hidden, .width = s.width, .routed = up.routed};
  down.h = up.h;
  down.y = x;
  if (s.shared) {
    up.shared_width = down.shared_width = s.width;
    up.shared_gate_up = layer.w_shared_up.matrix();
    down.shared_down = layer.w_shared_down.matrix();
    down.shared_gate_logit = static_cast<const float*>(route.segments[1].y.data);
  }
  ops->push_back(up);
  ops->push_back(down);
}

// As many copies of the layer as the memory has states for.
inline Ops layer_ops(const Layer& layer, const SequenceBatch& batch, const Range& range, const Sequences& all,
                     Memory* memory) {
  Ops ops;
  for (int64_t first = 0; first < layer.slots_of(*memory); first += all.slots()) {
    add_mixer(layer, batch, range, layer.state(memory, first), memory, &ops);
    add_experts(layer, range, memory, &ops);
  }
  return ops;
}

template <bool kFp8, int kKeys>
void run_columns(int columns, const cuda::LayerProgram& program) {
  columns == 1   ? cuda::run_layers<kFp8, 1, kKeys>(program)
  : columns == 2 ? cuda::run_layers<kFp8, 2, kKeys>(program)
  : columns == 4 ? cuda::run_layers<kFp8, 4, kKeys>(program)
                 : cuda::run_layers<kFp8, 8, kKeys>(program);
}
template <bool kFp8>
void run_experts(bool narrow, int columns, const cuda::LayerProgram& program) {
  narrow ? run_columns<kFp8, cuda::kLayerFewKeys>(columns, program)
         : run_columns<kFp8, cuda::kLayerManyKeys>(columns, program);
}

// decode_layers() on `blocks` multiprocessors.
class Multiprocessors {
 public:
  explicit Multiprocessors(int blocks)
      : blocks_(blocks), workspace_(static_cast<size_t>(cuda::kDecodeLayersWorkspaceBytes) / sizeof(Line)) {}

  void run(std::span<const cuda::DecodePhase> ops, uint64_t seed) {
    cuda::LayerProgramWriter writer(workspace_.data(), blocks_);
    while (!ops.empty()) {
      size_t taken = writer.take(ops);
      if (taken == 0) {
        ASSERT_FALSE(writer.empty()) << "the kernel does not take this op";
        ASSERT_NO_FATAL_FAILURE(launch(writer, seed));
        continue;
      }
      ops = ops.subspan(taken);
    }
    launch(writer, seed);
  }

 private:
  struct alignas(256) Line {
    std::byte bytes[256];
  };
  void launch(cuda::LayerProgramWriter& writer, uint64_t seed) {
    const cuda::LayerProgram& program = writer.finish({}, kChunkCycles);
    const int columns = cuda::layer_columns(program.rows);
    const emulation::Grid grid = {blocks_, cuda::layer_threads(columns), writer.shared_bytes(), seed};
    const std::string failure = emulation::run(grid, [&] {
      writer.fp8() ? run_experts<true>(writer.narrow(), columns, program)
                   : run_experts<false>(writer.narrow(), columns, program);
    });
    ASSERT_TRUE(failure.empty()) << failure;
    writer.clear();
  }
  int blocks_;
  std::vector<Line> workspace_;
};

// ---- comparison ----

inline double relative_error(const std::vector<float>& got, const std::vector<float>& expected) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(static_cast<double>(got[i]) - expected[i], 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(difference / size);
}
inline void expect_close(const char* what, const std::vector<float>& got, const std::vector<float>& expected,
                         double tolerance) {
  const double error = relative_error(got, expected);
  EXPECT_TRUE(error <= tolerance) << what << " differs by " << error;
}

inline std::vector<float> floats_of(std::span<const BFloat16> values) {
  std::vector<float> made;
  for (const BFloat16 value : values) made.push_back(to_float(value));
  return made;
}

struct Parts {
  std::vector<float> states, tails;
};
inline Parts parts_of(const Layer& layer, const Memory& memory) {
  Parts parts;
  for (size_t at = 0; at < memory.slots.size(); at += static_cast<size_t>(layer.slot)) {
    const auto* const state = reinterpret_cast<const float*>(memory.slots.data() + at);
    parts.states.insert(parts.states.end(), state, state + layer.values * 128);
    const auto* const tail = reinterpret_cast<const BFloat16*>(memory.slots.data() + at + layer.state_bytes);
    for (int64_t i = 0; i < 3 * layer.gdn.channels(); ++i) parts.tails.push_back(to_float(tail[i]));
  }
  return parts;
}
inline void expect_close(const Layer& layer, const Memory& got, const Memory& expected) {
  const Parts a = parts_of(layer, got), b = parts_of(layer, expected);
  expect_close("state", a.states, b.states, kStateTolerance);
  expect_close("tail", a.tails, b.tails, kTailTolerance);
  expect_close("x", floats_of(got.x), floats_of(expected.x), kLayerTolerance);
}

// Every row in a launch of its own, one token after the other.
inline void run_alone(const Layer& layer, const Sequences& sequences, Multiprocessors* gpu, Memory* memory) {
  for (size_t s = 0; s < sequences.state_in.size(); ++s) {
    for (int32_t row = sequences.token_begin[s]; row < sequences.token_begin[s + 1]; ++row) {
      Sequences one({1}, {1});
      one.state_in[0] = row == sequences.token_begin[s] ? sequences.state_in[s] : sequences.state_out[s];
      one.state_out[0] = sequences.state_out[s];
      gpu->run(layer_ops(layer, one.view(), {row, 1}, sequences, memory), 1);
    }
  }
}

struct Case {
  LayerShape shape;
  int blocks;
  std::vector<int32_t> lengths, contexts;
  int interleavings = 1;  // besides the first
};

inline void check_layer(Random* random, const Case& c) {
  SCOPED_TRACE(testing::Message() << "hidden " << c.shape.hidden << " blocks " << c.blocks << " fp8 " << c.shape.fp8
                                  << " sequences " << c.lengths.size() << " first length " << c.lengths[0]);
  const Layer layer(random, c.shape);
  const Sequences sequences(c.lengths, c.contexts);
  const Range rows = {0, sequences.token_begin.back()};
  Multiprocessors gpu(c.blocks);
  Memory start, expected;
  do {
    start = expected = layer.memory(random, rows.count, sequences.slots());
  } while (!run_reference(layer, sequences, &expected));

  Memory got = start;
  ASSERT_NO_FATAL_FAILURE(gpu.run(layer_ops(layer, sequences.view(), rows, sequences, &got), 1));
  expect_close(layer, got, expected);
  for (int i = 0; i < c.interleavings; ++i) {
    const uint64_t seed = std::random_device()();
    Memory again = start;
    gpu.run(layer_ops(layer, sequences.view(), rows, sequences, &again), seed);
    EXPECT_TRUE(again == got) << "another interleaving gives other bits: " << seed;
  }
  if (rows.count == 1) return;
  Memory alone = start;
  run_alone(layer, sequences, &gpu, &alone);
  EXPECT_TRUE(alone == got) << "rows depend on each other";
}

// Layers together against each layer, and each row, in launches of their own.
inline void check_layers(Random* random, const Case& c, int layers) {
  SCOPED_TRACE(testing::Message() << layers << " layers, hidden " << c.shape.hidden << " blocks " << c.blocks << " fp8 "
                                  << c.shape.fp8 << " sequences " << c.lengths.size());
  const Layer layer(random, c.shape);
  const Sequences sequences(c.lengths, c.contexts);
  const Range rows = {0, sequences.token_begin.back()};
  Multiprocessors gpu(c.blocks);
  const Memory start = layer.memory(random, rows.count, sequences.slots() * layers);

  Memory alone = start;
  run_alone(layer, sequences, &gpu, &alone);
  Memory one_by_one = start;
  const Ops ops = layer_ops(layer, sequences.view(), rows, sequences, &one_by_one);
  const size_t of_a_layer = ops.size() / static_cast<size_t>(layers);
  for (size_t i = 0; i < ops.size(); i += of_a_layer) gpu.run(std::span(ops).subspan(i, of_a_layer), 1);
  EXPECT_TRUE(one_by_one == alone) << "rows depend on each other";
  for (int i = 0; i < c.interleavings; ++i) {
    const uint64_t seed = std::random_device()();
    Memory together = start;
    gpu.run(layer_ops(layer, sequences.view(), rows, sequences, &together), seed);
    EXPECT_TRUE(together == alone) << "layers depend on each other: " << seed;
  }
}

}  // namespace tokenspeed::kernels

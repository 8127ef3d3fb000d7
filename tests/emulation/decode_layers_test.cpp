// decode_layers run by the machine: a layer against the plain references, T rows together against each row alone, and
// different interleavings against each other, both bit for bit. Seeds are printed.
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
namespace {

constexpr double kTailTolerance = 3e-3;   // one bfloat16 rounding, now and then the other way
constexpr double kStateTolerance = 3e-3;  // projections rounded the other way go into the state
constexpr double kLayerTolerance = 8e-3;  // what several such roundings leave in x; up to 6.2e-3 was seen
constexpr int64_t kGateStride = 64;       // of the rows of a and b
constexpr float kLeastLogit = 0.05f;

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
  bool merged = false;  // qkv and z, b and a are columns of one projection's result
};

// Rows of a matrix from `first` on, which begins a block of 128.
Matrix rows_of_matrix(Matrix m, int64_t first, int64_t count) {
  m.data = static_cast<const std::byte*>(m.data) + first * m.k * static_cast<int64_t>(dtype_size(m.dtype));
  if (m.scale != nullptr) m.scale += first / 128 * ((m.k + 127) / 128);
  m.n = count;
  return m;
}

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
std::vector<BFloat16> parallel_rows(Random* random, int64_t experts, int64_t hidden, int64_t levels) {
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
        w_qkvz(random, s.fp8, gdn.channels() + values, s.hidden),
        w_ba(random, false, 2 * s.value_heads, s.hidden),
        w_out(random, s.fp8, s.hidden, values),
        w_gate(random, false, 1, s.hidden),
        w_up(random, s.fp8, 2 * s.width, s.hidden, s.experts),
        w_down(random, s.fp8, s.hidden, s.width, s.experts),
        w_shared_up(random, s.fp8, 2 * s.width, s.hidden),
        w_shared_down(random, s.fp8, s.hidden, s.width) {}

  Memory memory(Random* random, int64_t rows, int64_t slot_count) const {
    Memory m = {random->bfloat16s(rows * s.hidden), std::vector<std::byte>(static_cast<size_t>(slot * slot_count))};
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
  Matrix router_matrix() const {
    return {router.data(), DType::kBFloat16, MatrixLayout::kRowMajor, s.experts, s.hidden, nullptr};
  }

  const LayerShape s;
  const GdnShape gdn;
  const int64_t values, state_bytes, slot;
  const std::vector<float> norm, conv, a_log, dt_bias, head_norm;
  const std::vector<BFloat16> router;
  Matrix w_qkv() const { return rows_of_matrix(w_qkvz.matrix(), 0, gdn.channels()); }
  Matrix w_z() const { return rows_of_matrix(w_qkvz.matrix(), gdn.channels(), values); }
  Matrix w_b() const { return rows_of_matrix(w_ba.matrix(), 0, s.value_heads); }
  Matrix w_a() const { return rows_of_matrix(w_ba.matrix(), s.value_heads, s.value_heads); }
  const Weights w_qkvz, w_ba, w_out, w_gate, w_up, w_down, w_shared_up, w_shared_down;
};

// ---- the references ----

template <typename T>
Rows rows_of(std::vector<T>& values, int64_t stride) {
  return {values.data(), std::is_same_v<T, float> ? DType::kFloat32 : DType::kBFloat16, stride};
}

void project(const Rows& x, int64_t rows, const Matrix& weight, const Rows& y, const float* norm = nullptr,
             bool accumulate = false) {
  std::vector<BFloat16> workspace(static_cast<size_t>(rows * weight.k));
  reference::linear({rows, x, weight, y, accumulate, norm, 1e-6f, workspace.data()});
}

void mix(const Layer& layer, const SequenceBatch& batch, const GdnState& state, Memory* memory) {
  const int64_t rows = batch.tokens;
  const auto sized = [&](int64_t columns) { return std::vector<BFloat16>(static_cast<size_t>(rows * columns)); };
  std::vector<BFloat16> qkv = sized(layer.gdn.channels()), z = sized(layer.values), mixed = sized(layer.values);
  std::vector<BFloat16> b = sized(kGateStride), a = sized(kGateStride);
  const Rows x = rows_of(memory->x, layer.s.hidden);
  const float* const norm = layer.norm.data();
  project(x, rows, layer.w_qkv(), rows_of(qkv, layer.gdn.channels()), norm);
  project(x, rows, layer.w_z(), rows_of(z, layer.values), norm);
  project(x, rows, layer.w_b(), rows_of(b, kGateStride), norm);
  project(x, rows, layer.w_a(), rows_of(a, kGateStride), norm);
  const int64_t bytes = gdn_mixer_workspace_bytes(layer.gdn, rows);
  std::vector<std::byte> workspace(static_cast<size_t>(bytes));
  reference::gdn_mixer({layer.gdn, batch, state, rows_of(qkv, layer.gdn.channels()), rows_of(z, layer.values),
                        rows_of(b, kGateStride), rows_of(a, kGateStride), layer.conv.data(), layer.a_log.data(),
                        layer.dt_bias.data(), layer.head_norm.data(), 1e-6f, rows_of(mixed, layer.values),
                        workspace.data()});
  project(rows_of(mixed, layer.values), rows, layer.w_out.matrix(), x, nullptr, true);
}

// y += weight * down(silu(gate x) * up x)
void add_expert(const Layer& layer, const Rows& x, const Matrix& gate_up, const Matrix& down, float weight,
                std::vector<float>* y) {
  std::vector<float> product(static_cast<size_t>(2 * layer.s.width)), part(y->size());
  std::vector<BFloat16> h(static_cast<size_t>(layer.s.width));
  project(x, 1, gate_up, rows_of(product, 2 * layer.s.width));
  reference::swiglu({1, layer.s.width, rows_of(product, 2 * layer.s.width), rows_of(h, layer.s.width)});
  project(rows_of(h, layer.s.width), 1, down, rows_of(part, layer.s.hidden));
  for (size_t i = 0; i < part.size(); ++i) (*y)[i] += weight * part[i];
}

// Returns the size of the greatest logit.
float feed_forward(const Layer& layer, BFloat16* x) {
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
  return std::ranges::max(logits, {}, [](float logit) { return std::fabs(logit); });
}
// Of rows one after the other: false when the router's choice is in doubt.
bool feed_forward(const Layer& layer, int64_t rows, Memory* memory) {
  bool certain = true;
  for (int64_t t = 0; t < rows; ++t) {
    certain &= std::fabs(feed_forward(layer, memory->x.data() + t * layer.s.hidden)) > kLeastLogit;
  }
  return certain;
}

bool run_reference(const Layer& layer, const Sequences& sequences, Memory* memory) {
  bool certain = true;
  const SequenceBatch batch = sequences.view();
  for (int64_t first = 0; first < layer.slots_of(*memory); first += sequences.slots()) {
    mix(layer, batch, layer.state(memory, first), memory);
    certain &= feed_forward(layer, batch.tokens, memory);
  }
  return certain;
}

// ---- the kernel ----

// Rows that the kernel does not write: it needs their addresses alone.
Rows unwritten(const char* name, DType dtype = DType::kBFloat16) {
  constexpr int64_t kColumns = 16384;
  static std::map<std::string, std::vector<float>> places;
  places[name].resize(kColumns);
  return {places[name].data(), dtype, kColumns};
}
Rows columns_from(const Rows& rows, int64_t first) {
  return {static_cast<BFloat16*>(rows.data) + first, rows.dtype, rows.stride};
}

// Which rows of x the ops are about: [first, first + count).
struct Range {
  int64_t first, count;
};
Rows x_of(const Layer& layer, const Range& range, Memory* memory) {
  return {memory->x.data() + range.first * layer.s.hidden, DType::kBFloat16, layer.s.hidden};
}

using Ops = std::vector<cuda::DecodePhase>;

void add_mixer(const Layer& layer, const SequenceBatch& batch, const Range& range, const GdnState& state,
               Memory* memory, Ops* ops) {
  const Rows x = x_of(layer, range, memory);
  cuda::DecodeLinear in = {.rows = range.count, .x = x, .norm_weight = layer.norm.data()};
  GdnMixer mixer = {.shape = layer.gdn, .batch = batch, .state = state};
  if (layer.s.merged) {
    in.segment_count = 2;
    in.segments[0] = {layer.w_qkvz.matrix(), unwritten("qkvz")};
    in.segments[1] = {layer.w_ba.matrix(), unwritten("ba")};
    mixer.qkv = in.segments[0].y;
    mixer.z = columns_from(mixer.qkv, layer.gdn.channels());
    mixer.b = in.segments[1].y;
    mixer.a = columns_from(mixer.b, layer.s.value_heads);
  } else {
    in.segment_count = 4;
    in.segments[0] = {layer.w_qkv(), mixer.qkv = unwritten("qkv")};
    in.segments[1] = {layer.w_z(), mixer.z = unwritten("z")};
    in.segments[2] = {layer.w_b(), mixer.b = unwritten("b")};
    in.segments[3] = {layer.w_a(), mixer.a = unwritten("a")};
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

void add_experts(const Layer& layer, const Range& range, Memory* memory, Ops* ops) {
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
Ops layer_ops(const Layer& layer, const SequenceBatch& batch, const Range& range, const Sequences& all,
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
void run_experts(int experts, int columns, const cuda::LayerProgram& program) {
  experts <= 256 ? run_columns<kFp8, 8>(columns, program) : run_columns<kFp8, 16>(columns, program);
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
    const cuda::LayerProgram& program = writer.finish();
    const int columns = cuda::layer_columns(program.rows);
    const emulation::Grid grid = {blocks_, cuda::layer_threads(columns), writer.shared_bytes(), seed};
    const std::string failure = emulation::run(grid, [&] {
      writer.fp8() ? run_experts<true>(writer.experts(), columns, program)
                   : run_experts<false>(writer.experts(), columns, program);
    });
    ASSERT_EQ(failure, "");
    writer.clear();
  }
  int blocks_;
  std::vector<Line> workspace_;
};

// ---- comparison ----

double relative_error(const std::vector<float>& got, const std::vector<float>& expected) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(static_cast<double>(got[i]) - expected[i], 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(difference / size);
}
void expect_close(const char* what, const std::vector<float>& got, const std::vector<float>& expected,
                  double tolerance) {
  const double error = relative_error(got, expected);
  EXPECT_TRUE(error <= tolerance) << what << " differs by " << error;
}

std::vector<float> floats_of(std::span<const BFloat16> values) {
  std::vector<float> made;
  for (const BFloat16 value : values) made.push_back(to_float(value));
  return made;
}

struct Parts {
  std::vector<float> states, tails;
};
Parts parts_of(const Layer& layer, const Memory& memory) {
  Parts parts;
  for (size_t at = 0; at < memory.slots.size(); at += static_cast<size_t>(layer.slot)) {
    const auto* const state = reinterpret_cast<const float*>(memory.slots.data() + at);
    parts.states.insert(parts.states.end(), state, state + layer.values * 128);
    const auto* const tail = reinterpret_cast<const BFloat16*>(memory.slots.data() + at + layer.state_bytes);
    for (int64_t i = 0; i < 3 * layer.gdn.channels(); ++i) parts.tails.push_back(to_float(tail[i]));
  }
  return parts;
}
// factor: on the tolerances of one layer.
void expect_close(const Layer& layer, const Memory& got, const Memory& expected, double factor) {
  const Parts a = parts_of(layer, got), b = parts_of(layer, expected);
  expect_close("state", a.states, b.states, kStateTolerance * factor);
  expect_close("tail", a.tails, b.tails, kTailTolerance * factor);
  expect_close("x", floats_of(got.x), floats_of(expected.x), kLayerTolerance * factor);
}

// Every row in a launch of its own, one token after the other.
void run_alone(const Layer& layer, const Sequences& sequences, Multiprocessors* gpu, Memory* memory) {
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
  int layers = 1;
};

void check_layer(Random* random, const Case& c) {
  SCOPED_TRACE(testing::Message() << "hidden " << c.shape.hidden << " blocks " << c.blocks << " fp8 " << c.shape.fp8
                                  << " sequences " << c.lengths.size() << " first length " << c.lengths[0] << " layers "
                                  << c.layers);
  const Layer layer(random, c.shape);
  const Sequences sequences(c.lengths, c.contexts);
  const Range rows = {0, sequences.token_begin.back()};
  Multiprocessors gpu(c.blocks);
  Memory start, expected;
  do {
    start = expected = layer.memory(random, rows.count, sequences.slots() * c.layers);
  } while (!run_reference(layer, sequences, &expected));

  Memory got = start;
  gpu.run(layer_ops(layer, sequences.view(), rows, sequences, &got), 1);
  expect_close(layer, got, expected, c.layers);
  for (int i = 0; i < 2; ++i) {
    const auto seed = static_cast<uint64_t>(random->below(1 << 30));
    Memory again = start;
    gpu.run(layer_ops(layer, sequences.view(), rows, sequences, &again), seed);
    EXPECT_TRUE(again == got) << "another interleaving gives other bits: " << seed;
  }
  if (rows.count == 1) return;
  Memory alone = start;
  run_alone(layer, sequences, &gpu, &alone);
  EXPECT_TRUE(alone == got) << "rows depend on each other";
}

uint32_t fresh_seed() {
  const uint32_t seed = std::random_device()();
  printf("seed %u\n", seed);
  return seed;
}

TEST(DecodeLayers, ReferenceAndRowInvariance) {
  Random random(fresh_seed());
  for (const bool fp8 : {true, false}) {
    check_layer(&random, {{512, 2, 8, 12, 4, 128, fp8}, 4, {1}, {5}});
    check_layer(&random, {{256, 2, 8, 12, 4, 128, fp8}, 5, {3}, {0}});
    check_layer(&random, {{256, 2, 8, 40, 10, 256, fp8}, 11, {1, 2, 1, 4}, {3, 0, 1, 2}});
    check_layer(&random, {{256, 2, 8, 12, 8, 128, fp8}, 8, {1, 1, 1, 1, 1, 1, 1, 1}, {1, 0, 1, 1, 1, 1, 0, 1}});
  }
}

TEST(DecodeLayers, EqualLogits) {
  Random random(fresh_seed());
  for (const int64_t levels : {1, 3}) {
    for (const int32_t rows : {1, 2}) {
      check_layer(&random, {{256, 2, 8, 100, 10, 128, true, true, true, levels}, 26, {rows}, {1}});
    }
  }
}

TEST(DecodeLayers, ManyExperts) {
  Random random(fresh_seed());
  check_layer(&random, {{256, 2, 8, 260, 10, 128, true}, 66, {1}, {1}});
}

TEST(DecodeLayers, WithoutASharedExpert) {
  Random random(fresh_seed());
  for (const bool normalize : {true, false}) {
    for (const int32_t rows : {1, 2}) {
      check_layer(&random, {{256, 4, 8, 40, 4, 128, true, false, normalize}, 20, {rows}, {1}});
    }
  }
}

TEST(DecodeLayers, MergedProjections) {
  Random random(fresh_seed());
  for (const bool fp8 : {true, false}) {
    LayerShape shape = {256, 2, 8, 12, 4, 128, fp8};
    shape.merged = true;
    check_layer(&random, {shape, 5, {1}, {4}});
    check_layer(&random, {shape, 6, {2, 1}, {0, 3}});
  }
}

// Rows of which every warp has two chunks, and two tiles of the residual stream for some blocks.
TEST(DecodeLayers, WideRows) {
  Random random(fresh_seed());
  check_layer(&random, {{4096, 2, 8, 40, 10, 128, true}, 40, {1}, {5}});
  check_layer(&random, {{4096, 2, 8, 12, 4, 128, true}, 40, {2}, {5}});
}

// More phases than one launch takes; more blocks than some phases have tiles.
TEST(DecodeLayers, SeveralLayers) {
  Random random(fresh_seed());
  check_layer(&random, {{256, 2, 8, 12, 4, 128, true}, 24, {1}, {5}, 5});
  check_layer(&random, {{256, 2, 8, 12, 4, 128, false}, 7, {2, 1}, {0, 3}, 5});
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
  project(x_of(layer, range, &expected), rows, layer.w_qkv(), rows_of(wide_expected, channels), layer.norm.data());
  project(rows_of(inner, layer.values), rows, layer.w_out.matrix(), x_of(layer, range, &expected), nullptr, true);
  certain &= feed_forward(layer, rows, &expected);
  if (!certain) return check_around_attention(random, shape, rows, blocks);

  Memory got = start;
  Multiprocessors gpu(blocks);
  Ops before, behind;
  add_experts(layer, range, &got, &before);
  cuda::DecodeLinear in = {.rows = rows, .x = x_of(layer, range, &got), .norm_weight = layer.norm.data()};
  in.segment_count = 1;
  in.segments[0] = {layer.w_qkv(), rows_of(wide, channels)};
  before.push_back(in);
  cuda::DecodeLinear out = {.rows = rows, .x = rows_of(inner, layer.values), .segment_count = 1};
  out.segments[0] = {layer.w_out.matrix(), x_of(layer, range, &got), true};
  behind.push_back(out);
  add_experts(layer, range, &got, &behind);
  gpu.run(before, 1);
  gpu.run(behind, 2);
  expect_close(layer, got, expected, 1.5);
  expect_close("projection", floats_of(wide), floats_of(wide_expected), kLayerTolerance);
}

TEST(DecodeLayers, AroundAttention) {
  Random random(fresh_seed());
  for (const bool fp8 : {true, false}) {
    check_around_attention(&random, {512, 2, 8, 12, 4, 128, fp8}, 1, 6);
    check_around_attention(&random, {256, 2, 8, 12, 4, 128, fp8}, 3, 9);
  }
}

}  // namespace
}  // namespace tokenspeed::kernels

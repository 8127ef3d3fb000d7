#include "model/dummy_weights.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include "base/random.h"
#include "model/architecture.h"
#include "model/fp8_blocks.h"
#include "model/tensor_names.h"

namespace tokenspeed::model {
namespace {

using compile::WeightForm;

// Standard deviation of trained weights of this family, and of their usual initialisation; the numbers are uniform.
constexpr float kMatrixDeviation = 0.02f;
constexpr float kSqrt3 = 1.7320508f;
constexpr float kMatrixBound = kMatrixDeviation * kSqrt3;
constexpr float kNormBound = 0.1f;     // around 0 for zero-centred norms, around 1 for the gated norm
constexpr float kConvBound = 0.5f;     // 1 / sqrt(taps)
constexpr float kDecayRateLow = 1.0f;  // exp(A_log)
constexpr float kDecayRateHigh = 16.0f;
constexpr float kStepLow = 0.001f;  // softplus(dt_bias), spread evenly on a logarithmic scale
constexpr float kStepHigh = 0.1f;
constexpr float kFp8Bound = 448.0f;
constexpr float kScaleSpread = 0.25f;

constexpr int64_t kAlignment = 64;                  // elements between places in a pool
constexpr int64_t kSlackAtMost = int64_t{1} << 24;  // elements beyond the largest matrix
constexpr int64_t kSlackAtLeast = 4096;
constexpr int64_t kChunk = int64_t{1} << 16;  // elements per task
// Beyond so many elements a pool repeats itself: copying is several times faster than drawing. Being prime, it is no
// multiple of a row, so no two rows of a vocabulary are alike (they would tie in every choice of a token).
constexpr int64_t kPeriod = (int64_t{1} << 22) - 3;
constexpr uint64_t kBFloat16Stream = 1;
constexpr uint64_t kFp8Stream = 2;
constexpr uint64_t kScaleStream = 3;

int64_t scale_count(const TensorSpec& spec) { return fp8_blocks(spec.rows) * fp8_blocks(spec.columns); }

// FNV-1a: spreads names over streams and places.
uint64_t hash(std::string_view text) {
  uint64_t value = 0xcbf29ce484222325u;
  for (const char c : text) value = (value ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
  return value;
}

// Element(i) of a stream is a function of 16 or 8 bits of the draw that covers it.
struct DrawBFloat16 {
  using Bits = uint16_t;
  BFloat16 operator()(Bits bits) const {
    return to_bfloat16((static_cast<float>(bits) - 32767.5f) * (kMatrixBound / 32768.0f));
  }
};

struct DrawFp8 {
  using Bits = uint8_t;
  DrawFp8() {
    for (int i = 0; i < 256; ++i)
      codes[i] = float_to_float8_e4m3((static_cast<float>(i) - 127.5f) * (kFp8Bound / 127.5f));
  }
  uint8_t operator()(Bits bits) const { return codes[bits]; }
  std::array<uint8_t, 256> codes;
};

struct DrawScale {
  using Bits = uint32_t;
  float operator()(Bits bits) const {
    return kMatrixBound / kFp8Bound * (1.0f + kScaleSpread * (2.0f * uniform_float(bits) - 1.0f));
  }
};

// Elements [begin, end) of a stream; begin is a multiple of the elements per draw.
template <typename Element, typename Draw>
void fill(uint64_t seed, uint64_t stream, const Draw& draw, int64_t begin, int64_t end, Element* out) {
  using Bits = typename Draw::Bits;
  constexpr int64_t kPerDraw = sizeof(std::array<uint32_t, 4>) / sizeof(Bits);
  for (int64_t i = begin; i < end; i += kPerDraw) {
    const auto random = philox(seed, stream, static_cast<uint64_t>(i / kPerDraw));
    Bits bits[kPerDraw];
    std::memcpy(bits, random.data(), sizeof(bits));
    const int64_t count = std::min(kPerDraw, end - i);
    for (int64_t j = 0; j < count; ++j) out[i + j] = draw(bits[j]);
  }
}

template <typename Element, typename Draw>
Result<std::unique_ptr<Element[]>> make_pool(uint64_t seed, uint64_t stream, int64_t size, ThreadPool& threads) {
  // Not zeroed first: the fill is the first touch, in parallel.
  std::unique_ptr<Element[]> elements(new (std::nothrow) Element[static_cast<size_t>(size)]);
  if (!elements) {
    return resource_exhausted("there is no memory for " + std::to_string(size * sizeof(Element)) +
                              " bytes of random weights");
  }
  const Draw draw;
  const int64_t drawn = std::min(size, kPeriod);
  threads.parallel_for((drawn + kChunk - 1) / kChunk, [&](int64_t chunk) {
    fill(seed, stream, draw, chunk * kChunk, std::min(drawn, (chunk + 1) * kChunk), elements.get());
  });
  threads.parallel_for((size - drawn + kPeriod - 1) / kPeriod, [&](int64_t i) {
    const int64_t begin = (i + 1) * kPeriod;
    std::copy_n(elements.get(), std::min(kPeriod, size - begin), elements.get() + begin);
  });
  return elements;
}

// The `index`-th number of a vector in [0, 1).
float uniform_at(uint64_t seed, uint64_t stream, int64_t index) {
  return uniform_float(philox(seed, stream, static_cast<uint64_t>(index))[0]);
}

float symmetric(float uniform, float bound) { return bound * (2.0f * uniform - 1.0f); }

float step_bias(float uniform) {
  const float step = kStepLow * std::pow(kStepHigh / kStepLow, uniform);
  return std::log(std::expm1(step));  // the inverse of softplus
}

}  // namespace

void DummyWeights::Demand::add(int64_t elements, int64_t count) {
  largest = std::max(largest, elements);
  total += elements * count;
}

int64_t DummyWeights::Demand::pool_size() const {
  if (largest == 0) return 0;
  return (largest + std::clamp(total, kSlackAtLeast, kSlackAtMost) + kAlignment - 1) / kAlignment * kAlignment;
}

Result<std::unique_ptr<DummyWeights>> DummyWeights::create(const compile::ModelConfig& config, uint64_t seed) {
  TS_ASSIGN_OR_RETURN(const compile::ModelGraph graph, build_graph(config));
  std::unique_ptr<DummyWeights> weights(new DummyWeights(config.name, seed));
  for (const TensorSpec& spec : list_tensors(graph)) {
    weights->tensors_[spec.name] = spec;
    if (spec.form == WeightForm::kVector) weights->fill_vector(spec);
  }
  TS_RETURN_IF_ERROR(weights->fill_pools(config.fp8_blocks));
  return weights;
}

Status DummyWeights::fill_pools(bool fp8_blocks) {
  fp8_blocks_ = fp8_blocks;
  Demand bfloat16;
  Demand fp8;
  Demand scales;
  for (const auto& [name, spec] : tensors_) {
    if (spec.form == WeightForm::kVector) continue;
    if (fp8_blocks && spec.quantizable) {
      fp8.add(spec.elements(), spec.count);
      scales.add(scale_count(spec), spec.count);
    } else {
      bfloat16.add(spec.elements(), spec.count);
    }
  }
  ThreadPool threads;
  const auto fill_pool = [&]<typename Element, typename Draw>(Pool<Element>& pool, const Demand& demand,
                                                              uint64_t stream, std::type_identity<Draw>) -> Status {
    pool.size = demand.pool_size();
    TS_ASSIGN_OR_RETURN(pool.elements, (make_pool<Element, Draw>(seed_, stream, pool.size, threads)));
    return {};
  };
  TS_RETURN_IF_ERROR(fill_pool(bfloat16_pool_, bfloat16, kBFloat16Stream, std::type_identity<DrawBFloat16>()));
  TS_RETURN_IF_ERROR(fill_pool(fp8_pool_, fp8, kFp8Stream, std::type_identity<DrawFp8>()));
  return fill_pool(scale_pool_, scales, kScaleStream, std::type_identity<DrawScale>());
}

// The dtypes are those of the official releases.
void DummyWeights::fill_vector(const TensorSpec& spec) {
  const std::string_view name = spec.name;
  const auto generate = [&](auto& vector, auto convert, auto number) {
    vector.resize(static_cast<size_t>(spec.elements()));
    const uint64_t stream = hash(name);
    for (int64_t i = 0; i < spec.elements(); ++i) vector[i] = convert(number(uniform_at(seed_, stream, i)));
  };
  const auto as_float = [](float value) { return value; };
  if (name.ends_with("A_log")) {
    generate(float_vectors_[spec.name], as_float,
             [](float u) { return std::log(kDecayRateLow + u * (kDecayRateHigh - kDecayRateLow)); });
  } else if (name.ends_with("linear_attn.norm.weight")) {
    generate(float_vectors_[spec.name], as_float, [](float u) { return 1.0f + symmetric(u, kNormBound); });
  } else if (name.ends_with("dt_bias")) {
    generate(bfloat16_vectors_[spec.name], to_bfloat16, step_bias);
  } else {
    const float bound = name.ends_with("conv1d.weight") ? kConvBound : kNormBound;
    generate(bfloat16_vectors_[spec.name], to_bfloat16, [bound](float u) { return symmetric(u, bound); });
  }
}

const TensorSpec* DummyWeights::find(const std::string& name) const {
  if (const auto found = tensors_.find(name); found != tensors_.end()) {
    return found->second.form == WeightForm::kExperts ? nullptr : &found->second;
  }
  const auto expert = parse_expert_tensor(name);
  if (!expert) return nullptr;
  const auto found = tensors_.find(std::string(expert->prefix) + "*." + std::string(expert->projection) + ".weight");
  return found != tensors_.end() && expert->expert < found->second.count ? &found->second : nullptr;
}

bool DummyWeights::has(const std::string& name) const { return find(name) != nullptr; }

template <typename Element>
const Element* DummyWeights::place(const Pool<Element>& pool, const std::string& name, int64_t elements) const {
  const int64_t places = (pool.size - elements) / kAlignment + 1;
  const uint64_t draw = philox(seed_, hash(name), 0)[0];
  return pool.elements.get() + static_cast<int64_t>(draw % static_cast<uint64_t>(places)) * kAlignment;
}

Result<compile::WeightView> DummyWeights::view(const std::string& name) const {
  const TensorSpec* spec = find(name);
  if (!spec) return not_found("tensor '" + name + "' is none of the model '" + model_ + "' (random weights)");
  compile::WeightView view;
  view.shape = {spec->rows};
  if (spec->form != WeightForm::kVector) {
    view.shape.push_back(spec->columns);
    if (fp8_blocks_ && spec->quantizable) {
      view.dtype = DType::kFloat8E4M3;
      view.data = reinterpret_cast<const std::byte*>(place(fp8_pool_, name, spec->elements()));
      view.scale = place(scale_pool_, name, scale_count(*spec));
    } else {
      view.dtype = DType::kBFloat16;
      view.data = reinterpret_cast<const std::byte*>(place(bfloat16_pool_, name, spec->elements()));
    }
    return view;
  }
  if (spec->columns > 1) view.shape = {spec->rows, 1, spec->columns};  // convolution taps, as in files
  if (const auto found = float_vectors_.find(name); found != float_vectors_.end()) {
    view.dtype = DType::kFloat32;
    view.data = reinterpret_cast<const std::byte*>(found->second.data());
  } else {
    view.dtype = DType::kBFloat16;
    view.data = reinterpret_cast<const std::byte*>(bfloat16_vectors_.at(name).data());
  }
  return view;
}

}  // namespace tokenspeed::model

// The runner against the stored answers of the reference implementation: random checkpoints and the demo model.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "driver.h"
#include "test_model.h"

namespace tokenspeed::runtime {
namespace {

// The reference computes in float32 too; the difference is the order of its sums.
constexpr float kFloat32LogitTolerance = 2e-4f;
constexpr float kFloat32StateTolerance = 1e-4f;
// Activations rounded to bfloat16 (8 bits) after each operation, against float32 answers: |difference| / |row| of the
// median row. Random experts are far apart, so a row in which rounding turned a close choice of the router is off as a
// whole.
constexpr float kBFloat16DenseTolerance = 0.03f;
constexpr float kBFloat16MoeTolerance = 0.13f;
// The demo model's logits reach some 30, several times those of the random models.
constexpr float kDemoFloat32LogitTolerance = 5e-4f;
constexpr float kDemoBFloat16Tolerance = 0.01f;  // |difference| / |row| of the median row
constexpr float kDemoBFloat16Lead = 2.0f;

constexpr int kRandomLengths[] = {1, 2, 5, 63, 64, 65, 130, 300};
constexpr int kReferenceLengths[] = {1, 2, 5, 65};  // the plain kernels take their time

int32_t argmax(std::span<const float> row) {
  return static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
}

// The greatest logit less the second greatest.
float lead(std::span<const float> row) {
  std::vector<float> sorted(row.begin(), row.end());
  std::nth_element(sorted.begin(), sorted.begin() + 1, sorted.end(), std::greater<>());
  return *std::max_element(sorted.begin(), sorted.begin() + 1) - sorted[1];
}

struct Kernels {
  const char* name;
  bool reference;
};

class RandomGolden : public testing::TestWithParam<std::tuple<const char*, Kernels>> {
 protected:
  std::string directory() const { return random_directory(std::get<0>(GetParam())); }
  bool reference() const { return std::get<1>(GetParam()).reference; }
  std::span<const int> lengths() const {
    return reference() ? std::span<const int>(kReferenceLengths) : std::span<const int>(kRandomLengths);
  }
};

TEST_P(RandomGolden, LogitsAtEveryStoredPosition) {
  const TestModel& model = test_model(directory());
  const Golden golden(directory() + "/golden.safetensors");
  CpuRunnerOptions options = test_options();
  options.reference_kernels = reference();
  const auto runner = make_runner(model, options);
  const int64_t vocabulary = runner->capacity().vocabulary_size;
  for (const int length : lengths()) {
    SCOPED_TRACE(length);
    const std::string suffix = "." + std::to_string(length);
    const Output output = run_one(runner.get(), {golden.ints("ids" + suffix)});
    if (golden.has("logits" + suffix)) {
      EXPECT_LE(greatest_difference(output.logits, golden.floats("logits" + suffix)), kFloat32LogitTolerance);
    }
    const auto last = row_of(output, length - 1, vocabulary);
    EXPECT_LE(greatest_difference(last, golden.floats("last_logits" + suffix)), kFloat32LogitTolerance);
    const std::vector<int32_t> winners = golden.ints("argmax" + suffix);
    for (int row = 0; row < length; ++row) EXPECT_EQ(argmax(row_of(output, row, vocabulary)), winners[row]) << row;
  }
}

TEST_P(RandomGolden, GreedyTokensAndTheirLogits) {
  const TestModel& model = test_model(directory());
  const Golden golden(directory() + "/golden.safetensors");
  CpuRunnerOptions options = test_options();
  options.reference_kernels = reference();
  const auto runner = make_runner(model, options);
  const int64_t vocabulary = runner->capacity().vocabulary_size;
  const std::vector<int32_t> prompt = golden.ints("decode.prompt");
  const std::vector<int32_t> tokens = golden.ints("decode.tokens");
  const int32_t count = static_cast<int32_t>(tokens.size());
  const Output output = run_one(runner.get(), {prompt, count});
  EXPECT_EQ(output.tokens, tokens);
  // Stored: the rows after the prompt's last token and after each token but, here, the last.
  const std::vector<float> stored = golden.floats("decode.logits");
  const std::span<const float> computed =
      std::span<const float>(output.logits).subspan((prompt.size() - 1) * vocabulary);
  ASSERT_EQ(computed.size(), static_cast<size_t>(count * vocabulary));
  EXPECT_LE(greatest_difference(computed, std::span<const float>(stored).first(computed.size())),
            kFloat32LogitTolerance);
}

// The stored states are those after the decode prompt: [head][key_dim][value_dim], and the last four inputs of the
// convolution [channel][4].
TEST_P(RandomGolden, StatesAfterThePrompt) {
  const TestModel& model = test_model(directory());
  const Golden golden(directory() + "/golden.safetensors");
  CpuRunnerOptions options = test_options();
  options.reference_kernels = reference();
  const auto runner = make_runner(model, options);
  Driver driver(runner.get(), {{golden.ints("decode.prompt")}});
  driver.run_alone(13);
  const auto& layers = runner->program().state.layers;
  int32_t state_layer = 0;
  for (size_t layer = 0; layer < model.config.layers.size(); ++layer) {
    if (model.config.layers[layer] != compile::LayerKind::kLinearAttention) continue;
    SCOPED_TRACE(layer);
    const compile::StateShape& shape = layers[state_layer].shape;
    const kernels::GdnState& state = runner->caches().state(state_layer);
    const int64_t slot = driver.slot(0) * state.slot_stride;
    const float* recurrent = reinterpret_cast<const float*>(state.recurrent + slot);
    const float* conv = reinterpret_cast<const float*>(state.conv + slot);
    std::vector<float> turned;
    for (int64_t head = 0; head < shape.value_heads; ++head) {
      for (int64_t key = 0; key < shape.key_dim; ++key) {
        for (int64_t value = 0; value < shape.value_dim; ++value) {
          turned.push_back(recurrent[(head * shape.value_dim + value) * shape.key_dim + key]);
        }
      }
    }
    const std::string suffix = "." + std::to_string(layer);
    EXPECT_LE(greatest_difference(turned, golden.floats("state_after_prompt" + suffix)), kFloat32StateTolerance);
    const std::vector<float> inputs = golden.floats("conv_after_prompt" + suffix);
    const int64_t stored_rows = shape.conv_rows + 1;
    ASSERT_EQ(inputs.size(), static_cast<size_t>(shape.channels * stored_rows));
    float greatest = 0;
    for (int64_t channel = 0; channel < shape.channels; ++channel) {
      for (int64_t row = 0; row < shape.conv_rows; ++row) {
        const float expected = inputs[channel * stored_rows + row + 1];
        greatest = std::max(greatest, std::abs(conv[row * shape.channels + channel] - expected));
      }
    }
    EXPECT_LE(greatest, kFloat32StateTolerance);
    ++state_layer;
  }
  EXPECT_EQ(static_cast<size_t>(state_layer), layers.size());
}

TEST_P(RandomGolden, BFloat16Activations) {
  const TestModel& model = test_model(directory());
  const Golden golden(directory() + "/golden.safetensors");
  CpuRunnerOptions options = bfloat16_options();
  options.reference_kernels = reference();
  const auto runner = make_runner(model, options);
  const int64_t vocabulary = runner->capacity().vocabulary_size;
  std::vector<float> errors;
  for (const int length : lengths()) {
    const std::string suffix = "." + std::to_string(length);
    if (!golden.has("logits" + suffix)) continue;
    const Output output = run_one(runner.get(), {golden.ints("ids" + suffix)});
    const std::vector<float> stored = golden.floats("logits" + suffix);
    for (int row = 0; row < length; ++row) {
      errors.push_back(relative_error(row_of(output, row, vocabulary),
                                      std::span<const float>(stored).subspan(row * vocabulary, vocabulary)));
    }
  }
  std::nth_element(errors.begin(), errors.begin() + errors.size() / 2, errors.end());
  EXPECT_LE(errors[errors.size() / 2], model.config.is_moe() ? kBFloat16MoeTolerance : kBFloat16DenseTolerance);
}

INSTANTIATE_TEST_SUITE_P(Models, RandomGolden,
                         testing::Combine(testing::Values("dense-a", "moe-a", "moe-b"),
                                          testing::Values(Kernels{"fast", false}, Kernels{"reference", true})),
                         [](const auto& info) {
                           std::string name = std::get<0>(info.param);
                           name[name.find('-')] = '_';
                           return name + "_" + std::get<1>(info.param).name;
                         });

constexpr int kDemoPrompts = 8;

Golden demo_golden() { return Golden(kRoot + "/tests/goldens/demo-model.safetensors"); }

// Compares the stored positions of prompt `index`; its greatest difference.
float demo_difference(const Golden& golden, const std::string& prefix, const Output& output, int64_t vocabulary) {
  const std::vector<int32_t> positions = golden.ints(prefix + "positions");
  const std::vector<float> stored = golden.floats(prefix + "logits_at");
  float greatest = 0;
  for (size_t i = 0; i < positions.size(); ++i) {
    const auto expected = std::span<const float>(stored).subspan(i * vocabulary, vocabulary);
    greatest = std::max(greatest, greatest_difference(row_of(output, positions[i], vocabulary), expected));
  }
  return greatest;
}

TEST(DemoGolden, LogitsAndGreedyTokens) {
  const Golden golden = demo_golden();
  const auto runner = make_runner(test_model(demo_directory()), test_options());
  const int64_t vocabulary = runner->capacity().vocabulary_size;
  for (int index = 0; index < kDemoPrompts; ++index) {
    SCOPED_TRACE(index);
    const std::string prefix = "p" + std::to_string(index) + ".";
    const std::vector<int32_t> greedy = golden.ints(prefix + "greedy");
    const std::vector<int32_t> ids = golden.ints(prefix + "ids");
    const Output output = run_one(runner.get(), {ids, static_cast<int32_t>(greedy.size())});
    EXPECT_LE(demo_difference(golden, prefix, output, vocabulary), kDemoFloat32LogitTolerance);
    EXPECT_LE(greatest_difference(row_of(output, static_cast<int64_t>(ids.size()) - 1, vocabulary),
                                  golden.floats(prefix + "logits_last")),
              kDemoFloat32LogitTolerance);
    EXPECT_EQ(output.tokens, greedy);
  }
}

// Relative errors as for the random models. A trained model is surer of its words: the likeliest token of a stored row
// is the same wherever its lead over the second is more than such an error can turn.
TEST(DemoGolden, BFloat16Activations) {
  const Golden golden = demo_golden();
  const auto runner = make_runner(test_model(demo_directory()), bfloat16_options());
  const int64_t vocabulary = runner->capacity().vocabulary_size;
  std::vector<float> errors;
  int compared = 0;
  for (int index = 0; index < kDemoPrompts; ++index) {
    SCOPED_TRACE(index);
    const std::string prefix = "p" + std::to_string(index) + ".";
    const Output output = run_one(runner.get(), {golden.ints(prefix + "ids")});
    const std::vector<int32_t> positions = golden.ints(prefix + "positions");
    const std::vector<float> stored = golden.floats(prefix + "logits_at");
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto expected = std::span<const float>(stored).subspan(i * vocabulary, vocabulary);
      const auto computed = row_of(output, positions[i], vocabulary);
      errors.push_back(relative_error(computed, expected));
      if (lead(expected) < kDemoBFloat16Lead) continue;
      EXPECT_EQ(argmax(computed), argmax(expected)) << "position " << positions[i];
      ++compared;
    }
  }
  EXPECT_GT(compared, static_cast<int>(errors.size()) / 2);
  std::nth_element(errors.begin(), errors.begin() + errors.size() / 2, errors.end());
  EXPECT_LE(errors[errors.size() / 2], kDemoBFloat16Tolerance);
}

// The MTP layer over the whole prompt with the body's hidden rows, then four chained drafts.
TEST(DemoGolden, MultiTokenPrediction) {
  const Golden golden = demo_golden();
  CpuRunnerOptions options = test_options();
  options.max_step_tokens = 1024;
  const auto runner = make_runner(test_model(demo_directory()), options);
  const int64_t vocabulary = runner->capacity().vocabulary_size;
  for (int index = 0; index < kDemoPrompts; ++index) {
    SCOPED_TRACE(index);
    const std::string prefix = "p" + std::to_string(index) + ".";
    const std::vector<int32_t> ids = golden.ints(prefix + "ids");
    const std::vector<int32_t> expected_drafts = golden.ints(prefix + "mtp_drafts");
    const int32_t length = static_cast<int32_t>(ids.size());
    Driver driver(runner.get(), {{ids, static_cast<int32_t>(expected_drafts.size()) + 1}});
    const Share whole{0, length};
    driver.step({&whole, 1});
    std::vector<int32_t> tokens(ids.begin() + 1, ids.end());
    tokens.push_back(driver.outputs()[0].tokens[0]);
    std::vector<float> hidden = runner->last_hidden();
    std::vector<float> logits(vocabulary);
    std::vector<float> hidden_out(hidden.size());
    Status status = runner->run_mtp({tokens, 0, driver.pages(0), hidden, logits.data(), hidden_out.data()});
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_LE(greatest_difference(logits, golden.floats(prefix + "mtp_logits_last")), kDemoFloat32LogitTolerance);
    std::vector<int32_t> drafts = {argmax(logits)};
    const int64_t columns = runner->program().hidden_size;
    hidden.assign(hidden_out.end() - columns, hidden_out.end());
    while (drafts.size() < expected_drafts.size()) {
      const std::vector<int32_t> last = {drafts.back()};
      const int32_t context = length + static_cast<int32_t>(drafts.size()) - 1;
      hidden_out.resize(columns);
      status = runner->run_mtp({last, context, driver.pages(0), hidden, logits.data(), hidden_out.data()});
      ASSERT_TRUE(status.ok()) << status.message();
      hidden = hidden_out;
      drafts.push_back(argmax(logits));
    }
    EXPECT_EQ(drafts, expected_drafts);
  }
}

}  // namespace
}  // namespace tokenspeed::runtime

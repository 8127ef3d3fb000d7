// Models of the repository (random goldens, the demo model) ready to make Runners of, and their golden tensors.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/architecture.h"
#include "model/loader.h"
#include "model/safetensors.h"
#include "runtime/cpu_runner.h"

namespace tokenspeed::runtime {

inline const std::string kRoot = TOKENSPEED_SOURCE_DIR;
inline std::string random_directory(const std::string& name) { return kRoot + "/tests/goldens/random/" + name; }
inline std::string demo_directory() { return kRoot + "/models/demo"; }

// A Result's value, or a failed test and the process's end: nothing in a test can go on without its model.
template <typename T>
T must(Result<T> result) {
  if (!result.ok()) {
    ADD_FAILURE() << result.status().message();
    std::abort();
  }
  return std::move(result).value();
}

struct TestModel {
  compile::ModelConfig config;
  compile::ModelGraph graph;
  std::unique_ptr<compile::WeightSource> source;
};

// Loaded once per process and directory.
inline const TestModel& test_model(const std::string& directory) {
  static std::map<std::string, TestModel> models;
  const auto [entry, added] = models.try_emplace(directory);
  if (added) {
    model::LoadedModel loaded = must(model::load_model(directory, model::LoadFormat::kAuto));
    entry->second.graph = must(model::build_graph(loaded.config));
    entry->second.config = std::move(loaded.config);
    entry->second.source = std::move(loaded.weights);
  }
  return entry->second;
}

// Small limits, and float32 throughout.
inline CpuRunnerOptions test_options() {
  CpuRunnerOptions options;
  options.weights = options.activation = options.kv = DType::kFloat32;
  options.threads = 2;
  options.pin = false;
  options.max_step_tokens = 256;
  options.max_sequences = 8;
  options.page_size = 16;
  options.max_model_length = 1024;
  options.pages = 256;
  return options;
}
// bfloat16 activations, which need bfloat16 weights, and keys and values.
inline CpuRunnerOptions bfloat16_options() {
  CpuRunnerOptions options = test_options();
  options.weights = options.activation = options.kv = DType::kBFloat16;
  return options;
}

inline std::unique_ptr<CpuRunner> make_runner(const TestModel& model, const CpuRunnerOptions& options) {
  return must(CpuRunner::create(model.graph, *model.source, options));
}

// The tensors of a golden file by name.
class Golden {
 public:
  explicit Golden(const std::string& path) : file_(must(model::SafetensorsFile::open(path))) {}
  bool has(const std::string& name) const { return file_.find(name) != nullptr; }
  std::vector<float> floats(const std::string& name) const { return read<float>(name, DType::kFloat32); }
  std::vector<int32_t> ints(const std::string& name) const { return read<int32_t>(name, DType::kInt32); }

 private:
  template <typename Element>
  std::vector<Element> read(const std::string& name, DType dtype) const {
    const model::SafetensorsTensor* tensor = file_.find(name);
    if (tensor == nullptr || tensor->dtype != dtype) {
      ADD_FAILURE() << "golden tensor '" << name << "' is missing or of another dtype";
      std::abort();
    }
    std::vector<Element> values(tensor->size / sizeof(Element));
    std::memcpy(values.data(), file_.data(*tensor), tensor->size);
    return values;
  }
  model::SafetensorsFile file_;
};

// Greatest absolute difference; infinite when the sizes differ or either side holds a NaN.
inline float greatest_difference(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) return INFINITY;
  float greatest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float difference = std::abs(a[i] - b[i]);
    greatest = difference <= greatest ? greatest : std::isnan(difference) ? INFINITY : difference;
  }
  return greatest;
}

// |computed - expected| / |expected|.
inline float relative_error(std::span<const float> computed, std::span<const float> expected) {
  double difference = 0;
  double size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(static_cast<double>(computed[i]) - expected[i], 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  return static_cast<float>(std::sqrt(difference / size));
}

}  // namespace tokenspeed::runtime

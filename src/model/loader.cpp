#include "model/loader.h"

#include <filesystem>
#include <utility>
#include <vector>

#include "base/log.h"
#include "base/shape.h"
#include "model/architecture.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/dummy_weights.h"
#include "model/presets.h"
#include "model/tensor_list.h"
#include "model/tensor_names.h"

namespace tokenspeed::model {
namespace {

constexpr const char* kDummyRemedy = "--load-format dummy gives it random weights";

bool is_directory(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_directory(path, error);
}

bool fits(const std::vector<int64_t>& shape, const TensorSpec& spec) {
  if (shape.size() == 1) return shape[0] == spec.elements() && (spec.rows == 1 || spec.columns == 1);
  int64_t columns = 1;
  for (size_t i = 1; i < shape.size(); ++i) columns *= shape[i];
  return !shape.empty() && shape[0] == spec.rows && columns == spec.columns;
}

Status check_tensors(const compile::ModelConfig& config, const Checkpoint& checkpoint) {
  TS_ASSIGN_OR_RETURN(const compile::ModelGraph graph, build_graph(config));
  for (const TensorSpec& spec : list_tensors(graph)) {
    for (int64_t i = 0; i < spec.count; ++i) {
      const std::string name = spec.name_of(i);
      TS_ASSIGN_OR_RETURN(const std::vector<int64_t> shape, checkpoint.shape(name));
      if (fits(shape, spec)) continue;
      return data_loss("tensor '" + name + "' has shape " + shape_text(shape) + ", but config.json of '" + config.name +
                       "' asks for [" + std::to_string(spec.rows) + ", " + std::to_string(spec.columns) +
                       "]; they do not belong together");
    }
  }
  return {};
}

void adjust_to_files(const Checkpoint& checkpoint, compile::ModelConfig& config) {
  if (config.mtp_layers > 0 && !checkpoint.has("mtp.fc.weight")) {
    spdlog::info("'{}' has no MTP weights: speculation with its own drafts is off", config.name);
    config.mtp_layers = 0;
  }
  config.fp8_blocks = checkpoint.has_fp8();
}

Result<std::unique_ptr<compile::WeightSource>> open_weights(const Directory& directory, compile::ModelConfig& config) {
  TS_ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> checkpoint, Checkpoint::open(directory, config.tie_word_embeddings));
  adjust_to_files(*checkpoint, config);
  TS_RETURN_IF_ERROR(check_tensors(config, *checkpoint));
  return std::unique_ptr<compile::WeightSource>(std::move(checkpoint));
}

}  // namespace

Result<compile::ModelConfig> load_model_config(const std::string& name_or_directory) {
  if (is_directory(name_or_directory)) return load_config(name_or_directory);
  Result<compile::ModelConfig> preset = find_preset(name_or_directory);
  if (preset.ok()) return preset;
  return std::move(Status(preset.status())).with_context("'" + name_or_directory + "' is no directory");
}

Result<LoadedModel> load_model(const Directory& directory, LoadFormat format) {
  LoadedModel model;
  TS_ASSIGN_OR_RETURN(model.config, load_config(directory));
  model.directory = directory;
  if (format == LoadFormat::kDummy) {
    TS_ASSIGN_OR_RETURN(model.weights, DummyWeights::create(model.config));
  } else {
    TS_ASSIGN_OR_RETURN(model.weights, open_weights(directory, model.config));
  }
  return model;
}

Result<LoadedModel> load_model(const std::string& name_or_directory, LoadFormat format) {
  if (is_directory(name_or_directory)) return load_model(Directory(name_or_directory), format);
  LoadedModel model;
  TS_ASSIGN_OR_RETURN(model.config, load_model_config(name_or_directory));
  if (format != LoadFormat::kDummy) {
    return failed_precondition("preset '" + model.config.name + "' comes without weights; give a model directory, or " +
                               kDummyRemedy);
  }
  TS_ASSIGN_OR_RETURN(model.weights, DummyWeights::create(model.config));
  return model;
}

}  // namespace tokenspeed::model

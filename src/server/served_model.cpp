#include <algorithm>

#include "server/request_fields.h"

namespace tokenspeed::server {
namespace {

constexpr const char* kTokenizerFile = "tokenizer.json";
constexpr const char* kGenerationFile = "generation_config.json";

// What a request may not ask for is no default either.
Status read_defaults(const Json& json, ServedModel::SamplingDefaults* out) {
  float top_k = static_cast<float>(out->top_k);
  TS_RETURN_IF_ERROR(read_number(json, "temperature", 0, 2, &out->temperature));
  TS_RETURN_IF_ERROR(read_number(json, "top_p", 1e-6, 1, &out->top_p));
  TS_RETURN_IF_ERROR(read_number(json, "top_k", -1, 1 << 24, &top_k));
  TS_RETURN_IF_ERROR(read_number(json, "min_p", 0, 1, &out->min_p));
  TS_RETURN_IF_ERROR(read_number(json, "repetition_penalty", 0.01, 10, &out->repetition_penalty));
  TS_RETURN_IF_ERROR(read_number(json, "presence_penalty", -2, 2, &out->presence_penalty));
  out->top_k = std::max(0, static_cast<int>(top_k));
  return {};
}

Status read_generation_config(const Directory& directory, ServedModel* model) {
  const std::string path = directory.path_of(kGenerationFile);
  TS_ASSIGN_OR_RETURN(const std::string text, directory.read(kGenerationFile));
  const Json json = Json::parse(text, nullptr, false);
  if (!json.is_object()) return data_loss(path + " is not a JSON object; repair or remove it.");
  TS_RETURN_IF_ERROR(read_defaults(json, &model->defaults).with_context(path));
  const auto stop = json.find("eos_token_id");
  if (stop == json.end()) return {};
  for (const Json& id : stop->is_array() ? *stop : Json::array({*stop})) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= model->vocabulary_size) {
      return data_loss(path + ": eos_token_id " + id.dump() + " is not a token id below " +
                       std::to_string(model->vocabulary_size) + ".");
    }
    model->stop_token_ids.push_back(id.get<int32_t>());
  }
  return {};
}

}  // namespace

Result<ServedModel> load_served_model(const std::string& name, const Directory& directory, int64_t max_model_length,
                                      int32_t vocabulary_size) {
  ServedModel model;
  model.name = name;
  model.directory = directory.path();
  model.max_model_length = max_model_length;
  model.vocabulary_size = vocabulary_size;
  if (directory.has(kTokenizerFile)) {
    TS_ASSIGN_OR_RETURN(auto tokenizer, text::Tokenizer::load(directory));
    if (tokenizer.vocabulary_size() > vocabulary_size) {
      return invalid_argument(directory.path_of(kTokenizerFile) + " has ids up to " +
                              std::to_string(tokenizer.vocabulary_size() - 1) + ", but the model's embedding has " +
                              std::to_string(vocabulary_size) + " rows; use the tokenizer of this model.");
    }
    model.tokenizer.emplace(std::move(tokenizer));
    model.sorted_vocabulary.emplace(*model.tokenizer);
  }
  auto chat_template = text::load_chat_template(directory);
  if (chat_template.ok()) {
    model.chat_template.emplace(std::move(chat_template).value());
  } else if (chat_template.status().code() != StatusCode::kNotFound) {
    return chat_template.status();
  }
  if (directory.has(kGenerationFile)) {
    TS_RETURN_IF_ERROR(read_generation_config(directory, &model));
  }
  return model;
}

}  // namespace tokenspeed::server

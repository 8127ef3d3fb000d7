#include "server/request_fields.h"

#include <charconv>
#include <cmath>

#include "server/json_text.h"

namespace tokenspeed::server {
namespace {

constexpr size_t kMaxStops = 16;

const Json* find(const Json& body, const char* field) {
  const auto at = body.find(field);
  return at == body.end() || at->is_null() ? nullptr : &*at;
}

std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 60) + "...";
  return text;
}

std::string plain(double value) {
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof(text), value).ptr);
}

Status add_stop(const Json& item, std::vector<std::string>* out) {
  if (!item.is_string()) return bad_field("stop", "must hold strings only, not " + shown(item));
  if (item.get_ref<const std::string&>().empty()) return bad_field("stop", "must not hold an empty string");
  out->push_back(item.get<std::string>());
  return {};
}

Status read_stop(const Json& body, std::vector<std::string>* out) {
  const Json* stop = find(body, "stop");
  if (stop == nullptr) return {};
  if (stop->is_string()) return add_stop(*stop, out);
  if (!stop->is_array()) return bad_field("stop", "must be a string or an array of strings, not " + shown(*stop));
  if (stop->size() > kMaxStops) {
    return bad_field("stop", "has " + std::to_string(stop->size()) + " strings; at most 16 are allowed");
  }
  for (const Json& item : *stop) TS_RETURN_IF_ERROR(add_stop(item, out));
  return {};
}

Status read_logit_bias(const Json& body, int32_t vocabulary, std::vector<std::pair<int32_t, float>>* out) {
  const Json* bias = find(body, "logit_bias");
  if (bias == nullptr) return {};
  if (!bias->is_object()) return bad_field("logit_bias", "must be an object of token id to bias, not " + shown(*bias));
  for (const auto& [key, value] : bias->items()) {
    int32_t id = -1;
    const auto end = std::from_chars(key.data(), key.data() + key.size(), id);
    if (end.ec != std::errc() || end.ptr != key.data() + key.size() || id < 0 || id >= vocabulary) {
      return bad_field("logit_bias", "names '" + key.substr(0, 40) + "', which is not a token id below " +
                                         std::to_string(vocabulary));
    }
    if (!value.is_number() || !(std::abs(value.get<double>()) <= 100)) {
      return bad_field("logit_bias", "must be from -100 to 100 for token " + key + ", not " + shown(value));
    }
    out->emplace_back(id, value.get<float>());
  }
  return {};
}

Status read_sampling(const Json& body, const ServerContext& context, runtime::SamplingParameters* out) {
  const auto& defaults = context.model.defaults;
  out->temperature = defaults.temperature;
  out->top_p = defaults.top_p;
  out->min_p = defaults.min_p;
  out->repetition_penalty = defaults.repetition_penalty;
  out->presence_penalty = defaults.presence_penalty;
  TS_RETURN_IF_ERROR(read_number(body, "temperature", 0, 2, &out->temperature));
  TS_RETURN_IF_ERROR(read_number(body, "top_p", 1e-6, 1, &out->top_p));
  TS_RETURN_IF_ERROR(read_number(body, "min_p", 0, 1, &out->min_p));
  TS_RETURN_IF_ERROR(read_number(body, "repetition_penalty", 0.01, 10, &out->repetition_penalty));
  TS_RETURN_IF_ERROR(read_number(body, "presence_penalty", -2, 2, &out->presence_penalty));
  TS_RETURN_IF_ERROR(read_number(body, "frequency_penalty", -2, 2, &out->frequency_penalty));
  int64_t top_k = defaults.top_k;
  TS_RETURN_IF_ERROR(read_integer(body, "top_k", -1, INT32_MAX, &top_k));
  out->top_k = static_cast<int32_t>(std::max<int64_t>(0, std::min<int64_t>(top_k, context.model.vocabulary_size)));
  return read_logit_bias(body, context.model.vocabulary_size, &out->logit_bias);
}

}  // namespace

Status bad_field(std::string_view field, const std::string& problem) {
  return invalid_argument("'" + std::string(field) + "' " + problem + ".").with_param(std::string(field));
}

Json parse_json(std::string_view text) {
  // The JSON reader takes a zero byte for the end.
  if (!json_within_limits(text) || text.find('\0') != std::string_view::npos) return Json::value_t::discarded;
  return Json::parse(text, nullptr, false);
}

Result<Json> parse_body(std::string_view body) {
  if (!is_utf8(body)) return invalid_argument("The request body is not valid UTF-8.");
  if (!json_within_limits(body)) {
    return invalid_argument(
        "The request body nests deeper than 200 levels or has an object of more than 4096 members; send "
        "a smaller one.");
  }
  Json json = parse_json(body);
  if (json.is_discarded()) return invalid_argument("The request body is not valid JSON.");
  if (!json.is_object()) return invalid_argument("The request body must be a JSON object, not " + shown(json) + ".");
  return json;
}

Status read_number(const Json& body, const char* field, double least, double greatest, float* out) {
  const Json* value = find(body, field);
  if (value == nullptr) return {};
  if (!value->is_number()) return bad_field(field, "must be a number, not " + shown(*value));
  const double number = value->get<double>();
  if (!(number >= least && number <= greatest)) {
    return bad_field(field, "is " + shown(*value) + "; it must be from " + plain(least) + " to " + plain(greatest));
  }
  *out = static_cast<float>(number);
  return {};
}

Status read_integer(const Json& body, const char* field, int64_t least, int64_t greatest, int64_t* out) {
  const Json* value = find(body, field);
  if (value == nullptr) return {};
  if (!value->is_number_integer()) return bad_field(field, "must be an integer, not " + shown(*value));
  const bool huge = value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  if (huge || value->get<int64_t>() < least || value->get<int64_t>() > greatest) {
    return bad_field(field, "is " + shown(*value) + "; it must be from " + std::to_string(least) + " to " +
                                std::to_string(greatest));
  }
  *out = value->get<int64_t>();
  return {};
}

Status read_flag(const Json& body, const char* field, bool* out) {
  const Json* value = find(body, field);
  if (value == nullptr) return {};
  if (!value->is_boolean()) return bad_field(field, "must be true or false, not " + shown(*value));
  *out = value->get<bool>();
  return {};
}

Status check_model(const Json& body, const ServerContext& context) {
  const Json* model = find(body, "model");
  if (model == nullptr) return {};
  if (!model->is_string()) return bad_field("model", "must be a string, not " + shown(*model));
  if (model->get_ref<const std::string&>() == context.model.name) return {};
  return not_found("The model " + shown(*model) + " does not exist; this server has '" + context.model.name + "'.")
      .with_param("model");
}

Result<std::vector<int32_t>> read_token_ids(const Json& value, const std::string& field, int32_t vocabulary_size) {
  if (!value.is_array()) return bad_field(field, "must be an array of token ids, not " + shown(value));
  std::vector<int32_t> ids;
  ids.reserve(value.size());
  for (const Json& item : value) {
    if (!item.is_number_unsigned() || item.get<uint64_t>() >= static_cast<uint64_t>(vocabulary_size)) {
      return bad_field(field,
                       "holds " + shown(item) + ", which is not a token id below " + std::to_string(vocabulary_size));
    }
    ids.push_back(item.get<int32_t>());
  }
  return ids;
}

Result<GenerationFields> read_generation_fields(const Json& body, const ServerContext& context) {
  GenerationFields out;
  TS_RETURN_IF_ERROR(check_model(body, context));
  TS_RETURN_IF_ERROR(read_sampling(body, context, &out.sampling));
  TS_RETURN_IF_ERROR(read_integer(body, "max_tokens", 0, INT32_MAX, &out.max_tokens));
  TS_RETURN_IF_ERROR(read_integer(body, "n", 1, 128, &out.n));
  TS_RETURN_IF_ERROR(read_flag(body, "stream", &out.stream));
  TS_RETURN_IF_ERROR(read_flag(body, "ignore_eos", &out.ignore_eos));
  TS_RETURN_IF_ERROR(read_flag(body, "include_stop_str_in_output", &out.include_stop));
  TS_RETURN_IF_ERROR(read_flag(body, "skip_special_tokens", &out.skip_special_tokens));
  TS_RETURN_IF_ERROR(read_flag(body, "return_token_ids", &out.return_token_ids));
  TS_RETURN_IF_ERROR(read_stop(body, &out.stop));
  if (!out.stop.empty() && !context.model.tokenizer) {
    return bad_field("stop", "needs a tokenizer, which this model does not have; use stop_token_ids");
  }
  int64_t seed = 0;
  out.seeded = find(body, "seed") != nullptr;
  TS_RETURN_IF_ERROR(read_integer(body, "seed", INT64_MIN, INT64_MAX, &seed));
  out.sampling.seed = static_cast<uint64_t>(seed);
  if (const Json* options = find(body, "stream_options")) {
    if (!options->is_object()) return bad_field("stream_options", "must be an object, not " + shown(*options));
    TS_RETURN_IF_ERROR(read_flag(*options, "include_usage", &out.include_usage));
  }
  out.stop_token_ids = context.model.stop_token_ids;
  if (const Json* ids = find(body, "stop_token_ids")) {
    TS_ASSIGN_OR_RETURN(auto more, read_token_ids(*ids, "stop_token_ids", context.model.vocabulary_size));
    out.stop_token_ids.insert(out.stop_token_ids.end(), more.begin(), more.end());
  }
  return out;
}

}  // namespace tokenspeed::server

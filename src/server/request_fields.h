// Reads the fields of a request body: types and ranges are checked, errors name the field, its value and the limit.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "runtime/runner.h"
#include "server/server_context.h"

namespace tokenspeed::server {

using Json = nlohmann::ordered_json;  // tools reach the template with their keys in the order given

Status bad_field(std::string_view field, const std::string& problem);
// Discarded: malformed, or beyond json_within_limits.
Json parse_json(std::string_view text);
// Errors: malformed JSON, invalid UTF-8, nesting over 200, not an object.
Result<Json> parse_body(std::string_view body);
// An absent or null field leaves `out` as it is.
Status read_number(const Json& body, const char* field, double least, double greatest, float* out);
Status read_integer(const Json& body, const char* field, int64_t least, int64_t greatest, int64_t* out);
Status read_flag(const Json& body, const char* field, bool* out);
// An absent or null field means the one model served. Errors: not_found.
Status check_model(const Json& body, const ServerContext& context);

// What chat and completions have in common.
struct GenerationFields {
  runtime::SamplingParameters sampling;
  bool seeded = false;
  int64_t max_tokens = -1;  // -1: not given
  int64_t n = 1;
  bool stream = false;
  bool include_usage = false;
  bool ignore_eos = false;
  bool include_stop = false;
  bool skip_special_tokens = true;
  bool return_token_ids = false;
  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;  // the model's and the request's
};
Result<GenerationFields> read_generation_fields(const Json& body, const ServerContext& context);
// Errors: not an array of ids within the vocabulary.
Result<std::vector<int32_t>> read_token_ids(const Json& value, const std::string& field, int32_t vocabulary_size);

}  // namespace tokenspeed::server

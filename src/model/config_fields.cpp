#include "model/config_fields.h"

#include <utility>

namespace tokenspeed::model {
namespace {

const nlohmann::json kEmptyObject = nlohmann::json::object();

std::string quoted(const char* key) { return std::string("'") + key + "'"; }

}  // namespace

std::string shown(const nlohmann::json& value) {
  constexpr size_t kLongest = 60;
  // Containers are not printed: they may be as large as the file.
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list of " + std::to_string(value.size());
  std::string text = value.dump(-1, ' ', true);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

Result<nlohmann::json> parse_json_object(std::string_view text, const std::string& where) {
  try {
    nlohmann::json parsed = nlohmann::json::parse(text);
    if (parsed.is_object()) return parsed;
    return invalid_argument(where + " must be a JSON object, but is " + shown(parsed));
  } catch (const nlohmann::json::parse_error& error) {
    return invalid_argument(where + " is not valid JSON (at byte " + std::to_string(error.byte) + " of " +
                            std::to_string(text.size()) + ")");
  } catch (const nlohmann::json::exception&) {
    return invalid_argument(where + " is not valid JSON (a number is out of range)");
  }
}

void ConfigFields::fail(Status status) {
  if (status_.ok()) status_ = std::move(status);
}

bool ConfigFields::has(const char* key) const {
  const auto found = object_.find(key);
  return found != object_.end() && !found->is_null();
}

int64_t ConfigFields::checked(const char* key, const nlohmann::json& value, IntegerRange range) {
  const std::string limits = "between " + std::to_string(range.low) + " and " + std::to_string(range.high);
  if (!value.is_number_integer()) {
    fail_invalid(quoted(key) + " must be an integer " + limits + ", but is " + shown(value));
    return range.low;
  }
  const bool huge = value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  if (huge || value.get<int64_t>() < range.low || value.get<int64_t>() > range.high) {
    fail_invalid(quoted(key) + " is " + shown(value) + "; it must be " + limits);
    return range.low;
  }
  return value.get<int64_t>();
}

int64_t ConfigFields::integer(const char* key, IntegerRange range) {
  if (!has(key)) {
    fail_invalid(quoted(key) + " is missing");
    return range.low;
  }
  return checked(key, *object_.find(key), range);
}

int64_t ConfigFields::integer(const char* key, IntegerRange range, int64_t otherwise) {
  return has(key) ? integer(key, range) : otherwise;
}

double ConfigFields::number(const char* key, double low, double high, double otherwise) {
  if (!has(key)) return otherwise;
  const nlohmann::json& value = *object_.find(key);
  if (!value.is_number() || !(value.get<double>() > low) || !(value.get<double>() <= high)) {
    fail_invalid(quoted(key) + " must be a number above " + shown(low) + " and at most " + shown(high) + ", but is " +
                 shown(value));
    return otherwise;
  }
  return value.get<double>();
}

bool ConfigFields::boolean(const char* key, bool otherwise) {
  if (!has(key)) return otherwise;
  const nlohmann::json& value = *object_.find(key);
  if (!value.is_boolean()) {
    fail_invalid(quoted(key) + " must be true or false, but is " + shown(value));
    return otherwise;
  }
  return value.get<bool>();
}

std::string ConfigFields::text(const char* key, const std::string& otherwise) {
  if (!has(key)) return otherwise;
  const nlohmann::json& value = *object_.find(key);
  if (!value.is_string()) {
    fail_invalid(quoted(key) + " must be a string, but is " + shown(value));
    return otherwise;
  }
  return value.get<std::string>();
}

std::vector<int32_t> ConfigFields::token_ids(const char* key, int64_t vocabulary_size) {
  constexpr size_t kMost = 64;
  std::vector<int32_t> ids;
  if (!has(key)) return ids;
  const nlohmann::json& value = *object_.find(key);
  const IntegerRange range = {0, vocabulary_size - 1};
  if (!value.is_array()) {
    ids.push_back(static_cast<int32_t>(checked(key, value, range)));
    return ids;
  }
  if (value.size() > kMost) {
    fail_invalid(quoted(key) + " lists " + std::to_string(value.size()) + " tokens; at most " + std::to_string(kMost) +
                 " are accepted");
    return ids;
  }
  for (const nlohmann::json& id : value) ids.push_back(static_cast<int32_t>(checked(key, id, range)));
  return ids;
}

const nlohmann::json& ConfigFields::object(const char* key) {
  if (!has(key)) return kEmptyObject;
  const nlohmann::json& value = *object_.find(key);
  if (value.is_object()) return value;
  fail_invalid(quoted(key) + " must be an object, but is " + shown(value));
  return kEmptyObject;
}

void ConfigFields::only(const char* key, bool supported) {
  if (boolean(key, supported) != supported) {
    fail_unsupported(quoted(key) + " is " + (supported ? "false" : "true") + "; only " +
                     (supported ? "true" : "false") + " is supported");
  }
}

}  // namespace tokenspeed::model

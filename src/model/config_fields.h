// Reads checked fields out of a configuration's JSON. The first problem is kept and named with field, value and limit;
// reading on after it is harmless, so a parser lists its fields plainly and asks status() once at the end.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/status.h"

namespace tokenspeed::model {

struct IntegerRange {
  int64_t low = 1;
  int64_t high = 1;
};

class ConfigFields {
 public:
  // `where` opens every message ("config.json of 'demo'"). The object must outlive the reader.
  ConfigFields(const nlohmann::json& object, std::string where) : object_(object), where_(std::move(where)) {}

  // Present and not null.
  bool has(const char* key) const;
  // Without the key: the default where one is given, an error otherwise.
  int64_t integer(const char* key, IntegerRange range);
  int64_t integer(const char* key, IntegerRange range, int64_t otherwise);
  // Exclusive of low, inclusive of high.
  double number(const char* key, double low, double high, double otherwise);
  bool boolean(const char* key, bool otherwise);
  std::string text(const char* key, const std::string& otherwise);
  // An integer, a list of them, or nothing.
  std::vector<int32_t> token_ids(const char* key, int64_t vocabulary_size);
  // The object under the key, or an empty one.
  const nlohmann::json& object(const char* key);

  // Refuses every value but the one this engine implements.
  void only(const char* key, bool supported);
  void fail(Status status);
  void fail_invalid(const std::string& sentence) { fail(invalid_argument(where_ + ": " + sentence)); }
  void fail_unsupported(const std::string& sentence) { fail(unimplemented(where_ + ": " + sentence)); }
  const Status& status() const { return status_; }

 private:
  int64_t checked(const char* key, const nlohmann::json& value, IntegerRange range);

  const nlohmann::json& object_;
  std::string where_;
  Status status_;
};

// A JSON value as it stands in a message, cut to a readable length.
std::string shown(const nlohmann::json& value);

// Parses a JSON object; `where` opens the message when the text is none.
Result<nlohmann::json> parse_json_object(std::string_view text, const std::string& where);

}  // namespace tokenspeed::model

// What a tool's JSON schema says about the value of each parameter: its types, for turning text into JSON
// (text/tool_value.h), and, where these leave few forms, the grammar its text must follow while it is generated.
// Invariant: every text of a grammar converts to JSON of a declared type. Cost: a schema is read once per request; a
// match is linear in the text and in the number of literals, which is bounded.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/tool_tags.h"

namespace tokenspeed::text {

enum class ValueType { kString, kInteger, kNumber, kBoolean, kContainer, kNull };

// The texts that a value may be: one of the literals, or a number. Neither: any text.
struct ValueGrammar {
  enum class Number { kNone, kInteger, kAny } number = Number::kNone;
  std::vector<std::string> literals;

  bool restricts() const { return number != Number::kNone || !literals.empty(); }
  // Does `text`, which follows `<parameter=NAME>`, start with "\n" VALUE "\n</parameter>\n"? kPartial: it may yet.
  TagMatch match(std::string_view text) const;
  // The same where the value is a number, whatever the literals.
  TagMatch match_number(std::string_view text) const;
  // What would complete `text` to each literal and its closing tag; only for literals that it may yet become.
  std::vector<std::string> literal_completions(std::string_view text) const;
};

struct ValueSchema {
  std::vector<ValueType> types;  // alternatives, in the schema's order; at least one
  ValueGrammar grammar;
};
using ParameterSchemas = std::unordered_map<std::string, ValueSchema>;

// The parameters named in `parameters_json` (a JSON schema of type object). Unreadable: none.
// Enumerations of at most kMostLiterals scalars, and types that are all integer, number, boolean or null, have a
// grammar. A longer enumeration would hold up every request's step while its tokens are looked up.
inline constexpr size_t kMostLiterals = 1000;
ParameterSchemas read_parameter_schemas(const std::string& parameters_json);

}  // namespace tokenspeed::text

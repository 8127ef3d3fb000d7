#include "text/value_schema.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "text/tool_tags.h"

namespace tokenspeed::text {
namespace {

using Json = nlohmann::json;

constexpr int kMaxSchemaDepth = 16;

// Clients write JSON Schema's names and those of many languages; an unknown name is a string.
ValueType type_of_name(std::string_view name) {
  const std::string type = ascii_lower(name);
  const auto starts = [&](std::initializer_list<std::string_view> prefixes) {
    return std::any_of(prefixes.begin(), prefixes.end(), [&](std::string_view p) { return type.starts_with(p); });
  };
  if (starts({"int", "uint", "long", "short", "unsigned"})) return ValueType::kInteger;
  if (starts({"num", "float", "double"})) return ValueType::kNumber;
  if (starts({"bool"})) return ValueType::kBoolean;
  if (starts({"object", "array", "dict", "list"})) return ValueType::kContainer;
  if (type == "null" || type == "none") return ValueType::kNull;
  return ValueType::kString;
}

ValueType type_of_value(const Json& value) {
  if (value.is_number_integer()) return ValueType::kInteger;
  if (value.is_number()) return ValueType::kNumber;
  if (value.is_boolean()) return ValueType::kBoolean;
  if (value.is_structured()) return ValueType::kContainer;
  return value.is_null() ? ValueType::kNull : ValueType::kString;
}

void collect_types(const Json& schema, int depth, std::vector<ValueType>* types) {
  if (!schema.is_object() || depth > kMaxSchemaDepth) return;
  const size_t before = types->size();
  if (const auto type = schema.find("type"); type != schema.end()) {
    if (type->is_string()) types->push_back(type_of_name(type->get_ref<const std::string&>()));
    if (type->is_array()) {
      for (const Json& name : *type) {
        if (name.is_string()) types->push_back(type_of_name(name.get_ref<const std::string&>()));
      }
    }
  } else if (const auto values = schema.find("enum"); values != schema.end() && values->is_array()) {
    for (const Json& value : *values) types->push_back(type_of_value(value));
  } else if (const auto value = schema.find("const"); value != schema.end()) {
    types->push_back(type_of_value(*value));
  } else {
    for (const char* key : {"anyOf", "oneOf", "allOf"}) {
      const auto parts = schema.find(key);
      if (parts == schema.end() || !parts->is_array()) continue;
      for (const Json& part : *parts) collect_types(part, depth + 1, types);
    }
    const bool shaped = schema.contains("properties") || schema.contains("items");
    if (types->size() == before && shaped) types->push_back(ValueType::kContainer);
  }
  if (const auto nullable = schema.find("nullable"); nullable != schema.end() && *nullable == true) {
    types->push_back(ValueType::kNull);
  }
}

// Literals of a scalar as models write them: JSON's words, and Python's for true, false and null.
void add_literals(const Json& value, std::vector<std::string>* literals) {
  if (value.is_boolean()) {
    const bool yes = value.get<bool>();
    literals->insert(literals->end(), {yes ? "true" : "false", yes ? "True" : "False"});
  } else if (value.is_null()) {
    literals->insert(literals->end(), {"null", "None"});
  } else {
    literals->push_back(value.is_string() ? value.get<std::string>() : value.dump());
  }
}

ValueGrammar grammar_of_values(const Json& values, bool nullable) {
  if (values.size() > kMostLiterals) return {};
  ValueGrammar grammar;
  for (const Json& value : values) {
    if (value.is_structured()) return {};
    add_literals(value, &grammar.literals);
  }
  if (nullable) add_literals(nullptr, &grammar.literals);
  return grammar;
}

ValueGrammar grammar_of_types(const std::vector<ValueType>& types) {
  ValueGrammar grammar;
  for (const ValueType type : types) {
    switch (type) {
      case ValueType::kInteger:
        if (grammar.number == ValueGrammar::Number::kNone) grammar.number = ValueGrammar::Number::kInteger;
        break;
      case ValueType::kNumber:
        grammar.number = ValueGrammar::Number::kAny;
        break;
      case ValueType::kBoolean:
        add_literals(true, &grammar.literals);
        add_literals(false, &grammar.literals);
        break;
      case ValueType::kNull:
        add_literals(nullptr, &grammar.literals);
        break;
      case ValueType::kString:
      case ValueType::kContainer:
        return {};
    }
  }
  return grammar;
}

ValueSchema read_value_schema(const Json& property) {
  ValueSchema schema;
  collect_types(property, 0, &schema.types);
  if (schema.types.empty()) schema.types.push_back(ValueType::kString);
  const bool nullable = std::find(schema.types.begin(), schema.types.end(), ValueType::kNull) != schema.types.end();
  if (!property.is_object()) return schema;
  if (const auto values = property.find("enum"); values != property.end() && values->is_array() && !values->empty()) {
    schema.grammar = grammar_of_values(*values, nullable);
  } else if (const auto value = property.find("const"); value != property.end()) {
    schema.grammar = grammar_of_values(Json::array({*value}), nullable);
  } else {
    schema.grammar = grammar_of_types(schema.types);
  }
  return schema;
}

// With the newline after it: the parser takes a `</parameter>` before other text for part of the value.
constexpr std::string_view kValueClose = "\n</parameter>\n";

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Longer runs of digits are nobody's argument but a model's that goes in circles; so bounded, a number is finite.
constexpr size_t kMostDigits = 64;
constexpr size_t kMostExponentDigits = 2;

// Reads up to `most` digits at *at; false when there is none.
bool skip_digits(std::string_view text, size_t* at, size_t most = kMostDigits) {
  const size_t start = *at;
  while (*at < text.size() && *at < start + most && is_digit(text[*at])) ++*at;
  return *at > start;
}

// Is `text` a number of JSON's form (kYes: and more digits may follow), or the start of one?
TagMatch match_digits(std::string_view text, bool integer) {
  const auto unless_at_end = [&](size_t at) { return at == text.size() ? TagMatch::kPartial : TagMatch::kNo; };
  size_t at = text.starts_with('-') ? 1 : 0;
  if (at < text.size() && text[at] == '0') {
    ++at;
  } else if (!skip_digits(text, &at)) {
    return unless_at_end(at);
  }
  if (!integer && at < text.size() && text[at] == '.') {
    ++at;
    if (!skip_digits(text, &at)) return unless_at_end(at);
  }
  if (!integer && at < text.size() && (text[at] == 'e' || text[at] == 'E')) {
    ++at;
    if (at < text.size() && (text[at] == '+' || text[at] == '-')) ++at;
    if (!skip_digits(text, &at, kMostExponentDigits)) return unless_at_end(at);
  }
  return at == text.size() ? TagMatch::kYes : TagMatch::kNo;
}

std::string whole_text(const std::string& literal) { return "\n" + literal + std::string(kValueClose); }

}  // namespace

TagMatch ValueGrammar::match(std::string_view text) const {
  TagMatch best = match_number(text);
  for (const std::string& literal : literals) best = std::max(best, match_tag(text, whole_text(literal)));
  return best;
}

TagMatch ValueGrammar::match_number(std::string_view text) const {
  if (number == Number::kNone) return TagMatch::kNo;
  if (text.empty()) return TagMatch::kPartial;
  if (text.front() != '\n') return TagMatch::kNo;
  text.remove_prefix(1);
  const std::string_view value = text.substr(0, text.find('\n'));
  const TagMatch matched = match_digits(value, number == Number::kInteger);
  if (value.size() == text.size()) return std::min(matched, TagMatch::kPartial);
  return matched == TagMatch::kYes ? match_tag(text.substr(value.size()), kValueClose) : TagMatch::kNo;
}

std::vector<std::string> ValueGrammar::literal_completions(std::string_view text) const {
  std::vector<std::string> completions;
  for (const std::string& literal : literals) {
    const std::string whole = whole_text(literal);
    if (whole.starts_with(text)) completions.push_back(whole.substr(text.size()));
  }
  return completions;
}

ParameterSchemas read_parameter_schemas(const std::string& parameters_json) {
  ParameterSchemas result;
  const Json schema = Json::parse(parameters_json, nullptr, false);
  if (!schema.is_object()) return result;
  const auto properties = schema.find("properties");
  if (properties == schema.end() || !properties->is_object()) return result;
  for (const auto& [name, property] : properties->items()) result[name] = read_value_schema(property);
  return result;
}

}  // namespace tokenspeed::text

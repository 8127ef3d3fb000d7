#include "text/tool_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_map>

#include "text/python_literal.h"
#include "text/tool_tags.h"

namespace tokenspeed::text {
namespace {

using Json = nlohmann::json;

std::string_view trim(std::string_view text) {
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

// Drops whitespace outside strings and writes Python's separators; `json` is valid. Digits and escapes stay as written.
std::string with_python_separators(std::string_view json) {
  std::string out;
  out.reserve(json.size() + json.size() / 8);
  bool in_string = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (!in_string && is_space(c)) continue;
    out.push_back(c);
    if (c == '"') in_string = !in_string;
    if (in_string && c == '\\') out.push_back(json[++i]);
    if (!in_string && (c == ',' || c == ':')) out.push_back(' ');
  }
  return out;
}

bool too_deep(std::string_view json) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (c == '"') in_string = !in_string;
    if (in_string && c == '\\') ++i;
    if (in_string) continue;
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (depth > kMaxValueDepth) return true;
  }
  return false;
}

std::optional<std::string> container_json(std::string_view text) {
  text = trim(text);
  if (text.empty() || std::string_view("{[(").find(text[0]) == std::string_view::npos) return std::nullopt;
  if (text.find('\0') != std::string_view::npos) return std::nullopt;  // the JSON reader would stop there, content
  if (Json::accept(text)) return too_deep(text) ? std::nullopt : std::optional(with_python_separators(text));
  return python_literal_to_json(text);
}

// The digits of an integer in JSON's form, of any length.
std::optional<std::string> integer_digits(std::string_view text) {
  const bool negative = text.starts_with('-');
  if (negative || text.starts_with('+')) text.remove_prefix(1);
  if (text.empty() || text.find_first_not_of("0123456789") != std::string_view::npos) return std::nullopt;
  text.remove_prefix(std::min(text.find_first_not_of('0'), text.size() - 1));
  return (negative && text != "0" ? "-" : "") + std::string(text);
}

std::optional<std::string> number_json(std::string_view text, bool integer_only) {
  text = trim(text);
  if (auto digits = integer_digits(text)) return digits;
  if (text.starts_with('+') && !text.starts_with("+-")) text.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
  constexpr double kExactIntegers = 9007199254740992.0;  // 2^53
  if (std::trunc(value) == value && std::abs(value) < kExactIntegers) {
    return std::to_string(static_cast<int64_t>(value));
  }
  if (integer_only) return std::nullopt;
  if (Json::accept(text)) return std::string(text);
  return Json(value).dump();
}

std::optional<std::string> convert(ValueType type, std::string_view text) {
  switch (type) {
    case ValueType::kString:
      return json_string(text);
    case ValueType::kInteger:
      return number_json(text, true);
    case ValueType::kNumber:
      return number_json(text, false);
    case ValueType::kBoolean: {
      const std::string word = ascii_lower(trim(text));
      return word == "true" || word == "false" ? std::optional(word) : std::nullopt;
    }
    case ValueType::kContainer:
      return container_json(text);
    case ValueType::kNull:
      return std::nullopt;  // decided before any other type
  }
  return std::nullopt;
}

bool is_null_text(std::string_view text) {
  text = trim(text);
  return text == "null" || text == "None";
}

}  // namespace

struct ToolSchemas::Tables {
  std::unordered_map<std::string, ParameterSchemas> tools;
};

ToolSchemas::ToolSchemas(const std::vector<ToolSchema>& tools) : tables_(std::make_unique<Tables>()) {
  for (const ToolSchema& tool : tools)
    tables_->tools.try_emplace(tool.name, read_parameter_schemas(tool.parameters_json));
}

ToolSchemas::ToolSchemas(ToolSchemas&&) noexcept = default;
ToolSchemas& ToolSchemas::operator=(ToolSchemas&&) noexcept = default;
ToolSchemas::~ToolSchemas() = default;

const ValueSchema* ToolSchemas::find(const std::string& tool, const std::string& parameter) const {
  const auto parameters = tables_->tools.find(tool);
  if (parameters == tables_->tools.end()) return nullptr;
  const auto found = parameters->second.find(parameter);
  return found == parameters->second.end() ? nullptr : &found->second;
}

std::string ToolSchemas::value_json(const std::string& tool, const std::string& parameter,
                                    std::string_view text) const {
  const ValueSchema* schema = find(tool, parameter);
  if (schema == nullptr) return json_string(text);
  const std::vector<ValueType>& types = schema->types;
  const auto allows = [&](ValueType type) { return std::find(types.begin(), types.end(), type) != types.end(); };
  if (is_null_text(text) && (allows(ValueType::kNull) || !allows(ValueType::kString))) return "null";
  for (const ValueType type : types) {
    if (auto json = convert(type, text)) return *std::move(json);
  }
  return json_string(text);
}

std::string json_string(std::string_view text) {
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace tokenspeed::text

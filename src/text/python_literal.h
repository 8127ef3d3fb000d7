// Python's literals of plain data (dict, list, tuple, str, numbers, True/False/None) rewritten as JSON: models write
// them where JSON is asked for. Cost: linear; nesting deeper than kMaxValueDepth is refused.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace tokenspeed::text {

// Nesting of one parameter's value that consumers can be expected to walk recursively.
inline constexpr int kMaxValueDepth = 128;

// The JSON of the literal, with Python's separators; nothing if `text` is not exactly one such literal.
std::optional<std::string> python_literal_to_json(std::string_view text);

}  // namespace tokenspeed::text

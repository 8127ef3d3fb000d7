// JSON text ⇄ values, as Python's json module: key order kept, the last of equal keys wins, integers exact at any size
// and apart from floats.
#pragma once

#include <string>
#include <string_view>

#include "text/jinja_value.h"

namespace tokenspeed::text::jinja {

// Throws TemplateError for malformed JSON, invalid UTF-8 and nesting beyond kMaximumDepth.
Value read_json(std::string_view text);

// json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys); indent < 0: one line, ", " and ": ".
// Throws TemplateError for what JSON cannot say (undefined, macros ...).
std::string write_json(const Value& value, int indent = -1, bool sort_keys = false);

}  // namespace tokenspeed::text::jinja

// Template source → tree. Refuses, with the line, what is not valid Jinja2 and what this subset leaves out
// (inheritance, includes, call blocks, recursive loops).
#pragma once

#include <string_view>

#include "text/jinja_ast.h"

namespace tokenspeed::text::jinja {

// Throws TemplateError.
Block parse_template(std::string_view source);

}  // namespace tokenspeed::text::jinja

// Template source → tokens, with white space removed as Jinja2 does under trim_blocks and lstrip_blocks, and as the
// source's own "-" and "+" marks say. Comments and raw blocks are resolved here. Cost: linear in the source.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "text/jinja_value.h"

namespace tokenspeed::text::jinja {

enum class TokenKind {
  kData,
  kVariableBegin,
  kVariableEnd,
  kBlockBegin,
  kBlockEnd,
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd
};

struct Token {
  TokenKind kind;
  int line;
  std::string text;  // of strings: without quotes, escapes resolved
};

// The last token is kEnd. Throws TemplateError.
std::vector<Token> tokenize(std::string_view source);

}  // namespace tokenspeed::text::jinja

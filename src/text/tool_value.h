// Turns the raw text of a tool-call parameter into JSON, by the tool's schema (docs: text/output_parser.h).
// Rules: string types keep the text; integers keep all their digits; a number without fraction is written as an
// integer; booleans are true/false in any case; objects and arrays are JSON or Python literals; "null" or "None" is
// null unless the type is a plain string. Alternatives (anyOf, oneOf, type lists) are tried in order. What does not
// convert, and what the schema does not name, is a JSON string of the text. `$ref` is not followed: a string.
// Invariant: the result is always valid JSON, separated as Python's json.dumps does (", " and ": ").
// Cost: schemas are read once, at construction; a conversion is linear in the text.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/output_parser.h"
#include "text/value_schema.h"

namespace tokenspeed::text {

class ToolSchemas {
 public:
  explicit ToolSchemas(const std::vector<ToolSchema>& tools);
  ToolSchemas(ToolSchemas&&) noexcept;
  ToolSchemas& operator=(ToolSchemas&&) noexcept;
  ~ToolSchemas();

  // The schema of a tool's parameter; nullptr: none is known. Lives as long as this.
  const ValueSchema* find(const std::string& tool, const std::string& parameter) const;
  std::string value_json(const std::string& tool, const std::string& parameter, std::string_view text) const;

 private:
  struct Tables;
  std::unique_ptr<Tables> tables_;
};

// `text` as a JSON string, quotes included; bytes that are not UTF-8 become U+FFFD.
std::string json_string(std::string_view text);

}  // namespace tokenspeed::text

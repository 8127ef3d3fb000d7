// Separates the reasoning at the start of a model's output from what follows it, while it streams.
// Invariant and border rules: text/output_parser.h. Cost: linear; holds back a tag's beginning and trailing whitespace.
#pragma once

#include <string>
#include <string_view>

#include "text/tool_tags.h"

namespace tokenspeed::text {

class ReasoningParser {
 public:
  // ends_at_tool_call: a tool call that opens before `</think>` ends the reasoning.
  explicit ReasoningParser(bool ends_at_tool_call);

  // Appends to `reasoning` what is settled. Returns true when the reasoning has ended: then `rest` is the text after it
  // (starting with `<tool_call>` if that ended it) and the parser must not be used again.
  bool push(std::string_view text, std::string* reasoning, std::string* rest);
  // The text ended inside the reasoning: appends everything held back.
  void finish(std::string* reasoning);

 private:
  enum class Tag { kText, kUnsettled, kThinkOpen, kThinkClose, kCall };
  Tag tag_at(std::string_view text) const;
  void take_text(size_t size, std::string* reasoning);

  const bool ends_at_tool_call_;
  bool may_open_ = true;  // nothing but whitespace so far: a `<think>` here is the model repeating the prompt's
  SpaceHolder space_;
  std::string buffer_;  // empty or the beginning of a possible tag, between pushes
  size_t position_ = 0;
};

}  // namespace tokenspeed::text

// Holds the arguments of a tool call to their declared types while they are generated: inside the value of a parameter
// whose schema is an enumeration, a number, a boolean or null, only tokens that keep the value on its way to one of
// those may follow. Everything else (text, reasoning, other arguments) stays free, and a value that does not begin on
// its own line is left alone.
// Invariant: while the model's most likely tokens write valid values, nothing changes.
// Cost: the text is parsed a second time (under a microsecond a token); allowed() inside such a value walks the
// matching part of the vocabulary.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "text/output_parser.h"
#include "text/sorted_vocabulary.h"
#include "text/tokenizer.h"

namespace tokenspeed::text {

class ToolCallConstraint {
 public:
  // `forced_prefix`: output that the prompt already ends with. The tokenizer and vocabulary must outlive this.
  ToolCallConstraint(const Tokenizer& tokenizer, const SortedVocabulary& vocabulary, OutputParserOptions options,
                     std::string_view forced_prefix);
  void push(int32_t token);
  // The tokens that may come next, ascending; empty: any. Valid until the next call.
  std::span<const int32_t> allowed();

 private:
  const Tokenizer* tokenizer_;
  const SortedVocabulary* vocabulary_;
  OutputParser parser_;
  std::vector<int32_t> allowed_;
};

}  // namespace tokenspeed::text

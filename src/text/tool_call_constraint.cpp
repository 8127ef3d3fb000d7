#include "text/tool_call_constraint.h"

#include <algorithm>
#include <string>
#include <utility>

namespace tokenspeed::text {

ToolCallConstraint::ToolCallConstraint(const Tokenizer& tokenizer, const SortedVocabulary& vocabulary,
                                       OutputParserOptions options, std::string_view forced_prefix)
    : tokenizer_(&tokenizer), vocabulary_(&vocabulary), parser_(std::move(options), 0) {
  parser_.push(forced_prefix);
}

void ToolCallConstraint::push(int32_t token) {
  const std::string* bytes = tokenizer_->token_bytes(token);
  if (bytes != nullptr && !tokenizer_->is_special(token)) parser_.push(*bytes);
}

std::span<const int32_t> ToolCallConstraint::allowed() {
  allowed_.clear();
  const OpenValue value = parser_.open_value();
  if (value.grammar == nullptr || value.grammar->match(value.text) != TagMatch::kPartial) return {};
  for (const std::string& rest : value.grammar->literal_completions(value.text)) {
    vocabulary_->add_towards(rest, &allowed_);
  }
  if (value.grammar->number != ValueGrammar::Number::kNone) {
    const auto may_continue = [&](std::string_view text) { return value.grammar->match_number(text) != TagMatch::kNo; };
    vocabulary_->add_matching(std::string(value.text), may_continue, &allowed_);
  }
  std::sort(allowed_.begin(), allowed_.end());  // literals share tokens
  allowed_.erase(std::unique(allowed_.begin(), allowed_.end()), allowed_.end());
  return allowed_;
}

}  // namespace tokenspeed::text

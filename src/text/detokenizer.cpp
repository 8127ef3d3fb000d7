#include "text/detokenizer.h"

#include "text/unicode.h"

namespace tokenspeed::text {

StreamingDetokenizer::StreamingDetokenizer(const Tokenizer& tokenizer, bool skip_special_tokens)
    : tokenizer_(&tokenizer), skip_special_tokens_(skip_special_tokens) {}

std::string StreamingDetokenizer::push(int32_t id) {
  if (skip_special_tokens_ && tokenizer_->is_special(id)) return {};
  const std::string* token = tokenizer_->token_bytes(id);
  if (token == nullptr) return {};
  held_ += *token;
  std::string text;
  held_.erase(0, append_repaired_utf8(held_, /*hold_tail=*/true, text));
  return text;
}

std::string StreamingDetokenizer::finish() {
  std::string text;
  append_repaired_utf8(held_, /*hold_tail=*/false, text);
  held_.clear();
  return text;
}

}  // namespace tokenspeed::text

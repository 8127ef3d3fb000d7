// Token ids to text one at a time, for streaming. Never emits part of a character: an incomplete UTF-8 tail (at most
// three bytes) waits for the next token.
// Invariant: all pieces together, finish() last, are Tokenizer::decode of all ids.
#pragma once

#include <cstdint>
#include <string>

#include "text/tokenizer.h"

namespace tokenspeed::text {

class StreamingDetokenizer {
 public:
  // The tokenizer must outlive this.
  explicit StreamingDetokenizer(const Tokenizer& tokenizer, bool skip_special_tokens);
  // The text that `id` completes; may be empty. Unknown ids add nothing.
  std::string push(int32_t id);
  // What is left when the stream ends: U+FFFD for an incomplete character, else nothing. Ready for a new stream then.
  std::string finish();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_tokens_;
  std::string held_;
};

}  // namespace tokenspeed::text

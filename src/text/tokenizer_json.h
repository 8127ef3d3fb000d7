// tokenizer.json as plain data, checked: what a Tokenizer is made of.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "text/bpe.h"
#include "text/pretokenizer.h"
#include "text/tokenizer_added.h"

namespace tokenspeed::text {

enum class TokenKind : uint8_t { kUnknown, kVocabulary, kAdded, kSpecial };

struct TokenizerParts {
  bool nfc = false;
  Pretokenizer pretokenizer;
  BpeModel model;                // tokens(): every id's bytes, added tokens' too
  std::vector<TokenKind> kinds;  // by id; kUnknown fills the gaps
  std::vector<AddedToken> added_tokens;
};

// Errors: data_loss (not JSON, a missing or wrong field, contradictions), unimplemented (another kind of tokenizer).
Result<TokenizerParts> parse_tokenizer_json(std::string_view json);

}  // namespace tokenspeed::text

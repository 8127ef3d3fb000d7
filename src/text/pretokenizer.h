// Cuts normalized text into words by the Split pattern of tokenizer.json (behaviour Isolated): matches and the gaps
// between them are the words, and together they are the text. Two patterns, Qwen2/3's and Qwen3.5's, run in
// hand-written scanners (hundreds of MB/s); every other runs in PCRE2 with JIT.
// Invariant: input is valid UTF-8; splitting is const and thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace tokenspeed::text {

extern const std::string_view kQwen2Pattern;   // also Qwen3's
extern const std::string_view kQwen35Pattern;  // marks belong to words
extern const std::string_view kGpt2Pattern;    // what ByteLevel's use_regex means

class Pretokenizer {
 public:
  // The whole text as one word.
  Pretokenizer();
  // Chooses a scanner when the pattern is exactly one of Qwen's, else compile_regex.
  static Result<Pretokenizer> compile(std::string_view pattern);
  // Always PCRE2. Errors: data_loss (the pattern does not compile; says where and why).
  static Result<Pretokenizer> compile_regex(std::string_view pattern);
  ~Pretokenizer();
  Pretokenizer(Pretokenizer&&) noexcept;
  Pretokenizer& operator=(Pretokenizer&&) noexcept;

  // Appends the end offset of each word to `ends` (none for an empty text; the last is text.size()).
  // Errors: invalid_argument (the pattern's backtracking exceeds PCRE2's limits on this text).
  Status split(std::string_view text, std::vector<uint32_t>& ends) const;

 private:
  enum class Kind : uint8_t { kWhole, kQwen2, kQwen35, kRegex };
  struct Regex;
  Kind kind_;
  std::unique_ptr<Regex> regex_;
};

// The scanners, for valid UTF-8.
void split_qwen2(std::string_view text, std::vector<uint32_t>& ends);
void split_qwen35(std::string_view text, std::vector<uint32_t>& ends);

}  // namespace tokenspeed::text

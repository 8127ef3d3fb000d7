// UTF-8 and the few Unicode facts the tokenizer needs: one class per code point, validity, repair and NFC.
// The class table is built once from ICU on first use (about a millisecond) and is 4 KB plus the distinct blocks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace tokenspeed::text {

// What Qwen's patterns tell apart. The classes are disjoint: White_Space holds no letter, mark or number.
enum class CharClass : uint8_t { kOther, kLetter, kMark, kNumber, kSpace, kNewline };  // kNewline: CR and LF

// The class of every code point, in two stages: block of 256 → row.
class CharClassTable {
 public:
  static const CharClassTable& instance();
  CharClass ascii(unsigned char byte) const { return ascii_[byte & 0x7f]; }
  CharClass of(char32_t code_point) const {
    return rows_[static_cast<size_t>(blocks_[code_point >> 8]) * 256 + (code_point & 0xff)];
  }

 private:
  CharClassTable();
  std::array<CharClass, 128> ascii_{};
  std::array<uint16_t, 0x1100> blocks_{};
  std::vector<CharClass> rows_;
};

struct DecodedChar {
  char32_t code_point;
  uint32_t length;  // bytes
};

// The character at `position` of a text that is known to be valid UTF-8; position < text.size().
inline DecodedChar decode_valid_utf8(std::string_view text, size_t position) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data()) + position;
  if (bytes[0] < 0x80) return {bytes[0], 1};
  if (bytes[0] < 0xe0) return {char32_t((bytes[0] & 0x1fu) << 6 | (bytes[1] & 0x3fu)), 2};
  if (bytes[0] < 0xf0) {
    return {char32_t((bytes[0] & 0x0fu) << 12 | (bytes[1] & 0x3fu) << 6 | (bytes[2] & 0x3fu)), 3};
  }
  return {char32_t((bytes[0] & 0x07u) << 18 | (bytes[1] & 0x3fu) << 12 | (bytes[2] & 0x3fu) << 6 | (bytes[3] & 0x3fu)),
          4};
}

// The start of the character that ends at `position` > 0 of a valid text.
inline size_t previous_char(std::string_view text, size_t position) {
  do --position;
  while ((static_cast<unsigned char>(text[position]) & 0xc0) == 0x80);
  return position;
}

enum class Utf8Kind : uint8_t { kValid, kInvalid, kIncomplete };

// A character, or the longest ill-formed run that counts as one error (Unicode's "maximal subpart"), at the front of
// `bytes` (not empty). kIncomplete: the bytes end inside a character that may still become valid.
struct Utf8Step {
  Utf8Kind kind;
  uint32_t length;
};
Utf8Step utf8_step(std::string_view bytes);

// Offset of the first byte that is not UTF-8; nothing when the text is valid.
std::optional<size_t> find_invalid_utf8(std::string_view text);

// Appends `bytes` to `out`, each ill-formed run replaced by one U+FFFD. With `hold_tail` an incomplete character at the
// end is left out. Returns the number of bytes consumed.
size_t append_repaired_utf8(std::string_view bytes, bool hold_tail, std::string& out);

// Puts valid UTF-8 into Unicode normalization form C. Returns `text` itself when nothing changes, else a view of
// `buffer`. Errors: internal (ICU's data is missing).
Result<std::string_view> normalize_nfc(std::string_view text, std::string& buffer);

// White_Space, and a regular expression's "word" character (alphabetic, mark, decimal digit, connector, join control).
bool is_white_space(char32_t code_point);
bool is_word(char32_t code_point);

}  // namespace tokenspeed::text

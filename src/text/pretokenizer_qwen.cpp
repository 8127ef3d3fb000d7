// Qwen's Split pattern by hand. Its alternatives, tried in order at each position:
//   1 a contraction ('s 't 're 've 'm 'll 'd, any case)      2 one optional leader, then letters (Qwen3.5: and marks)
//   3 one number character     4 optional space, then other characters, then newlines
//   5 white space up to its last newline     6 white space but its last character, before a word     7 white space
#include "text/pretokenizer.h"
#include "text/unicode.h"

namespace tokenspeed::text {
namespace {

template <bool kMarksInWords>
class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}

  // End of the word that starts at `position` < text.size().
  size_t word_end(size_t position) const {
    const Char first = at(position);
    const size_t next = position + first.length;
    if (text_[position] == '\'') {
      if (const size_t length = contraction(position + 1); length > 0) return position + 1 + length;
    }
    if (in_word(first.kind)) {
      // A mark may be the leader too, but the run it leads is the same.
      if (kMarksInWords || first.kind == CharClass::kLetter) return word_run(next);
    }
    if (may_lead(first.kind) && next < text_.size() && in_word(at(next).kind)) return word_run(next);
    if (first.kind == CharClass::kNumber) return next;
    if (in_punctuation(first.kind)) return newline_run(punctuation_run(next));
    if (text_[position] == ' ' && next < text_.size() && in_punctuation(at(next).kind)) {
      return newline_run(punctuation_run(next));
    }
    return white_space_end(position);
  }

 private:
  struct Char {
    CharClass kind;
    uint32_t length;
  };

  Char at(size_t position) const {
    const auto byte = static_cast<unsigned char>(text_[position]);
    if (byte < 0x80) return {table_.ascii(byte), 1};
    const DecodedChar decoded = decode_valid_utf8(text_, position);
    return {table_.of(decoded.code_point), decoded.length};
  }

  static bool in_word(CharClass kind) {
    return kind == CharClass::kLetter || (kMarksInWords && kind == CharClass::kMark);
  }
  static bool in_punctuation(CharClass kind) {
    return kind == CharClass::kOther || (!kMarksInWords && kind == CharClass::kMark);
  }
  static bool in_white_space(CharClass kind) { return kind == CharClass::kSpace || kind == CharClass::kNewline; }
  static bool may_lead(CharClass kind) {
    return kind != CharClass::kNewline && kind != CharClass::kLetter && kind != CharClass::kNumber;
  }

  template <typename Predicate>
  size_t run(size_t position, Predicate predicate) const {
    while (position < text_.size()) {
      const Char current = at(position);
      if (!predicate(current.kind)) break;
      position += current.length;
    }
    return position;
  }
  size_t word_run(size_t position) const { return run(position, in_word); }
  size_t punctuation_run(size_t position) const { return run(position, in_punctuation); }
  size_t newline_run(size_t position) const {
    return run(position, [](CharClass kind) { return kind == CharClass::kNewline; });
  }

  // Bytes of the contraction after an apostrophe, 0 for none. U+017F (ſ) is an s to a caseless match.
  size_t contraction(size_t position) const {
    const std::string_view rest = text_.substr(position, 2);
    if (rest.empty()) return 0;
    if (rest == "\xc5\xbf") return 2;
    const char first = static_cast<char>(rest[0] | 0x20);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 1;
    if (rest.size() < 2) return 0;
    const char second = static_cast<char>(rest[1] | 0x20);
    const bool pair =
        (first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l');
    return pair ? 2 : 0;
  }

  size_t white_space_end(size_t start) const {
    size_t after_newline = 0;
    size_t last = start;
    size_t position = start;
    while (position < text_.size()) {
      const Char current = at(position);
      if (!in_white_space(current.kind)) break;
      last = position;
      position += current.length;
      if (current.kind == CharClass::kNewline) after_newline = position;
    }
    if (after_newline > 0) return after_newline;
    if (position < text_.size() && last > start) return last;
    return position;
  }

  const std::string_view text_;
  const CharClassTable& table_ = CharClassTable::instance();
};

template <bool kMarksInWords>
void split(std::string_view text, std::vector<uint32_t>& ends) {
  const Scanner<kMarksInWords> scanner(text);
  for (size_t position = 0; position < text.size();) {
    position = scanner.word_end(position);
    ends.push_back(static_cast<uint32_t>(position));
  }
}

}  // namespace

void split_qwen2(std::string_view text, std::vector<uint32_t>& ends) { split<false>(text, ends); }
void split_qwen35(std::string_view text, std::vector<uint32_t>& ends) { split<true>(text, ends); }

}  // namespace tokenspeed::text

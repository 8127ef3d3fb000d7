#include "text/jinja_lexer.h"

#include <algorithm>
#include <array>

#include "text/jinja_text.h"

namespace tokenspeed::text::jinja {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
int hex_digit(char c) {
  if (is_digit(c)) return c - '0';
  const char lower = static_cast<char>(c | 0x20);
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

// Line ends become \n; one at the very end is dropped.
std::string normalize(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
    } else {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    }
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

// Reads `count` hex digits at `position` (after "\x", "\u" or "\U").
uint32_t read_hex(std::string_view text, size_t position, size_t count, int line) {
  uint32_t value = 0;
  for (size_t i = 0; i < count; ++i) {
    const int digit = position + i < text.size() ? hex_digit(text[position + i]) : -1;
    if (digit < 0) throw TemplateError("a \\x, \\u or \\U escape in a string has too few hexadecimal digits", line);
    value = value << 4 | static_cast<uint32_t>(digit);
  }
  if (value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) {
    throw TemplateError("a \\u or \\U escape in a string names no character", line);
  }
  return value;
}

std::string unescape(std::string_view text, int line) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\' || i + 1 == text.size()) {
      out += text[i];
      continue;
    }
    const char c = text[++i];
    constexpr std::string_view kNames = "abfnrtv\\'\"", kMeanings = "\a\b\f\n\r\t\v\\'\"";
    if (const size_t known = kNames.find(c); known != std::string_view::npos) {
      out += kMeanings[known];
    } else if (c == 'x' || c == 'u' || c == 'U') {
      const size_t count = c == 'x' ? 2 : c == 'u' ? 4 : 8;
      append_utf8(out, read_hex(text, i + 1, count, line));
      i += count;
    } else if (c >= '0' && c <= '7') {
      uint32_t value = 0;
      size_t end = i;
      while (end < std::min(i + 3, text.size()) && text[end] >= '0' && text[end] <= '7') {
        value = value * 8 + static_cast<uint32_t>(text[end++] - '0');
      }
      append_utf8(out, value);
      i = end - 1;
    } else if (c != '\n') {
      out += '\\';
      out += c;
    }
  }
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(normalize(source)) {}

  std::vector<Token> run() {
    while (position_ < source_.size()) data();
    add(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  std::string_view rest() const { return std::string_view(source_).substr(position_); }
  bool starts_with(std::string_view text) const { return rest().starts_with(text); }
  void add(TokenKind kind, std::string text) { tokens_.push_back({kind, line_, std::move(text)}); }

  // Every step forward passes here: keeps the line number, and whether the step ended at a line's start, which is
  // where Jinja lets lstrip_blocks act.
  void advance(size_t count) {
    if (count == 0) return;
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(position_),
                                         source_.begin() + static_cast<ptrdiff_t>(position_ + count), '\n'));
    position_ += count;
    line_starting_ = source_[position_ - 1] == '\n';
  }
  void skip_space() { advance(rest().size() - strip_left(rest()).size()); }

  // Adds the text before a tag, whose opening is "{%", "{{" or "{#" plus `sign` ('-', '+' or none).
  void add_data(std::string_view text, char sign, bool lstrip) {
    if (sign == '-') {
      text = strip_right(text);
    } else if (sign != '+' && lstrip) {
      const size_t newline = text.rfind('\n');
      const size_t start = newline == std::string_view::npos ? 0 : newline + 1;
      if ((start > 0 || line_starting_) && strip_left(text.substr(start)).empty()) text = text.substr(0, start);
    }
    if (!text.empty()) add(TokenKind::kData, std::string(text));
  }

  char sign_at(size_t position) const {
    return position < source_.size() && (source_[position] == '-' || source_[position] == '+') ? source_[position] : 0;
  }

  void data() {
    size_t tag = position_;
    while (true) {
      tag = source_.find('{', tag);
      if (tag == std::string::npos) {
        add(TokenKind::kData, std::string(rest()));
        return advance(rest().size());
      }
      if (tag + 1 < source_.size() && std::string_view("{%#").find(source_[tag + 1]) != std::string_view::npos) break;
      ++tag;
    }
    const char kind = source_[tag + 1];
    const char sign = sign_at(tag + 2);
    add_data(std::string_view(source_).substr(position_, tag - position_), sign, kind != '{');
    advance(tag + 2 + (sign != 0) - position_);
    if (kind == '#') {
      comment();
    } else if (kind == '{') {
      add(TokenKind::kVariableBegin, "");
      code(TokenKind::kVariableEnd, "}}");
    } else if (const size_t raw_start = raw_begin(); raw_start != std::string::npos) {
      advance(raw_start - position_);
      raw();
    } else {
      add(TokenKind::kBlockBegin, "");
      code(TokenKind::kBlockEnd, "%}");
    }
  }

  void comment() {
    const size_t end = source_.find("#}", position_);
    if (end == std::string::npos) throw TemplateError("a comment is not closed", line_);
    const char sign = end > position_ ? sign_at(end - 1) : 0;
    advance(end + 2 - position_);
    after_tag(sign, true);
  }

  // White space after a closing tag: all of it after "-", else one newline where blocks are trimmed.
  void after_tag(char sign, bool trim) {
    if (sign == '-') {
      skip_space();
    } else if (trim && sign != '+' && starts_with("\n")) {
      advance(1);
    }
  }

  // If the block just opened is "raw", where its text begins, else npos.
  size_t raw_begin() const {
    std::string_view text = strip_left(rest());
    if (!text.starts_with("raw")) return std::string::npos;
    text = strip_left(text.substr(3));
    if (text.starts_with("%}")) return source_.size() - text.size() + 2;
    if (text.starts_with("-%}")) return source_.size() - strip_left(text.substr(3)).size();
    return std::string::npos;
  }

  void raw() {
    for (size_t tag = source_.find("{%", position_); tag != std::string::npos; tag = source_.find("{%", tag + 2)) {
      const char sign = sign_at(tag + 2);
      std::string_view text = strip_left(std::string_view(source_).substr(tag + 2 + (sign != 0)));
      if (!text.starts_with("endraw")) continue;
      text = strip_left(text.substr(6));
      const char end_sign = text.starts_with("-%}") ? '-' : text.starts_with("+%}") ? '+' : 0;
      if (end_sign == 0 && !text.starts_with("%}")) continue;
      add_data(std::string_view(source_).substr(position_, tag - position_), sign, true);
      advance(source_.size() - text.size() + 2 + (end_sign != 0) - position_);
      return after_tag(end_sign, true);
    }
    throw TemplateError("a raw block is not closed", line_);
  }

  void code(TokenKind end_kind, std::string_view end_mark) {
    std::string open;  // brackets not closed yet: inside them the end mark is no end
    while (true) {
      if (open.empty()) {
        const char sign = sign_at(position_);
        const bool signed_end =
            sign != 0 && (sign == '-' || end_kind == TokenKind::kBlockEnd) && rest().substr(1).starts_with(end_mark);
        if (signed_end || starts_with(end_mark)) {
          add(end_kind, "");
          advance(end_mark.size() + signed_end);
          return after_tag(signed_end ? sign : 0, end_kind == TokenKind::kBlockEnd);
        }
      }
      if (position_ == source_.size()) throw TemplateError("a tag is not closed", line_);
      const size_t before = position_;
      skip_space();
      if (position_ == before) token(open);
    }
  }

  void token(std::string& open) {
    const uint32_t first = code_point(source_, position_);
    if (is_digit(source_[position_])) return number();
    if (first == '\'' || first == '"') return string(static_cast<char>(first));
    if (is_name_start(first)) {
      size_t end = position_;
      while (end < source_.size() && is_name_part(code_point(source_, end))) end += character_size(source_, end);
      add(TokenKind::kName, source_.substr(position_, end - position_));
      return advance(end - position_);
    }
    constexpr std::array<std::string_view, 6> kLong = {"//", "**", "==", "!=", ">=", "<="};
    for (const std::string_view text : kLong) {
      if (!starts_with(text)) continue;
      add(TokenKind::kOperator, std::string(text));
      return advance(text.size());
    }
    if (first >= 0x80 ||
        std::string_view("+-/*%~[](){}><=.:|,;").find(static_cast<char>(first)) == std::string_view::npos) {
      throw TemplateError("unexpected character " + quote(rest().substr(0, character_size(source_, position_))), line_);
    }
    const char c = static_cast<char>(first);
    if (c == '(' || c == '[' || c == '{') open += c;
    if (c == ')' || c == ']' || c == '}') {
      const char expected = c == ')' ? '(' : c == ']' ? '[' : '{';
      if (open.empty() || open.back() != expected) throw TemplateError(std::string("unexpected '") + c + "'", line_);
      open.pop_back();
    }
    add(TokenKind::kOperator, std::string(1, c));
    advance(1);
  }

  void string(char mark) {
    size_t end = position_ + 1;
    while (end < source_.size() && source_[end] != mark) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) throw TemplateError("a string is not closed", line_);
    add(TokenKind::kString, unescape(std::string_view(source_).substr(position_ + 1, end - position_ - 1), line_));
    advance(end + 1 - position_);
  }

  // Digits with single underscores between them; returns the position after them.
  size_t digits(size_t start) const {
    size_t end = start;
    while (end < source_.size() &&
           (is_digit(source_[end]) ||
            (source_[end] == '_' && end > start && end + 1 < source_.size() && is_digit(source_[end + 1])))) {
      ++end;
    }
    return end;
  }

  void number() {
    if (prefixed_integer()) return;
    size_t end = digits(position_);
    bool is_float = false;
    if (end + 1 < source_.size() && source_[end] == '.' && is_digit(source_[end + 1]) && !after_dot()) {
      end = digits(end + 1);
      is_float = true;
    }
    if (end < source_.size() && (source_[end] | 0x20) == 'e' && !after_dot()) {
      const size_t exponent = end + 1 + (sign_at(end + 1) != 0);
      if (exponent < source_.size() && is_digit(source_[exponent])) {
        end = digits(exponent);
        is_float = true;
      }
    }
    std::string text = source_.substr(position_, end - position_);
    std::erase(text, '_');
    if (!is_float && text.size() > 1 && text[0] == '0') {
      if (text.find_first_not_of('0') != std::string::npos) throw TemplateError("an integer starts with 0", line_);
      text = "0";
    }
    add(is_float ? TokenKind::kFloat : TokenKind::kInteger, std::move(text));
    advance(end - position_);
  }

  // x.0.1 is two subscripts, not a subscript by 0.1.
  bool after_dot() const { return position_ > 0 && source_[position_ - 1] == '.'; }

  // 0x1F, 0o17, 0b11: added as decimal text.
  bool prefixed_integer() {
    if (source_[position_] != '0' || position_ + 2 >= source_.size()) return false;
    const char letter = static_cast<char>(source_[position_ + 1] | 0x20);
    const int base = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 0;
    if (base == 0) return false;
    uint64_t value = 0;
    size_t end = position_ + 2;
    for (; end < source_.size(); ++end) {
      if (source_[end] == '_') continue;
      const int digit = hex_digit(source_[end]);
      if (digit < 0 || digit >= base) break;
      if (value >> 58 != 0) throw TemplateError("an integer is too large", line_);
      value = value * static_cast<uint64_t>(base) + static_cast<uint64_t>(digit);
    }
    if (end == position_ + 2) return false;
    add(TokenKind::kInteger, std::to_string(value));
    advance(end - position_);
    return true;
  }

  std::string source_;
  size_t position_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) { return Lexer(source).run(); }

}  // namespace tokenspeed::text::jinja

#include "text/python_literal.h"

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>

#include "text/tool_tags.h"
#include "text/tool_value.h"

namespace tokenspeed::text {
namespace {

void append_utf8(uint32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
  } else if (code < 0x800) {
    out->push_back(static_cast<char>(0xC0 | code >> 6));
    out->push_back(static_cast<char>(0x80 | (code & 0x3F)));
  } else if (code < 0x10000) {
    out->push_back(static_cast<char>(0xE0 | code >> 12));
    out->push_back(static_cast<char>(0x80 | (code >> 6 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code & 0x3F)));
  } else {
    out->push_back(static_cast<char>(0xF0 | code >> 18));
    out->push_back(static_cast<char>(0x80 | (code >> 12 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code >> 6 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code & 0x3F)));
  }
}

class LiteralReader {
 public:
  explicit LiteralReader(std::string_view text) : text_(text) {}

  bool read_all() { return read_value(0) && (skip_space(), position_ == text_.size()); }
  std::string take_json() { return std::move(json_); }

 private:
  bool read_value(int depth) {
    skip_space();
    if (position_ == text_.size() || depth > kMaxValueDepth) return false;
    switch (text_[position_]) {
      case '{':
        return read_items('}', true, depth);
      case '[':
        return read_items(']', false, depth);
      case '(':
        return read_items(')', false, depth);
      case '"':
      case '\'':
        return read_string();
      default:
        return read_word();
    }
  }

  bool read_items(char close, bool keyed, int depth) {
    ++position_;
    json_.push_back(keyed ? '{' : '[');
    for (bool first = true;; first = false) {
      if (take(close)) break;
      if (!first) json_ += ", ";
      if (keyed) {
        skip_space();
        if (position_ == text_.size() || (text_[position_] != '"' && text_[position_] != '\'')) return false;
        if (!read_string() || !take(':')) return false;
        json_ += ": ";
      }
      if (!read_value(depth + 1)) return false;
      if (take(',')) continue;
      if (!take(close)) return false;
      break;
    }
    json_.push_back(keyed ? '}' : ']');
    return true;
  }

  bool read_string() {
    const char quote = text_[position_++];
    std::string value;
    while (position_ < text_.size() && text_[position_] != quote) {
      if (text_[position_] != '\\') {
        value.push_back(text_[position_++]);
      } else if (!read_escape(&value)) {
        return false;
      }
    }
    if (position_ == text_.size()) return false;
    ++position_;
    json_ += json_string(value);
    return true;
  }

  bool read_escape(std::string* value) {
    static constexpr std::string_view kNames = "\\'\"abfnrtv";
    static constexpr std::string_view kBytes = "\\'\"\a\b\f\n\r\t\v";
    ++position_;
    if (position_ == text_.size()) return false;
    const char name = text_[position_++];
    if (const size_t index = kNames.find(name); index != std::string_view::npos) {
      value->push_back(kBytes[index]);
      return true;
    }
    if (name == 'x') return read_hex(2, value);
    if (name == 'u') return read_hex(4, value);
    if (name == 'U') return read_hex(8, value);
    value->push_back('\\');  // Python keeps an unknown escape as it is.
    value->push_back(name);
    return true;
  }

  bool read_hex(size_t digits, std::string* value) {
    uint32_t code = 0;
    for (size_t i = 0; i < digits; ++i, ++position_) {
      static constexpr std::string_view kDigits = "0123456789abcdef";
      if (position_ == text_.size()) return false;
      const char c = text_[position_];
      const size_t digit = kDigits.find(c >= 'A' && c <= 'F' ? static_cast<char>(c - 'A' + 'a') : c);
      if (digit == std::string_view::npos) return false;
      code = code << 4 | static_cast<uint32_t>(digit);
    }
    if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return false;
    append_utf8(code, value);
    return true;
  }

  bool read_word() {
    const size_t end = std::min(text_.find_first_of(",:]}) \t\r\n", position_), text_.size());
    const std::string_view word = text_.substr(position_, end - position_);
    position_ = end;
    if (word == "True" || word == "true") {
      json_ += "true";
    } else if (word == "False" || word == "false") {
      json_ += "false";
    } else if (word == "None" || word == "null") {
      json_ += "null";
    } else if (!word.empty() && (word[0] == '-' || (word[0] >= '0' && word[0] <= '9')) &&
               nlohmann::json::accept(word)) {
      json_ += word;
    } else {
      return false;
    }
    return true;
  }

  void skip_space() {
    while (position_ < text_.size() && is_space(text_[position_])) ++position_;
  }

  bool take(char c) {
    skip_space();
    if (position_ == text_.size() || text_[position_] != c) return false;
    ++position_;
    return true;
  }

  std::string_view text_;
  size_t position_ = 0;
  std::string json_;
};

}  // namespace

std::optional<std::string> python_literal_to_json(std::string_view text) {
  LiteralReader reader(text);
  if (!reader.read_all()) return std::nullopt;
  return reader.take_json();
}

}  // namespace tokenspeed::text

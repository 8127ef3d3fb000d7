#include "text/jinja_text.h"

#include <unicode/locid.h>
#include <unicode/uchar.h>
#include <unicode/unistr.h>

#include <charconv>
#include <cmath>

namespace tokenspeed::text::jinja {
namespace {

// Decodes strictly (no overlong forms, surrogates or values past U+10FFFF); 0 bytes when invalid.
size_t decode(std::string_view text, size_t position, uint32_t& result) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[position + i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) {
    result = lead;
    return 1;
  }
  const size_t size = lead >= 0xF0 && lead < 0xF5   ? 4
                      : lead >= 0xE0 && lead < 0xF0 ? 3
                      : lead >= 0xC2 && lead < 0xE0 ? 2
                                                    : 0;
  if (size == 0 || text.size() - position < size) return 0;
  uint32_t value = lead & (0xFF >> (size + 1));
  for (size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
    value = value << 6 | (byte(i) & 0x3F);
  }
  constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  if (value < kLeast[size] || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) return 0;
  result = value;
  return size;
}

icu::UnicodeString to_icu(std::string_view text) {
  return icu::UnicodeString::fromUTF8(icu::StringPiece(text.data(), static_cast<int32_t>(text.size())));
}

std::string from_icu(const icu::UnicodeString& text) {
  std::string out;
  return text.toUTF8String(out);
}

bool in_set(std::string_view character, uint32_t code, const std::string* set) {
  if (set == nullptr) return is_space(code);
  for (size_t i = 0; i < set->size(); i += character_size(*set, i)) {
    if (std::string_view(*set).substr(i, character_size(*set, i)) == character) return true;
  }
  return false;
}

bool is_printable(uint32_t code) {
  if (code == ' ') return true;
  switch (u_charType(static_cast<UChar32>(code))) {
    case U_CONTROL_CHAR:
    case U_FORMAT_CHAR:
    case U_SURROGATE:
    case U_PRIVATE_USE_CHAR:
    case U_UNASSIGNED:
    case U_LINE_SEPARATOR:
    case U_PARAGRAPH_SEPARATOR:
    case U_SPACE_SEPARATOR:
      return false;
    default:
      return true;
  }
}

void append_escape(std::string& out, uint32_t code) {
  const int digits = code > 0xFFFF ? 8 : code > 0xFF ? 4 : 2;
  out += digits == 8 ? "\\U" : digits == 4 ? "\\u" : "\\x";
  for (int shift = 4 * (digits - 1); shift >= 0; shift -= 4) out += "0123456789abcdef"[code >> shift & 15];
}

}  // namespace

size_t character_size(std::string_view text, size_t position) {
  uint32_t ignored;
  const size_t size = decode(text, position, ignored);
  return size == 0 ? 1 : size;
}

uint32_t code_point(std::string_view text, size_t position) {
  uint32_t result;
  return decode(text, position, result) == 0 ? 0xFFFD : result;
}

void append_utf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

size_t character_count(std::string_view text) {
  size_t count = 0;
  for (size_t i = 0; i < text.size(); i += character_size(text, i)) ++count;
  return count;
}

std::vector<std::string_view> characters(std::string_view text) {
  std::vector<std::string_view> result;
  for (size_t i = 0; i < text.size();) {
    const size_t size = character_size(text, i);
    result.push_back(text.substr(i, size));
    i += size;
  }
  return result;
}

bool is_space(uint32_t c) {
  return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_name_start(uint32_t c) {
  if (c < 0x80) return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
  return c != 0xFFFD && u_isalpha(static_cast<UChar32>(c));
}

bool is_name_part(uint32_t c) {
  if (c < 0x80) return is_name_start(c) || (c >= '0' && c <= '9');
  return c != 0xFFFD && u_isalnum(static_cast<UChar32>(c));
}

std::string_view strip_left(std::string_view text, const std::string* set) {
  while (!text.empty()) {
    const size_t size = character_size(text, 0);
    if (!in_set(text.substr(0, size), code_point(text, 0), set)) break;
    text.remove_prefix(size);
  }
  return text;
}

std::string_view strip_right(std::string_view text, const std::string* set) {
  while (!text.empty()) {
    size_t start = text.size() - 1;
    while (start > 0 && text.size() - start < 4 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
    if (character_size(text, start) != text.size() - start) start = text.size() - 1;
    if (!in_set(text.substr(start), code_point(text, start), set)) break;
    text = text.substr(0, start);
  }
  return text;
}

std::string to_upper(std::string_view text) { return from_icu(to_icu(text).toUpper(icu::Locale::getRoot())); }
std::string to_lower(std::string_view text) { return from_icu(to_icu(text).toLower(icu::Locale::getRoot())); }

std::string capitalize(std::string_view text) {
  if (text.empty()) return {};
  const size_t first = character_size(text, 0);
  std::string out;
  append_utf8(out, static_cast<uint32_t>(u_totitle(static_cast<UChar32>(code_point(text, 0)))));
  return out + to_lower(text.substr(first));
}

std::string title(std::string_view text) {
  std::string out;
  size_t start = 0;
  const auto is_break = [&](size_t i) {
    return is_space(code_point(text, i)) || std::string_view("-({[<").find(text[i]) != std::string_view::npos;
  };
  for (size_t i = 0; i < text.size();) {
    const bool is_a_break = is_break(i);
    const size_t size = character_size(text, i);
    i += size;
    if (is_a_break || i == text.size()) {
      const std::string_view word = text.substr(start, i - start);
      const size_t first = character_size(word, 0);
      out += to_upper(word.substr(0, first)) + to_lower(word.substr(first));
      start = i;
    }
  }
  return out;
}

std::string quote(std::string_view text) {
  const char mark = text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos ? '"' : '\'';
  std::string out(1, mark);
  for (size_t i = 0; i < text.size();) {
    const size_t size = character_size(text, i);
    const uint32_t code = code_point(text, i);
    if (code == '\n') {
      out += "\\n";
    } else if (code == '\r') {
      out += "\\r";
    } else if (code == '\t') {
      out += "\\t";
    } else if (code == '\\' || code == static_cast<unsigned char>(mark)) {
      out += '\\';
      out += text[i];
    } else if (is_printable(code)) {
      out += text.substr(i, size);
    } else {
      append_escape(out, code);
    }
    i += size;
  }
  return out += mark;
}

std::string float_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[64];
  // The shortest digits that read back as the same double, as "d.ddde+XX"; Python writes exponents -4..15 in full.
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific).ptr;
  const std::string_view scientific(buffer, static_cast<size_t>(end - buffer));
  const size_t mark = scientific.find('e');
  int exponent = 0;
  const size_t digits_start = scientific[mark + 1] == '+' ? mark + 2 : mark + 1;
  std::from_chars(scientific.data() + digits_start, scientific.data() + scientific.size(), exponent);
  if (exponent < -4 || exponent >= 16) return std::string(scientific);
  const auto fixed_end = std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::fixed).ptr;
  std::string fixed(buffer, static_cast<size_t>(fixed_end - buffer));
  if (fixed.find('.') == std::string::npos) fixed += ".0";
  return fixed;
}

}  // namespace tokenspeed::text::jinja

// Python's view of UTF-8 text: characters are code points, and spaces, cases, quotes and floats are Python's.
// An invalid byte counts as one character and is copied as it is; nothing here fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tokenspeed::text::jinja {

// Length in bytes of the character at `position` (position < text.size()).
size_t character_size(std::string_view text, size_t position);
// Its code point; U+FFFD for an invalid byte.
uint32_t code_point(std::string_view text, size_t position);
void append_utf8(std::string& out, uint32_t code_point);
size_t character_count(std::string_view text);
std::vector<std::string_view> characters(std::string_view text);

bool is_space(uint32_t code_point);       // str.isspace()
bool is_name_start(uint32_t code_point);  // may start an identifier
bool is_name_part(uint32_t code_point);

// str.lstrip/rstrip; `set` null means white space, else any of its characters.
std::string_view strip_left(std::string_view text, const std::string* set = nullptr);
std::string_view strip_right(std::string_view text, const std::string* set = nullptr);

std::string to_upper(std::string_view text);
std::string to_lower(std::string_view text);
// str.capitalize() and Jinja's title filter.
std::string capitalize(std::string_view text);
std::string title(std::string_view text);

std::string quote(std::string_view text);  // repr() of a str
std::string float_text(double value);      // repr() of a float: 1.0, 1e-07, 1e+16, inf, nan

}  // namespace tokenspeed::text::jinja

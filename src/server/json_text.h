// JSON written straight into a string: what the per-token path needs and no more.
#pragma once

#include <string>
#include <string_view>

namespace tokenspeed::server {

// Appends `text` (UTF-8; bytes that are not become U+FFFD) as the inside of a JSON string, without the quotes.
void append_json_escaped(std::string& out, std::string_view text);
std::string json_quoted(std::string_view text);

// Whether brackets nest at most `limit` deep; strings are skipped. Linear, constant memory.
bool json_depth_within(std::string_view text, int limit);
bool is_utf8(std::string_view text);

}  // namespace tokenspeed::server

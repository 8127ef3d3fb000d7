// JSON written straight into a string: what the per-token path needs and no more.
#pragma once

#include <string>
#include <string_view>

namespace tokenspeed::server {

// Appends `text` (UTF-8; bytes that are not become U+FFFD) as the inside of a JSON string, without the quotes.
void append_json_escaped(std::string& out, std::string_view text);
std::string json_quoted(std::string_view text);

// Whether brackets nest at most kMaxJsonDepth deep and no object has more than kMaxJsonMembers members: the parser
// recurses, and finds a member by looking at all. Linear, constant memory; says nothing about malformed JSON.
constexpr int kMaxJsonDepth = 200;
constexpr int kMaxJsonMembers = 4096;
bool json_within_limits(std::string_view text);
bool is_utf8(std::string_view text);

}  // namespace tokenspeed::server

#include "text/tokenizer_added.h"

#include <algorithm>
#include <utility>

#include "text/unicode.h"

namespace tokenspeed::text {
namespace {

bool touches_word(std::string_view text, size_t start, size_t end) {
  return (start > 0 && is_word(decode_valid_utf8(text, previous_char(text, start)).code_point)) ||
         (end < text.size() && is_word(decode_valid_utf8(text, end).code_point));
}

size_t skip_space_left(std::string_view text, size_t position) {
  while (position > 0) {
    const size_t before = previous_char(text, position);
    if (!is_white_space(decode_valid_utf8(text, before).code_point)) break;
    position = before;
  }
  return position;
}

size_t skip_space_right(std::string_view text, size_t position) {
  while (position < text.size()) {
    const DecodedChar next = decode_valid_utf8(text, position);
    if (!is_white_space(next.code_point)) break;
    position += next.length;
  }
  return position;
}

}  // namespace

void AddedTokenMatcher::add(const AddedToken& token, std::string_view pattern) {
  starts_[static_cast<unsigned char>(pattern.front())] = true;
  uint32_t node = 0;
  for (const char byte : pattern) {
    const uint64_t key = uint64_t{node} << 8 | static_cast<unsigned char>(byte);
    const auto [edge, inserted] = edges_.try_emplace(key, static_cast<uint32_t>(entry_of_node_.size()));
    if (inserted) entry_of_node_.push_back(-1);
    node = edge->second;
  }
  // Two tokens may be one after normalization; the first keeps the text.
  if (entry_of_node_[node] >= 0) return;
  entry_of_node_[node] = static_cast<int32_t>(entries_.size());
  entries_.push_back({token.id, token.special, token.single_word, token.left_strip, token.right_strip});
}

AddedTokenMatcher::Match AddedTokenMatcher::match_at(std::string_view text, size_t start) const {
  Match match{start, nullptr};
  uint32_t node = 0;
  for (size_t position = start; position < text.size(); ++position) {
    const auto edge = edges_.find(uint64_t{node} << 8 | static_cast<unsigned char>(text[position]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (entry_of_node_[node] >= 0) match = {position + 1, &entries_[entry_of_node_[node]]};
  }
  return match;
}

void AddedTokenMatcher::split(std::string_view text, bool parse_special, std::vector<TextPiece>& pieces) const {
  size_t done = 0;
  size_t position = 0;
  while (position < text.size()) {
    if (!starts_[static_cast<unsigned char>(text[position])]) {
      ++position;
      continue;
    }
    const Match match = match_at(text, position);
    if (match.entry == nullptr) {
      ++position;
      continue;
    }
    // A match that does not count still hides those inside it.
    size_t start = std::exchange(position, match.end);
    size_t end = match.end;
    const Entry& entry = *match.entry;
    if (entry.special && !parse_special) continue;
    if (entry.single_word && touches_word(text, start, end)) continue;
    if (entry.left_strip) start = std::max(skip_space_left(text, start), done);
    if (entry.right_strip) end = skip_space_right(text, end);
    if (done < start) pieces.push_back({text.substr(done, start - done), -1});
    pieces.push_back({{}, entry.id});
    done = end;
  }
  if (done < text.size()) pieces.push_back({text.substr(done), -1});
}

}  // namespace tokenspeed::text

// Added tokens: strings cut out of the text before anything else looks at it. At each position the longest one wins.
// Cost: a table look-up per byte of text, and a walk down a trie where an added token may start.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace tokenspeed::text {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;
  bool normalized = false;   // looked for after normalization, not before
  bool single_word = false;  // only where no word character touches it
  bool left_strip = false;   // takes the white space before it along
  bool right_strip = false;  // and after it
};

// A stretch of text: an added token, or text between them.
struct TextPiece {
  std::string_view text;
  int32_t id;  // -1: ordinary text
};

class AddedTokenMatcher {
 public:
  // pattern: the token's text as it is looked for, not empty.
  void add(const AddedToken& token, std::string_view pattern);
  // Appends the pieces of valid UTF-8 `text`, left to right. Special tokens count only when `parse_special`.
  void split(std::string_view text, bool parse_special, std::vector<TextPiece>& pieces) const;

 private:
  struct Entry {
    int32_t id;
    bool special, single_word, left_strip, right_strip;
  };
  struct Match {
    size_t end;
    const Entry* entry;  // nullptr: none
  };
  Match match_at(std::string_view text, size_t start) const;

  std::vector<Entry> entries_;
  std::array<bool, 256> starts_{};
  std::unordered_map<uint64_t, uint32_t> edges_;  // node << 8 | byte → node; node 0 is the root
  std::vector<int32_t> entry_of_node_{-1};
};

}  // namespace tokenspeed::text

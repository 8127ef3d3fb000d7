// Finds stop strings in text that streams, and keeps back what may still become one.
// Invariant: the output joined over all pushes does not depend on how the text was cut. The match is the one that ends
// first; of those that end together, the longest. Text is cut where the match begins (or after it, when included).
// Cost: amortised constant per byte (Aho-Corasick), memory linear in the stop strings.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tokenspeed::text {

class StopStringMatcher {
 public:
  // Empty stop strings are ignored.
  explicit StopStringMatcher(std::vector<std::string> stops, bool include_stop_in_output = false);

  struct Output {
    std::string text;     // what became certain with this piece
    bool stopped;         // a stop string was found, now or before
    std::string matched;  // that stop string
  };
  // After a match the text is ignored and `text` is empty.
  Output push(std::string_view piece);
  // No more text comes: returns what was kept back (empty after a match).
  std::string finish();

 private:
  struct Node {
    uint8_t byte = 0;
    int32_t first_child = -1;
    int32_t next_sibling = -1;
    int32_t fallback = 0;  // the longest proper suffix that is also a node
    int32_t matched = -1;  // the longest stop string that ends here
    int32_t depth = 0;
  };
  void insert(size_t stop);
  void link_fallbacks();
  int32_t child(int32_t node, uint8_t byte) const;
  int32_t next(int32_t node, uint8_t byte) const;

  std::vector<std::string> stops_;
  bool include_stop_;
  std::vector<Node> nodes_;
  int32_t node_ = 0;
  int32_t matched_ = -1;
  std::string held_;  // the text of node_: the longest suffix that may begin a stop string
};

}  // namespace tokenspeed::text

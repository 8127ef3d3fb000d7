// The tokens of a vocabulary in the order of their bytes: an implicit trie, to find every token that a grammar lets
// follow without trying them all.
//
//   ids:    [ … "1"  "10"  "100"  "11" … "5"  "5."  … ]      tokens that share a prefix lie together, the prefix first
//
// Invariant: immutable; any number of threads may match at once. Special tokens are left out: they have no text.
// Cost: one sort at construction (0.1 s for 248,320 tokens); finding the tokens towards a text is a binary search per
// byte of the longest of them, a match tries only the bytes that continue accepted prefixes.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace tokenspeed::text {

class SortedVocabulary {
 public:
  explicit SortedVocabulary(const Tokenizer& tokenizer);  // must outlive this

  // Appends the tokens that `text` starts with, and those that start with all of `text`.
  void add_towards(std::string_view text, std::vector<int32_t>* ids) const;
  // Appends the tokens of which every prefix, appended to `text`, passes `may_continue(std::string_view)`.
  template <typename MayContinue>
  void add_matching(std::string text, const MayContinue& may_continue, std::vector<int32_t>* ids) const {
    collect(entries_, 0, &text, may_continue, ids);
  }

 private:
  struct Entry {
    const std::string* bytes = nullptr;
    int32_t id = 0;
  };

  // `entries` share their first `depth` bytes, which end *text.
  template <typename MayContinue>
  static void collect(std::span<const Entry> entries, size_t depth, std::string* text, const MayContinue& may_continue,
                      std::vector<int32_t>* ids) {
    entries = take_complete(entries, depth, ids);
    while (!entries.empty()) {
      const std::span<const Entry> same = first_with_same_byte(entries, depth);
      text->push_back((*same.front().bytes)[depth]);
      if (may_continue(std::string_view(*text))) collect(same, depth + 1, text, may_continue, ids);
      text->pop_back();
      entries = entries.subspan(same.size());
    }
  }
  // Appends the entries of just `depth` bytes, which come first, and returns the rest.
  static std::span<const Entry> take_complete(std::span<const Entry> entries, size_t depth, std::vector<int32_t>* ids);
  // The leading entries whose byte at `depth` is that of the first.
  static std::span<const Entry> first_with_same_byte(std::span<const Entry> entries, size_t depth);

  std::vector<Entry> entries_;
};

}  // namespace tokenspeed::text

// Byte-pair encoding: a vocabulary of byte strings and ranked merges. A word's bytes become symbols; the adjacent pair
// of lowest rank (leftmost first) merges until none is left.
// Invariant: every single byte is a token, so every word has an encoding. encode_word is const and thread-safe.
// Cost: a word that is one token is a hash lookup once it has been seen; others take a lookup per pair, and words over
// kShortWord bytes a heap, so no input is worse than n log n.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace tokenspeed::text {

// Open-addressing table of byte string → id; the strings stay in the caller's vector.
class TokenIndex {
 public:
  void reserve(size_t count);
  // False when the bytes are there already. reserve() must have made room.
  bool insert(int32_t id, const std::vector<std::string>& tokens);
  // -1: unknown.
  int32_t find(std::string_view bytes, const std::vector<std::string>& tokens) const;

 private:
  struct Slot {
    uint32_t hash;
    int32_t id = -1;
  };
  std::vector<Slot> slots_;
};

// Flat table of (left id, right id) → (rank, id of the product).
class MergeTable {
 public:
  struct Merge {
    uint32_t rank;
    int32_t product;
  };
  static constexpr uint32_t kNoRank = UINT32_MAX;

  void reserve(size_t count);
  void insert(int32_t left, int32_t right, Merge merge);  // replaces an equal pair
  Merge find(int32_t left, int32_t right) const;          // rank kNoRank: no such merge

 private:
  struct Slot {
    uint64_t pair = UINT64_MAX;
    Merge merge{kNoRank, -1};
  };
  std::vector<Slot> slots_;
};

class BpeModel {
 public:
  // tokens[id] is the token's bytes; ids in `indexed` are those the encoder may produce (distinct bytes).
  // Errors: data_loss (two tokens of the same bytes, a byte without a token).
  static Result<BpeModel> create(std::vector<std::string> tokens, std::span<const int32_t> indexed, bool ignore_merges);

  void reserve_merges(size_t count) { merges_.reserve(count); }
  // Errors: data_loss (left, right or their product is no token).
  Status add_merge(std::string_view left, std::string_view right, uint32_t rank);

  void encode_word(std::string_view word, std::vector<int32_t>& ids) const;
  std::optional<int32_t> find(std::string_view bytes) const;
  const std::vector<std::string>& tokens() const { return tokens_; }

 private:
  static constexpr size_t kShortWord = 48;
  enum class Verdict : uint8_t { kUnknown, kWhole, kSplits };

  void merge_short(std::string_view word, std::vector<int32_t>& ids) const;
  void merge_long(std::string_view word, std::vector<int32_t>& ids) const;
  void merge(std::string_view word, std::vector<int32_t>& ids) const;

  std::vector<std::string> tokens_;
  TokenIndex index_;
  MergeTable merges_;
  std::vector<int32_t> byte_ids_;
  bool ignore_merges_ = false;
  // Whether merging a token's own bytes gives that one token: found out on first use, the same whoever asks.
  std::unique_ptr<std::atomic<Verdict>[]> verdicts_;
};

}  // namespace tokenspeed::text

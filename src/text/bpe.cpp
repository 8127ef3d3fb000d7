#include "text/bpe.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <queue>

namespace tokenspeed::text {
namespace {

uint64_t mix(uint64_t value) {
  value *= 0x9e3779b97f4a7c15u;
  return value ^ (value >> 29);
}

uint32_t hash_bytes(std::string_view bytes) {
  uint64_t hash = bytes.size();
  const char* data = bytes.data();
  size_t left = bytes.size();
  for (; left >= 8; left -= 8, data += 8) {
    uint64_t chunk;
    std::memcpy(&chunk, data, 8);
    hash = mix(hash ^ chunk);
  }
  uint64_t tail = 0;
  for (size_t index = 0; index < left; ++index) tail = tail << 8 | static_cast<unsigned char>(data[index]);
  return static_cast<uint32_t>(mix(mix(hash ^ tail)) >> 16);
}

// At most half full, so that probe runs stay short.
size_t table_size(size_t count) { return std::bit_ceil(std::max<size_t>(count, 8) * 2); }

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

void TokenIndex::reserve(size_t count) { slots_.assign(table_size(count), Slot{}); }

bool TokenIndex::insert(int32_t id, const std::vector<std::string>& tokens) {
  const std::string& bytes = tokens[id];
  const uint32_t hash = hash_bytes(bytes);
  const size_t mask = slots_.size() - 1;
  size_t slot = hash & mask;
  for (; slots_[slot].id >= 0; slot = (slot + 1) & mask) {
    if (slots_[slot].hash == hash && tokens[slots_[slot].id] == bytes) return false;
  }
  slots_[slot] = {hash, id};
  return true;
}

int32_t TokenIndex::find(std::string_view bytes, const std::vector<std::string>& tokens) const {
  const uint32_t hash = hash_bytes(bytes);
  const size_t mask = slots_.size() - 1;
  for (size_t slot = hash & mask; slots_[slot].id >= 0; slot = (slot + 1) & mask) {
    if (slots_[slot].hash == hash && tokens[slots_[slot].id] == bytes) return slots_[slot].id;
  }
  return -1;
}

void MergeTable::reserve(size_t count) { slots_.assign(table_size(count), Slot{}); }

void MergeTable::insert(int32_t left, int32_t right, Merge merge) {
  const uint64_t pair = pair_key(left, right);
  const size_t mask = slots_.size() - 1;
  size_t slot = mix(pair) >> 16 & mask;
  while (slots_[slot].pair != UINT64_MAX && slots_[slot].pair != pair) slot = (slot + 1) & mask;
  slots_[slot] = {pair, merge};
}

MergeTable::Merge MergeTable::find(int32_t left, int32_t right) const {
  const uint64_t pair = pair_key(left, right);
  const size_t mask = slots_.size() - 1;
  // An empty slot carries kNoRank.
  size_t slot = mix(pair) >> 16 & mask;
  while (slots_[slot].pair != UINT64_MAX && slots_[slot].pair != pair) slot = (slot + 1) & mask;
  return slots_[slot].merge;
}

Result<BpeModel> BpeModel::create(std::vector<std::string> tokens, std::span<const int32_t> indexed,
                                  bool ignore_merges) {
  BpeModel model;
  model.tokens_ = std::move(tokens);
  model.ignore_merges_ = ignore_merges;
  model.index_.reserve(indexed.size());
  for (const int32_t id : indexed) {
    if (!model.index_.insert(id, model.tokens_)) {
      return data_loss("token " + std::to_string(id) + " has the same bytes as another token of model.vocab");
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    const char text = static_cast<char>(byte);
    const int32_t id = model.index_.find({&text, 1}, model.tokens_);
    if (id < 0) {
      return data_loss("model.vocab has no token for byte " + std::to_string(byte) +
                       "; a byte-level vocabulary needs all 256");
    }
    model.byte_ids_.push_back(id);
  }
  model.merges_.reserve(0);
  model.verdicts_ = std::make_unique<std::atomic<Verdict>[]>(model.tokens_.size());
  return model;
}

Status BpeModel::add_merge(std::string_view left, std::string_view right, uint32_t rank) {
  const int32_t left_id = index_.find(left, tokens_);
  const int32_t right_id = index_.find(right, tokens_);
  const int32_t product = left_id < 0 || right_id < 0 ? -1 : index_.find(std::string(left).append(right), tokens_);
  if (product < 0) {
    return data_loss("model.merges[" + std::to_string(rank) + "] names a token that is not in model.vocab");
  }
  merges_.insert(left_id, right_id, {rank, product});
  return {};
}

std::optional<int32_t> BpeModel::find(std::string_view bytes) const {
  const int32_t id = index_.find(bytes, tokens_);
  return id < 0 ? std::nullopt : std::optional(id);
}

void BpeModel::encode_word(std::string_view word, std::vector<int32_t>& ids) const {
  const int32_t whole = index_.find(word, tokens_);
  if (whole < 0) return merge(word, ids);
  if (ignore_merges_) return ids.push_back(whole);
  std::atomic<Verdict>& verdict = verdicts_[whole];
  switch (verdict.load(std::memory_order_relaxed)) {
    case Verdict::kWhole:
      return ids.push_back(whole);
    case Verdict::kSplits:
      return merge(word, ids);
    case Verdict::kUnknown:
      break;
  }
  const size_t before = ids.size();
  merge(word, ids);
  const bool is_whole = ids.size() == before + 1 && ids.back() == whole;
  verdict.store(is_whole ? Verdict::kWhole : Verdict::kSplits, std::memory_order_relaxed);
}

void BpeModel::merge(std::string_view word, std::vector<int32_t>& ids) const {
  if (word.size() <= kShortWord) {
    merge_short(word, ids);
  } else {
    merge_long(word, ids);
  }
}

// For a few symbols a scan for the lowest rank beats a heap.
void BpeModel::merge_short(std::string_view word, std::vector<int32_t>& ids) const {
  std::array<int32_t, kShortWord> symbols;
  std::array<MergeTable::Merge, kShortWord> pairs;  // pairs[i]: symbols i and i + 1
  size_t count = word.size();
  for (size_t index = 0; index < count; ++index) symbols[index] = byte_ids_[static_cast<unsigned char>(word[index])];
  for (size_t index = 0; index + 1 < count; ++index) pairs[index] = merges_.find(symbols[index], symbols[index + 1]);
  while (count > 1) {
    size_t best = 0;
    for (size_t index = 1; index + 1 < count; ++index) {
      if (pairs[index].rank < pairs[best].rank) best = index;
    }
    if (pairs[best].rank == MergeTable::kNoRank) break;
    symbols[best] = pairs[best].product;
    std::copy(symbols.begin() + best + 2, symbols.begin() + count, symbols.begin() + best + 1);
    if (best + 2 < count) std::copy(pairs.begin() + best + 2, pairs.begin() + count - 1, pairs.begin() + best + 1);
    --count;
    if (best + 1 < count) pairs[best] = merges_.find(symbols[best], symbols[best + 1]);
    if (best > 0) pairs[best - 1] = merges_.find(symbols[best - 1], symbols[best]);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.begin() + count);
}

void BpeModel::merge_long(std::string_view word, std::vector<int32_t>& ids) const {
  struct Symbol {
    int32_t id;         // -1: merged into a symbol to its left
    uint32_t previous;  // word.size() is the sentinel at both ends
    uint32_t next;
    MergeTable::Merge pair;  // with the next symbol
  };
  const auto size = static_cast<uint32_t>(word.size());
  std::vector<Symbol> symbols(size);
  // Lowest rank first, then leftmost. An entry is stale when its symbol's pair has another rank now.
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue;
  const auto update_pair = [&](uint32_t index) {
    Symbol& symbol = symbols[index];
    symbol.pair = symbol.next == size ? MergeTable::Merge{MergeTable::kNoRank, -1}
                                      : merges_.find(symbol.id, symbols[symbol.next].id);
    if (symbol.pair.rank != MergeTable::kNoRank) queue.push(uint64_t{symbol.pair.rank} << 32 | index);
  };
  for (uint32_t index = 0; index < size; ++index) {
    symbols[index] = {byte_ids_[static_cast<unsigned char>(word[index])], index == 0 ? size : index - 1, index + 1, {}};
  }
  for (uint32_t index = 0; index < size; ++index) update_pair(index);
  while (!queue.empty()) {
    const uint32_t rank = static_cast<uint32_t>(queue.top() >> 32);
    const uint32_t index = static_cast<uint32_t>(queue.top());
    queue.pop();
    Symbol& symbol = symbols[index];
    if (symbol.id < 0 || symbol.pair.rank != rank) continue;
    Symbol& absorbed = symbols[symbol.next];
    symbol.id = symbol.pair.product;
    symbol.next = absorbed.next;
    absorbed.id = -1;
    if (symbol.next != size) symbols[symbol.next].previous = index;
    update_pair(index);
    if (symbol.previous != size) update_pair(symbol.previous);
  }
  for (uint32_t index = 0; index != size; index = symbols[index].next) ids.push_back(symbols[index].id);
}

}  // namespace tokenspeed::text

#include "text/sorted_vocabulary.h"

#include <algorithm>

namespace tokenspeed::text {

SortedVocabulary::SortedVocabulary(const Tokenizer& tokenizer) {
  for (int32_t id = 0; id < tokenizer.vocabulary_size(); ++id) {
    const std::string* bytes = tokenizer.token_bytes(id);
    if (bytes != nullptr && !bytes->empty() && !tokenizer.is_special(id)) entries_.push_back({bytes, id});
  }
  std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return *a.bytes < *b.bytes; });
}

void SortedVocabulary::add_towards(std::string_view text, std::vector<int32_t>* ids) const {
  std::span<const Entry> entries(entries_);
  for (size_t depth = 0; depth < text.size() && !entries.empty(); ++depth) {
    entries = take_complete(entries, depth, ids);
    const auto byte = [depth](const Entry& entry) { return static_cast<unsigned char>((*entry.bytes)[depth]); };
    const auto wanted = static_cast<unsigned char>(text[depth]);
    const auto begin = std::ranges::partition_point(entries, [&](const Entry& entry) { return byte(entry) < wanted; });
    entries = entries.subspan(static_cast<size_t>(begin - entries.begin()));
    if (entries.empty() || byte(entries.front()) != wanted) return;
    entries = first_with_same_byte(entries, depth);
  }
  for (const Entry& entry : entries) ids->push_back(entry.id);
}

std::span<const SortedVocabulary::Entry> SortedVocabulary::take_complete(std::span<const Entry> entries, size_t depth,
                                                                         std::vector<int32_t>* ids) {
  while (!entries.empty() && entries.front().bytes->size() == depth) {
    ids->push_back(entries.front().id);
    entries = entries.subspan(1);
  }
  return entries;
}

std::span<const SortedVocabulary::Entry> SortedVocabulary::first_with_same_byte(std::span<const Entry> entries,
                                                                                size_t depth) {
  const char byte = (*entries.front().bytes)[depth];
  const auto end =
      std::ranges::partition_point(entries, [&](const Entry& entry) { return (*entry.bytes)[depth] == byte; });
  return entries.first(static_cast<size_t>(end - entries.begin()));
}

}  // namespace tokenspeed::text

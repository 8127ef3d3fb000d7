#include "text/sorted_vocabulary.h"

namespace tokenspeed::text {

SortedVocabulary::SortedVocabulary(const Tokenizer& tokenizer) {
  for (int32_t id = 0; id < tokenizer.vocabulary_size(); ++id) {
    const std::string* bytes = tokenizer.token_bytes(id);
    if (bytes != nullptr && !bytes->empty() && !tokenizer.is_special(id)) entries_.push_back({bytes, id});
  }
  std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return *a.bytes < *b.bytes; });
}

}  // namespace tokenspeed::text

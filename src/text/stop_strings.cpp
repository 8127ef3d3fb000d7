#include "text/stop_strings.h"

#include <utility>

namespace tokenspeed::text {

StopStringMatcher::StopStringMatcher(std::vector<std::string> stops, bool include_stop_in_output)
    : stops_(std::move(stops)), include_stop_(include_stop_in_output), nodes_(1) {
  for (size_t stop = 0; stop < stops_.size(); ++stop) insert(stop);
  link_fallbacks();
}

void StopStringMatcher::insert(size_t stop) {
  if (stops_[stop].empty()) return;
  int32_t node = 0;
  for (const char c : stops_[stop]) {
    const uint8_t byte = static_cast<uint8_t>(c);
    int32_t following = child(node, byte);
    if (following < 0) {
      following = static_cast<int32_t>(nodes_.size());
      nodes_.push_back({byte, -1, nodes_[node].first_child, 0, -1, nodes_[node].depth + 1});
      nodes_[node].first_child = following;
    }
    node = following;
  }
  if (nodes_[node].matched < 0) nodes_[node].matched = static_cast<int32_t>(stop);
}

// Breadth first: a node's fallback is nearer to the root, so it is linked before.
void StopStringMatcher::link_fallbacks() {
  std::vector<int32_t> queue = {0};
  for (size_t head = 0; head < queue.size(); ++head) {
    const int32_t parent = queue[head];
    for (int32_t node = nodes_[parent].first_child; node >= 0; node = nodes_[node].next_sibling) {
      const int32_t fallback = parent == 0 ? 0 : next(nodes_[parent].fallback, nodes_[node].byte);
      nodes_[node].fallback = fallback;
      if (nodes_[node].matched < 0) nodes_[node].matched = nodes_[fallback].matched;
      queue.push_back(node);
    }
  }
}

int32_t StopStringMatcher::child(int32_t node, uint8_t byte) const {
  int32_t candidate = nodes_[node].first_child;
  while (candidate >= 0 && nodes_[candidate].byte != byte) candidate = nodes_[candidate].next_sibling;
  return candidate;
}

int32_t StopStringMatcher::next(int32_t node, uint8_t byte) const {
  for (;; node = nodes_[node].fallback) {
    if (const int32_t following = child(node, byte); following >= 0) return following;
    if (node == 0) return 0;
  }
}

StopStringMatcher::Output StopStringMatcher::push(std::string_view piece) {
  Output output{{}, matched_ >= 0, matched_ >= 0 ? stops_[matched_] : std::string()};
  if (output.stopped) return output;
  held_.reserve(held_.size() + piece.size());
  for (const char c : piece) {
    held_.push_back(c);
    node_ = next(node_, static_cast<uint8_t>(c));
    if (nodes_[node_].matched < 0) continue;
    matched_ = nodes_[node_].matched;
    output.stopped = true;
    output.matched = stops_[matched_];
    output.text = std::move(held_);
    if (!include_stop_) output.text.resize(output.text.size() - output.matched.size());
    held_.clear();
    return output;
  }
  const size_t certain = held_.size() - static_cast<size_t>(nodes_[node_].depth);
  output.text = held_.substr(0, certain);
  held_.erase(0, certain);
  return output;
}

std::string StopStringMatcher::finish() {
  node_ = 0;
  return std::exchange(held_, {});
}

}  // namespace tokenspeed::text

#include "text/reasoning_parser.h"

#include <algorithm>

namespace tokenspeed::text {

ReasoningParser::ReasoningParser(bool ends_at_tool_call) : ends_at_tool_call_(ends_at_tool_call) {
  space_.drop_leading_newlines();
}

ReasoningParser::Tag ReasoningParser::tag_at(std::string_view text) const {
  const TagMatch close = match_tag(text, kThinkClose);
  const TagMatch open = may_open_ ? match_tag(text, kThinkOpen) : TagMatch::kNo;
  const TagMatch call = ends_at_tool_call_ ? match_call_opening(text).match : TagMatch::kNo;
  if (close == TagMatch::kYes) return Tag::kThinkClose;
  if (open == TagMatch::kYes) return Tag::kThinkOpen;
  if (call == TagMatch::kYes) return Tag::kCall;
  return std::max({close, open, call}) == TagMatch::kPartial ? Tag::kUnsettled : Tag::kText;
}

void ReasoningParser::take_text(size_t size, std::string* reasoning) {
  const std::string_view text = std::string_view(buffer_).substr(position_, size);
  may_open_ = may_open_ && std::all_of(text.begin(), text.end(), is_space);
  space_.add(text, reasoning);
  position_ += size;
}

bool ReasoningParser::push(std::string_view text, std::string* reasoning, std::string* rest) {
  buffer_.append(text);
  while (position_ < buffer_.size()) {
    const size_t bracket = std::min(buffer_.find('<', position_), buffer_.size());
    if (bracket > position_) take_text(bracket - position_, reasoning);
    if (position_ == buffer_.size()) break;
    const Tag tag = tag_at(std::string_view(buffer_).substr(position_));
    if (tag == Tag::kUnsettled) break;
    if (tag == Tag::kText) {
      take_text(1, reasoning);
    } else if (tag == Tag::kThinkOpen) {
      space_.drop();
      may_open_ = false;
      position_ += kThinkOpen.size();
    } else {
      if (tag == Tag::kThinkClose) position_ += kThinkClose.size();
      rest->assign(buffer_, position_);
      return true;
    }
  }
  buffer_.erase(0, position_);
  position_ = 0;
  return false;
}

void ReasoningParser::finish(std::string* reasoning) {
  take_text(buffer_.size() - position_, reasoning);
  space_.flush(reasoning);
}

}  // namespace tokenspeed::text

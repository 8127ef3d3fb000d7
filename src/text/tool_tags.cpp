#include "text/tool_tags.h"

#include <algorithm>

namespace tokenspeed::text {
namespace {

constexpr std::string_view kSpaces = " \t\r\n";

TagMatch either(TagMatch a, TagMatch b) { return std::max(a, b); }

// The text after `tag_size` bytes and the whitespace there. kYes: `rest` is not empty and starts with a non-space.
TagMatch skip_gap(std::string_view text, size_t tag_size, std::string_view* rest) {
  const std::string_view after = text.substr(tag_size);
  const size_t gap = after.find_first_not_of(kSpaces);
  if (std::min(gap, after.size()) > kMaxTagGap) return TagMatch::kNo;
  if (gap == std::string_view::npos) return TagMatch::kPartial;
  *rest = after.substr(gap);
  return TagMatch::kYes;
}

}  // namespace

bool is_space(char c) { return kSpaces.find(c) != std::string_view::npos; }

std::string ascii_lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return result;
}

TagMatch match_tag(std::string_view text, std::string_view tag) {
  if (text.starts_with(tag)) return TagMatch::kYes;
  return tag.starts_with(text) ? TagMatch::kPartial : TagMatch::kNo;
}

NamedTag match_named_tag(std::string_view text, std::string_view opening) {
  if (const TagMatch match = match_tag(text, opening); match != TagMatch::kYes) return {match, {}, 0};
  const std::string_view after = text.substr(opening.size(), kMaxTagName + 1);
  const size_t stop = after.find_first_of("<>\n");
  if (stop == std::string_view::npos) return {after.size() > kMaxTagName ? TagMatch::kNo : TagMatch::kPartial, {}, 0};
  const std::string_view raw = after.substr(0, stop);
  const size_t first = raw.find_first_not_of(kSpaces);
  if (after[stop] != '>' || first == std::string_view::npos) return {};
  const size_t last = raw.find_last_not_of(kSpaces);
  return {TagMatch::kYes, raw.substr(first, last - first + 1), opening.size() + stop + 1};
}

NamedTag match_call_opening(std::string_view text) {
  if (const TagMatch match = match_tag(text, kToolCallOpen); match != TagMatch::kYes) return {match, {}, 0};
  std::string_view rest;
  if (const TagMatch gap = skip_gap(text, kToolCallOpen.size(), &rest); gap != TagMatch::kYes) return {gap, {}, 0};
  NamedTag function = match_named_tag(rest, kFunctionOpen);
  function.end += text.size() - rest.size();
  return function;
}

TagMatch match_function_close(std::string_view text) {
  if (const TagMatch match = match_tag(text, kFunctionClose); match != TagMatch::kYes) return match;
  std::string_view rest;
  if (const TagMatch gap = skip_gap(text, kFunctionClose.size(), &rest); gap != TagMatch::kYes) return gap;
  return either(match_tag(rest, kToolCallClose),
                either(match_call_opening(rest).match, match_named_tag(rest, kFunctionOpen).match));
}

TagMatch match_parameter_close(std::string_view text) {
  if (const TagMatch match = match_tag(text, kParameterClose); match != TagMatch::kYes) return match;
  std::string_view rest;
  if (const TagMatch gap = skip_gap(text, kParameterClose.size(), &rest); gap != TagMatch::kYes) return gap;
  return either(match_named_tag(rest, kParameterOpen).match,
                either(match_function_close(rest), match_tag(rest, kToolCallClose)));
}

bool closes_value_at_end(std::string_view text) {
  if (text.starts_with(kFunctionClose)) return match_function_close(text) != TagMatch::kNo;
  if (!text.starts_with(kParameterClose)) return false;
  if (match_parameter_close(text) != TagMatch::kNo) return true;
  std::string_view rest;
  return skip_gap(text, kParameterClose.size(), &rest) == TagMatch::kYes && rest.starts_with(kFunctionClose);
}

void SpaceHolder::strip_leading() {
  if (leading_) space_.erase(0, std::min(space_.find_first_not_of("\r\n"), space_.size()));
}

void SpaceHolder::add(std::string_view text, std::string* out) {
  const size_t first = std::min(text.find_first_not_of(kSpaces), text.size());
  space_.append(text.substr(0, first));
  if (first == text.size()) return;
  flush(out);
  leading_ = false;
  const size_t last = text.find_last_not_of(kSpaces);
  out->append(text.substr(first, last + 1 - first));
  space_.assign(text.substr(last + 1));
}

void SpaceHolder::flush(std::string* out) {
  strip_leading();
  out->append(space_);
  space_.clear();
}

}  // namespace tokenspeed::text

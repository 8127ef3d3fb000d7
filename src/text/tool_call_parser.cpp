#include "text/tool_call_parser.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "base/random.h"

namespace tokenspeed::text {
namespace {

using Kind = OutputDelta::Kind;

std::string call_id(uint64_t seed, int index) {
  const std::array<uint32_t, 4> bits = philox(seed, 0, static_cast<uint64_t>(index));
  char hex[25];
  std::snprintf(hex, sizeof hex, "%08x%08x%08x", bits[0], bits[1], bits[2]);
  return std::string("call_") + hex;
}

// One newline each belongs to the tags around a value, not to the value.
std::string_view strip_border_newlines(std::string_view value) {
  if (value.starts_with('\n')) value.remove_prefix(1);
  if (value.ends_with('\n')) value.remove_suffix(1);
  return value;
}

}  // namespace

void append_delta(Kind kind, std::string_view text, int tool_index, std::vector<OutputDelta>* deltas) {
  if (text.empty()) return;
  if (deltas->empty() || deltas->back().kind != kind || deltas->back().tool_index != tool_index) {
    deltas->push_back({kind, {}, tool_index, {}, {}});
  }
  deltas->back().text.append(text);
}

ToolCallParser::ToolCallParser(const std::vector<ToolSchema>& tools, uint64_t id_seed)
    : active_(!tools.empty()), id_seed_(id_seed), schemas_(tools) {}

void ToolCallParser::push(std::string_view text, std::vector<OutputDelta>* deltas) {
  deltas_ = deltas;
  buffer_.append(text);
  while (step()) {
  }
  if (position_ == 0) return;
  buffer_.erase(0, position_);
  scan_ = scan_ > position_ ? scan_ - position_ : 0;
  position_ = 0;
}

void ToolCallParser::finish(std::vector<OutputDelta>* deltas) {
  at_end_ = true;
  scan_ = position_;  // what did not end the value before may do so now
  push({}, deltas);
  if (place_ != Place::kContent) {
    if (function_open_) emit(Kind::kToolCallArguments, seen_parameters_.empty() ? "{}" : "}");
  } else if (calls_ == 0) {
    std::string space;
    space_.flush(&space);
    emit(Kind::kContent, space);
  }
}

OpenValue ToolCallParser::open_value() const {
  if (place_ != Place::kValue) return {};
  const ValueSchema* schema = schemas_.find(function_, parameter_);
  return schema != nullptr && schema->grammar.restricts() ? OpenValue{&schema->grammar, rest()} : OpenValue{};
}

bool ToolCallParser::step() {
  if (position_ >= buffer_.size()) return false;
  switch (place_) {
    case Place::kContent:
      return step_content();
    case Place::kCall:
      return step_call();
    case Place::kValue:
      return step_value();
  }
  return false;
}

bool ToolCallParser::step_content() {
  const size_t bracket = active_ ? std::min(buffer_.find('<', position_), buffer_.size()) : buffer_.size();
  if (bracket > position_) {
    take_content(bracket - position_);
    return true;
  }
  const NamedTag call = match_call_opening(rest());
  if (call.match == TagMatch::kPartial && !at_end_) return false;
  if (call.match == TagMatch::kYes) {
    space_.drop();
    open_function(call.name);
    position_ += call.end;
  } else {
    take_content(1);
  }
  return true;
}

bool ToolCallParser::step_call() {
  position_ = std::min(buffer_.find('<', position_), buffer_.size());
  if (position_ == buffer_.size()) return false;
  const NamedTag function = match_named_tag(rest(), kFunctionOpen);
  const NamedTag parameter = function_open_ ? match_named_tag(rest(), kParameterOpen) : NamedTag{};
  const TagMatch function_close = match_tag(rest(), kFunctionClose);
  const TagMatch call_close = match_tag(rest(), kToolCallClose);
  const TagMatch call_open = match_tag(rest(), kToolCallOpen);
  if (function.match == TagMatch::kYes) {
    close_function();
    open_function(function.name);
    position_ += function.end;
  } else if (parameter.match == TagMatch::kYes) {
    parameter_ = parameter.name;
    position_ += parameter.end;
    scan_ = position_;
    place_ = Place::kValue;
  } else if (function_close == TagMatch::kYes || call_open == TagMatch::kYes) {
    close_function();
    position_ += 1;
  } else if (call_close == TagMatch::kYes) {
    close_function();
    position_ += kToolCallClose.size();
    place_ = Place::kContent;
    if (!content_started_) space_.drop_leading_newlines();
  } else if (std::max({function.match, parameter.match, function_close, call_close, call_open}) == TagMatch::kPartial &&
             !at_end_) {
    return false;
  } else {
    position_ += 1;
  }
  return true;
}

bool ToolCallParser::step_value() {
  scan_ = buffer_.find('<', scan_);
  if (scan_ == std::string::npos) {
    scan_ = buffer_.size();
    return false;
  }
  const std::string_view text = std::string_view(buffer_).substr(scan_);
  const bool line_start = scan_ > position_ && buffer_[scan_ - 1] == '\n';
  const TagMatch next = line_start ? match_named_tag(text, kParameterOpen).match : TagMatch::kNo;
  const TagMatch match = std::max({next, match_parameter_close(text), match_function_close(text)});
  if (match == TagMatch::kYes || (at_end_ && closes_value_at_end(text))) {
    end_value(scan_);
    return true;
  }
  if (match == TagMatch::kPartial && !at_end_) return false;
  ++scan_;
  return true;
}

void ToolCallParser::take_content(size_t size) {
  const std::string_view text = rest().substr(0, size);
  std::string settled;
  space_.add(text, &settled);
  // Without calls nothing can follow that whitespace at the end would have to make way for, once the border is behind.
  if (!active_ && (content_started_ || !settled.empty())) space_.flush(&settled);
  content_started_ = content_started_ || !settled.empty();
  emit(Kind::kContent, settled);
  position_ += size;
}

void ToolCallParser::open_function(std::string_view name) {
  function_ = name;
  seen_parameters_.clear();
  function_open_ = true;
  place_ = Place::kCall;
  deltas_->push_back({Kind::kToolCallStart, {}, calls_, function_, call_id(id_seed_, calls_)});
  ++calls_;
}

void ToolCallParser::close_function() {
  if (!function_open_) return;
  emit(Kind::kToolCallArguments, seen_parameters_.empty() ? "{}" : "}");
  function_open_ = false;
  ++complete_calls_;
}

void ToolCallParser::end_value(size_t end) {
  const std::string_view value = strip_border_newlines(std::string_view(buffer_).substr(position_, end - position_));
  const std::string_view separator = seen_parameters_.empty() ? "{" : ", ";
  if (seen_parameters_.insert(parameter_).second) {
    emit(Kind::kToolCallArguments, separator);
    emit(Kind::kToolCallArguments, json_string(parameter_));
    emit(Kind::kToolCallArguments, ": ");
    emit(Kind::kToolCallArguments, schemas_.value_json(function_, parameter_, value));
  }
  position_ = end;
  place_ = Place::kCall;
}

void ToolCallParser::emit(Kind kind, std::string_view text) {
  append_delta(kind, text, kind == Kind::kToolCallArguments ? calls_ - 1 : -1, deltas_);
}

}  // namespace tokenspeed::text

// Separates content from XML tool calls, while the text streams; the part of OutputParser that runs after the
// reasoning. Invariant and rules of the borders and calls: text/output_parser.h. Tags inside values: `<parameter=` ends
// a value only at the start of a line, `</parameter>` only when a structural tag follows, `</function>` only when the
// call's end or the next call follows (text/tool_tags.h). Text between the tags of a call is discarded. Cost: linear; a
// value is scanned once however it is cut.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "text/output_parser.h"
#include "text/tool_tags.h"
#include "text/tool_value.h"

namespace tokenspeed::text {

// Appends text to the deltas, joining it to the last one if that is of the same kind and call.
void append_delta(OutputDelta::Kind kind, std::string_view text, int tool_index, std::vector<OutputDelta>* deltas);

class ToolCallParser {
 public:
  // No tools: all text is content.
  ToolCallParser(const std::vector<ToolSchema>& tools, uint64_t id_seed);

  // Reasoning came before: newlines at the start of the content are its border.
  void drop_leading_newlines() { space_.drop_leading_newlines(); }
  void push(std::string_view text, std::vector<OutputDelta>* deltas);
  void finish(std::vector<OutputDelta>* deltas);
  int tool_calls() const { return complete_calls_; }
  OpenValue open_value() const;

 private:
  enum class Place { kContent, kCall, kValue };

  // Each consumes what is settled; false when the rest needs more text.
  bool step();
  bool step_content();
  bool step_call();
  bool step_value();

  std::string_view rest() const { return std::string_view(buffer_).substr(position_); }
  void take_content(size_t size);
  void open_function(std::string_view name);
  void close_function();
  void end_value(size_t end);
  void emit(OutputDelta::Kind kind, std::string_view text);

  const bool active_;
  const uint64_t id_seed_;
  ToolSchemas schemas_;
  std::vector<OutputDelta>* deltas_ = nullptr;  // where the current push or finish writes

  Place place_ = Place::kContent;
  bool at_end_ = false;
  std::string buffer_;
  size_t position_ = 0;  // consumed up to here
  size_t scan_ = 0;      // kValue: no end of the value starts before here

  SpaceHolder space_;
  bool content_started_ = false;
  bool function_open_ = false;
  int calls_ = 0;
  int complete_calls_ = 0;
  std::string function_;
  std::string parameter_;
  std::unordered_set<std::string> seen_parameters_;
};

}  // namespace tokenspeed::text

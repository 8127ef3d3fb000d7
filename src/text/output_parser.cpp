#include "text/output_parser.h"

#include <optional>
#include <utility>

#include "text/reasoning_parser.h"
#include "text/tool_call_parser.h"

namespace tokenspeed::text {

using Kind = OutputDelta::Kind;

struct OutputParser::State {
  State(const std::vector<ToolSchema>& tools, uint64_t id_seed) : after(tools, id_seed) {}

  std::optional<ReasoningParser> reasoning;  // until the reasoning has ended
  ToolCallParser after;
  bool finished = false;
};

OutputParser::OutputParser(OutputParserOptions options, uint64_t id_seed) {
  if (!options.parse_tool_calls) options.tools.clear();
  const bool calls = !options.tools.empty();
  state_ = std::make_unique<State>(options.tools, id_seed);
  if (options.parse_reasoning && options.starts_in_reasoning) state_->reasoning.emplace(calls);
}

OutputParser::OutputParser(OutputParser&&) noexcept = default;
OutputParser& OutputParser::operator=(OutputParser&&) noexcept = default;
OutputParser::~OutputParser() = default;

std::vector<OutputDelta> OutputParser::push(std::string_view text) {
  std::vector<OutputDelta> deltas;
  if (state_->finished) return deltas;
  if (!state_->reasoning) {
    state_->after.push(text, &deltas);
    return deltas;
  }
  std::string reasoning;
  std::string rest;
  const bool ended = state_->reasoning->push(text, &reasoning, &rest);
  append_delta(Kind::kReasoning, reasoning, -1, &deltas);
  if (ended) {
    state_->reasoning.reset();
    state_->after.drop_leading_newlines();
    state_->after.push(rest, &deltas);
  }
  return deltas;
}

std::vector<OutputDelta> OutputParser::finish() {
  std::vector<OutputDelta> deltas;
  if (std::exchange(state_->finished, true)) return deltas;
  if (state_->reasoning) {
    std::string reasoning;
    state_->reasoning->finish(&reasoning);
    append_delta(Kind::kReasoning, reasoning, -1, &deltas);
  } else {
    state_->after.finish(&deltas);
  }
  return deltas;
}

int OutputParser::tool_calls() const { return state_->after.tool_calls(); }

OpenValue OutputParser::open_value() const { return state_->after.open_value(); }

namespace {

void collect(std::vector<OutputDelta> deltas, ParsedOutput* output) {
  for (OutputDelta& delta : deltas) {
    switch (delta.kind) {
      case Kind::kReasoning:
        output->reasoning += delta.text;
        break;
      case Kind::kContent:
        output->content += delta.text;
        break;
      case Kind::kToolCallStart:
        output->calls.push_back({std::move(delta.tool_id), std::move(delta.tool_name), {}});
        break;
      case Kind::kToolCallArguments:
        output->calls.back().arguments_json += delta.text;
        break;
    }
  }
}

}  // namespace

ParsedOutput parse_output(std::string_view text, OutputParserOptions options, uint64_t id_seed) {
  OutputParser parser(std::move(options), id_seed);
  ParsedOutput output;
  collect(parser.push(text), &output);
  collect(parser.finish(), &output);
  return output;
}

}  // namespace tokenspeed::text

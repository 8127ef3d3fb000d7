// The work behind one chat or completions request: submits one engine request per choice, turns tokens into text, and
// writes the answer, whole or as server-sent events. Owned by the connection while the answer is under way (see
// Exchange::hold): releasing it cancels the engine requests. Everything but the sinks runs on the connection's strand.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/exchange.h"
#include "server/request_fields.h"
#include "text/output_parser.h"

namespace tokenspeed::server {

struct GenerationRequest {
  bool chat = false;
  GenerationFields fields;
  struct Prompt {
    std::vector<int32_t> tokens;
    std::string text;  // what echo gives back
  };
  std::vector<Prompt> prompts;
  bool echo = false;                 // completions only
  text::OutputParserOptions parser;  // chat only
  std::string forced_prefix;         // the start of a forced tool call, already at the end of the prompt
  bool parallel_tool_calls = true;
};

// Answers `exchange`, now with an error or over time.
void start_generation(ServerContext& context, GenerationRequest request, Exchange& exchange);

}  // namespace tokenspeed::server

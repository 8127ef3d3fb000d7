// One choice of an answer while it is generated.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "text/detokenizer.h"
#include "text/output_parser.h"
#include "text/stop_strings.h"

namespace tokenspeed::server {

struct Choice {
  engine::RequestHandle handle;
  size_t prompt = 0;  // index into the request's prompts
  std::optional<text::StreamingDetokenizer> detokenizer;
  std::optional<text::StopStringMatcher> stops;
  std::optional<text::OutputParser> parser;
  std::vector<int32_t> tokens;
  std::vector<runtime::TokenLogprobs> logprobs;
  std::vector<runtime::TokenLogprobs> prompt_logprobs;
  std::string pending;  // deltas known before the first token (a forced call's header)
  std::string content;
  std::string reasoning;
  struct Call {
    std::string id;
    std::string name;
    std::string arguments;
  };
  std::vector<Call> calls;
  int64_t cached_tokens = 0;
  size_t text_offset = 0;  // of the next token, in characters (completions' logprobs)
  std::chrono::steady_clock::time_point last_token{};
  bool started = false;  // its first chunk is written
  bool finished = false;
  std::string finish_reason;
};

}  // namespace tokenspeed::server

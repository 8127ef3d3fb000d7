// Log probabilities in the two shapes of the API.
#pragma once

#include <span>
#include <string>

#include "runtime/runner.h"
#include "server/server.h"

namespace tokenspeed::server {

// {"content":[{"token","logprob","bytes","top_logprobs":[...]}]}
std::string chat_logprobs(const ServedModel& model, std::span<const runtime::TokenLogprobs> tokens, int32_t top);
// {"tokens","token_logprobs","top_logprobs","text_offset"}; `offset` advances by the characters of the tokens. With
// `first` (an echoed prompt's first token, which has no probability) that one leads.
std::string completion_logprobs(const ServedModel& model, const int32_t* first,
                                std::span<const runtime::TokenLogprobs> tokens, int32_t top, size_t* offset);

}  // namespace tokenspeed::server

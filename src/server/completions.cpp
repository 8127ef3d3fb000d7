#include "server/generation.h"
#include "server/json_errors.h"
#include "server/router.h"

namespace tokenspeed::server {
namespace {

constexpr int64_t kDefaultMaxTokens = 16;
constexpr size_t kMaxPrompts = 128;

Result<GenerationRequest::Prompt> read_prompt(const Json& value, const std::string& field, const ServedModel& model) {
  GenerationRequest::Prompt prompt;
  if (value.is_string()) {
    if (!model.tokenizer) {
      return bad_field(field, "is text, but this model has no tokenizer; send an array of token ids");
    }
    prompt.text = value.get<std::string>();
    TS_ASSIGN_OR_RETURN(prompt.tokens, model.tokenizer->encode(prompt.text));
  } else {
    TS_ASSIGN_OR_RETURN(prompt.tokens, read_token_ids(value, field, model.vocabulary_size));
    if (model.tokenizer) prompt.text = model.tokenizer->decode(prompt.tokens, false);
  }
  if (prompt.tokens.empty()) return bad_field(field, "is empty; send at least one token");
  return prompt;
}

Result<std::vector<GenerationRequest::Prompt>> read_prompts(const Json& body, const ServedModel& model) {
  const auto at = body.find("prompt");
  if (at == body.end()) return bad_field("prompt", "is missing");
  std::vector<GenerationRequest::Prompt> prompts;
  const bool many = at->is_array() && !at->empty() && (at->front().is_string() || at->front().is_array());
  if (!many) {
    TS_ASSIGN_OR_RETURN(auto prompt, read_prompt(*at, "prompt", model));
    prompts.push_back(std::move(prompt));
    return prompts;
  }
  if (at->size() > kMaxPrompts) return bad_field("prompt", "holds more than 128 prompts; send fewer");
  for (size_t i = 0; i < at->size(); ++i) {
    TS_ASSIGN_OR_RETURN(auto prompt, read_prompt((*at)[i], "prompt[" + std::to_string(i) + "]", model));
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

Result<GenerationRequest> read_request(const ServerContext& context, const std::string& text) {
  TS_ASSIGN_OR_RETURN(const Json body, parse_body(text));
  GenerationRequest request;
  TS_ASSIGN_OR_RETURN(request.fields, read_generation_fields(body, context));
  if (const auto at = body.find("suffix"); at != body.end() && !at->is_null()) {
    return bad_field("suffix", "is not supported; leave it out");
  }
  TS_RETURN_IF_ERROR(read_flag(body, "echo", &request.echo));
  int64_t logprobs = -1;
  TS_RETURN_IF_ERROR(read_integer(body, "logprobs", 0, 20, &logprobs));
  request.fields.sampling.logprobs = static_cast<int32_t>(logprobs);
  if (request.echo) request.fields.sampling.prompt_logprobs = static_cast<int32_t>(logprobs);
  if (request.fields.max_tokens < 0) request.fields.max_tokens = kDefaultMaxTokens;
  if (request.fields.max_tokens == 0) {
    if (!request.echo) return bad_field("max_tokens", "is 0; it must be at least 1 without echo");
    request.fields.sampling.prompt_logprobs = std::max(request.fields.sampling.prompt_logprobs, 0);
  }
  TS_ASSIGN_OR_RETURN(request.prompts, read_prompts(body, context.model));
  for (const auto& prompt : request.prompts) {
    const auto length = static_cast<int64_t>(prompt.tokens.size());
    if (length + request.fields.max_tokens > context.model.max_model_length) {
      return bad_field("prompt", "has " + std::to_string(length) + " tokens and max_tokens is " +
                                     std::to_string(request.fields.max_tokens) + "; together they must not exceed " +
                                     std::to_string(context.model.max_model_length));
    }
  }
  return request;
}

}  // namespace

void handle_completions(ServerContext& context, const HttpRequest& http, Exchange& exchange) {
  auto request = read_request(context, http.body);
  if (!request.ok()) return reply_error(exchange, request.status());
  start_generation(context, std::move(request).value(), exchange);
}

}  // namespace tokenspeed::server

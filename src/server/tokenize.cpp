#include "server/chat_request.h"
#include "server/json_errors.h"
#include "server/json_text.h"
#include "server/router.h"

namespace tokenspeed::server {
namespace {

Result<std::string> tokenize(const ServerContext& context, const std::string& text) {
  TS_ASSIGN_OR_RETURN(const Json body, parse_body(text));
  TS_RETURN_IF_ERROR(check_model(body, context));
  const ServedModel& model = context.model;
  if (!model.tokenizer) return invalid_argument("This model has no tokenizer; send token ids to /v1/completions.");
  bool strings = false;
  bool generation_prompt = true;
  TS_RETURN_IF_ERROR(read_flag(body, "return_token_strs", &strings));
  TS_RETURN_IF_ERROR(read_flag(body, "add_generation_prompt", &generation_prompt));
  std::string prompt;
  if (body.contains("messages")) {
    TS_ASSIGN_OR_RETURN(const Json tools, read_tools(body));
    TS_ASSIGN_OR_RETURN(const text::ChatTemplate* chat_template, chat_template_of(model));
    TS_ASSIGN_OR_RETURN(prompt, render_chat(*chat_template, body, tools, generation_prompt));
  } else {
    const auto at = body.find("prompt");
    if (at == body.end() || !at->is_string()) return bad_field("prompt", "must be a string");
    prompt = at->get<std::string>();
  }
  TS_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, model.tokenizer->encode(prompt));
  std::string tokens, texts;
  for (const int32_t id : ids) {
    const char* comma = tokens.empty() ? "" : ",";
    tokens += comma + std::to_string(id);
    const std::string* bytes = strings ? model.tokenizer->token_bytes(id) : nullptr;
    if (strings) texts += comma + json_quoted(bytes != nullptr ? *bytes : "");
  }
  return "{\"count\":" + std::to_string(ids.size()) + ",\"max_model_len\":" + std::to_string(model.max_model_length) +
         ",\"tokens\":[" + tokens + "],\"token_strs\":" + (strings ? "[" + texts + "]" : "null") + "}";
}

Result<std::string> detokenize(const ServerContext& context, const std::string& text) {
  TS_ASSIGN_OR_RETURN(const Json body, parse_body(text));
  TS_RETURN_IF_ERROR(check_model(body, context));
  if (!context.model.tokenizer) return invalid_argument("This model has no tokenizer.");
  const auto at = body.find("tokens");
  if (at == body.end()) return bad_field("tokens", "is missing");
  TS_ASSIGN_OR_RETURN(const auto ids, read_token_ids(*at, "tokens", context.model.vocabulary_size));
  return "{\"prompt\":" + json_quoted(context.model.tokenizer->decode(ids, false)) + "}";
}

void answer(const Result<std::string>& json, Exchange& exchange) {
  if (json.ok())
    exchange.reply(200, "application/json", *json);
  else
    reply_error(exchange, json.status());
}

}  // namespace

void handle_tokenize(ServerContext& context, const HttpRequest& request, Exchange& exchange) {
  answer(tokenize(context, request.body), exchange);
}

void handle_detokenize(ServerContext& context, const HttpRequest& request, Exchange& exchange) {
  answer(detokenize(context, request.body), exchange);
}

}  // namespace tokenspeed::server

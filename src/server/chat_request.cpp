#include "server/chat_request.h"

#include "server/json_errors.h"
#include "server/render.h"
#include "server/router.h"

namespace tokenspeed::server {
namespace {

std::vector<text::ToolSchema> schemas(const Json& tools) {
  std::vector<text::ToolSchema> out;
  for (const Json& tool : tools) {
    const Json& function = tool["function"];
    const auto parameters = function.find("parameters");
    out.push_back({function["name"].get<std::string>(), parameters == function.end() ? "" : parameters->dump()});
  }
  return out;
}

// A schema that is not followed must not look as if it were.
Status check_response_format(const Json& body) {
  const auto at = body.find("response_format");
  if (at == body.end() || at->is_null()) return {};
  if (at->is_object() && at->contains("type") && (*at)["type"] == "text") return {};
  return bad_field("response_format", "must be {\"type\":\"text\"}; this server does not constrain output yet");
}

struct ToolChoice {
  bool none = false;
  bool forced = false;
  std::string name;  // of the one function that may follow; empty: any
};

Result<ToolChoice> read_tool_choice(const Json& body, const Json& tools) {
  ToolChoice choice;
  const auto at = body.find("tool_choice");
  if (at == body.end() || at->is_null() || *at == "auto") return choice;
  if (*at == "none") {
    choice.none = true;
    return choice;
  }
  choice.forced = true;
  if (*at == "required") {
    if (tools.empty()) return bad_field("tool_choice", "is 'required', but there are no tools");
    if (tools.size() == 1) choice.name = tools[0]["function"]["name"].get<std::string>();
    return choice;
  }
  if (!at->is_object() || !at->contains("function") || !(*at)["function"].is_object() ||
      !(*at)["function"].contains("name") || !(*at)["function"]["name"].is_string()) {
    return bad_field("tool_choice",
                     "must be 'none', 'auto', 'required' or {\"type\":\"function\",\"function\":"
                     "{\"name\":...}}");
  }
  choice.name = (*at)["function"]["name"].get<std::string>();
  for (const Json& tool : tools) {
    if (tool["function"]["name"] == choice.name) return choice;
  }
  return bad_field("tool_choice", "names '" + choice.name + "', which is not among the tools");
}

// Reads max_completion_tokens, else max_tokens; the default is the rest of the context.
Status set_max_tokens(const Json& body, const ServedModel& model, GenerationRequest* request) {
  GenerationFields& fields = request->fields;
  const auto length = static_cast<int64_t>(request->prompts[0].tokens.size());
  const int64_t rest = model.max_model_length - length;
  TS_RETURN_IF_ERROR(read_integer(body, "max_completion_tokens", 1, INT32_MAX, &fields.max_tokens));
  if (fields.max_tokens == 0) return bad_field("max_tokens", "is 0; it must be at least 1");
  if (rest < 1 || fields.max_tokens > rest) {
    return bad_field(rest < 1 ? "messages" : "max_tokens",
                     "does not fit: the prompt has " + std::to_string(length) + " tokens and the context " +
                         std::to_string(model.max_model_length) + "; shorten one of them");
  }
  if (fields.max_tokens < 0) fields.max_tokens = rest;
  return {};
}

Status read_logprobs(const Json& body, GenerationFields* fields) {
  bool wanted = false;
  int64_t top = 0;
  TS_RETURN_IF_ERROR(read_flag(body, "logprobs", &wanted));
  TS_RETURN_IF_ERROR(read_integer(body, "top_logprobs", 0, 20, &top));
  if (top > 0 && !wanted) return bad_field("top_logprobs", "needs logprobs: true");
  if (wanted) fields->sampling.logprobs = static_cast<int32_t>(top);
  return {};
}

}  // namespace

Result<Json> read_tools(const Json& body) {
  const auto at = body.find("tools");
  if (at == body.end() || at->is_null()) return Json::array();
  if (!at->is_array()) return bad_field("tools", "must be an array");
  for (size_t i = 0; i < at->size(); ++i) {
    const Json& tool = (*at)[i];
    const std::string field = "tools[" + std::to_string(i) + "]";
    if (!tool.is_object() || !tool.contains("type") || tool["type"] != "function") {
      return bad_field(field, "must be an object of type 'function'");
    }
    if (!tool.contains("function") || !tool["function"].is_object() || !tool["function"].contains("name") ||
        !tool["function"]["name"].is_string() || tool["function"]["name"].get_ref<const std::string&>().empty()) {
      return bad_field(field + ".function.name", "must be a string that is not empty");
    }
  }
  return *at;
}

Result<std::string> render_chat_request(const text::ChatTemplate& chat_template, const std::string& request_json) {
  TS_ASSIGN_OR_RETURN(const Json body, parse_body(request_json));
  TS_ASSIGN_OR_RETURN(const Json tools, read_tools(body));
  bool generation_prompt = true;
  TS_RETURN_IF_ERROR(read_flag(body, "add_generation_prompt", &generation_prompt));
  return render_chat(chat_template, body, tools, generation_prompt);
}

Result<GenerationRequest> read_chat_request(const ServerContext& context, const std::string& text) {
  TS_ASSIGN_OR_RETURN(const Json body, parse_body(text));
  GenerationRequest request;
  request.chat = true;
  TS_ASSIGN_OR_RETURN(request.fields, read_generation_fields(body, context));
  TS_RETURN_IF_ERROR(read_logprobs(body, &request.fields));
  TS_RETURN_IF_ERROR(check_response_format(body));
  TS_RETURN_IF_ERROR(read_flag(body, "parallel_tool_calls", &request.parallel_tool_calls));
  TS_ASSIGN_OR_RETURN(Json tools, read_tools(body));
  TS_ASSIGN_OR_RETURN(const ToolChoice choice, read_tool_choice(body, tools));
  if (choice.none) tools = Json::array();
  TS_ASSIGN_OR_RETURN(const text::ChatTemplate* chat_template, chat_template_of(context.model));
  TS_ASSIGN_OR_RETURN(std::string prompt, render_chat(*chat_template, body, tools, true));
  request.parser.tools = schemas(tools);
  request.parser.parse_tool_calls = !tools.empty();
  request.parser.starts_in_reasoning = prompt.ends_with("<think>\n");
  if (choice.forced) {
    if (request.parser.starts_in_reasoning) prompt += "\n</think>\n\n";
    request.parser.starts_in_reasoning = false;
    request.forced_prefix = "<tool_call>\n<function=" + (choice.name.empty() ? "" : choice.name + ">\n");
    prompt += request.forced_prefix;
  }
  request.prompts.resize(1);
  TS_ASSIGN_OR_RETURN(request.prompts[0].tokens, context.model.tokenizer->encode(prompt));
  TS_RETURN_IF_ERROR(set_max_tokens(body, context.model, &request));
  return request;
}

void handle_chat_completions(ServerContext& context, const HttpRequest& http, Exchange& exchange) {
  auto request = read_chat_request(context, http.body);
  if (!request.ok()) return reply_error(exchange, request.status());
  start_generation(context, std::move(request).value(), exchange);
}

}  // namespace tokenspeed::server

#include "server/chat_request.h"

namespace tokenspeed::server {
namespace {

Status flatten_content(Json& message, const std::string& field) {
  const auto at = message.find("content");
  if (at == message.end() || at->is_null()) {
    message["content"] = "";
    return {};
  }
  if (at->is_string()) return {};
  if (!at->is_array()) return bad_field(field, "must be a string, null or an array of text parts");
  std::string text;
  for (const Json& part : *at) {
    const auto type = part.is_object() ? part.find("type") : part.end();
    if (!part.is_object() || type == part.end() || !type->is_string()) {
      return bad_field(field, "holds a part without a type; send {\"type\":\"text\",\"text\":...}");
    }
    if (*type != "text") {
      return bad_field(field, "holds a part of type '" + type->get<std::string>() + "'; this server reads text only");
    }
    const auto value = part.find("text");
    if (value == part.end() || !value->is_string())
      return bad_field(field, "holds a text part whose text is no string");
    text += value->get<std::string>();
  }
  message["content"] = std::move(text);
  return {};
}

Status read_calls(Json& message, const std::string& field) {
  const auto calls = message.find("tool_calls");
  if (calls == message.end()) return {};
  if (calls->is_null()) {
    message.erase("tool_calls");
    return {};
  }
  if (!calls->is_array()) return bad_field(field, "must be an array");
  for (Json& call : *calls) {
    if (!call.is_object() || !call.contains("function") || !call["function"].is_object() ||
        !call["function"].contains("name") || !call["function"]["name"].is_string()) {
      return bad_field(field, "holds a call without a function name");
    }
    Json& function = call["function"];
    if (!function.contains("arguments") || function["arguments"].is_null()) function["arguments"] = Json::object();
    Json& arguments = function["arguments"];
    if (arguments.is_string()) {
      const auto text = arguments.get<std::string>();
      arguments = text.empty() ? Json::object() : parse_json(text);
    }
    if (!arguments.is_object()) return bad_field(field, "holds a call whose arguments are not a JSON object");
  }
  return {};
}

}  // namespace

Result<Json> read_messages(const Json& body) {
  const auto at = body.find("messages");
  if (at == body.end()) return bad_field("messages", "is missing");
  if (!at->is_array()) return bad_field("messages", "must be an array");
  if (at->empty()) return bad_field("messages", "is empty; send at least one message");
  Json messages = *at;
  for (size_t i = 0; i < messages.size(); ++i) {
    Json& message = messages[i];
    const std::string field = "messages[" + std::to_string(i) + "]";
    if (!message.is_object()) return bad_field(field, "must be an object");
    const auto role = message.find("role");
    if (role == message.end() || !role->is_string()) return bad_field(field + ".role", "must be a string");
    if (*role == "developer") *role = "system";
    if (*role != "system" && *role != "user" && *role != "assistant" && *role != "tool") {
      return bad_field(field + ".role", "is '" + role->get<std::string>().substr(0, 40) +
                                            "'; it must be system, developer, user, assistant or tool");
    }
    TS_RETURN_IF_ERROR(flatten_content(message, field + ".content"));
    TS_RETURN_IF_ERROR(read_calls(message, field + ".tool_calls"));
  }
  return messages;
}

Result<std::string> render_chat(const text::ChatTemplate& chat_template, const Json& body, const Json& tools,
                                bool generation_prompt) {
  Json values = Json::object();
  if (const auto extra = body.find("chat_template_kwargs"); extra != body.end() && !extra->is_null()) {
    if (!extra->is_object()) return bad_field("chat_template_kwargs", "must be an object");
    values = *extra;
  }
  TS_ASSIGN_OR_RETURN(values["messages"], read_messages(body));
  if (!tools.empty()) values["tools"] = tools;
  values["add_generation_prompt"] = generation_prompt;
  auto rendered = chat_template.render(values.dump(-1, ' ', false, Json::error_handler_t::replace));
  if (!rendered.ok()) return Status(rendered.status()).with_param("messages");
  return rendered;
}

Result<const text::ChatTemplate*> chat_template_of(const ServedModel& model) {
  if (!model.tokenizer || !model.chat_template) {
    return invalid_argument("This model has no tokenizer or chat template; use /v1/completions with token ids.");
  }
  return &*model.chat_template;
}

}  // namespace tokenspeed::server

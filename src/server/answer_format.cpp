#include "server/answer_format.h"

#include <ctime>

#include "server/json_text.h"
#include "server/logprob_json.h"

namespace tokenspeed::server {
namespace {

std::string ids_json(const std::vector<int32_t>& ids) {
  std::string out = "[";
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += ',';
    out += std::to_string(ids[i]);
  }
  return out + "]";
}

std::string calls_json(const std::vector<Choice::Call>& calls) {
  std::string out;
  for (const Choice::Call& call : calls) {
    out += out.empty() ? "[" : ",";
    out += "{\"id\":" + json_quoted(call.id) +
           ",\"type\":\"function\",\"function\":{\"name\":" + json_quoted(call.name) +
           ",\"arguments\":" + json_quoted(call.arguments) + "}}";
  }
  return out + "]";
}

void close_chunk(std::string& out, std::string_view finish_reason, std::string_view logprobs) {
  out += ",\"logprobs\":";
  out += logprobs.empty() ? "null" : logprobs;
  out += ",\"finish_reason\":";
  if (finish_reason.empty()) {
    out += "null";
  } else {
    out.append("\"").append(finish_reason).append("\"");
  }
  out += "}]}\n\n";
}

}  // namespace

AnswerFormat::AnswerFormat(const ServedModel& model, const GenerationRequest& request, uint64_t number)
    : model_(model), request_(request) {
  const std::string now = std::to_string(std::time(nullptr));
  head_ = std::string("{\"id\":\"") + (request.chat ? "chatcmpl-" : "cmpl-") + now + "-" + std::to_string(number);
  head_ += std::string("\",\"object\":\"") + (request.chat ? "chat.completion" : "text_completion");
  if (request.chat && request.fields.stream) head_ += ".chunk";
  head_ += "\",\"created\":" + now + ",\"model\":" + json_quoted(model.name);
}

std::string AnswerFormat::whole(std::vector<Choice>& choices) const {
  std::string out = head_ + ",\"choices\":[";
  for (size_t i = 0; i < choices.size(); ++i) {
    if (i > 0) out += ',';
    out += "{\"index\":" + std::to_string(i) + (request_.chat ? message_json(choices[i]) : text_json(choices[i])) +
           ",\"finish_reason\":\"" + choices[i].finish_reason + "\"}";
  }
  return out + "],\"usage\":" + usage(choices) + "}";
}

std::string AnswerFormat::usage_event(const std::vector<Choice>& choices) const {
  return "data: " + head_ + ",\"choices\":[],\"usage\":" + usage(choices) + "}\n\n";
}

void AnswerFormat::append_chunks(std::string& out, size_t index, Choice& choice, std::string_view delta,
                                 const engine::Event& event) const {
  out.reserve(out.size() + head_.size() + delta.size() + 256);
  if (request_.chat) {
    append_chat_chunks(out, index, choice, delta, event);
  } else if (!delta.empty() || !event.tokens.empty() || choice.finished) {
    append_text_chunk(out, index, choice, delta, event);
  }
}

void AnswerFormat::open_chunk(std::string& out, size_t index) const {
  out += "data: ";
  out += head_;
  out += ",\"choices\":[{\"index\":";
  out += std::to_string(index);
}

void AnswerFormat::append_chat_chunks(std::string& out, size_t index, Choice& choice, std::string_view delta,
                                      const engine::Event& event) const {
  if (!choice.started) {
    choice.started = true;
    open_chunk(out, index);
    out += ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"}";
    close_chunk(out, {}, {});
  }
  std::string logprobs;
  if (request_.fields.sampling.logprobs >= 0 && !event.logprobs.empty()) {
    logprobs = chat_logprobs(model_, event.logprobs, request_.fields.sampling.logprobs);
    if (delta.empty()) delta = "{}";
  }
  while (!delta.empty()) {
    const size_t end = delta.find('\n');
    open_chunk(out, index);
    out += ",\"delta\":";
    out += delta.substr(0, end);
    close_chunk(out, {}, logprobs);
    logprobs.clear();
    delta = end == std::string_view::npos ? std::string_view() : delta.substr(end + 1);
  }
  if (!choice.finished) return;
  open_chunk(out, index);
  out += ",\"delta\":{}";
  close_chunk(out, choice.finish_reason, {});
}

void AnswerFormat::append_text_chunk(std::string& out, size_t index, Choice& choice, std::string_view delta,
                                     const engine::Event& event) const {
  const bool first = !choice.started;
  choice.started = true;
  open_chunk(out, index);
  out += ",\"text\":\"";
  if (first) append_json_escaped(out, choice.content);  // the echoed prompt
  out += delta;
  out += '"';
  if (request_.fields.return_token_ids) {
    out += ",\"token_ids\":" + ids_json(event.tokens);
    if (first) out += ",\"prompt_token_ids\":" + ids_json(request_.prompts[choice.prompt].tokens);
  }
  const std::string logprobs = text_logprobs(choice, first && request_.echo, event.logprobs);
  close_chunk(out, choice.finished ? std::string_view(choice.finish_reason) : std::string_view(), logprobs);
}

std::string AnswerFormat::usage(const std::vector<Choice>& choices) const {
  int64_t prompt = 0, completion = 0, cached = 0;
  for (const auto& entry : request_.prompts) prompt += static_cast<int64_t>(entry.tokens.size());
  for (const Choice& choice : choices) {
    completion += static_cast<int64_t>(choice.tokens.size());
    cached += choice.cached_tokens;
  }
  return "{\"prompt_tokens\":" + std::to_string(prompt) + ",\"completion_tokens\":" + std::to_string(completion) +
         ",\"total_tokens\":" + std::to_string(prompt + completion) +
         ",\"prompt_tokens_details\":{\"cached_tokens\":" + std::to_string(cached) + "}}";
}

std::string AnswerFormat::message_json(const Choice& choice) const {
  std::string out = ",\"message\":{\"role\":\"assistant\",\"content\":";
  out += choice.content.empty() && !choice.calls.empty() ? "null" : json_quoted(choice.content);
  if (!choice.reasoning.empty()) out += ",\"reasoning_content\":" + json_quoted(choice.reasoning);
  if (!choice.calls.empty()) out += ",\"tool_calls\":" + calls_json(choice.calls);
  out += "},\"logprobs\":";
  const int32_t top = request_.fields.sampling.logprobs;
  return out + (top >= 0 ? chat_logprobs(model_, choice.logprobs, top) : "null");
}

std::string AnswerFormat::text_json(Choice& choice) const {
  std::string out = ",\"text\":" + json_quoted(choice.content);
  if (request_.fields.return_token_ids) {
    out += ",\"token_ids\":" + ids_json(choice.tokens) +
           ",\"prompt_token_ids\":" + ids_json(request_.prompts[choice.prompt].tokens);
  }
  const std::string logprobs = text_logprobs(choice, request_.echo, choice.logprobs);
  return out + ",\"logprobs\":" + (logprobs.empty() ? "null" : logprobs);
}

// Empty when none are asked for.
std::string AnswerFormat::text_logprobs(Choice& choice, bool echo,
                                        const std::vector<runtime::TokenLogprobs>& tokens) const {
  const int32_t top = request_.fields.sampling.logprobs;
  if (top < 0) return {};
  std::vector<runtime::TokenLogprobs> all;
  if (echo) all = choice.prompt_logprobs;
  all.insert(all.end(), tokens.begin(), tokens.end());
  const int32_t* first = echo ? &request_.prompts[choice.prompt].tokens.front() : nullptr;
  return completion_logprobs(model_, first, all, top, &choice.text_offset);
}

void append_delta_object(std::string& out, const text::OutputDelta& delta) {
  using Kind = text::OutputDelta::Kind;
  if (!out.empty()) out += '\n';
  const bool call = delta.kind == Kind::kToolCallStart || delta.kind == Kind::kToolCallArguments;
  if (!call) {
    out += delta.kind == Kind::kReasoning ? "{\"reasoning_content\":\"" : "{\"content\":\"";
    append_json_escaped(out, delta.text);
    out += "\"}";
    return;
  }
  out += "{\"tool_calls\":[{\"index\":" + std::to_string(delta.tool_index);
  if (delta.kind == Kind::kToolCallStart) {
    out += ",\"id\":" + json_quoted(delta.tool_id) +
           ",\"type\":\"function\",\"function\":{\"name\":" + json_quoted(delta.tool_name) + ",\"arguments\":\"";
  } else {
    out += ",\"function\":{\"arguments\":\"";
  }
  append_json_escaped(out, delta.text);
  out += "\"}}]}";
}

}  // namespace tokenspeed::server

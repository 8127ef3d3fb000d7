#include "app/conversation.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "app/command_line.h"
#include "app/local_tools.h"

namespace tokenspeed::app {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr int kMaxToolRounds = 8;

// Prints pieces of text under a label in the left margin; a new label starts a new block.
class Transcript {
 public:
  void write(std::string_view label, std::string_view style, std::string_view text) {
    if (label != label_) {
      finish();
      label_ = label;
      fmt::print("{}{:<10}{}", terminal_style().accent, label, terminal_style().reset);
    }
    fmt::print("{}", style);
    for (const char c : text) {
      std::fputc(c, stdout);
      if (c == '\n') std::fputs("          ", stdout);
    }
    fmt::print("{}", terminal_style().reset);
    std::fflush(stdout);
  }
  void finish() {
    if (!label_.empty()) std::fputc('\n', stdout);
    label_.clear();
    std::fflush(stdout);
  }

 private:
  std::string label_;
};

void print_block(std::string_view label, std::string_view text) {
  Transcript transcript;
  transcript.write(label, "", text);
  transcript.finish();
}

// The assistant message that a stream of chunks builds up, and when its first and last pieces came.
class StreamedAnswer {
 public:
  void take(std::string_view event) {
    const Json chunk = Json::parse(event, nullptr, false);
    if (!chunk.is_object()) return;
    if (chunk.contains("error")) {
      error_ = chunk["error"].value("message", "the server reported an error");
      return;
    }
    if (chunk.contains("usage") && chunk["usage"].is_object()) usage_ = chunk["usage"];
    if (chunk.value("choices", Json::array()).empty()) return;
    const Json& delta = chunk["choices"][0]["delta"];
    take_text(delta, "reasoning_content", "thinking", terminal_style().dim, &reasoning_);
    take_text(delta, "content", "answer", terminal_style().bold, &content_);
    if (delta.contains("tool_calls")) {
      for (const Json& call : delta["tool_calls"]) take_call(call);
    }
  }

  void finish() { transcript_.finish(); }
  const std::string& error() const { return error_; }
  bool has_calls() const { return !calls_.empty(); }

  Json message() const {
    Json message = {{"role", "assistant"}, {"content", content_}};
    if (!reasoning_.empty()) message["reasoning_content"] = reasoning_;
    if (has_calls()) message["tool_calls"] = calls_;
    return message;
  }

  std::string summary() const {
    const auto seconds = [](Clock::duration d) { return std::chrono::duration<double>(d).count(); };
    const int64_t tokens = usage_.value("completion_tokens", int64_t{0});
    const double generating = seconds(last_ - first_);
    const Json details = usage_.value("prompt_tokens_details", Json::object());
    const int64_t cached = details.is_object() ? details.value("cached_tokens", int64_t{0}) : 0;
    return fmt::format("first token {:.0f} ms · {:.0f} tok/s · {} new tokens · prompt {} tokens, {} cached",
                       seconds(first_ - start_) * 1e3,
                       generating > 0 ? static_cast<double>(tokens - 1) / generating : 0.0, tokens,
                       usage_.value("prompt_tokens", int64_t{0}), cached);
  }

 private:
  void take_text(const Json& delta, const char* key, std::string_view label, std::string_view style, std::string* out) {
    const auto text = delta.find(key);
    if (text == delta.end() || !text->is_string() || text->get_ref<const std::string&>().empty()) return;
    stamp();
    *out += text->get_ref<const std::string&>();
    transcript_.write(label, style, text->get_ref<const std::string&>());
  }

  void take_call(const Json& piece) {
    stamp();
    const size_t index = piece.value("index", size_t{0});
    while (calls_.size() <= index) {
      calls_.push_back({{"id", ""}, {"type", "function"}, {"function", {{"name", ""}, {"arguments", ""}}}});
    }
    Json& call = calls_[index];
    if (piece.contains("id") && piece["id"].is_string()) call["id"] = piece["id"];
    const Json function = piece.value("function", Json::object());
    const std::string name = function.value("name", "");
    const std::string arguments = function.value("arguments", "");
    if (!name.empty()) {
      call["function"]["name"] = name;
      transcript_.finish();  // every call starts a line
      transcript_.write("call", terminal_style().bold, name + " ");
    }
    call["function"]["arguments"].get_ref<std::string&>() += arguments;
    transcript_.write("call", "", arguments);
  }

  void stamp() {
    last_ = Clock::now();
    if (first_ == Clock::time_point()) first_ = last_;
  }

  Transcript transcript_;
  std::string reasoning_;
  std::string content_;
  std::string error_;
  Json calls_ = Json::array();
  Json usage_ = Json::object();
  const Clock::time_point start_ = Clock::now();
  Clock::time_point first_;
  Clock::time_point last_;
};

}  // namespace

Conversation::Conversation(HttpClient client, ConversationOptions options)
    : client_(std::move(client)), options_(std::move(options)) {
  forget();
}

void Conversation::forget() {
  messages_ = Json::array();
  if (!options_.system_prompt.empty()) messages_.push_back({{"role", "system"}, {"content", options_.system_prompt}});
}

Status Conversation::say(const std::string& text) {
  messages_.push_back({{"role", "user"}, {"content", text}});
  for (int round = 0; round < kMaxToolRounds; ++round) {
    TS_ASSIGN_OR_RETURN(const bool calls, answer());
    if (!calls) return {};
    call_tools();
  }
  return resource_exhausted("the model called tools " + std::to_string(kMaxToolRounds) + " times without an answer");
}

Result<bool> Conversation::answer() {
  Json request = {{"model", options_.model},
                  {"messages", messages_},
                  {"max_completion_tokens", options_.max_tokens},
                  {"stream", true},
                  {"stream_options", {{"include_usage", true}}}};
  if (options_.temperature) request["temperature"] = *options_.temperature;
  if (options_.tools) request["tools"] = local_tool_schemas();
  StreamedAnswer answer;
  const Status status = client_.post_events("/v1/chat/completions", request.dump(),
                                            [&answer](std::string_view event) { answer.take(event); });
  answer.finish();
  TS_RETURN_IF_ERROR(status);
  if (!answer.error().empty()) return internal_error(answer.error());
  fmt::print("{}          {}{}\n", terminal_style().dim, answer.summary(), terminal_style().reset);
  messages_.push_back(answer.message());
  return answer.has_calls();
}

void Conversation::call_tools() {
  const Json calls = messages_.back()["tool_calls"];
  for (const Json& call : calls) {
    const std::string result = call_local_tool(call["function"]["name"], call["function"]["arguments"]);
    print_block("result", result);
    messages_.push_back({{"role", "tool"}, {"tool_call_id", call["id"]}, {"content", result}});
  }
}

}  // namespace tokenspeed::app

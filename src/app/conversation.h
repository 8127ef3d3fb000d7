// A conversation with a served model over its HTTP API, shown on the terminal as it streams: reasoning, tool calls,
// their results, the answer, and what each request took. What `demo` and `chat` have in common.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "app/http_client.h"
#include "base/status.h"

namespace tokenspeed::app {

struct ConversationOptions {
  std::string model;
  std::string system_prompt;               // empty: none
  bool tools = true;                       // offer local_tools.h and answer their calls
  std::optional<double> temperature = {};  // none: the server's default
  int max_tokens = 1024;                   // of one answer
};

class Conversation {
 public:
  Conversation(HttpClient client, ConversationOptions options);

  // One turn: sends the text, answers tool calls until the model is done. The history keeps all of it.
  // Errors: the client's; resource_exhausted when the model keeps calling tools.
  Status say(const std::string& text);
  void forget();  // back to the system prompt
  bool tools() const { return options_.tools; }
  void set_tools(bool on) { options_.tools = on; }

 private:
  // Streams one answer into the history. Returns whether it holds tool calls.
  Result<bool> answer();
  void call_tools();

  HttpClient client_;
  ConversationOptions options_;
  nlohmann::ordered_json messages_;
};

}  // namespace tokenspeed::app

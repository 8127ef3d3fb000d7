// A model's chat template: turns a chat request into the prompt text, byte for byte as Python's Jinja2 does with the
// settings chat templates are written for (trim_blocks, lstrip_blocks, plain-JSON tojson, raise_exception). The
// template is parsed once; rendering changes nothing in it, so any number of threads may render at once. Steps, output
// bytes and recursion are bounded: no template and no request can hold a thread. Cost: rendering is linear in the
// prompt for templates that walk the messages a fixed number of times.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "base/directory.h"
#include "base/status.h"

namespace tokenspeed::text {

class ChatTemplate {
 public:
  // Errors: invalid_argument naming the template's line.
  static Result<ChatTemplate> parse(std::string_view source);
  ~ChatTemplate();
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;

  // request_json: an object with "messages" (array), optional "tools" (array) and any further template variables
  // ("add_generation_prompt", "enable_thinking" ...) at the top level. The order of keys is kept.
  // Errors: invalid_argument for malformed JSON, for what the template raises (its own message, then the line), for
  // what it does wrong and for limits exceeded.
  Result<std::string> render(std::string_view request_json) const;

 private:
  struct Parsed;
  explicit ChatTemplate(std::unique_ptr<const Parsed> parsed);
  std::unique_ptr<const Parsed> parsed_;
};

// The template of a model directory: chat_template.jinja, else "chat_template" of tokenizer_config.json (a string, or
// a list of named ones, of which "default" is taken).
// Errors: not_found when there is none; else those of reading and parsing, naming the file.
Result<ChatTemplate> load_chat_template(const Directory& model_directory);

}  // namespace tokenspeed::text

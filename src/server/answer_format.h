// The answers of one request as JSON: a whole one, or the chunks of a stream (server-sent events).
// Cost: a chunk is one string, written without a JSON tree.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/choice.h"
#include "server/generation.h"

namespace tokenspeed::server {

class AnswerFormat {
 public:
  // Both must outlive this. `number` makes the answer's id unique within the server.
  AnswerFormat(const ServedModel& model, const GenerationRequest& request, uint64_t number);

  // The whole answer. Choices' text offsets advance.
  std::string whole(std::vector<Choice>& choices) const;
  // Appends the events that `event` causes for choice `index`. `delta`: chat's delta objects, one a line, or escaped
  // text.
  void append_chunks(std::string& out, size_t index, Choice& choice, std::string_view delta,
                     const engine::Event& event) const;
  // The event after the last choice's, with nothing but the usage.
  std::string usage_event(const std::vector<Choice>& choices) const;

 private:
  void append_chat_chunks(std::string& out, size_t index, Choice& choice, std::string_view delta,
                          const engine::Event& event) const;
  void append_text_chunk(std::string& out, size_t index, Choice& choice, std::string_view delta,
                         const engine::Event& event) const;
  void open_chunk(std::string& out, size_t index) const;
  std::string usage(const std::vector<Choice>& choices) const;
  std::string message_json(const Choice& choice) const;
  std::string text_json(Choice& choice) const;
  std::string text_logprobs(Choice& choice, bool echo, const std::vector<runtime::TokenLogprobs>& tokens) const;

  const ServedModel& model_;
  const GenerationRequest& request_;
  std::string head_;  // every chunk's and answer's start, up to the choices
};

// Appends a parser's output as a chunk's delta object, after a line break when `out` is not empty.
void append_delta_object(std::string& out, const text::OutputDelta& delta);

}  // namespace tokenspeed::server

// Splits a model's generated text into reasoning, content and tool calls (Qwen3.5: `<think>…</think>`, then text, then
// XML tool calls), while it streams.
// Invariant: the concatenation of all deltas does not depend on how the text was cut into pushes; every decision waits
// until the text seen so far settles it. A call's argument fragments always join to one valid JSON object.
// Cost: linear in the text (structural look-ahead is bounded); held back are at most a tag, a run of whitespace, or the
// parameter that is being written.
//
// Borders. Reasoning runs to `</think>`, or to a tool call that opens before it; a `<think>` the model writes first is
// dropped. Newlines at the start of the reasoning and of the content after it, whitespace at the end of the reasoning,
// whitespace before, between and after calls are dropped. Text that ends inside the reasoning is all reasoning.
//
// Calls. `<tool_call>` opens a call only when `<function=NAME>` follows (whitespace between); else it is plain text, as
// it is when no tools are offered. A duplicate parameter is ignored after its first value: that one is already sent.
// A call that the end of the text cuts off loses its unfinished parameter, gets its closing brace and does not count
// in tool_calls(); a header that is cut off is given back as text. Names the request did not offer are passed through.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/value_schema.h"

namespace tokenspeed::text {

struct ToolSchema {
  std::string name;
  std::string parameters_json;  // the JSON schema of function.parameters; empty or unreadable: all values are strings
};

struct OutputParserOptions {
  bool starts_in_reasoning = true;  // the prompt ended inside `<think>`
  bool parse_reasoning = true;      // false: reasoning and its tags are content
  bool parse_tool_calls = true;     // false, or no tools: tool-call text is content
  std::vector<ToolSchema> tools;
};

// One piece of output, in stream order.
struct OutputDelta {
  enum class Kind { kReasoning, kContent, kToolCallStart, kToolCallArguments } kind = Kind::kContent;
  std::string text;       // reasoning, content, or a fragment of the arguments' JSON text
  int tool_index = -1;    // calls count from 0
  std::string tool_name;  // kToolCallStart only
  std::string tool_id;    // kToolCallStart only: "call_" and 24 hex digits
};

// A call's parameter while its value is being written.
struct OpenValue {
  const ValueGrammar* grammar = nullptr;  // nullptr: no value is open, or its schema admits any text
  std::string_view text;                  // from the end of `<parameter=NAME>` on; valid until the next push
};

// Not thread-safe; one per choice of a request.
class OutputParser {
 public:
  // Call ids are a function of `id_seed` and the call's index.
  explicit OutputParser(OutputParserOptions options, uint64_t id_seed);
  OutputParser(OutputParser&&) noexcept;
  OutputParser& operator=(OutputParser&&) noexcept;
  ~OutputParser();

  // Takes the next piece of text, cut anywhere. After finish() it returns nothing.
  std::vector<OutputDelta> push(std::string_view text);
  // Ends the text: flushes what was held back and closes an open call.
  std::vector<OutputDelta> finish();
  // Calls closed by the model so far.
  int tool_calls() const;
  OpenValue open_value() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct ParsedOutput {
  struct Call {
    std::string id;
    std::string name;
    std::string arguments_json;
  };
  std::string reasoning;
  std::string content;
  std::vector<Call> calls;
};

// The whole text at once: the concatenation of OutputParser's deltas.
ParsedOutput parse_output(std::string_view text, OutputParserOptions options, uint64_t id_seed);

}  // namespace tokenspeed::text

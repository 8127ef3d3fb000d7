// The output parser on arbitrary UTF-8 text (which is all a detokenizer gives it): any chunking must give the result of
// the whole text, and the arguments of every call must be a JSON object. Byte 0 of the input chooses the options, byte
// 1 the cuts.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "text/output_parser.h"
#include "text/unicode.h"

namespace {

using tokenspeed::text::OutputDelta;
using tokenspeed::text::OutputParser;
using tokenspeed::text::OutputParserOptions;

void require(bool condition) {
  if (!condition) std::abort();
}

OutputParserOptions options_of(uint8_t bits) {
  OutputParserOptions options;
  options.starts_in_reasoning = bits & 1;
  options.parse_reasoning = !(bits & 2);
  options.parse_tool_calls = !(bits & 4);
  options.tools = {{"f", R"({"properties":{"i":{"type":"integer"},"n":{"type":"number"},"b":{"type":"boolean"},
                     "o":{"type":"object"},"a":{"anyOf":[{"type":"array"},{"type":"null"}]},"s":{"type":"string"}}})"}};
  return options;
}

struct Joined {
  std::string text[2];  // reasoning, content
  std::vector<std::string> calls;
  std::vector<std::string> arguments;
  bool operator==(const Joined&) const = default;

  void add(const std::vector<OutputDelta>& deltas) {
    for (const OutputDelta& delta : deltas) {
      if (delta.kind == OutputDelta::Kind::kToolCallStart) {
        calls.push_back(delta.tool_name + delta.tool_id);
        arguments.emplace_back();
      } else if (delta.kind == OutputDelta::Kind::kToolCallArguments) {
        require(delta.tool_index + 1 == static_cast<int>(calls.size()));
        arguments.back() += delta.text;
      } else {
        text[delta.kind == OutputDelta::Kind::kContent] += delta.text;
      }
    }
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const OutputParserOptions options = options_of(data[0]);
  const size_t piece = data[1] % 16 + 1;
  std::string text;
  tokenspeed::text::append_repaired_utf8({reinterpret_cast<const char*>(data) + 2, size - 2}, false, text);

  Joined whole;
  OutputParser at_once(options, 1);
  whole.add(at_once.push(text));
  whole.add(at_once.finish());

  Joined chunked;
  OutputParser streamed(options, 1);
  for (size_t position = 0; position < text.size(); position += piece) {
    chunked.add(streamed.push(std::string_view(text).substr(position, piece)));
  }
  chunked.add(streamed.finish());

  require(chunked == whole);
  require(streamed.tool_calls() == at_once.tool_calls());
  for (const std::string& arguments : whole.arguments) {
    require(nlohmann::json::parse(arguments, nullptr, false).is_object());
  }
  return 0;
}

#include "text/output_parser.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>

namespace tokenspeed::text {
namespace {

using Json = nlohmann::ordered_json;
using Kind = OutputDelta::Kind;

OutputParserOptions options_with_tools() {
  OutputParserOptions options;
  options.tools = {{"f", R"({"type":"object","properties":{"a":{"type":"string"},"n":{"type":"integer"},
                            "list":{"type":"array"},"flag":{"type":"boolean"}}})"},
                   {"g", ""}};
  return options;
}

OutputParserOptions without_reasoning() {
  OutputParserOptions options = options_with_tools();
  options.starts_in_reasoning = false;
  return options;
}

// The deltas joined, kinds and calls in order: what must not depend on chunking.
std::string flat(const std::vector<OutputDelta>& deltas) {
  std::string out;
  const OutputDelta* last = nullptr;
  for (const OutputDelta& delta : deltas) {
    if (!last || last->kind != delta.kind || last->tool_index != delta.tool_index) {
      out += "\n#" + std::to_string(static_cast<int>(delta.kind)) + ":" + std::to_string(delta.tool_index) + ":" +
             delta.tool_name + ":" + delta.tool_id + ":";
    }
    out += delta.text;
    last = &delta;
  }
  return out;
}

std::string parse_in_pieces(const std::string& text, const OutputParserOptions& options,
                            const std::vector<size_t>& sizes, int* calls = nullptr) {
  OutputParser parser(options, 7);
  std::vector<OutputDelta> all;
  const auto take = [&](std::vector<OutputDelta> deltas) { all.insert(all.end(), deltas.begin(), deltas.end()); };
  size_t position = 0;
  for (size_t i = 0; position < text.size(); ++i) {
    const size_t size = sizes.empty() ? text.size() : sizes[i % sizes.size()];
    take(parser.push(std::string_view(text).substr(position, size)));
    position += size;
  }
  take(parser.finish());
  if (calls) *calls = parser.tool_calls();
  return flat(all);
}

TEST(OutputParser, ReasoningThenContent) {
  const ParsedOutput output =
      parse_output("<think>\nI think. \n\n</think>\n\nHello <b>you</b>\n", options_with_tools(), 1);
  EXPECT_EQ(output.reasoning, "I think.");
  EXPECT_EQ(output.content, "Hello <b>you</b>\n");
  EXPECT_TRUE(output.calls.empty());
}

TEST(OutputParser, BordersKeepIndentationAndInnerSpace) {
  const ParsedOutput output = parse_output("\n  a\n b</think>\n  x </think> y", options_with_tools(), 1);
  EXPECT_EQ(output.reasoning, "  a\n b");
  EXPECT_EQ(output.content, "  x </think> y");
}

TEST(OutputParser, TruncatedReasoningIsAllReasoning) {
  const ParsedOutput output = parse_output("still thinking </thi", options_with_tools(), 1);
  EXPECT_EQ(output.reasoning, "still thinking </thi");
  EXPECT_EQ(output.content, "");
}

TEST(OutputParser, ThinkingDisabledOrNotParsedIsContent) {
  EXPECT_EQ(parse_output("a </think> b", without_reasoning(), 1).content, "a </think> b");
  OutputParserOptions raw = options_with_tools();
  raw.parse_reasoning = false;
  EXPECT_EQ(parse_output("<think>a</think>\n\nb", raw, 1).content, "<think>a</think>\n\nb");
}

TEST(OutputParser, CallAfterReasoningAndContent) {
  const ParsedOutput output = parse_output(
      "why\n</think>\n\nLet me see.\n\n<tool_call>\n<function=f>\n<parameter=a>\nline 1\nline 2\n</parameter>\n"
      "<parameter=n>\n42\n</parameter>\n</function>\n</tool_call>\n",
      options_with_tools(), 1);
  EXPECT_EQ(output.reasoning, "why");
  EXPECT_EQ(output.content, "Let me see.");
  ASSERT_EQ(output.calls.size(), 1u);
  EXPECT_EQ(output.calls[0].name, "f");
  EXPECT_EQ(output.calls[0].arguments_json, R"({"a": "line 1\nline 2", "n": 42})");
  EXPECT_EQ(output.calls[0].id.size(), 29u);
  EXPECT_EQ(output.calls[0].id.substr(0, 5), "call_");
  EXPECT_EQ(output.calls[0].id.find_first_not_of("0123456789abcdef", 5), std::string::npos);
}

TEST(OutputParser, CallEndsReasoningImplicitly) {
  const ParsedOutput output =
      parse_output("hm\n<tool_call>\n<function=f>\n</function>\n</tool_call>", options_with_tools(), 1);
  EXPECT_EQ(output.reasoning, "hm");
  ASSERT_EQ(output.calls.size(), 1u);
  EXPECT_EQ(output.calls[0].arguments_json, "{}");
  // A mention of the tag is not a call.
  const ParsedOutput mention = parse_output("I may write <tool_call> now</think>ok", options_with_tools(), 1);
  EXPECT_EQ(mention.reasoning, "I may write <tool_call> now");
  EXPECT_EQ(mention.content, "ok");
}

TEST(OutputParser, ParallelCallsHaveOwnIdsAndNoContentBetween) {
  const std::string call = "<tool_call>\n<function=g>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>";
  const ParsedOutput output = parse_output(call + "\n" + call + "\n", without_reasoning(), 1);
  EXPECT_EQ(output.content, "");
  ASSERT_EQ(output.calls.size(), 2u);
  EXPECT_EQ(output.calls[1].arguments_json, R"({"x": "1"})");
  EXPECT_NE(output.calls[0].id, output.calls[1].id);
  EXPECT_NE(output.calls[0].id, parse_output(call, without_reasoning(), 2).calls[0].id);
  EXPECT_EQ(output.calls[0].id, parse_output(call, without_reasoning(), 1).calls[0].id);
}

TEST(OutputParser, TwoFunctionsInOneBlock) {
  const ParsedOutput output =
      parse_output("<tool_call><function=f><parameter=n>1</parameter></function><function=g></function></tool_call>",
                   without_reasoning(), 1);
  ASSERT_EQ(output.calls.size(), 2u);
  EXPECT_EQ(output.calls[0].arguments_json, R"({"n": 1})");
  EXPECT_EQ(output.calls[1].name, "g");
}

TEST(OutputParser, TagsInsideValuesAreText) {
  const std::string value =
      "x <parameter=b> y\n</parameter> z\n</function>\nif a</parameter>\n</function>\nmore\n<function=q>\n</tool_call>";
  const ParsedOutput output =
      parse_output("<tool_call>\n<function=f>\n<parameter=a>\n" + value + "\n</parameter>\n</function>\n</tool_call>",
                   without_reasoning(), 1);
  ASSERT_EQ(output.calls.size(), 1u);
  EXPECT_EQ(Json::parse(output.calls[0].arguments_json)["a"], value);
}

TEST(OutputParser, MissingClosingTags) {
  const char* const texts[] = {
      "<tool_call><function=f>\n<parameter=a>\n1\n<parameter=n>\n2\n</parameter>\n</function></tool_call>",
      "<tool_call><function=f>\n<parameter=a>\n1\n</parameter><parameter=n>2\n</function>\n</tool_call>",
      "<tool_call><function=f><parameter=a>1</parameter><parameter=n>\n2\n</parameter>\n</tool_call>",
      "<tool_call><function=f><parameter=a>1</parameter> junk <parameter=n>2</parameter></function>",
      "<tool_call><function=f><parameter=a>1</parameter><parameter=n>2</parameter></function> junk"};
  for (const std::string text : texts) {
    const ParsedOutput output = parse_output(text, without_reasoning(), 1);
    ASSERT_EQ(output.calls.size(), 1u) << text;
    const bool swallowed = text.find(" junk <") != std::string::npos;
    EXPECT_EQ(output.calls[0].arguments_json,
              swallowed ? R"({"a": "1</parameter> junk <parameter=n>2"})" : R"({"a": "1", "n": 2})")
        << text;
    int calls = 0;
    parse_in_pieces(text, without_reasoning(), {1}, &calls);
    EXPECT_EQ(calls, 1) << text;
  }
}

TEST(OutputParser, CutOffCallIsClosedWithoutItsUnfinishedParameter) {
  const std::string text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=n>\n12";
  int calls = -1;
  parse_in_pieces(text, without_reasoning(), {}, &calls);
  EXPECT_EQ(calls, 0);
  const ParsedOutput output = parse_output(text, without_reasoning(), 1);
  ASSERT_EQ(output.calls.size(), 1u);
  EXPECT_EQ(output.calls[0].arguments_json, R"({"a": "1"})");
  EXPECT_EQ(parse_output("Hi \n<tool_call>\n<func", without_reasoning(), 1).content, "Hi \n<tool_call>\n<func");
}

TEST(OutputParser, EveryParameterOfAPushIsEmittedAtOnce) {
  OutputParser parser(without_reasoning(), 1);
  const auto deltas = parser.push(
      "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=n>\n2\n</parameter>\n<parameter=flag>");
  ASSERT_EQ(deltas.size(), 2u);
  EXPECT_EQ(deltas[0].kind, Kind::kToolCallStart);
  EXPECT_EQ(deltas[1].text, R"({"a": "1", "n": 2)");
  EXPECT_EQ(parser.tool_calls(), 0);
}

TEST(OutputParser, TextIsNotHeldBackLongerThanNeeded) {
  OutputParser parser(options_with_tools(), 1);
  EXPECT_EQ(flat(parser.push("abc <t")), "\n#0:-1:::abc");
  EXPECT_EQ(flat(parser.push("x")), "\n#0:-1::: <tx");
  EXPECT_EQ(flat(parser.push("</think>\n\nHi")), "\n#1:-1:::Hi");
}

TEST(OutputParser, DuplicateParametersKeepTheFirst) {
  const ParsedOutput output =
      parse_output("<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
                   without_reasoning(), 1);
  EXPECT_EQ(output.calls.at(0).arguments_json, R"({"a": "1"})");
}

TEST(OutputParser, UnknownFunctionIsEmitted) {
  const ParsedOutput output = parse_output("<tool_call><function=zzz><parameter=k>1</parameter></function></tool_call>",
                                           without_reasoning(), 1);
  EXPECT_EQ(output.calls.at(0).name, "zzz");
  EXPECT_EQ(output.calls.at(0).arguments_json, R"({"k": "1"})");
}

TEST(OutputParser, WithoutToolsCallsAreContent) {
  const std::string text = "a\n<tool_call>\n<function=f>\n</function>\n</tool_call>\n";
  OutputParserOptions options = without_reasoning();
  options.parse_tool_calls = false;
  EXPECT_EQ(parse_output(text, options, 1).content, text);
  OutputParserOptions reasoning;  // no tools: a call does not end the reasoning either
  EXPECT_EQ(parse_output(text, reasoning, 1).reasoning, text);
}

TEST(OutputParser, PushAfterFinishReturnsNothing) {
  OutputParser parser(without_reasoning(), 1);
  parser.push("a");
  parser.finish();
  EXPECT_TRUE(parser.push("b").empty());
  EXPECT_TRUE(parser.finish().empty());
}

std::string render_value(const Json& value) { return value.is_string() ? value.get<std::string>() : value.dump(); }

TEST(OutputParser, DemoCallsRenderedAndParsedBack) {
  std::ifstream file(TOKENSPEED_SOURCE_DIR "/tests/goldens/demo-calls.jsonl");
  std::string line;
  int count = 0;
  while (std::getline(file, line)) {
    const Json request = Json::parse(line);
    OutputParserOptions options;
    for (const Json& tool : request["tools"]) {
      const Json& function = tool["function"];
      options.tools.push_back({function["name"], function["parameters"].dump()});
    }
    std::string text = "Reason.\n</think>\n\nText.\n\n";
    for (const Json& call : request["expected_calls"]) {
      text += "<tool_call>\n<function=" + call[0].get<std::string>() + ">\n";
      for (const auto& [name, value] : call[1].items()) {
        text += "<parameter=" + name + ">\n" + render_value(value) + "\n</parameter>\n";
      }
      text += "</function>\n</tool_call>\n";
    }
    const ParsedOutput output = parse_output(text, options, 1);
    EXPECT_EQ(output.reasoning, "Reason.");
    EXPECT_EQ(output.content, "Text.");
    Json calls = Json::array();
    for (const auto& call : output.calls) calls.push_back({call.name, Json::parse(call.arguments_json)});
    EXPECT_EQ(nlohmann::json(calls), nlohmann::json(request["expected_calls"])) << text;
    EXPECT_EQ(parse_in_pieces(text, options, {1}), parse_in_pieces(text, options, {}));
    ++count;
  }
  EXPECT_EQ(count, 128);
}

// Texts made of tags, beginnings of tags, whitespace and UTF-8: the places where chunking could matter.
rc::Gen<std::string> nasty_text() {
  const auto piece = rc::gen::weightedOneOf<std::string>(
      {{6, rc::gen::element<std::string>("<think>", "</think>", "<tool_call>", "</tool_call>", "</function>",
                                         "</parameter>", "<function=f>", "<function=g>", "<parameter=a>",
                                         "<parameter=n>", "<parameter=list>", "<parameter=b c>")},
       {3, rc::gen::element<std::string>("<tool_call>\n<function=f>\n", "\n</parameter>\n",
                                         "\n</function>\n</tool_call>\n", "<parameter=a>\n")},
       {3, rc::gen::element<std::string>("\n", " ", "\n\n", "\t", "\r\n", std::string(300, ' '))},
       {2,
        rc::gen::element<std::string>("<", "</", "<t", "</f", "<function=", "<function=\n", "<parameter=>", ">", "<<")},
       {3, rc::gen::element<std::string>("x", "12", "[1,\"</parameter>\"]", "true", "日本語", "é", "🙂", "\xF0\x9F",
                                         "\"")},
       {1,
        rc::gen::map(rc::gen::inRange<size_t>(0, 300), [](size_t n) { return "<function=" + std::string(n, 'n'); })}});
  return rc::gen::map(rc::gen::container<std::vector<std::string>>(piece), [](const std::vector<std::string>& pieces) {
    return std::accumulate(pieces.begin(), pieces.end(), std::string());
  });
}

TEST(OutputParserProperty, AnySplitGivesTheResultOfTheWhole) {
  EXPECT_TRUE(rc::check("any split of the text = the whole text at once", [] {
    const std::string text = *nasty_text();
    const auto sizes = *rc::gen::nonEmpty(rc::gen::container<std::vector<size_t>>(rc::gen::inRange<size_t>(1, 12)));
    OutputParserOptions options = options_with_tools();
    options.starts_in_reasoning = *rc::gen::arbitrary<bool>();
    options.parse_tool_calls = *rc::gen::weightedElement<bool>({{4, true}, {1, false}});
    int whole_calls = 0;
    int split_calls = 0;
    const std::string whole = parse_in_pieces(text, options, {}, &whole_calls);
    RC_ASSERT(parse_in_pieces(text, options, sizes, &split_calls) == whole);
    RC_ASSERT(split_calls == whole_calls);
    RC_ASSERT(parse_in_pieces(text, options, {1}) == whole);
  }));
}

TEST(OutputParserProperty, ArgumentsAreAlwaysJsonObjects) {
  EXPECT_TRUE(rc::check("arguments parse", [] {
    const ParsedOutput output =
        parse_output("<tool_call><function=f>" + *nasty_text(), without_reasoning(), *rc::gen::arbitrary<uint64_t>());
    RC_ASSERT(!output.calls.empty());
    for (const auto& call : output.calls) RC_ASSERT(Json::parse(call.arguments_json).is_object());
  }));
}

TEST(OutputParserProperty, RenderedCallsComeBack) {
  EXPECT_TRUE(rc::check("render, then parse", [] {
    // Values without '<' cannot look like tags; the rest of what the template can render is free.
    const auto value_gen = rc::gen::container<std::string>(rc::gen::elementOf(std::string("ab \n\t\"\\{}[]>/=0'")));
    const auto values = *rc::gen::container<std::vector<std::string>>(value_gen);
    std::string text = "<tool_call>\n<function=g>\n";
    Json expected = Json::object();
    for (size_t i = 0; i < values.size(); ++i) {
      const std::string name = "p" + std::to_string(i);
      text += "<parameter=" + name + ">\n" + values[i] + "\n</parameter>\n";
      expected[name] = values[i];
    }
    const ParsedOutput output = parse_output(text + "</function>\n</tool_call>", without_reasoning(), 1);
    RC_ASSERT(output.calls.size() == 1u);
    RC_ASSERT(Json::parse(output.calls[0].arguments_json) == expected);
  }));
}

TEST(OutputParser, LongValuesInSmallPiecesStayLinear) {
  // Quadratic scanning of this would take minutes.
  std::string text = "<tool_call>\n<function=f>\n<parameter=a>\n";
  for (int i = 0; i < 60000; ++i) text += "</parameter> <";
  text += "\n</parameter>\n</function>\n</tool_call>";
  int calls = 0;
  parse_in_pieces(text, without_reasoning(), {3}, &calls);
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace tokenspeed::text

#include "text/tool_call_constraint.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/random.h"

namespace tokenspeed::text {
namespace {

const std::string kSource = TOKENSPEED_SOURCE_DIR;

const Tokenizer& demo() {
  static const Tokenizer tokenizer = Tokenizer::load(kSource + "/models/demo").value();
  return tokenizer;
}
const SortedVocabulary& vocabulary() {
  static const SortedVocabulary sorted(demo());
  return sorted;
}

ValueGrammar grammar(const std::string& property) {
  return read_parameter_schemas(R"({"type":"object","properties":{"p":)" + property + "}}").at("p").grammar;
}

TEST(ValueGrammar, NumbersEndWhereTheirTagBegins) {
  const ValueGrammar number = grammar(R"({"type":"number"})");
  for (const char* yes : {"\n588\n</parameter>\n", "\n-0.5e+3\n</parameter>\n<", "\n0\n</parameter>\n\n"}) {
    EXPECT_EQ(number.match(yes), TagMatch::kYes) << yes;
  }
  for (const char* open : {"", "\n", "\n-", "\n1.", "\n1e", "\n1e-", "\n588", "\n588\n", "\n588\n</parameter>"}) {
    EXPECT_EQ(number.match(open), TagMatch::kPartial) << open;
  }
  for (const char* no : {"5", "\n ", "\n588 ZAR", "\n\n", "\n-\n", "\n1.\n", "\n01", "\n+1", "\n1e100", "\nnull",
                         "\n588\n\n", "\n5\n</parameter>&"}) {
    EXPECT_EQ(number.match(no), TagMatch::kNo) << no;
  }
}

TEST(ValueGrammar, TheSchemaDecidesWhatIsRestricted) {
  const auto matches = [](const char* property, const std::string& value) {
    return grammar(property).match("\n" + value + "\n</parameter>\n") == TagMatch::kYes;
  };
  EXPECT_FALSE(matches(R"({"type":"integer"})", "1.5"));
  EXPECT_TRUE(matches(R"({"type":["integer","null"]})", "null"));
  EXPECT_TRUE(matches(R"({"type":["integer","number"]})", "1.5"));
  EXPECT_TRUE(matches(R"({"type":"boolean"})", "True"));
  EXPECT_FALSE(matches(R"({"type":"boolean"})", "yes"));
  EXPECT_TRUE(matches(R"({"type":"string","enum":["a","ab","two\nlines"]})", "ab"));
  EXPECT_TRUE(matches(R"({"type":"string","enum":["a","ab","two\nlines"]})", "two\nlines"));
  EXPECT_FALSE(matches(R"({"type":"string","enum":["a","ab"]})", "b"));
  EXPECT_TRUE(matches(R"({"enum":[1,true,null]})", "None"));
  EXPECT_TRUE(matches(R"({"enum":["a"],"nullable":true})", "null"));
  EXPECT_TRUE(matches(R"({"const":7})", "7"));
  std::string many = R"({"enum":["0")";
  for (size_t i = 1; i <= kMostLiterals; ++i) many += ",\"" + std::to_string(i) + "\"";
  EXPECT_FALSE(grammar(many + "]}").restricts());
  for (const char* open :
       {R"({"type":"string"})", R"({"type":"array"})", R"({"type":["string","number"]})", "{}", R"({"enum":[["a"]]})",
        R"({"enum":[]})", R"({"anyOf":[{"type":"number"},{"enum":["a"]}]})"}) {
    EXPECT_FALSE(grammar(open).restricts()) << open;
  }
}

OutputParserOptions options() {
  OutputParserOptions result;
  result.starts_in_reasoning = false;
  result.tools = {{"f", R"({"type":"object","properties":{"n":{"type":"number"},"s":{"type":"string"},
                            "b":{"type":"boolean"},"mixed":{"type":["integer","null"]},"unit":{"type":"string","enum":["km/h","°C"]}}})"}};
  return result;
}

class Writer {
 public:
  explicit Writer(const std::string& prefix = "") : constraint_(demo(), vocabulary(), options(), prefix) {}
  void write(const std::string& text) {
    const std::vector<int32_t> ids = demo().encode(text).value();
    for (const int32_t id : ids) push(id);
  }
  void push(int32_t id) {
    constraint_.push(id);
    text_ += *demo().token_bytes(id);
  }
  std::span<const int32_t> allowed() { return constraint_.allowed(); }
  const std::string& text() const { return text_; }

 private:
  ToolCallConstraint constraint_;
  std::string text_;
};

TEST(ToolCallConstraint, OnlyTypedValuesAreHeld) {
  Writer writer;
  const auto expect_free = [&](const std::string& text) {
    writer.write(text);
    EXPECT_TRUE(writer.allowed().empty()) << writer.text();
  };
  expect_free("It costs 5.");
  expect_free("\n<tool_call>\n<function=f>\n<parameter=s>\n");
  expect_free("anything 12");
  expect_free("\n</parameter>\n<parameter=n");
  writer.write(">\n5");
  EXPECT_FALSE(writer.allowed().empty());
  writer.write("\n</parameter>");
  EXPECT_FALSE(writer.allowed().empty());
  expect_free("\n");
  expect_free("<parameter=unknown>\n");
  expect_free("1\n</parameter>\n</function>\n</tool_call>");
}

TEST(ToolCallConstraint, AForcedPrefixCounts) {
  Writer writer("<tool_call>\n<function=f>\n<parameter=b>");
  EXPECT_FALSE(writer.allowed().empty());
  writer.write("\nperhaps");  // as no sampled token could
  EXPECT_TRUE(writer.allowed().empty());
}

TEST(ToolCallConstraint, AllowsWhatTryingEveryTokenAllows) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> cases = {
      {"n", {"", "\n", "\n12", "\n12\n</para", "\n1."}},
      {"b", {"", "\n", "\nt", "\nFal", "\ntrue", "\ntrue\n</parameter"}},
      {"unit", {"", "\n", "\nk", "\nkm/h\n", "\n\xC2"}},
      {"mixed", {"", "\n", "\n1", "\nn", "\nNone\n"}}};
  for (const auto& [name, texts] : cases) {
    const ValueGrammar rules = read_parameter_schemas(options().tools[0].parameters_json).at(name).grammar;
    for (const std::string& text : texts) {
      SCOPED_TRACE(name + ": " + text);
      Writer writer("<tool_call>\n<function=f>\n<parameter=" + name + ">" + text);
      std::vector<int32_t> expected;
      for (int32_t id = 0; id < demo().vocabulary_size(); ++id) {
        const std::string* bytes = demo().token_bytes(id);
        if (bytes == nullptr || bytes->empty() || demo().is_special(id)) continue;
        if (rules.match(text + *bytes) != TagMatch::kNo) expected.push_back(id);
      }
      const auto allowed = writer.allowed();
      EXPECT_EQ(std::vector<int32_t>(allowed.begin(), allowed.end()), expected);
      EXPECT_FALSE(expected.empty());
    }
  }
}

// Whatever allowed tokens a model picks, the value that comes out has the declared type.
TEST(ToolCallConstraint, RandomChoicesGiveValuesOfTheDeclaredType) {
  constexpr uint64_t kSeed = 11;
  constexpr int kMostTokens = 40;
  SCOPED_TRACE(kSeed);
  int closed = 0;
  for (uint64_t run = 0; run < 300; ++run) {
    const std::string name = std::vector<std::string>{"n", "b", "unit"}[run % 3];
    Writer writer;
    writer.write("<tool_call>\n<function=f>\n<parameter=" + name + ">\n");
    int tokens = 0;
    for (auto allowed = writer.allowed(); !allowed.empty() && tokens < kMostTokens; allowed = writer.allowed()) {
      writer.push(allowed[philox(kSeed, run, static_cast<uint64_t>(tokens++))[0] % allowed.size()]);
    }
    if (tokens == kMostTokens) continue;  // a long number, still going on
    ++closed;
    const auto call = parse_output(writer.text() + "</function>\n</tool_call>", options(), 0).calls.at(0);
    const auto value = nlohmann::json::parse(call.arguments_json).at(name);
    if (name == "n") {
      EXPECT_TRUE(value.is_number()) << writer.text();
    } else if (name == "b") {
      EXPECT_TRUE(value.is_boolean()) << writer.text();
    } else {
      EXPECT_TRUE(value == "km/h" || value == "°C") << writer.text();
    }
  }
  EXPECT_GT(closed, 200);
}

}  // namespace
}  // namespace tokenspeed::text

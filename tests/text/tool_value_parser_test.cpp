#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "text/python_literal.h"
#include "text/tool_value.h"

namespace tokenspeed::text {
namespace {

std::string convert(const std::string& property_schema, std::string_view text) {
  const ToolSchemas schemas({{"f", R"({"type":"object","properties":{"p":)" + property_schema + "}}"}});
  return schemas.value_json("f", "p", text);
}

TEST(ToolValue, Strings) {
  EXPECT_EQ(convert(R"({"type":"string"})", "5"), R"("5")");
  EXPECT_EQ(convert(R"({"type":"string"})", " null "), R"(" null ")");
  EXPECT_EQ(convert(R"({"type":["string","null"]})", "None"), "null");
  EXPECT_EQ(convert(R"({"type":"string","nullable":true})", "null"), "null");
  EXPECT_EQ(convert(R"({"type":"string"})", "a\"b\\c\n\xF0\x9F"), "\"a\\\"b\\\\c\\n\xEF\xBF\xBD\"");
}

TEST(ToolValue, Integers) {
  for (const char* type : {"integer", "int32", "uint8", "long", "short", "unsigned"}) {
    const std::string schema = std::string(R"({"type":")") + type + "\"}";
    EXPECT_EQ(convert(schema, " 42 "), "42");
    EXPECT_EQ(convert(schema, "-007"), "-7");
    EXPECT_EQ(convert(schema, "+3"), "3");
    EXPECT_EQ(convert(schema, "-0"), "0");
    EXPECT_EQ(convert(schema, "5.0"), "5");
    EXPECT_EQ(convert(schema, "null"), "null");
    EXPECT_EQ(convert(schema, "5.5"), R"("5.5")");
    EXPECT_EQ(convert(schema, "five"), R"("five")");
    EXPECT_EQ(convert(schema, ""), R"("")");
    EXPECT_EQ(convert(schema, "123456789012345678901234567890"), "123456789012345678901234567890");
  }
}

TEST(ToolValue, Numbers) {
  const std::string schema = R"({"type":"number"})";
  EXPECT_EQ(convert(schema, "2.50"), "2.50");
  EXPECT_EQ(convert(schema, "3.0"), "3");
  EXPECT_EQ(convert(schema, "1e3"), "1000");
  EXPECT_EQ(convert(schema, ".5"), "0.5");
  EXPECT_EQ(convert(schema, "-1e-3"), "-1e-3");
  for (const char* bad : {"inf", "nan", "1e999", "0x10", "1,5", "--1", "+-1"}) {
    EXPECT_EQ(convert(schema, bad), json_string(bad));
  }
}

TEST(ToolValue, Booleans) {
  EXPECT_EQ(convert(R"({"type":"boolean"})", "True"), "true");
  EXPECT_EQ(convert(R"({"type":"bool"})", "FALSE"), "false");
  EXPECT_EQ(convert(R"({"type":"boolean"})", "yes"), R"("yes")");
}

TEST(ToolValue, Containers) {
  const std::string array = R"({"type":"array"})";
  EXPECT_EQ(convert(array, std::string_view("[1]\0[", 5)), R"("[1]\u0000[")");
  EXPECT_EQ(convert(array, R"( [1,"a,b:\"", {"k":[ ]}] )"), R"([1, "a,b:\"", {"k": []}])");
  EXPECT_EQ(convert(array, "[12345678901234567890123, 1.0]"), "[12345678901234567890123, 1.0]");
  EXPECT_EQ(convert(array, "['it', \"x'y\", True, None, (1, -2.5,),]"), R"(["it", "x'y", true, null, [1, -2.5]])");
  EXPECT_EQ(convert(R"({"type":"object"})", R"({'a': {'b': '\x41\u00e9\n'}})"), "{\"a\": {\"b\": \"Aé\\n\"}}");
  EXPECT_EQ(convert(R"({"properties":{}})", R"({"z":1,"a":2})"), R"({"z": 1, "a": 2})");
  for (const char* bad : {"[1, 2", "[1 2]", "{'a'}", "{1: 2}", "abc", "[,]", "['\\ud800']", "[__import__('os')]"}) {
    EXPECT_EQ(convert(array, bad), json_string(bad));
  }
}

TEST(ToolValue, DeepNestingIsText) {
  for (const char open : {'[', '('}) {
    const std::string deep = std::string(200000, open) + std::string(200000, open == '[' ? ']' : ')');
    EXPECT_EQ(convert(R"({"type":"array"})", deep), json_string(deep));
  }
}

TEST(ToolValue, Alternatives) {
  EXPECT_EQ(convert(R"({"anyOf":[{"type":"null"},{"type":"integer"},{"type":"string"}]})", "5"), "5");
  EXPECT_EQ(convert(R"({"anyOf":[{"type":"integer"},{"type":"string"}]})", "five"), R"("five")");
  EXPECT_EQ(convert(R"({"oneOf":[{"type":"integer"},{"type":"array"}]})", "[1]"), "[1]");
  EXPECT_EQ(convert(R"({"type":["string","integer"]})", "5"), R"("5")");
  EXPECT_EQ(convert(R"({"type":["null","boolean"]})", "null"), "null");
  EXPECT_EQ(convert(R"({"enum":["1","2"]})", "1"), R"("1")");
  EXPECT_EQ(convert(R"({"enum":[1,2]})", "1"), "1");
  EXPECT_EQ(convert(R"({"const":true})", "true"), "true");
  EXPECT_EQ(convert(R"({"$ref":"#/x"})", "5"), R"("5")");
}

TEST(ToolValue, OddSchemasMeanStrings) {
  for (const char* schema : {"", "[]", "{", "{\"properties\":[]}", "{\"properties\":{\"p\":3}}",
                             "{\"properties\":{\"p\":{\"type\":{}}}}", "{\"properties\":{\"p\":{\"type\":[3]}}}"}) {
    EXPECT_EQ(ToolSchemas(std::vector<ToolSchema>{{"f", schema}}).value_json("f", "p", "5"), R"("5")") << schema;
  }
  EXPECT_EQ(ToolSchemas(std::vector<ToolSchema>()).value_json("f", "p", "null"), R"("null")");
  std::string deep = "{\"type\":\"null\"}";
  for (int i = 0; i < 100; ++i) deep = "{\"anyOf\":[" + deep + "]}";
  EXPECT_EQ(convert(deep, "5"), R"("5")");
}

}  // namespace
}  // namespace tokenspeed::text

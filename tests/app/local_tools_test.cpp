#include "app/local_tools.h"

#include <gtest/gtest.h>

namespace tokenspeed::app {
namespace {

using Json = nlohmann::ordered_json;

TEST(LocalTools, Arithmetic) {
  EXPECT_EQ(*evaluate_expression("(41 + 170) * 18"), 3798);
  EXPECT_EQ(*evaluate_expression("-2^2 + 10 % 4 - .5"), -2.5);
  EXPECT_EQ(*evaluate_expression("2^3^2"), 512) << "powers associate to the right";
  for (const char* bad : {"", "1 +", "(1", "1 2", "1/0", "1..2", "x", "1e5"}) {
    EXPECT_FALSE(evaluate_expression(bad).ok()) << bad;
  }
  EXPECT_FALSE(evaluate_expression(std::string(100000, '(')).ok()) << "depth is limited";
  EXPECT_FALSE(evaluate_expression(std::string(100000, '-') + "1").ok()) << "depth is limited";
}

TEST(LocalTools, UnitsClockAndFiles) {
  EXPECT_EQ(call_local_tool("calculate", R"({"expression": "243 * 62.58"})"), R"({"result":15206.94})");
  EXPECT_EQ(call_local_tool("convert_units", R"({"value": 18, "from_unit": "inches", "to_unit": "centimeters"})"),
            R"({"result":45.72})");
  const Json time = Json::parse(call_local_tool("get_time", R"({"city": "Tokyo"})"));
  EXPECT_EQ(time["offset"], "+09:00");
  EXPECT_EQ(time["time"].get<std::string>().size(), 5u);
}

TEST(LocalTools, MistakesAreAnswers) {
  const auto error = [](const char* name, const char* arguments) {
    return Json::parse(call_local_tool(name, arguments)).contains("error");
  };
  EXPECT_TRUE(error("launch_rocket", "{}"));
  EXPECT_TRUE(error("calculate", "not json"));
  EXPECT_TRUE(error("calculate", R"({"expression": 5})"));
  EXPECT_TRUE(error("calculate", "{}"));
  EXPECT_TRUE(error("convert_units", R"({"value": 1, "from_unit": "miles", "to_unit": "grams"})"));
  EXPECT_TRUE(error("get_time", R"({"city": "Atlantis"})"));
  EXPECT_TRUE(error("read_file", R"({"path": "no such file"})"));
  EXPECT_TRUE(error("read_file", R"({"path": "/etc/hostname"})")) << "outside the working directory";
}

}  // namespace
}  // namespace tokenspeed::app

#include "text/stop_strings.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

namespace tokenspeed::text {
namespace {

struct Ended {
  std::string text;
  std::string matched;
  bool operator==(const Ended&) const = default;
};

Ended run(StopStringMatcher matcher, const std::string& text, const std::vector<size_t>& sizes) {
  Ended ended;
  for (size_t position = 0, i = 0; position < text.size(); ++i) {
    const size_t size = sizes.empty() ? text.size() : sizes[i % sizes.size()];
    const StopStringMatcher::Output output = matcher.push(std::string_view(text).substr(position, size));
    ended.text += output.text;
    ended.matched = output.matched;
    position += size;
  }
  ended.text += matcher.finish();
  return ended;
}

TEST(StopStrings, CutsBeforeOrAfterTheMatch) {
  StopStringMatcher matcher({"END"});
  EXPECT_EQ(matcher.push("ab E").text, "ab ");
  EXPECT_EQ(matcher.push("N").text, "");
  const auto output = matcher.push("D tail");
  EXPECT_TRUE(output.stopped);
  EXPECT_EQ(output.text, "");
  EXPECT_EQ(output.matched, "END");
  EXPECT_TRUE(matcher.push("more").stopped);
  EXPECT_EQ(matcher.push("more").text, "");
  EXPECT_EQ(matcher.finish(), "");
  EXPECT_EQ(run(StopStringMatcher({"END"}, true), "ab END tail", {}), (Ended{"ab END", "END"}));
}

TEST(StopStrings, HeldTextComesBack) {
  StopStringMatcher matcher({"\n\nUser:"});
  EXPECT_EQ(matcher.push("a\n\nUse").text, "a");
  EXPECT_EQ(matcher.push(" it\n").text, "\n\nUse it");
  EXPECT_EQ(matcher.finish(), "\n");
}

TEST(StopStrings, FirstEndWinsThenTheLongest) {
  EXPECT_EQ(run(StopStringMatcher({"abcd", "bc"}), "xabcd", {}), (Ended{"xa", "bc"}));
  EXPECT_EQ(run(StopStringMatcher({"c", "abc"}), "xabcd", {}), (Ended{"x", "abc"}));
  EXPECT_EQ(run(StopStringMatcher({"aab"}), "aaab", {1}), (Ended{"a", "aab"}));
}

TEST(StopStrings, NoneOrEmptyPassesTextThrough) {
  EXPECT_EQ(StopStringMatcher({}).push("abc").text, "abc");
  EXPECT_EQ(StopStringMatcher({""}).push("abc").text, "abc");
  EXPECT_FALSE(StopStringMatcher({""}).push("abc").stopped);
}

// The definition, by trying every end.
Ended by_definition(const std::vector<std::string>& stops, const std::string& text, bool include) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::string longest;
    for (const std::string& stop : stops) {
      if (stop.size() > longest.size() && std::string_view(text).substr(0, end).ends_with(stop)) longest = stop;
    }
    if (!longest.empty()) return {text.substr(0, include ? end : end - longest.size()), longest};
  }
  return {text, ""};
}

TEST(StopStringsProperty, AnySplitAgreesWithTheDefinition) {
  EXPECT_TRUE(rc::check("any split = definition", [] {
    const auto word = rc::gen::container<std::string>(rc::gen::element('a', 'b', 'c'));
    const auto stops = *rc::gen::container<std::vector<std::string>>(word);
    const auto prefix = *word;
    const std::string text = prefix + *word + *word;
    const auto sizes = *rc::gen::nonEmpty(rc::gen::container<std::vector<size_t>>(rc::gen::inRange<size_t>(1, 5)));
    const bool include = *rc::gen::arbitrary<bool>();
    RC_ASSERT(run(StopStringMatcher(stops, include), text, sizes) == by_definition(stops, text, include));
  }));
}

}  // namespace
}  // namespace tokenspeed::text

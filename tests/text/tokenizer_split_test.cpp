// The hand-written scanners against PCRE2 with the same patterns, and the Unicode table against ICU.
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <unicode/uchar.h>

#include "text/pretokenizer.h"
#include "text/unicode.h"

namespace tokenspeed::text {
namespace {

std::string utf8(char32_t code) {
  std::string out;
  if (code < 0x80) return {static_cast<char>(code)};
  if (code < 0x800) {
    out += static_cast<char>(0xc0 | code >> 6);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3f));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
  }
  return out += static_cast<char>(0x80 | (code & 0x3f));
}

// PCRE2 10.42 knows Unicode 14; ICU may know more.
bool both_know(char32_t code) {
  if (code >= 0xd800 && code < 0xe000) return false;
  UVersionInfo age;
  u_charAge(static_cast<UChar32>(code), age);
  return age[0] <= 14;
}

rc::Gen<std::string> characters() {
  // Weighted to what the patterns tell apart: contractions, spaces of every kind, newlines, marks, digits.
  return rc::gen::oneOf(rc::gen::element<std::string>("'", "'s", "'S", "'t", "'re", "'VE", "'m", "'ll", "'Ll", "'d",
                                                      "'l", "'\u017f", "s"),
                        rc::gen::element<std::string>(" ", "  ", "\t", "\n", "\r", "\r\n", "\v", "\u00a0", "\u0085",
                                                      "\u180e", "\u2028", "\u3000", "\u200b", "\ufeff"),
                        rc::gen::element<std::string>("a", "Z", "word", "é", "日本", "ß", "ﬆ", "\u0301", "\u0903",
                                                      "\u20dd", "1", "²", "Ⅷ", "٣", ".", "!?", "_", "😀", "€"),
                        rc::gen::map(rc::gen::suchThat(rc::gen::inRange<uint32_t>(0, 0x110000), both_know),
                                     [](uint32_t code) { return utf8(code); }));
}

void expect_same(std::string_view pattern, void (*scanner)(std::string_view, std::vector<uint32_t>&)) {
  const auto regex = Pretokenizer::compile_regex(pattern);
  ASSERT_TRUE(regex.ok()) << regex.status().to_string();
  const auto chosen = Pretokenizer::compile(pattern);
  EXPECT_TRUE(rc::check([&] {
    std::string text;
    for (int part = *rc::gen::inRange(0, 40); part > 0; --part) text += *characters();
    std::vector<uint32_t> expected, actual, by_choice;
    RC_ASSERT(regex->split(text, expected).ok());
    scanner(text, actual);
    RC_ASSERT(actual == expected);
    RC_ASSERT(chosen->split(text, by_choice).ok());
    RC_ASSERT(by_choice == expected);
  }));
  // Every character, at the start, after a letter, after a space and before each.
  for (char32_t code = 0; code < 0x110000; ++code) {
    if (!both_know(code)) continue;
    const std::string text = utf8(code) + "a" + utf8(code) + " " + utf8(code) + "'" + utf8(code);
    std::vector<uint32_t> expected, actual;
    if (code % 7 != 0 && code > 0x3000) continue;  // a seventh of the far planes is enough
    ASSERT_TRUE(regex->split(text, expected).ok());
    scanner(text, actual);
    ASSERT_EQ(actual, expected) << std::hex << static_cast<uint32_t>(code);
  }
}

TEST(TokenizerSplitTest, qwen2_scanner_is_its_regex) { expect_same(kQwen2Pattern, split_qwen2); }
TEST(TokenizerSplitTest, qwen35_scanner_is_its_regex) { expect_same(kQwen35Pattern, split_qwen35); }

TEST(TokenizerSplitTest, other_patterns_isolate_matches_and_gaps) {
  const auto split = [](const char* pattern, std::string_view text) {
    std::vector<uint32_t> ends;
    EXPECT_TRUE(Pretokenizer::compile(pattern).value().split(text, ends).ok());
    return ends;
  };
  using Ends = std::vector<uint32_t>;
  EXPECT_EQ(split("b+", "abba"), (Ends{1, 3, 4}));
  EXPECT_EQ(split("z", "abba"), (Ends{4}));
  EXPECT_EQ(split("z", ""), (Ends{}));
  EXPECT_EQ(split("x*", "aé"), (Ends{1, 3}));
  EXPECT_EQ(split("\\s", "a\u180e\u3000"), (Ends{4, 7}));  // U+180E is no white space
  EXPECT_EQ(split("[^\\s]+", "a\u180e\u3000"), (Ends{4, 7}));
  EXPECT_EQ(split("^", "a\nb"), (Ends{2, 3}));
}

TEST(TokenizerSplitTest, a_runaway_pattern_is_an_error) {
  std::vector<uint32_t> ends;
  const auto runaway = Pretokenizer::compile("(a+)+$").value();
  EXPECT_FALSE(runaway.split(std::string(64, 'a') + "b", ends).ok());
}

TEST(TokenizerSplitTest, class_table_is_icu) {
  const CharClassTable& table = CharClassTable::instance();
  for (char32_t code = 0; code < 0x110000; ++code) {
    const auto category = U_GET_GC_MASK(static_cast<UChar32>(code));
    CharClass expected = CharClass::kOther;
    if (category & U_GC_L_MASK) expected = CharClass::kLetter;
    if (category & U_GC_M_MASK) expected = CharClass::kMark;
    if (category & U_GC_N_MASK) expected = CharClass::kNumber;
    if (u_isUWhiteSpace(static_cast<UChar32>(code))) expected = CharClass::kSpace;
    if (code == '\r' || code == '\n') expected = CharClass::kNewline;
    ASSERT_EQ(table.of(code), expected) << std::hex << static_cast<uint32_t>(code);
  }
}

}  // namespace
}  // namespace tokenspeed::text

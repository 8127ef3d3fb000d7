#include "text/tokenizer.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <chrono>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/mapped_file.h"
#include "text/detokenizer.h"

namespace tokenspeed::text {
namespace {

const std::string kSource = TOKENSPEED_SOURCE_DIR;
const std::string kQwen35 = kSource + "/../shared/data/qwen3.5-tokenizer/";

const Tokenizer& demo() {
  static const Tokenizer tokenizer = Tokenizer::load(kSource + "/models/demo").value();
  return tokenizer;
}

std::string stream(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special_tokens) {
  StreamingDetokenizer detokenizer(tokenizer, skip_special_tokens);
  std::string text;
  for (const int32_t id : ids) text += detokenizer.push(id);
  return text + detokenizer.finish();
}

void expect_cases(const Tokenizer& tokenizer, const std::string& path, size_t at_least) {
  const auto cases = nlohmann::json::parse(read_file(path).value());
  ASSERT_GE(cases.size(), at_least);
  for (const auto& item : cases) {
    const auto text = item["text"].get<std::string>();
    const auto ids = tokenizer.encode(text);
    ASSERT_TRUE(ids.ok()) << ids.status().to_string();
    EXPECT_EQ(*ids, item["ids"].get<std::vector<int32_t>>()) << text;
    EXPECT_EQ(tokenizer.decode(*ids, false), item["decoded"].get<std::string>());
    EXPECT_EQ(stream(tokenizer, *ids, false), item["decoded"].get<std::string>());
  }
}

TEST(TokenizerTest, demo_goldens_both_ways) {
  expect_cases(demo(), kSource + "/tests/goldens/demo-tokenizer.json", 20);
}

TEST(TokenizerTest, qwen35_cases_both_ways) {
  if (!std::filesystem::exists(kQwen35 + "cases.json")) GTEST_SKIP() << "no ../shared";
  const auto start = std::chrono::steady_clock::now();
  const auto tokenizer = Tokenizer::load(kQwen35);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().to_string();
  std::cout << "loaded in " << seconds.count() << " s\n";
  EXPECT_EQ(tokenizer->vocabulary_size(), 248077);
  EXPECT_EQ(tokenizer->token_id("<|im_end|>"), 248046);
  expect_cases(*tokenizer, kQwen35 + "cases.json", 1000);
}

TEST(TokenizerTest, tokens_and_their_texts) {
  EXPECT_EQ(demo().token_id("<|im_start|>"), 6119);
  EXPECT_TRUE(demo().is_special(6119));
  EXPECT_FALSE(demo().is_special(6142));  // <think>
  EXPECT_EQ(demo().token_id("no such token"), std::nullopt);
  EXPECT_EQ(demo().token_bytes(-1), nullptr);
  EXPECT_EQ(demo().token_bytes(demo().vocabulary_size()), nullptr);
  for (int32_t id = 0; id < demo().vocabulary_size(); ++id) {
    ASSERT_NE(demo().token_bytes(id), nullptr);
    EXPECT_EQ(demo().token_id(*demo().token_bytes(id)), id);
  }
  EXPECT_EQ(demo().decode(std::vector<int32_t>{6119, -5, 6142, 999999}, true), "<think>");
  EXPECT_EQ(demo().decode(std::vector<int32_t>{6119, 6142}, false), "<|im_start|><think>");
}

TEST(TokenizerTest, special_tokens_can_be_ordinary_text) {
  const auto ids = demo().encode("<|im_end|><think>", {.parse_special_tokens = false}).value();
  EXPECT_GT(ids.size(), 2u);
  for (const int32_t id : ids) EXPECT_FALSE(demo().is_special(id));
  EXPECT_EQ(ids.back(), 6142);
  EXPECT_EQ(demo().decode(ids, true), "<|im_end|><think>");
}

TEST(TokenizerTest, invalid_utf8_is_refused_with_its_place) {
  for (const std::string_view tail : {"\x80", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\xff"}) {
    const auto ids = demo().encode("ab" + std::string(tail));
    ASSERT_FALSE(ids.ok());
    EXPECT_EQ(ids.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(ids.status().message().find("byte 2"), std::string::npos) << ids.status().message();
  }
}

TEST(TokenizerTest, long_words_do_not_take_quadratic_time) {
  for (const std::string unit : {"a", " ", "\n", "ab", "日", "=", "\xcc\x81"}) {
    std::string text;
    while (text.size() < 300000) text += unit;
    const auto ids = demo().encode(text);
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ(demo().decode(*ids, false), text);
  }
}

TEST(TokenizerTest, threads_share_one_tokenizer) {
  const auto fresh = Tokenizer::load(kSource + "/models/demo");
  const std::string text = read_file(kSource + "/models/demo/README.md").value();
  const auto expected = demo().encode(text).value();
  std::vector<std::vector<int32_t>> results(4);
  {
    std::vector<std::jthread> threads;
    for (auto& result : results) threads.emplace_back([&] { result = fresh->encode(text).value(); });
  }
  for (const auto& result : results) EXPECT_EQ(result, expected);
}

TEST(DetokenizerTest, holds_back_incomplete_characters) {
  const std::string euro = "\xe2\x82\xac";
  StreamingDetokenizer detokenizer(demo(), true);
  const auto id = [](char byte) { return *demo().token_id({&byte, 1}); };
  EXPECT_EQ(detokenizer.push(id(euro[0])), "");
  EXPECT_EQ(detokenizer.push(id(euro[1])), "");
  EXPECT_EQ(detokenizer.push(id(euro[2])), euro);
  EXPECT_EQ(detokenizer.push(id(euro[0])), "");
  EXPECT_EQ(detokenizer.push(id('x')), "\xef\xbf\xbdx");
  EXPECT_EQ(detokenizer.push(id(euro[0])), "");
  EXPECT_EQ(detokenizer.push(*demo().token_id("<|im_end|>")), "");
  EXPECT_EQ(detokenizer.finish(), "\xef\xbf\xbd");
  EXPECT_EQ(detokenizer.finish(), "");
}

TEST(DetokenizerTest, pieces_are_the_whole_at_random_ids) {
  EXPECT_TRUE(rc::check([](bool skip_special_tokens) {
    // Half the ids are single bytes, so that characters break in every way.
    const auto ids = *rc::gen::container<std::vector<int32_t>>(
        rc::gen::oneOf(rc::gen::inRange(-2, demo().vocabulary_size() + 2), rc::gen::inRange(94, 256)));
    const std::string whole = demo().decode(ids, skip_special_tokens);
    RC_ASSERT(stream(demo(), ids, skip_special_tokens) == whole);
    RC_ASSERT(demo().encode(whole).ok());  // valid UTF-8
  }));
}

TEST(DetokenizerTest, replaces_as_unicode_recommends) {
  const auto decode = [](std::string_view bytes) {
    std::vector<int32_t> ids;
    for (const char byte : bytes) ids.push_back(*demo().token_id({&byte, 1}));
    return demo().decode(ids, false);
  };
  const std::string r = "\xef\xbf\xbd";
  EXPECT_EQ(decode("\xf0\x9f\x98"), r);
  EXPECT_EQ(decode("\xed\xa0\x80"), r + r + r);
  EXPECT_EQ(decode("\xe2\x82G\xc3"), r + "G" + r);
  EXPECT_EQ(decode("\xf4\x90\x80"), r + r + r);
  EXPECT_EQ(decode("\xc0\x80\xf0\x80"), r + r + r + r);
}

}  // namespace
}  // namespace tokenspeed::text

// What tokenizer.json may hold: flags of added tokens, forms of merges, and files that are broken or lie.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <nlohmann/json.hpp>

#include "base/mapped_file.h"
#include "text/tokenizer.h"

namespace tokenspeed::text {
namespace {

using nlohmann::json;

std::string utf8(int code) {
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

// 256 bytes, then "ab" (256), "abc" (257), "bc" (258), "xyz" (259, no merge).
json small() {
  json vocab = json::object();
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    vocab[utf8(printable ? byte : next++)] = byte;
  }
  for (const char* token : {"ab", "abc", "bc", "xyz"}) vocab[token] = vocab.size();
  return {{"added_tokens", json::array()},
          {"normalizer", {{"type", "NFC"}}},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"b c", "a b", "a bc"}}}}};
}

json added(int id, const std::string& content, json flags = json::object()) {
  json token = {{"id", id}, {"content", content}, {"special", false}, {"normalized", false}};
  token.update(flags);
  return token;
}

std::vector<int32_t> encode(const json& file, std::string_view text) {
  const auto tokenizer = Tokenizer::parse(file.dump());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().to_string();
  return tokenizer.ok() ? tokenizer->encode(text).value() : std::vector<int32_t>{};
}

using Ids = std::vector<int32_t>;

TEST(TokenizerFileTest, merges_by_rank_in_both_forms) {
  json file = small();
  EXPECT_EQ(encode(file, "abc"), (Ids{257}));
  EXPECT_EQ(encode(file, "abab"), (Ids{256, 256}));
  EXPECT_EQ(encode(file, "xyz"), (Ids{'x', 'y', 'z'}));
  file["model"]["merges"] = json::parse(R"([["a","b"],["b","c"]])");
  EXPECT_EQ(encode(file, "abc"), (Ids{256, 'c'}));
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(encode(file, "xyz"), (Ids{259}));
  EXPECT_EQ(encode(file, "abcx"), (Ids{256, 'c', 'x'}));
}

TEST(TokenizerFileTest, long_and_short_words_merge_alike) {
  const json file = small();
  const auto tokenizer = Tokenizer::parse(file.dump());
  EXPECT_TRUE(rc::check([&] {
    // Spaces never merge, so the parts of a long word are encoded as if alone.
    const auto parts = *rc::gen::container<std::vector<std::string>>(
        rc::gen::container<std::string>(rc::gen::element('a', 'b', 'c', 'x')));
    std::string text;
    Ids expected;
    for (const std::string& part : parts) {
      const Ids ids = tokenizer->encode(part.substr(0, 40)).value();
      expected.insert(expected.end(), ids.begin(), ids.end());
      expected.push_back(' ');
      text += part.substr(0, 40) + ' ';
    }
    RC_ASSERT(tokenizer->encode(text).value() == expected);
  }));
}

TEST(TokenizerFileTest, added_tokens_leftmost_longest) {
  json file = small();
  file["added_tokens"] = {added(300, "<a>"), added(301, "<a><b>"), added(302, "<b>"), added(303, "b><c>")};
  EXPECT_EQ(encode(file, "<a><b><c>"), (Ids{301, '<', 'c', '>'}));
  EXPECT_EQ(encode(file, "<a><<b>"), (Ids{300, '<', 302}));
  const auto tokenizer = Tokenizer::parse(file.dump());
  EXPECT_EQ(tokenizer->vocabulary_size(), 304);
  EXPECT_EQ(tokenizer->token_bytes(299), nullptr);
  EXPECT_EQ(tokenizer->token_id("xyz"), 259);
}

TEST(TokenizerFileTest, added_token_flags) {
  json file = small();
  file["added_tokens"] = {added(300, "LL", {{"lstrip", true}}), added(301, "RR", {{"rstrip", true}}),
                          added(302, "word", {{"single_word", true}})};
  EXPECT_EQ(encode(file, "x \t LL x"), (Ids{'x', 300, ' ', 'x'}));
  EXPECT_EQ(encode(file, "x RR \n\xe3\x80\x80x"), (Ids{'x', ' ', 301, 'x'}));
  EXPECT_EQ(encode(file, "RR  LL"), (Ids{301, 300}));
  EXPECT_EQ(encode(file, "word-word"), (Ids{302, '-', 302}));
  EXPECT_EQ(encode(file, "word_"), (Ids{'w', 'o', 'r', 'd', '_'}));
  EXPECT_EQ(encode(file, "\xc3\xa9word").size(), 6u);  // é is a word character
}

TEST(TokenizerFileTest, normalized_tokens_are_looked_for_after_nfc) {
  const std::string composed = "\xe1\xba\xbf", decomposed = "e\xcc\x82\xcc\x81";  // ế
  json file = small();
  file["added_tokens"] = {added(300, composed, {{"normalized", true}})};
  EXPECT_EQ(encode(file, composed), (Ids{300}));
  EXPECT_EQ(encode(file, decomposed), (Ids{300}));
  file["added_tokens"] = {added(300, composed)};
  EXPECT_EQ(encode(file, composed), (Ids{300}));
  EXPECT_EQ(encode(file, decomposed), (Ids{0xe1, 0xba, 0xbf}));
  file["normalizer"] = nullptr;
  EXPECT_EQ(encode(file, decomposed), (Ids{'e', 0xcc, 0x82, 0xcc, 0x81}));
}

TEST(TokenizerFileTest, gpt2_pattern_comes_with_use_regex) {
  json file = small();
  EXPECT_EQ(encode(file, "ab1c"), (Ids{256, '1', 'c'}));
  file["model"]["vocab"]["1c"] = 260;
  file["model"]["merges"].push_back("1 c");
  EXPECT_EQ(encode(file, "ab1c"), (Ids{256, 260}));
  file["pre_tokenizer"]["use_regex"] = true;
  EXPECT_EQ(encode(file, "ab1c"), (Ids{256, '1', 'c'}));
}

void expect_refused(const json& file, StatusCode code, const std::string& named) {
  const auto tokenizer = Tokenizer::parse(file.dump());
  ASSERT_FALSE(tokenizer.ok()) << named;
  EXPECT_EQ(tokenizer.status().code(), code) << tokenizer.status().to_string();
  EXPECT_NE(tokenizer.status().message().find(named), std::string::npos) << tokenizer.status().message();
}

json with(const char* pointer, json value) {
  json file = small();
  file[json::json_pointer(pointer)] = std::move(value);
  return file;
}

TEST(TokenizerFileTest, broken_files_say_where) {
  const auto bad = StatusCode::kDataLoss;
  expect_refused(json::array(), bad, "JSON object");
  expect_refused(json::object(), bad, "model");
  expect_refused(with("/model/vocab", 3), bad, "model.vocab");
  expect_refused(with("/model/vocab/ab", "x"), bad, "model.vocab[\"ab\"]");
  expect_refused(with("/model/vocab/ab", -1), bad, "id -1");
  expect_refused(with("/model/vocab/ab", int64_t{1} << 40), bad, "1099511627776");
  expect_refused(with("/model/vocab/ab", 7), bad, "id 7");
  expect_refused(with("/model/vocab", {{"a", 0}}), bad, "byte 0");
  expect_refused(with("/model/merges", nullptr), bad, "model.merges");
  for (const char* merge : {"\"ab\"", "\"a b c\"", "[\"a\"]", "[\"a\",1]", "7", "\" \"", "[\"\",\"a\"]"}) {
    expect_refused(with("/model/merges/1", json::parse(merge)), bad, "model.merges[1]");
  }
  expect_refused(with("/model/merges/2", "a x"), bad, "model.merges[2]");
  expect_refused(with("/added_tokens", 1), bad, "added_tokens");
  expect_refused(with("/added_tokens/0", 1), bad, "added_tokens[0]");
  expect_refused(with("/added_tokens/0", added(300, "")), bad, "content");
  expect_refused(with("/added_tokens/0", added(-3, "x")), bad, "-3");
  expect_refused(with("/added_tokens/0", added(300, "ab")), bad, "256");
  expect_refused(with("/added_tokens/0", added(256, "q")), bad, "256");
  expect_refused(with("/added_tokens", {added(300, "q1"), added(300, "q2")}), bad, "300");
  expect_refused(with("/added_tokens", {added(300, "qq"), added(301, "qq")}), bad, "twice");
  expect_refused(with("/decoder", nullptr), bad, "decoder");
  expect_refused(with("/pre_tokenizer", nullptr), bad, "pre_tokenizer");
}

TEST(TokenizerFileTest, other_kinds_are_unimplemented) {
  const auto other = StatusCode::kUnimplemented;
  expect_refused(with("/model/type", "Unigram"), other, "Unigram");
  expect_refused(with("/model/byte_fallback", true), other, "byte_fallback");
  expect_refused(with("/model/dropout", 0.5), other, "dropout");
  expect_refused(with("/model/end_of_word_suffix", "</w>"), other, "end_of_word_suffix");
  expect_refused(with("/normalizer/type", "NFKC"), other, "NFKC");
  expect_refused(with("/decoder/type", "WordPiece"), other, "WordPiece");
  expect_refused(with("/pre_tokenizer/type", "Metaspace"), other, "Metaspace");
  expect_refused(with("/pre_tokenizer/add_prefix_space", true), other, "add_prefix_space");
  json split = {{"type", "Split"}, {"pattern", {{"Regex", "(a"}}}, {"behavior", "Isolated"}, {"invert", false}};
  json file = with("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {split, small()["pre_tokenizer"]}}});
  expect_refused(file, StatusCode::kDataLoss, "(a");
  file["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed";
  expect_refused(file, other, "Removed");
}

TEST(TokenizerFileTest, a_truncated_file_is_refused_at_every_length) {
  const std::string whole = small().dump();
  ASSERT_GT(whole.size(), 2000u);
  for (size_t length = 0; length < whole.size(); ++length) {
    ASSERT_FALSE(Tokenizer::parse(std::string_view(whole).substr(0, length)).ok()) << length;
  }
}

TEST(TokenizerFileTest, damaged_files_never_crash) {
  const std::string whole = small().dump();
  ASSERT_GT(whole.size(), 2000u);
  EXPECT_TRUE(rc::check([&] {
    std::string file = whole;
    const auto edits = *rc::gen::container<std::vector<std::pair<size_t, char>>>(
        rc::gen::pair(rc::gen::inRange<size_t>(0, file.size()), rc::gen::arbitrary<char>()));
    for (const auto& [position, byte] : edits) file[position] = byte;
    const auto tokenizer = Tokenizer::parse(file);
    if (tokenizer.ok()) RC_ASSERT(tokenizer->encode("abc xyz \xc3\xa9").ok());
  }));
}

TEST(TokenizerFileTest, a_missing_file_is_named) {
  const auto tokenizer = Tokenizer::load(std::string("/nonexistent"));
  ASSERT_FALSE(tokenizer.ok());
  EXPECT_NE(tokenizer.status().message().find("/nonexistent/tokenizer.json"), std::string::npos);
}

}  // namespace
}  // namespace tokenspeed::text

#include "model/safetensors.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "model/checkpoint_builder.h"

namespace tokenspeed::model {
namespace {

const std::string kGolden = TOKENSPEED_SOURCE_DIR "/tests/goldens/random/dense-a/model.safetensors";

std::string small_file() {
  return safetensors_bytes({{"a", "F32", {2, 3}, std::string(24, 'x')}, {"b", "BF16", {4}, std::string(8, 'y')}});
}

TEST(Safetensors, ReadsEveryTensorOfARealFile) {
  const auto file = SafetensorsFile::open(kGolden);
  ASSERT_TRUE(file.ok()) << file.status().to_string();
  EXPECT_EQ(file->tensors().size(), 56u);
  const SafetensorsTensor* head = file->find("lm_head.weight");
  ASSERT_NE(head, nullptr);
  EXPECT_EQ(head->dtype, DType::kBFloat16);
  EXPECT_EQ(head->shape, (std::vector<int64_t>{512, 192}));
  EXPECT_EQ(head->size, 512u * 192 * 2);
  EXPECT_EQ(head->offset, 8u + 6752 + 48);
  const std::string bytes = read_all(kGolden);
  EXPECT_EQ(std::memcmp(file->data(*head), bytes.data() + head->offset, head->size), 0);
  EXPECT_EQ(file->find("lm_head"), nullptr);
}

TEST(Safetensors, AcceptsScalarsEmptyTensorsAndPaddedHeaders) {
  const std::string bytes = safetensors_bytes(
      {{"scalar", "F32", {}, std::string(4, '\0')}, {"empty", "BF16", {0, 7}, ""}, {"byte", "U8", {1}, "z"}}, 5);
  const auto tensors = parse_safetensors(as_bytes(bytes), "f");
  ASSERT_TRUE(tensors.ok()) << tensors.status().to_string();
  EXPECT_EQ(tensors->size(), 3u);
  EXPECT_EQ(tensors->at("scalar").size, 4u);
  EXPECT_EQ(tensors->at("empty").size, 0u);
}

TEST(Safetensors, TruncatedAnywhereIsOneClearError) {
  const std::string whole = small_file();
  ASSERT_TRUE(parse_safetensors(as_bytes(whole), "f").ok());
  for (size_t size = 0; size < whole.size(); ++size) {
    const auto tensors = parse_safetensors(as_bytes(whole.substr(0, size)), "f");
    ASSERT_FALSE(tensors.ok()) << size;
    EXPECT_EQ(tensors.status().code(), StatusCode::kDataLoss) << size;
    EXPECT_NE(tensors.status().message().find("'f'"), std::string::npos) << tensors.status().message();
  }
}

TEST(Safetensors, TruncatedFileOnDisk) {
  const TemporaryDirectory directory;
  const std::string whole = read_all(kGolden);
  for (const size_t size : {size_t{0}, size_t{7}, size_t{8}, size_t{9}, size_t{6759}, size_t{6760}, whole.size() - 1}) {
    const auto file = SafetensorsFile::open(directory.write("cut.safetensors", whole.substr(0, size)));
    ASSERT_FALSE(file.ok()) << size;
    EXPECT_EQ(file.status().code(), StatusCode::kDataLoss);
    EXPECT_NE(file.status().message().find("cut.safetensors"), std::string::npos);
  }
  EXPECT_EQ(SafetensorsFile::open(directory.path() + "/none").status().code(), StatusCode::kNotFound);
}

struct Lie {
  const char* what;
  std::string header;
  size_t data;           // bytes after the header
  const char* expected;  // in the message
};

TEST(Safetensors, LyingHeadersAreRefused) {
  const auto tensor = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  const std::string good = R"({"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
  const std::vector<Lie> lies = {
      {"empty header", "", 0, "does not begin with '{'"},
      {"a list", "[]", 0, "does not begin with '{'"},
      {"leading blank", " {}", 0, "does not begin with '{'"},
      {"broken JSON", "{\"a\":", 0, "not valid JSON"},
      {"trailing text", "{} x", 0, "not valid JSON"},
      {"invalid UTF-8", "{\"\xff\":1}", 0, "not valid JSON"},
      {"deep nesting", "{\"a\":" + std::string(5000, '[') + std::string(5000, ']') + "}", 0, "not valid JSON"},
      {"data without tensors", "{}", 1, "nothing describes the last 1 bytes"},
      {"metadata no object", R"({"__metadata__":1})", 0, "__metadata__ is not"},
      {"metadata of numbers", R"({"__metadata__":{"k":1}})", 0, "'k' is not a string"},
      {"tensor no object", R"({"a":[1]})", 0, "not described by"},
      {"no dtype", R"({"a":{"shape":[4],"data_offsets":[0,4]}})", 4, "has no dtype"},
      {"no shape", R"({"a":{"dtype":"U8","data_offsets":[0,4]}})", 4, "has no shape"},
      {"no offsets", R"({"a":{"dtype":"U8","shape":[4]}})", 4, "has no data_offsets"},
      {"unknown field", R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1}})", 4, "unknown field 'x'"},
      {"field twice", R"({"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4, "'dtype' twice"},
      {"dtype no string", R"({"a":{"dtype":8,"shape":[4],"data_offsets":[0,4]}})", 4, "dtype is not a string"},
      {"unknown dtype", tensor("Q4", "[4]", "[0,4]"), 4, "dtype 'Q4'; supported are F32, F16, BF16"},
      {"shape no list", tensor("U8", "4", "[0,4]"), 4, "shape is not a list"},
      {"negative extent", tensor("U8", "[-4]", "[0,4]"), 4, "something else than sizes"},
      {"fractional extent", tensor("U8", "[4.0]", "[0,4]"), 4, "something else than sizes"},
      {"extent over int64", tensor("U8", "[18446744073709551615]", "[0,4]"), 4, "something else than sizes"},
      {"shape as text", tensor("U8", "[\"4\"]", "[0,4]"), 4, "something else than sizes"},
      {"nine dimensions", tensor("U8", "[1,1,1,1,1,1,1,1,4]", "[0,4]"), 4, "more than 8 dimensions"},
      {"overflowing shape", tensor("U8", "[4294967296,4294967296]", "[0,0]"), 0, "more than a file can hold"},
      {"overflow behind a zero", tensor("F32", "[0,4611686018427387904]", "[0,0]"), 0, "more than a file can hold"},
      {"size below shape", tensor("F32", "[2]", "[0,4]"), 4, "has 4 bytes, but its shape and dtype ask for 8"},
      {"size above shape", tensor("U8", "[2]", "[0,4]"), 4, "has 4 bytes, but its shape and dtype ask for 2"},
      {"one offset", tensor("U8", "[4]", "[4]"), 4, "not two byte positions"},
      {"three offsets", tensor("U8", "[4]", "[0,4,8]"), 4, "not two byte positions"},
      {"negative offset", tensor("U8", "[4]", "[-4,0]"), 4, "not two byte positions"},
      {"reversed offsets", tensor("U8", "[4]", "[4,0]"), 4, "before it begins"},
      {"offsets past the end", tensor("U8", "[5]", "[0,5]"), 4, "the file holds 4"},
      {"enormous offsets", tensor("U8", "[4]", "[18446744073709551611,18446744073709551615]"), 4, "the file holds 4"},
      {"hole at the begin", tensor("U8", "[3]", "[1,4]"), 4, "nothing describes the bytes between"},
      {"bytes at the end", tensor("U8", "[3]", "[0,3]"), 4, "nothing describes the last 1 bytes"},
      {"name twice", "{\"a\":" + good + ",\"a\":" + good + "}", 4, "'a' is there twice"},
      {"same range twice", "{\"a\":" + good + ",\"b\":" + good + "}", 4, "they overlap"},
      {"partial overlap", R"({"a":)" + good + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})", 6,
       "they overlap"},
      {"hole between", R"({"a":)" + good + R"(,"b":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}})", 6,
       "bytes between"},
  };
  for (const Lie& lie : lies) {
    SCOPED_TRACE(lie.what);
    const std::string bytes = with_length(lie.header) + std::string(lie.data, 'x');
    const auto tensors = parse_safetensors(as_bytes(bytes), "f");
    ASSERT_FALSE(tensors.ok());
    EXPECT_NE(tensors.status().message().find(lie.expected), std::string::npos) << tensors.status().message();
    EXPECT_EQ(tensors.status().message().find("'f'"), tensors.status().message().rfind("'f'"));
  }
}

TEST(Safetensors, LyingHeaderLengths) {
  for (const uint64_t length : {uint64_t{100'000'001}, uint64_t{1} << 63, ~uint64_t{0}}) {
    std::string bytes = small_file();
    std::memcpy(bytes.data(), &length, sizeof(length));
    const auto tensors = parse_safetensors(as_bytes(bytes), "f");
    ASSERT_FALSE(tensors.ok());
    EXPECT_NE(tensors.status().message().find("at most 100000000"), std::string::npos) << tensors.status().message();
  }
}

TEST(Safetensors, LongNamesAreCutInMessages) {
  const std::string header = "{\"" + std::string(10'000, 'n') + "\":1}";
  const auto tensors = parse_safetensors(as_bytes(with_length(header)), "f");
  ASSERT_FALSE(tensors.ok());
  EXPECT_LT(tensors.status().message().size(), 400u);
}

// Whatever parses must be safe to use: ranges in the file, sizes that match.
void require_safe(const std::string& bytes) {
  const auto tensors = parse_safetensors(as_bytes(bytes), "f");
  if (!tensors.ok()) return;
  uint64_t total = 0;
  for (const auto& [name, tensor] : *tensors) {
    RC_ASSERT(tensor.offset + tensor.size <= bytes.size());
    total += tensor.size;
  }
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof(header));
  RC_ASSERT(total + header + sizeof(header) == bytes.size());
}

TEST(Safetensors, RandomBytesNeverCrash) {
  EXPECT_TRUE(rc::check("random bytes", [](const std::string& bytes) { require_safe(bytes); }));
  EXPECT_TRUE(rc::check("random header", [](const std::string& text) { require_safe(with_length("{" + text)); }));
}

TEST(Safetensors, MutatedFilesNeverCrash) {
  EXPECT_TRUE(rc::check("mutations", [] {
    std::string bytes = small_file();
    const int mutations = *rc::gen::inRange(1, 5);
    for (int i = 0; i < mutations; ++i) bytes[*rc::gen::inRange<size_t>(0, bytes.size())] = *rc::gen::arbitrary<char>();
    require_safe(bytes);
  }));
}

}  // namespace
}  // namespace tokenspeed::model

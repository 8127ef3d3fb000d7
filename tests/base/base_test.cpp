#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <vector>

#include "base/dtype.h"
#include "base/mapped_file.h"
#include "base/random.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace tokenspeed {
namespace {

TEST(Status, CarriesCodeMessageAndParam) {
  const Status ok;
  EXPECT_TRUE(ok.ok());
  const Status error = invalid_argument("temperature is 9, the limit is 2").with_param("temperature");
  EXPECT_EQ(error.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(error.param(), "temperature");
  EXPECT_EQ(Status(error).with_context("line 3").message(), "line 3: temperature is 9, the limit is 2");
  EXPECT_TRUE(Status().with_context("line 3").ok());
}

Result<int> half(int value) {
  if (value % 2 != 0) return invalid_argument("odd");
  return value / 2;
}
Result<int> quarter(int value) {
  TS_ASSIGN_OR_RETURN(const int once, half(value));
  return half(once);
}

TEST(Status, ErrorsTravelThroughTheMacros) {
  EXPECT_EQ(*quarter(12), 3);
  EXPECT_EQ(quarter(6).status().message(), "odd");
}

TEST(DType, BFloat16RoundsToNearestEven) {
  EXPECT_EQ(to_bfloat16(1.0f).bits, 0x3f80);
  EXPECT_EQ(to_bfloat16(std::bit_cast<float>(0x3f808000u)).bits, 0x3f80) << "tie to even";
  EXPECT_EQ(to_bfloat16(std::bit_cast<float>(0x3f818000u)).bits, 0x3f82) << "tie to even";
  EXPECT_EQ(to_bfloat16(std::bit_cast<float>(0x3f808001u)).bits, 0x3f81);
  EXPECT_TRUE(std::isnan(round_to_bfloat16(std::bit_cast<float>(0x7f800001u))));
  EXPECT_TRUE(std::isinf(round_to_bfloat16(3.4e38f)));
}

TEST(DType, Float16MatchesItsDefinition) {
  EXPECT_EQ(float16_to_float(0x3c00), 1.0f);
  EXPECT_EQ(float16_to_float(0x0001), 0x1p-24f) << "least subnormal";
  EXPECT_EQ(float16_to_float(0x7bff), 65504.0f);
  EXPECT_TRUE(std::isinf(float16_to_float(0xfc00)));
  EXPECT_TRUE(std::isnan(float16_to_float(0x7e00)));
}

TEST(DType, Float8RoundTripsEveryValue) {
  for (int bits = 0; bits < 256; ++bits) {
    const float value = float8_e4m3_to_float(static_cast<uint8_t>(bits));
    if (std::isnan(value)) {
      EXPECT_EQ(bits & 0x7f, 0x7f);
    } else {
      EXPECT_EQ(float_to_float8_e4m3(value), bits);
    }
  }
  EXPECT_EQ(float8_e4m3_to_float(0x7e), 448.0f);
  EXPECT_EQ(float_to_float8_e4m3(1e9f), 0x7e) << "saturates";
}

// Known answers of Philox 4x32-10 published with its reference implementation.
TEST(Random, PhiloxKnownAnswers) {
  EXPECT_EQ(philox(0, 0, 0), (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox(~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}),
            (std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(ThreadPool, RunsEveryIndexOnce) {
  ThreadPool pool(3);
  EXPECT_EQ(pool.size(), 3);
  for (const int64_t count : {0, 1, 2, 3, 1000}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
    pool.parallel_for(count, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
    for (const auto& n : runs) EXPECT_EQ(n, 1);
  }
}

TEST(ThreadPool, ManyShortLoops) {
  ThreadPool pool(2);
  std::atomic<int64_t> sum{0};
  for (int round = 0; round < 5000; ++round) pool.parallel_for(4, [&](int64_t i) { sum += i; });
  EXPECT_EQ(sum, 5000 * 6);
}

TEST(MappedFile, MapsReadsAndReports) {
  const auto path = std::filesystem::temp_directory_path() / "tokenspeed_mapped_file_test";
  std::ofstream(path) << "hello";
  const auto file = MappedFile::open(path.string());
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(file->bytes().size(), 5u);
  EXPECT_EQ(static_cast<char>(file->bytes()[4]), 'o');
  EXPECT_EQ(*read_file(path.string()), "hello");
  EXPECT_FALSE(read_file(path.string(), 4).ok());
  std::filesystem::remove(path);
  EXPECT_EQ(MappedFile::open(path.string()).status().code(), StatusCode::kNotFound);
  EXPECT_FALSE(MappedFile::open(std::filesystem::temp_directory_path().string()).ok()) << "a directory";
}

}  // namespace
}  // namespace tokenspeed

// What a user is told where a GPU, its driver or its memory does not do: the thing, its value, the limit, the remedy.
#include "runtime/gpu_support.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace tokenspeed::runtime {
namespace {

void expect_refusal(const Status& status, StatusCode code, const std::vector<std::string>& parts) {
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.code(), code);
  for (const std::string& part : parts) {
    EXPECT_NE(status.message().find(part), std::string::npos) << part << " in: " << status.message();
  }
}

TEST(GpuSupport, ADriverMustKnowTheProgramsCuda) {
  EXPECT_TRUE(check_driver(13000, 13000).ok());
  EXPECT_TRUE(check_driver(13020, 13000).ok());
  expect_refusal(check_driver(12040, 13000), StatusCode::kFailedPrecondition,
                 {"CUDA 12.4", "CUDA 13.0", "update the driver", "--device cpu"});
  expect_refusal(check_driver(0, 13000), StatusCode::kFailedPrecondition, {"no NVIDIA driver", "--device cpu"});
}

TEST(GpuSupport, OnlyHopperIsTaken) {
  EXPECT_TRUE(check_capability(0, "NVIDIA H100 80GB HBM3", 9, 0).ok());
  struct Refused {
    const char* name;
    int major, minor;
    const char* value;
  };
  for (const Refused& gpu : std::vector<Refused>{{"NVIDIA A100-SXM4-80GB", 8, 0, "8.0"},
                                                 {"NVIDIA L40S", 8, 9, "8.9"},
                                                 {"NVIDIA B200", 10, 0, "10.0"},
                                                 {"NVIDIA GeForce RTX 5090", 12, 0, "12.0"}}) {
    expect_refusal(check_capability(3, gpu.name, gpu.major, gpu.minor), StatusCode::kFailedPrecondition,
                   {"GPU 3", gpu.name, gpu.value, "need 9.0", "H100", "--device cpu"});
  }
}

constexpr int64_t kGb = 1'000'000'000;

TEST(GpuSupport, WeightsThatDoNotFitSayWhatWould) {
  WeightNeed need = {.model = "m", .gpu = "GPU 0 (NVIDIA H100)", .bytes = 70 * kGb, .usable = 74 * kGb};
  EXPECT_TRUE(check_weights_fit(need).ok());
  need.usable = 60 * kGb;
  expect_refusal(check_weights_fit(need), StatusCode::kResourceExhausted,
                 {"'m'", "70.00 GB", "GPU 0 (NVIDIA H100)", "60.00 GB", "FP8 checkpoint (about 35.00 GB)", "--tp 2 "});
  need.is_fp8 = true;
  need.bytes = 400 * kGb;
  const Status fp8 = check_weights_fit(need);
  expect_refusal(fp8, StatusCode::kResourceExhausted, {"--tp 8 ", "over 8 such GPUs"});
  EXPECT_EQ(fp8.message().find("FP8 checkpoint"), std::string::npos) << fp8.message();
  need.ranks = 4;
  need.bytes = 100 * kGb;
  expect_refusal(check_weights_fit(need), StatusCode::kResourceExhausted, {"one of 4 ranks", "--tp 8 "});
  need.usable = -kGb;
  expect_refusal(check_weights_fit(need), StatusCode::kResourceExhausted, {"0.00 GB to give", "end what else runs"});
}

TEST(GpuSupport, ALengthThatDoesNotFitSaysWhichWould) {
  KvNeed need = {.pages = 512, .page_size = 64, .page_bytes = kGb / 100, .max_model_length = 32768, .state_slots = 4};
  EXPECT_TRUE(check_kv_fits(need).ok());
  need.max_model_length = 32769;
  expect_refusal(check_kv_fits(need), StatusCode::kResourceExhausted,
                 {"32768 KV positions", "--max-model-len 32769", "5.13 GB", "at most 32768", "FP8", "--max-num-seqs"});
  need.pages = -3;
  need.is_fp8 = true;
  const Status none = check_kv_fits(need);
  expect_refusal(none, StatusCode::kResourceExhausted, {"room for 0 KV positions", "lower --max-num-seqs"});
  EXPECT_EQ(none.message().find("at most"), std::string::npos) << none.message();
  EXPECT_EQ(none.message().find("FP8"), std::string::npos) << none.message();
}

}  // namespace
}  // namespace tokenspeed::runtime

#include "runtime/gpu_support.h"

#include <algorithm>
#include <cstdio>

namespace tokenspeed::runtime {
namespace {

constexpr int kComputeMajor = 9;
constexpr int kComputeMinor = 0;

std::string version(int cuda) { return std::to_string(cuda / 1000) + "." + std::to_string(cuda % 1000 / 10); }

}  // namespace

std::string gigabytes(int64_t bytes) {
  char text[32];
  snprintf(text, sizeof(text), "%.2f GB", static_cast<double>(bytes) * 1e-9);
  return text;
}

Status check_driver(int driver, int needed) {
  if (driver == 0) return failed_precondition("this machine has no NVIDIA driver; run with --device cpu");
  if (driver >= needed) return {};
  return failed_precondition("the NVIDIA driver supports CUDA " + version(driver) + ", this program needs CUDA " +
                             version(needed) + "; update the driver, or run with --device cpu");
}

Status check_capability(int32_t ordinal, const std::string& gpu_name, int major, int minor) {
  if (major == kComputeMajor && minor == kComputeMinor) return {};
  const bool older = major < kComputeMajor;
  return failed_precondition(
      "GPU " + std::to_string(ordinal) + " (" + gpu_name + ") has compute capability " + std::to_string(major) + "." +
      std::to_string(minor) +
      "; the kernels for linear layers, experts and the delta rule need 9.0 (Hopper: H100, H200, "
      "GH200), whose warpgroup matrix products " +
      (older ? "it does not have yet" : "newer GPUs no longer have") + ". Use such a GPU, or run with --device cpu");
}

Status check_weights_fit(const WeightNeed& need) {
  if (need.bytes < need.usable) return {};
  std::string message = "model '" + need.model + "' has " + gigabytes(need.bytes) + " of weights" +
                        (need.ranks > 1 ? " on one of " + std::to_string(need.ranks) + " ranks" : "") + ", " +
                        need.gpu + " has " + gigabytes(std::max<int64_t>(0, need.usable)) + " to give; use ";
  if (!need.is_fp8) message += "an FP8 checkpoint (about " + gigabytes(need.bytes / 2) + "), ";
  message += "a smaller model or a larger GPU";
  if (need.usable <= 0) return resource_exhausted(message + ", or end what else runs on this one");
  int64_t ranks = need.ranks;  // a power of two, as heads are divided
  while (need.bytes * need.ranks / ranks >= need.usable) ranks *= 2;
  return resource_exhausted(message + "; over " + std::to_string(ranks) + " such GPUs it would fit (bench --tp " +
                            std::to_string(ranks) + " --rank-only 0 measures one of them; serving takes one GPU)");
}

Status check_kv_fits(const KvNeed& need) {
  const int64_t pages_of_one = (need.max_model_length + need.page_size - 1) / need.page_size;
  if (need.pages >= pages_of_one) return {};
  const int64_t room = std::max<int64_t>(0, need.pages) * need.page_size;
  return resource_exhausted(
      "after weights, activations and " + std::to_string(need.state_slots) + " state slots (" +
      gigabytes(need.state_bytes) + ") the GPU has room for " + std::to_string(room) +
      " KV positions, fewer than one sequence of --max-model-len " + std::to_string(need.max_model_length) + " (" +
      gigabytes(pages_of_one * need.page_bytes) + "); " +
      (room > 0 ? "lower --max-model-len to at most " + std::to_string(room) + ", lower" : std::string("lower")) +
      " --max-num-seqs or --max-num-batched-tokens, raise --gpu-memory-utilization" +
      (need.is_fp8 ? "" : ", use an FP8 checkpoint") + ", or use a larger GPU");
}

}  // namespace tokenspeed::runtime

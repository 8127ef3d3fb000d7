// Whether a GPU can run this program and a model on it, and what to do where it cannot. Plain arithmetic and sentences:
// nothing here needs a GPU, so all of it is tested without one.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"

namespace tokenspeed::runtime {

// Versions as CUDA counts them (13000 is 13.0); 0: there is no driver. failed_precondition says which is needed.
Status check_driver(int driver, int needed);

// Compute capability major.minor. The kernels of linear layers, experts and the delta rule use instructions that 9.0
// alone has (docs/operations.md): any other is failed_precondition, newer ones too.
Status check_capability(int32_t ordinal, const std::string& gpu_name, int major, int minor);

struct WeightNeed {
  std::string model;
  std::string gpu;     // "GPU 0 (NVIDIA H200)"
  int64_t bytes = 0;   // on this rank
  int64_t usable = 0;  // bytes the GPU can give
  bool is_fp8 = false;
  int32_t ranks = 1;
};
// resource_exhausted: says what would fit.
Status check_weights_fit(const WeightNeed& need);

struct KvNeed {
  int64_t pages = 0;  // there is room for
  int64_t page_size = 0;
  int64_t page_bytes = 0;
  int64_t max_model_length = 0;
  int64_t state_slots = 0;
  int64_t state_bytes = 0;  // of all slots
  bool is_fp8 = false;      // the weights
};
// One sequence of max_model_length must fit. resource_exhausted: says which length would.
Status check_kv_fits(const KvNeed& need);

std::string gigabytes(int64_t bytes);  // "12.34 GB"

}  // namespace tokenspeed::runtime

#include "kernels/cuda/memory_bandwidth.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/launch.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksPerMultiprocessor = 16;
constexpr int kLoads = 4;  // of 16 bytes, in flight per thread

// Zeros would read faster than what a model holds.
__global__ void fill_kernel(uint4* data, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    uint32_t word[4];
#pragma unroll
    for (uint32_t& w : word) {
      x ^= x << 13;
      x ^= x >> 17;
      x ^= x << 5;
      w = x;
    }
    data[i] = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

__global__ void __launch_bounds__(kThreads) read_kernel(const uint4* data, int64_t count, uint32_t* sink) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  uint32_t sum = 0;
  int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (; i + (kLoads - 1) * stride < count; i += kLoads * stride) {
    uint4 v[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += stride) sum ^= data[i].x;
  if (sum == 0x9e3779b9u) *sink = sum;  // keeps the loads; true once in four billion
}

struct FreeDevice {
  void operator()(void* data) const { cudaFree(data); }
};
struct DestroyEvent {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using Event = std::unique_ptr<CUevent_st, DestroyEvent>;

Result<Event> make_event() {
  cudaEvent_t event = nullptr;
  TS_RETURN_IF_ERROR(cuda_status(cudaEventCreate(&event), "measuring bandwidth"));
  return Event(event);
}

}  // namespace

Result<double> measure_read_bandwidth(int64_t bytes, int repetitions) {
  void* data = nullptr;
  if (cudaMalloc(&data, static_cast<size_t>(bytes) + sizeof(uint4)) != cudaSuccess) {
    cudaGetLastError();
    return resource_exhausted("the GPU has no " + std::to_string(bytes >> 20) +
                              " MiB free to measure its read bandwidth with; end what else uses it");
  }
  const std::unique_ptr<void, FreeDevice> owner(data);
  uint4* words = static_cast<uint4*>(data);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(uint4));
  uint32_t* sink = reinterpret_cast<uint32_t*>(words + count);
  const unsigned blocks = static_cast<unsigned>(multiprocessors() * kBlocksPerMultiprocessor);
  TS_ASSIGN_OR_RETURN(const Event begin, make_event());
  TS_ASSIGN_OR_RETURN(const Event end, make_event());
  fill_kernel<<<blocks, kThreads>>>(words, count);
  read_kernel<<<blocks, kThreads>>>(words, count, sink);  // warms up
  std::vector<float> milliseconds;
  for (int i = 0; i < repetitions; ++i) {
    cudaEventRecord(begin.get());
    read_kernel<<<blocks, kThreads>>>(words, count, sink);
    cudaEventRecord(end.get());
    TS_RETURN_IF_ERROR(cuda_status(cudaEventSynchronize(end.get()), "measuring bandwidth"));
    float elapsed = 0;
    TS_RETURN_IF_ERROR(
        cuda_status(cudaEventElapsedTime(&elapsed, begin.get(), end.get()), "measuring bandwidth"));
    milliseconds.push_back(elapsed);
  }
  const auto middle = milliseconds.begin() + repetitions / 2;
  std::nth_element(milliseconds.begin(), middle, milliseconds.end());
  return static_cast<double>(count) * sizeof(uint4) / (static_cast<double>(*middle) * 1e-3);
}

}  // namespace tokenspeed::kernels::cuda

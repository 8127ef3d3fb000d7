// Random data on the GPU for benches: one arena, filled by kernels, so that gigabytes take milliseconds.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "base/status.h"
#include "kernels/types.h"

namespace tokenspeed::bench {

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}
inline void require(const Status& status) {
  if (status.ok()) return;
  fprintf(stderr, "%s\n", status.to_string().c_str());
  exit(1);
}

enum class Fill { kFp8, kBf16, kFloat };

__device__ inline uint32_t hash(uint64_t x) {
  x ^= x >> 31;
  x *= 0x9E3779B97F4A7C15ull;
  x ^= x >> 29;
  x *= 0xBF58476D1CE4E5B9ull;
  return static_cast<uint32_t>(x >> 32);
}

// Words of uniform values in [-scale, scale), or of e4m3 codes without NaN.
static __global__ void fill_kernel(uint32_t* out, int64_t words, Fill fill, float scale, uint64_t seed) {
  const auto uniform = [scale](uint32_t bits) { return (static_cast<float>(bits >> 8) * 0x1p-23f - 1.0f) * scale; };
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < words; i += gridDim.x * int64_t{blockDim.x}) {
    const uint32_t a = hash(seed + 2 * i), b = hash(seed + 2 * i + 1);
    if (fill == Fill::kFp8) {
      out[i] = a & 0xf7f7f7f7u;
    } else if (fill == Fill::kBf16) {
      out[i] = (__float_as_uint(uniform(a)) >> 16) | (__float_as_uint(uniform(b)) & 0xffff0000u);
    } else {
      out[i] = __float_as_uint(uniform(a));
    }
  }
}

class Arena {
 public:
  explicit Arena(int64_t bytes) : bytes_(bytes) {
    require(cudaMalloc(&base_, static_cast<size_t>(bytes)), "cudaMalloc");
  }
  ~Arena() { cudaFree(base_); }

  std::byte* take(int64_t bytes) {
    std::byte* const at = base_ + used_;
    used_ += (bytes + 255) / 256 * 256;
    if (used_ > bytes_) {
      fprintf(stderr, "the arena of %.1f GB is too small\n", static_cast<double>(bytes_) * 1e-9);
      exit(1);
    }
    return at;
  }
  void reset() { used_ = 0; }

  void* filled(int64_t bytes, Fill fill, float scale) {
    void* const at = take(bytes);
    fill_kernel<<<2048, 256>>>(static_cast<uint32_t*>(at), (bytes + 3) / 4, fill, scale, seed_ += 0x1234567);
    return at;
  }
  float* floats(int64_t count, float scale) { return static_cast<float*>(filled(count * 4, Fill::kFloat, scale)); }
  kernels::Rows rows(int64_t count, int64_t columns, DType dtype = DType::kBFloat16) {
    const bool wide = dtype == DType::kFloat32;
    return {filled(count * columns * (wide ? 4 : 2), wide ? Fill::kFloat : Fill::kBf16, 1.0f), dtype, columns};
  }
  // `count` weights [n, k] one after the other; FP8 with block scales that leave them near the size of the others.
  kernels::Matrix matrix(int64_t n, int64_t k, bool fp8, int64_t count = 1) {
    kernels::Matrix m;
    m.n = n;
    m.k = k;
    m.dtype = fp8 ? DType::kFloat8E4M3 : DType::kBFloat16;
    m.data = filled(n * k * count * (fp8 ? 1 : 2), fp8 ? Fill::kFp8 : Fill::kBf16, 0.03f);
    if (fp8)
      m.scale = upload(std::vector<float>(static_cast<size_t>((n + 127) / 128 * ((k + 127) / 128) * count), 1.2e-4f));
    return m;
  }
  template <typename T>
  T* upload(const std::vector<T>& values) {
    T* const at = reinterpret_cast<T*>(take(static_cast<int64_t>(values.size() * sizeof(T))));
    require(cudaMemcpy(at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    return at;
  }

 private:
  std::byte* base_ = nullptr;
  int64_t bytes_;
  int64_t used_ = 0;
  uint64_t seed_ = 1;
};

// Median microseconds of one call, by events around `calls` of them.
template <typename Call>
double time_microseconds(Call call, int calls = 4, int repeats = 5) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin), "cudaEventCreate");
  require(cudaEventCreate(&end), "cudaEventCreate");
  call();
  std::vector<double> times;
  for (int r = 0; r < repeats; ++r) {
    require(cudaEventRecord(begin), "cudaEventRecord");
    for (int i = 0; i < calls; ++i) call();
    require(cudaEventRecord(end), "cudaEventRecord");
    require(cudaEventSynchronize(end), "a timed call");
    float milliseconds = 0;
    require(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    times.push_back(milliseconds * 1e3 / calls);
  }
  require(cudaEventDestroy(begin), "cudaEventDestroy");
  require(cudaEventDestroy(end), "cudaEventDestroy");
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace tokenspeed::bench

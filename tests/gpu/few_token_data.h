// What the tests of the kernels for few tokens share.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "base/status.h"
#include "gpu/device_data.h"

namespace tokenspeed::kernels {

using Bf16Rows = Activations<BFloat16>;
using FloatRows = Activations<float>;

inline uint32_t fresh_seed() {
  const uint32_t seed = std::random_device()();
  testing::Test::RecordProperty("seed", static_cast<int>(seed));
  printf("seed %u\n", seed);
  return seed;
}

inline void run(const Status& status) {
  ASSERT_TRUE(status.ok()) << status.to_string();
  expect_ok(cudaGetLastError());
  expect_ok(cudaDeviceSynchronize());
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// `count` matrices [n, k] one after the other on both sides.
class Weights {
 public:
  Weights(Random* random, bool fp8, int64_t n, int64_t k, int64_t count = 1)
      : bytes_({}), scales_({}), n_(n), k_(k), fp8_(fp8) {
    std::vector<uint8_t> bytes;
    std::vector<float> scales;
    const int64_t blocks = (n + 127) / 128 * ((k + 127) / 128);
    if (fp8) {
      bytes = random_bytes(random, n * k * count);
      for (uint8_t& code : bytes) code -= (code & 0x7f) == 0x7f;  // no NaN
      for (int64_t i = 0; i < 4 * count; ++i)
        bytes[static_cast<size_t>(random->below(n * k))] = static_cast<uint8_t>(i % 8);
      for (int64_t i = 0; i < blocks * count; ++i)
        scales.push_back(1e-4f * (1.0f + static_cast<float>(random->below(100)) * 0.01f));
    } else {
      bytes = random_bytes(random, n * k * count * 2);
      for (size_t i = 1; i < bytes.size(); i += 2) bytes[i] = static_cast<uint8_t>((bytes[i] & 0x81) | 0x3c);  // 2^-7
    }
    renew(&bytes_, std::move(bytes));
    renew(&scales_, std::move(scales));
  }
  Matrix host() const { return matrix(bytes_.host.data(), scales_.host.data()); }
  Matrix device() const { return matrix(bytes_.device(), scales_.device()); }
  int64_t stride() const { return n_ * k_ * (fp8_ ? 1 : 2); }
  int64_t scale_stride() const { return fp8_ ? (n_ + 127) / 128 * ((k_ + 127) / 128) : 0; }

 private:
  // Normal numbers would take a minute for the larger shapes.
  static std::vector<uint8_t> random_bytes(Random* random, int64_t count) {
    std::mt19937_64 engine(static_cast<uint64_t>(random->below(int64_t{1} << 31)));
    std::vector<uint8_t> bytes(static_cast<size_t>((count + 7) / 8 * 8));
    for (size_t i = 0; i < bytes.size(); i += 8) {
      const uint64_t bits = engine();
      std::memcpy(bytes.data() + i, &bits, 8);
    }
    bytes.resize(static_cast<size_t>(count));
    return bytes;
  }
  template <typename T>
  static void renew(Both<T>* array, std::vector<T> values) {
    array->~Both<T>();
    new (array) Both<T>(std::move(values));
  }
  Matrix matrix(const void* data, const float* scale) const {
    return {
        data, fp8_ ? DType::kFloat8E4M3 : DType::kBFloat16, MatrixLayout::kRowMajor, n_, k_, fp8_ ? scale : nullptr};
  }
  Both<uint8_t> bytes_;
  Both<float> scales_;
  int64_t n_, k_;
  bool fp8_;
};

}  // namespace tokenspeed::kernels

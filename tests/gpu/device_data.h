// Test data that lies on the host and on the GPU: random inputs, poisoned outputs, comparison.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/elements.h"
#include "kernels/types.h"

namespace tokenspeed::kernels {

inline void expect_ok(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

// An array on both sides. Device memory past the array is poisoned too, so that a read behind the end shows as NaN.
template <typename T>
class Both {
 public:
  explicit Both(std::vector<T> values) : host(std::move(values)) {
    expect_ok(cudaMalloc(&device_, bytes() + kTail));
    expect_ok(cudaMemset(device_, 0xff, bytes() + kTail));
    upload();
  }
  Both(const Both&) = delete;
  Both& operator=(const Both&) = delete;
  ~Both() { cudaFree(device_); }

  T* device() const { return static_cast<T*>(device_); }
  void upload() { expect_ok(cudaMemcpy(device_, host.data(), bytes(), cudaMemcpyHostToDevice)); }
  std::vector<T> download() const {
    std::vector<T> values(host.size());
    expect_ok(cudaMemcpy(values.data(), device_, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }
  void poison() { expect_ok(cudaMemset(device_, 0xff, bytes())); }

  std::vector<T> host;

 private:
  static constexpr size_t kTail = 4096;
  size_t bytes() const { return host.size() * sizeof(T); }
  void* device_ = nullptr;
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  float normal(float scale = 1.0f) { return scale * distribution_(engine_); }
  int64_t below(int64_t limit) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(limit)); }
  std::vector<float> floats(int64_t count, float scale = 1.0f) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal(scale);
    return values;
  }
  std::vector<BFloat16> bfloat16s(int64_t count, float scale = 1.0f) {
    std::vector<BFloat16> values(static_cast<size_t>(count));
    for (BFloat16& value : values) value = to_bfloat16(normal(scale));
    return values;
  }
  std::vector<uint8_t> fp8s(int64_t count) {
    std::vector<uint8_t> values(static_cast<size_t>(count));
    for (uint8_t& value : values) value = float_to_float8_e4m3(normal(100.0f));
    return values;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> distribution_;
};

// [rows, columns] of bfloat16 (or float32) activations; rows are `stride` apart.
template <typename T>
class Activations : public Both<T> {
 public:
  Activations(std::vector<T> values, int64_t stride) : Both<T>(std::move(values)), stride_(stride) {}
  Rows host_rows() { return {this->host.data(), dtype(), stride_}; }
  Rows device_rows() const { return {this->device(), dtype(), stride_}; }
  static constexpr DType dtype() { return std::is_same_v<T, float> ? DType::kFloat32 : DType::kBFloat16; }

 private:
  int64_t stride_;
};

// ||got - expected|| / ||expected||; NaN when anything is.
template <typename T>
double relative_error(const std::vector<T>& got, const std::vector<T>& expected) {
  double difference = 0;
  double size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = to_float(got[i]);
    const double b = to_float(expected[i]);
    difference += (a - b) * (a - b);
    size += b * b;
  }
  return std::sqrt(difference / (size > 0 ? size : 1));
}

#define EXPECT_CLOSE(got, expected, tolerance)                            \
  EXPECT_PRED2([](double error, double limit) { return error <= limit; }, \
               ::tokenspeed::kernels::relative_error(got, expected), tolerance)

// Sequences of a step over shuffled pages and slots.
struct Batch {
  Batch(Random* random, const std::vector<int32_t>& lengths, const std::vector<int32_t>& contexts, int32_t page_size)
      : token_begin({}), context(contexts), position({}), sequence({}), page_table({}), state_in({}), state_out({}) {
    int32_t longest = 0;
    token_begin.host.push_back(0);
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int32_t i = 0; i < lengths[s]; ++i) {
        position.host.push_back(contexts[s] + i);
        sequence.host.push_back(static_cast<int32_t>(s));
      }
      token_begin.host.push_back(token_begin.host.back() + lengths[s]);
      longest = std::max(longest, contexts[s] + lengths[s]);
      state_in.host.push_back(contexts[s] == 0 ? -1 : static_cast<int32_t>(2 * s));
      state_out.host.push_back(static_cast<int32_t>(s % 2 ? 2 * s : 2 * s + 1));  // in place and elsewhere
    }
    pages_per_sequence = (longest + page_size - 1) / page_size;
    pages = pages_per_sequence * static_cast<int32_t>(lengths.size());
    for (int32_t i = 0; i < pages; ++i) page_table.host.push_back(i);
    for (int32_t i = pages - 1; i > 0; --i) std::swap(page_table.host[i], page_table.host[random->below(i + 1)]);
    slots = 2 * static_cast<int32_t>(lengths.size());
    for (Both<int32_t>* array : {&token_begin, &context, &position, &sequence, &page_table, &state_in, &state_out})
      renew(array);
  }
  int32_t tokens() const { return static_cast<int32_t>(position.host.size()); }
  SequenceBatch on_host() const {
    return batch([](const Both<int32_t>& array) { return array.host.data(); });
  }
  SequenceBatch on_device() const {
    return batch([](const Both<int32_t>& array) { return array.device(); });
  }

  Both<int32_t> token_begin, context, position, sequence, page_table, state_in, state_out;
  int32_t pages_per_sequence = 0;
  int32_t pages = 0;
  int32_t slots = 0;

 private:
  static void renew(Both<int32_t>* array) {
    std::vector<int32_t> values = std::move(array->host);
    array->~Both<int32_t>();
    new (array) Both<int32_t>(std::move(values));
  }
  template <typename Pointer>
  SequenceBatch batch(Pointer pointer) const {
    SequenceBatch made;
    made.sequences = static_cast<int32_t>(context.host.size());
    made.tokens = tokens();
    made.token_begin = pointer(token_begin);
    made.context = pointer(context);
    made.position = pointer(position);
    made.sequence = pointer(sequence);
    made.page_table = pointer(page_table);
    made.page_table_stride = pages_per_sequence;
    made.state_in = pointer(state_in);
    made.state_out = pointer(state_out);
    return made;
  }
};

}  // namespace tokenspeed::kernels

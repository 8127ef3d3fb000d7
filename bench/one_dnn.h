// What benchmarks against oneDNN share: the matrix products of qwen3.5-0.8b, and oneDNN's time for one of them in
// bfloat16 with its own prepacked weights on all CPUs. Benchmarks only: the program itself never links oneDNN.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <dnnl.hpp>
#include <span>
#include <unordered_map>

#include "base/dtype.h"

namespace tokenspeed::bench {

constexpr int kRepetitions = 7;

struct Shape {
  const char* name;
  int64_t n;
  int64_t k;
  int layers;  // that have it
};

// Of qwen3.5-0.8b, projections merged as the compiler does.
constexpr Shape kShapes[] = {{"gdn in", 8224, 1024, 18},      {"gdn out", 1024, 2048, 18},
                             {"attention in", 5120, 1024, 6}, {"attention out", 1024, 2048, 6},
                             {"gate_up", 7168, 1024, 24},     {"down", 1024, 3584, 24}};

template <typename Function>
double best_seconds(const Function& function) {
  double best = 1e30;
  for (int i = 0; i < kRepetitions; ++i) {
    const auto start = std::chrono::steady_clock::now();
    function();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// Weights in huge pages, as the runner holds them.
inline std::span<BFloat16> random_values(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(BFloat16);
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) std::abort();
  madvise(data, bytes, MADV_HUGEPAGE);
  BFloat16* values = static_cast<BFloat16*>(data);
  uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    values[i] = to_bfloat16(static_cast<float>(state >> 8) * 0x1.0p-24f - 0.5f);
  }
  return {values, static_cast<size_t>(count)};
}

// Seconds of y[rows, n] = x[rows, k] times a weight of that shape.
inline double one_dnn_seconds(const Shape& shape, int64_t rows, BFloat16* x, BFloat16* y) {
  using dnnl::memory;
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const memory::desc x_desc({rows, shape.k}, memory::data_type::bf16, memory::format_tag::ab);
  const memory::desc weight_desc({shape.k, shape.n}, memory::data_type::bf16, memory::format_tag::any);
  const memory::desc y_desc({rows, shape.n}, memory::data_type::bf16, memory::format_tag::ab);
  const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(x_desc, weight_desc, y_desc), engine);
  memory weight(description.weights_desc(), engine);
  const std::span<BFloat16> values =
      random_values(static_cast<int64_t>(weight.get_desc().get_size() / sizeof(BFloat16)));
  weight.set_data_handle(values.data());
  const dnnl::matmul matmul(description);
  const std::unordered_map<int, memory> arguments = {
      {DNNL_ARG_SRC, memory(x_desc, engine, x)}, {DNNL_ARG_WEIGHTS, weight}, {DNNL_ARG_DST, memory(y_desc, engine, y)}};
  const double seconds = best_seconds([&] {
    matmul.execute(stream, arguments);
    stream.wait();
  });
  munmap(values.data(), values.size_bytes());
  return seconds;
}

}  // namespace tokenspeed::bench

// Matrix products of one model size on this machine: decode (1 row) against the read bandwidth of memory, prefill
// (512 rows) against oneDNN's bfloat16 GEMM with its own prepacked weights, both on all CPUs. A benchmark only: the
// program itself never links oneDNN.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <dnnl.hpp>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/thread_pool.h"
#include "kernels/cpu/linear_with.h"
#include "kernels/elements.h"
#include "kernels/memory_bandwidth.h"

namespace {

using namespace tokenspeed;
using namespace tokenspeed::kernels;

constexpr int64_t kDecodeBytes = int64_t{512} << 20;  // distinct weights per decode pass: far over any cache
constexpr int kRepetitions = 7;

struct Shape {
  const char* name;
  int64_t n;
  int64_t k;
};

// Of qwen3.5-0.8b, projections merged as the compiler does.
constexpr Shape kShapes[] = {{"gdn in", 8224, 1024},        {"gdn out", 1024, 2048}, {"attention in", 5120, 1024},
                             {"attention out", 1024, 2048}, {"gate_up", 7168, 1024}, {"down", 1024, 3584}};

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
std::span<BFloat16> random_values(int64_t count) {
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

double one_dnn_seconds(const Shape& shape, int64_t rows, BFloat16* x, BFloat16* y) {
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

}  // namespace

int main() {
  ThreadPool pool(0, true);
  const double bandwidth = cpu::measure_read_bandwidth(kDecodeBytes * 2, kRepetitions, pool);
  std::printf("%d threads, %s; memory reads %.1f GB/s\n", pool.size(),
              std::string(cpu::instruction_set_name(cpu::instruction_set())).c_str(), bandwidth);
  std::printf("%-14s %6s %6s | 1 row GB/s  of memory | 8 rows GB/s | 512 rows GFLOP/s  oneDNN  ratio\n", "shape", "n",
              "k");
  const std::span<BFloat16> weights = random_values(kDecodeBytes / 2 + (int64_t{16} << 20));
  for (const Shape& shape : kShapes) {
    constexpr int64_t kPrefillRows = 512;
    const std::span<BFloat16> x = random_values(kPrefillRows * shape.k);
    const std::span<BFloat16> y = random_values(kPrefillRows * shape.n);
    const int64_t bytes = packed_bytes(shape.n, shape.k, DType::kBFloat16);
    const auto product = [&](int64_t rows, int64_t copy) {
      cpu::linear({.rows = rows,
                   .x = {x.data(), DType::kBFloat16, shape.k},
                   .weight = {.data = weights.data() + copy * bytes / 2,
                              .dtype = DType::kBFloat16,
                              .layout = MatrixLayout::kPanel16,
                              .n = shape.n,
                              .k = shape.k},
                   .y = {y.data(), DType::kBFloat16, shape.n}},
                  pool);
    };
    const int64_t copies = kDecodeBytes / bytes;
    double streamed[2];
    for (int i = 0; i < 2; ++i) {
      const double seconds = best_seconds([&] {
        for (int64_t copy = 0; copy < copies; ++copy) product(i == 0 ? 1 : 8, copy);
      });
      streamed[i] = static_cast<double>(copies * bytes) / seconds / 1e9;
    }
    const double flops = 2.0 * kPrefillRows * static_cast<double>(shape.n * shape.k);
    const double ours = flops / best_seconds([&] { product(kPrefillRows, 0); }) / 1e9;
    const double one_dnn = flops / one_dnn_seconds(shape, kPrefillRows, x.data(), y.data()) / 1e9;
    std::printf("%-14s %6ld %6ld | %10.1f  %8.0f%% | %11.1f | %16.1f  %6.1f  %4.0f%%\n", shape.name, shape.n, shape.k,
                streamed[0], 100 * streamed[0] / bandwidth, streamed[1], ours, one_dnn, 100 * ours / one_dnn);
    munmap(x.data(), x.size_bytes());
    munmap(y.data(), y.size_bytes());
  }
}

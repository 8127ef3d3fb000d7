// Matrix products of one model size on this machine: decode (1 row) against the read bandwidth of memory, prefill
// (512 rows) against oneDNN's bfloat16 GEMM, both on all CPUs.
#include <cstdio>
#include <string>

#include "base/thread_pool.h"
#include "kernels/cpu/linear_with.h"
#include "kernels/elements.h"
#include "kernels/memory_bandwidth.h"
#include "one_dnn.h"

namespace {

using namespace tokenspeed;
using namespace tokenspeed::bench;
using namespace tokenspeed::kernels;

constexpr int64_t kDecodeBytes = int64_t{512} << 20;  // distinct weights per decode pass: far over any cache

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

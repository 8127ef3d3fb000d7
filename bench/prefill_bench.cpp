// The whole prefill of qwen3.5-0.8b (512 tokens, random weights, as `tokenspeed bench prefill` measures it) against
// oneDNN's bfloat16 GEMM on the shapes of its matrix products, in one run: oneDNN before and after, the better counts.
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "one_dnn.h"

namespace {

using namespace tokenspeed;
using namespace tokenspeed::bench;

constexpr int64_t kTokens = 512;
constexpr const char* kPrefill = TOKENSPEED_PROGRAM
    " bench prefill --model qwen3.5-0.8b --load-format dummy --device cpu --max-model-len 2048 --rounds 7 --json";

double flops_of(const Shape& shape) { return 2.0 * kTokens * static_cast<double>(shape.n * shape.k); }

double all_flops() {
  double flops = 0;
  for (const Shape& shape : kShapes) flops += shape.layers * flops_of(shape);
  return flops;
}

// GFLOP/s of one layer's products after the other, weighted as the model has them.
double one_dnn_rate(bool print) {
  double seconds = 0;
  for (const Shape& shape : kShapes) {
    const std::span<BFloat16> x = random_values(kTokens * shape.k);
    const std::span<BFloat16> y = random_values(kTokens * shape.n);
    const double one = one_dnn_seconds(shape, kTokens, x.data(), y.data());
    seconds += shape.layers * one;
    if (print) std::printf("  %-14s %6ld x %5ld  %7.1f\n", shape.name, shape.n, shape.k, flops_of(shape) / one / 1e9);
    munmap(x.data(), x.size_bytes());
    munmap(y.data(), y.size_bytes());
  }
  return all_flops() / seconds / 1e9;
}

nlohmann::json run_prefill() {
  std::string output;
  FILE* pipe = popen(kPrefill, "r");
  if (pipe == nullptr) return {};
  char piece[4096];
  for (size_t n; (n = fread(piece, 1, sizeof(piece), pipe)) > 0;) output.append(piece, n);
  if (pclose(pipe) != 0) return {};
  return nlohmann::json::parse(output, nullptr, false);
}

}  // namespace

int main() {
  std::printf("oneDNN, GFLOP/s of %ld rows:\n", kTokens);
  double one_dnn = one_dnn_rate(true);
  const nlohmann::json report = run_prefill();
  if (!report.is_object()) {
    std::fprintf(stderr, "this failed: %s\n", kPrefill);
    return 1;
  }
  one_dnn = std::max(one_dnn, one_dnn_rate(false));
  const double prefill = report["gflop_per_s"];
  const double matrix_products = all_flops() / report["time_to_first_token_ms"].get<double>() / 1e6;
  std::printf("oneDNN, weighted as the model has them      %7.1f GFLOP/s\n", one_dnn);
  std::printf("whole prefill, all its operations           %7.1f GFLOP/s  %3.0f%% of oneDNN\n", prefill,
              100 * prefill / one_dnn);
  std::printf("whole prefill, counting these products only %7.1f GFLOP/s  %3.0f%% of oneDNN\n", matrix_products,
              100 * matrix_products / one_dnn);
  std::printf("time to first token %.1f ms, %.0f tokens/s\n", report["time_to_first_token_ms"].get<double>(),
              report["tokens_per_s"].get<double>());
}

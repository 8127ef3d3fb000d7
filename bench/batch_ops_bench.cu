// Times the kernels for 9 to 64 rows at the shapes of qwen3.5-35b-a3b, random weights, each call another layer's:
//   batch_ops_bench [--rows N] [--dtype fp8|bf16]
#include <cstring>
#include <set>
#include <string>
#include <utility>

#include "bench/device_data.cuh"
#include "kernels/cuda/batch.h"
#include "kernels/cuda/batch_experts.cuh"

using namespace tokenspeed;
using namespace tokenspeed::kernels;
namespace {

constexpr int kHidden = 2048, kWidth = 512, kExperts = 256, kTopK = 8, kLayers = 4;

void report(const char* name, double microseconds, double bytes) {
  printf("%-12s %8.1f us %8.1f MB %7.0f GB/s\n", name, microseconds, bytes * 1e-6, bytes / microseconds * 1e-3);
}

// Microseconds per launch of a graph of `count` calls.
template <typename Call>
double time_graph(int count, Call call) {
  cudaStream_t stream;
  bench::require(cudaStreamCreate(&stream), "cudaStreamCreate");
  for (int i = 0; i < count; ++i) call(i, stream);
  bench::require(cudaStreamSynchronize(stream), "a warm-up");
  bench::require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "a capture");
  for (int i = 0; i < count; ++i) call(i, stream);
  cudaGraph_t graph;
  bench::require(cudaStreamEndCapture(stream, &graph), "a capture");
  cudaGraphExec_t executable;
  bench::require(cudaGraphInstantiate(&executable, graph, 0), "a graph");
  return bench::time_microseconds([&] { bench::require(cudaGraphLaunch(executable, nullptr), "a graph"); }, 2, 9) /
         count;
}

}  // namespace

int main(int argc, char** argv) {
  int64_t rows = 32;
  bool fp8 = true;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--rows") rows = atoi(argv[i + 1]);
    if (std::string(argv[i]) == "--dtype") fp8 = std::string(argv[i + 1]) == "fp8";
  }
  bench::Arena arena(int64_t{20} << 30);
  std::vector<float> logits(static_cast<size_t>(rows * kExperts));
  uint32_t state = 12345;
  for (float& logit : logits) logit = static_cast<float>((state = state * 1664525 + 1013904223) >> 8) * 0x1p-24f;
  std::set<int> chosen;
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<int> ids(kExperts);
    for (int e = 0; e < kExperts; ++e) ids[e] = e;
    std::partial_sort(ids.begin(), ids.begin() + kTopK, ids.end(),
                      [&](int a, int b) { return logits[t * kExperts + a] > logits[t * kExperts + b]; });
    chosen.insert(ids.begin(), ids.begin() + kTopK);
  }
  const float* const device_logits = arena.upload(logits);
  const double element = fp8 ? 1 : 2;
  const double expert_bytes = 3.0 * kHidden * kWidth * element;

  cuda::BatchExperts layers[kLayers];
  const Rows x = arena.rows(rows, kHidden), residual = arena.rows(rows, kHidden), normed = arena.rows(rows, kHidden);
  const float* const norm = arena.floats(kHidden, 0.1f);
  void* const workspace =
      arena.take(cuda::batch_experts_workspace_bytes(rows, kExperts, kTopK, kHidden, kWidth, kWidth));
  for (cuda::BatchExperts& l : layers) {
    l.rows = rows;
    l.experts = kExperts;
    l.top_k = kTopK;
    l.router_logits = device_logits;
    l.router_stride = kExperts;
    l.hidden = kHidden;
    l.width = l.shared_width = kWidth;
    l.x = x;
    l.gate_up = arena.matrix(2 * kWidth, kHidden, fp8, kExperts);
    l.down = arena.matrix(kHidden, kWidth, fp8, kExperts);
    l.shared_gate_up = arena.matrix(2 * kWidth, kHidden, fp8);
    l.shared_down = arena.matrix(kHidden, kWidth, fp8);
    l.workspace = workspace;
  }
  printf("%lld rows, %zu distinct experts\n", static_cast<long long>(rows), chosen.size());
  report("experts",
         time_graph(kLayers,
                    [&](int i, cudaStream_t stream) { bench::require(cuda::batch_experts(layers[i], {stream})); }),
         expert_bytes * static_cast<double>(chosen.size() + 1));
  report("route",
         time_graph(8,
                    [&](int, cudaStream_t stream) {
                      const cuda::BatchExpertsSpace space(workspace, rows, kExperts, kTopK, kHidden, kWidth, kWidth);
                      bench::require(cuda::batch_route(layers[0], space, {stream}));
                    }),
         static_cast<double>(rows) * kExperts * 4);
  report("norm, sum",
         time_graph(8,
                    [&](int, cudaStream_t stream) {
                      bench::require(cuda::batch_norm({rows, kHidden, residual, cuda::batch_experts_output(layers[0]),
                                                       kTopK, device_logits, kExperts, norm, 1e-6f, normed},
                                                      {stream}));
                    }),
         static_cast<double>(rows) * kHidden * (4 * (kTopK + 1) + 6));

  const auto linear = [&](const char* name, int64_t k, std::vector<std::pair<int64_t, bool>> segments) {
    constexpr int kCopies = 12;
    cuda::BatchLinear copies[kCopies];
    double bytes = 0;
    for (cuda::BatchLinear& l : copies) {
      l.rows = rows;
      l.x = arena.rows(rows, k);
      for (const auto& [n, narrow] : segments) {
        l.segments[l.segment_count++] = {arena.matrix(n, k, narrow && fp8), arena.rows(rows, n)};
        bytes += static_cast<double>(n * k) * (narrow && fp8 ? 1 : 2) / kCopies;
      }
    }
    void* const split = arena.take(cuda::batch_split_bytes(rows, k));
    bench::require(cuda::batch_split(copies[0].x, rows, k, split, {}));
    for (cuda::BatchLinear& l : copies) l.split = split;
    report(name,
           time_graph(kCopies,
                      [&](int i, cudaStream_t stream) { bench::require(cuda::batch_linear(copies[i], {stream})); }),
           bytes);
  };
  linear("in-proj.", kHidden, {{12288, true}, {64, false}});
  linear("out-proj.", 4096, {{kHidden, true}});
  linear("q, k, v", kHidden, {{9216, true}});
  linear("router", kHidden, {{kExperts, false}, {1, false}});

  const GdnShape shape{16, 32, 128, 128, 4};
  const int64_t values = shape.value_heads * 128, recurrent = values * 128 * 4;
  const int64_t slot = recurrent + 3 * shape.channels() * 2;
  std::byte* const slots = static_cast<std::byte*>(arena.filled(slot * rows * kLayers, bench::Fill::kBf16, 0.1f));
  std::vector<int32_t> index(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) index[i] = static_cast<int32_t>(i);
  SequenceBatch batch;
  batch.sequences = batch.tokens = static_cast<int32_t>(rows);
  batch.state_in = batch.state_out = arena.upload(index);
  const Rows qkvz = arena.rows(rows, shape.channels() + values), ba = arena.rows(rows, 2 * shape.value_heads);
  const auto part = [](Rows r, int64_t column) {
    r.data = static_cast<std::byte*>(r.data) + column * 2;
    return r;
  };
  const float* const taps = arena.floats(shape.channels() * 4, 0.5f);
  const float* const small = arena.floats(128, 1.0f);
  const Rows out = arena.rows(rows, values);
  report("gdn",
         time_graph(kLayers,
                    [&](int i, cudaStream_t stream) {
                      std::byte* const base = slots + i * slot * rows;
                      bench::require(cuda::batch_gdn({shape,
                                                      batch,
                                                      {base, base + recurrent, DType::kBFloat16, slot},
                                                      qkvz,
                                                      part(qkvz, shape.channels()),
                                                      ba,
                                                      part(ba, shape.value_heads),
                                                      taps,
                                                      small,
                                                      small,
                                                      small,
                                                      1e-6f,
                                                      out,
                                                      nullptr},
                                                     nullptr, {stream}));
                    }),
         2.0 * static_cast<double>(rows * slot));
  return 0;
}

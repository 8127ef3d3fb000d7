// Times the kernels for few tokens on random weights: each op alone against the measured read bandwidth, and the whole
// step of a model shape as one graph, with every kind of op left out in turn (what the op costs inside the step).
//
//   ops_bench [--model 35b|0.8b|4b|9b|27b|397b-tp8] [--dtype fp8|bf16] [--rows T] [--sequences S] [--context N]
//             [--kv-fp8] [--quick]
//
// The T rows are S sequences (1 unless said otherwise) of as many tokens each. Every step begins with the same random
// rows, so that they choose experts of their own. Every layer has weights of its own, so nothing is found in L2 that a
// real step would not find there. Times are medians of event-timed graph replays after warm-up. "alone": each launch
// waits for the one before; "chained": launches of the same op overlap as they would between layers (weights fetched
// ahead).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "bench/device_data.cuh"
#include "kernels/cuda/decode.h"

#ifdef TOKENSPEED_LAYER_CLOCKS
namespace tokenspeed::kernels::cuda {
void fetch_layer_clocks(long long* to);
}
#endif
namespace {

using namespace tokenspeed;
using namespace tokenspeed::kernels;
using namespace tokenspeed::bench;

__global__ void read_kernel(const uint4* from, int64_t count, uint32_t* sink) {
  uint32_t sum = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} * 8 + threadIdx.x; i < count;
       i += gridDim.x * int64_t{blockDim.x} * 8) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = i + j * blockDim.x < count ? __ldcs(from + i + j * blockDim.x) : uint4{};
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x12345678u) *sink = sum;
}

__global__ void copy_kernel(const uint32_t* from, uint32_t* to, int64_t words) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < words) to[i] = from[i];
}

struct Model {
  const char* name;
  int64_t hidden, layers, query_heads, kv_heads, key_heads, value_heads, experts, top_k, width, shared_width,
      vocabulary;
};
constexpr Model kModels[] = {
    {"35b", 2048, 40, 16, 2, 16, 32, 256, 8, 512, 512, 248320},
    {"0.8b", 1024, 24, 8, 2, 16, 16, 0, 0, 0, 3584, 248320},
    {"4b", 2560, 32, 16, 4, 16, 32, 0, 0, 0, 9216, 248320},
    {"9b", 4096, 32, 32, 4, 16, 32, 0, 0, 0, 12288, 248320},
    {"27b", 5120, 64, 24, 4, 16, 48, 0, 0, 0, 17408, 248320},
    {"397b-tp8", 4096, 60, 4, 1, 2, 8, 512, 10, 128, 128, 31040},
};

struct Options {
  Model model = kModels[0];
  bool fp8 = true;
  int64_t rows = 1;
  int64_t sequences = 1;
  int64_t context = 128;
  bool quick = false;
  bool kv_fp8 = false;
};

// One step's ops by kind, in order.
struct Op {
  const char* kind;
  int64_t bytes;
  std::function<Status(const cuda::Launch&)> launch;
  std::optional<cuda::DecodePhase> phase;  // what decode_layers takes along
};

using Enqueue = std::function<void(const cuda::Launch&)>;
double graph_time_us(cudaStream_t stream, const Enqueue& enqueue, bool dependent, int repeats) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  enqueue({stream, dependent});
  require(cudaStreamEndCapture(stream, &graph), "end capture");
  require(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < repeats + 3; ++i) {
    require(cudaEventRecord(begin, stream), "record");
    require(cudaGraphLaunch(exec, stream), "launch");
    require(cudaEventRecord(end, stream), "record");
    require(cudaEventSynchronize(end), "synchronize");
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i >= 3) times.push_back(ms);
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e3;
}

double graph_time_us(cudaStream_t stream, const std::vector<const Op*>& ops, bool dependent, int repeats) {
  return graph_time_us(
      stream,
      [&](const cuda::Launch& launch) {
        for (const Op* op : ops) require(op->launch(launch));
      },
      dependent, repeats);
}
// The same ops, runs of phases through decode_layers.
double layers_time_us(cudaStream_t stream, const std::vector<const Op*>& ops, void* workspace, int repeats) {
  return graph_time_us(
      stream,
      [&](const cuda::Launch& launch) {
        std::vector<cuda::DecodePhase> phases;
        const auto flush = [&] {
          if (!phases.empty()) require(cuda::decode_layers(phases, workspace, launch));
          phases.clear();
        };
        for (const Op* op : ops) {
          if (op->phase) {
            phases.push_back(*op->phase);
            if (auto* up = std::get_if<cuda::DecodeGateUp>(&phases.back())) up->expert_ids = nullptr;
            continue;
          }
          flush();
          require(op->launch(launch));
        }
        flush();
      },
      true, repeats);
}
double read_bandwidth(cudaStream_t stream, const void* from, int64_t bytes, uint32_t* sink) {
  std::vector<float> times;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  for (int i = 0; i < 8; ++i) {
    cudaEventRecord(begin, stream);
    read_kernel<<<2048, 512, 0, stream>>>(static_cast<const uint4*>(from), bytes / 16, sink);
    cudaEventRecord(end, stream);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return static_cast<double>(bytes) / (times[times.size() / 2] * 1e-3);
}

class Step {
 public:
  explicit Step(const Options& o) : o_(o), arena_(arena_bytes(o)) { build(); }
  const std::vector<Op>& ops() const { return ops_; }

  // Bytes of the expert phases by the distinct experts of a step that has just run.
  void count_experts() {
    const int64_t element = o_.fp8 ? 1 : 2;
    int64_t read = 0;
    for (Op& op : ops_) {
      if (!op.phase) continue;
      if (const auto* up = std::get_if<cuda::DecodeGateUp>(&*op.phase); up != nullptr && up->expert_ids != nullptr) {
        std::vector<int32_t> ids(static_cast<size_t>(up->rows * up->routed.top_k));
        require(cudaMemcpy(ids.data(), up->expert_ids, ids.size() * 4, cudaMemcpyDeviceToHost), "expert ids");
        const auto distinct = static_cast<int64_t>(std::set<int32_t>(ids.begin(), ids.end()).size());
        read = (distinct * up->width + up->shared_width) * up->hidden * element;
        op.bytes = 2 * read;
      } else if (std::holds_alternative<cuda::DecodeDown>(*op.phase)) {
        op.bytes = read;
      }
    }
  }

 private:
  static int64_t arena_bytes(const Options& o) {
    const Model& m = o.model;
    const int64_t element = o.fp8 ? 1 : 2;
    const int64_t experts = 3 * m.hidden * (m.experts * m.width + m.shared_width) * element;
    const int64_t mixer = (m.key_heads * 256 + m.value_heads * 384 + m.query_heads * 768) * m.hidden * element * 2;
    const int64_t state = m.value_heads * 65536 * o.sequences * 4;
    return m.layers * (experts + mixer + state + (64 << 20)) + m.vocabulary * m.hidden * 2 + (int64_t{3} << 30) +
           m.layers / 4 * (o.context + 4096) * m.kv_heads * 1024 * o.rows;
  }

  void add(const char* kind, int64_t bytes, std::function<Status(const cuda::Launch&)> launch) {
    ops_.push_back({kind, bytes, std::move(launch), {}});
  }
  template <typename Args>
  void add_phase(const char* kind, int64_t bytes, const Args& args, Status (*op)(const Args&, const cuda::Launch&)) {
    ops_.push_back({kind, bytes, [args, op](const cuda::Launch& launch) { return op(args, launch); }, args});
  }
  void linear(const char* kind, Rows x, const float* norm, Rows normed, std::vector<cuda::DecodeSegment> segments) {
    cuda::DecodeLinear args;
    args.rows = o_.rows;
    args.x = x;
    args.norm_weight = norm;
    args.normed = normed;
    int64_t bytes = 0;
    for (const cuda::DecodeSegment& s : segments) {
      args.segments[args.segment_count++] = s;
      bytes += s.weight.n * s.weight.k * static_cast<int64_t>(dtype_size(s.weight.dtype));
    }
    add_phase(kind, bytes, args, &cuda::decode_linear);
  }

  void build() {
    const Model& m = o_.model;
    const int64_t rows = o_.rows;
    const int64_t page = 64;
    const int64_t sequences = o_.sequences, own_rows = rows / sequences;
    const int64_t pages = (o_.context + own_rows + page - 1) / page;
    std::vector<int32_t> table, position, sequence, begin, slots;
    for (int64_t i = 0; i < pages * sequences; ++i) table.push_back(static_cast<int32_t>(i));
    for (int64_t t = 0; t < rows; ++t) {
      position.push_back(static_cast<int32_t>(o_.context + t % own_rows));
      sequence.push_back(static_cast<int32_t>(t / own_rows));
    }
    for (int64_t i = 0; i < sequences; ++i) slots.push_back(static_cast<int32_t>(i));
    for (int64_t i = 0; i <= sequences; ++i) begin.push_back(static_cast<int32_t>(i * own_rows));
    SequenceBatch batch;
    batch.sequences = static_cast<int32_t>(sequences);
    batch.tokens = static_cast<int32_t>(rows);
    batch.token_begin = arena_.upload(begin);
    batch.context = arena_.upload(std::vector<int32_t>(slots.size(), static_cast<int32_t>(o_.context)));
    batch.position = arena_.upload(position);
    batch.sequence = arena_.upload(sequence);
    batch.page_table = arena_.upload(table);
    batch.page_table_stride = pages;
    batch.state_in = arena_.upload(slots);
    batch.state_out = batch.state_in;

    const Rows x = arena_.rows(rows, m.hidden), first = arena_.rows(rows, m.hidden);
    const int64_t words = rows * m.hidden / 2;
    add("0 rows", 0, [=](const cuda::Launch& launch) {
      copy_kernel<<<static_cast<unsigned>((words + 255) / 256), 256, 0, launch.stream>>>(
          static_cast<const uint32_t*>(first.data), static_cast<uint32_t*>(x.data), words);
      return Status();
    });
    const Rows normed = arena_.rows(rows, m.hidden);
    const GdnShape gdn{m.key_heads, m.value_heads, 128, 128, 4};
    const int64_t channels = gdn.channels(), values = m.value_heads * 128;
    const Rows qkv = arena_.rows(rows, channels), z = arena_.rows(rows, values), b = arena_.rows(rows, 128),
               a = arena_.rows(rows, 128);
    AttentionShape attention;
    attention.query_heads = m.query_heads;
    attention.kv_heads = m.kv_heads;
    const Rows q_gate = arena_.rows(rows, m.query_heads * 512), key = arena_.rows(rows, m.kv_heads * 256),
               value = arena_.rows(rows, m.kv_heads * 256);
    const Rows mixed = arena_.rows(rows, std::max(values, m.query_heads * 256));
    const Rows router = arena_.rows(rows, std::max<int64_t>(m.experts, 8), DType::kFloat32);
    const Rows gate = arena_.rows(rows, 8, DType::kFloat32);
    void* const h = arena_.take(rows * (m.top_k + 1) * std::max(m.width, m.shared_width) * 2);
    const Rows logits = arena_.rows(rows, m.vocabulary, DType::kFloat32);
    const int64_t attention_bytes = cuda::decode_attention_workspace_bytes(attention, rows, o_.context + rows);
    void* const attention_workspace = arena_.take(attention_bytes + 256);
    require(cudaMemset(attention_workspace, 0, static_cast<size_t>(attention_bytes)), "cudaMemset");
    void* const argmax_workspace = arena_.take(1024);
    require(cudaMemset(argmax_workspace, 0, 1024), "cudaMemset");
    int32_t* const tokens = reinterpret_cast<int32_t*>(arena_.take(256));
    const float* const norm = arena_.floats(m.hidden, 0.1f);
    const float* const head_norm = arena_.floats(256, 0.1f);
    const float* const conv = arena_.floats(channels * 4, 0.5f);
    const float* const small = arena_.floats(256, 0.5f);

    for (int64_t layer = 0; layer < m.layers; ++layer) {
      if (layer % 4 != 3) {
        linear("1 in-projections (GDN)", x, norm, {},
               {{arena_.matrix(channels, m.hidden, o_.fp8), qkv},
                {arena_.matrix(values, m.hidden, o_.fp8), z},
                {arena_.matrix(m.value_heads, m.hidden, false), b},
                {arena_.matrix(m.value_heads, m.hidden, false), a}});
        GdnMixer mixer;
        mixer.shape = gdn;
        mixer.batch = batch;
        const int64_t recurrent = values * 128 * 4;
        const auto state = [&](Fill fill) {
          return static_cast<std::byte*>(arena_.filled(recurrent * sequences, fill, 0.01f));
        };
        mixer.state = {state(Fill::kFloat), state(Fill::kBf16), DType::kBFloat16, recurrent};
        mixer.qkv = qkv;
        mixer.z = z;
        mixer.b = b;
        mixer.a = a;
        mixer.conv_weight = conv;
        mixer.a_log = small;
        mixer.dt_bias = small;
        mixer.norm_weight = norm;
        mixer.out = {mixed.data, DType::kBFloat16, values};
        add_phase("2 gated delta net", 2 * recurrent * sequences, mixer, &cuda::decode_gdn);
        linear("3 out-projection (GDN)", mixer.out, nullptr, {}, {{arena_.matrix(m.hidden, values, o_.fp8), x, true}});
      } else {
        linear("1 in-projections (attention)", x, norm, {},
               {{arena_.matrix(m.query_heads * 512, m.hidden, o_.fp8), q_gate},
                {arena_.matrix(m.kv_heads * 256, m.hidden, o_.fp8), key},
                {arena_.matrix(m.kv_heads * 256, m.hidden, o_.fp8), value}});
        cuda::DecodeAttention args;
        args.shape = attention;
        args.batch = batch;
        const int64_t kv = pages * sequences * page * m.kv_heads * 256;
        const Fill fill = o_.kv_fp8 ? Fill::kFp8 : Fill::kBf16;
        args.pages = {arena_.filled(kv * (o_.kv_fp8 ? 1 : 2), fill, 1.0f),
                      arena_.filled(kv * (o_.kv_fp8 ? 1 : 2), fill, 1.0f),
                      o_.kv_fp8 ? DType::kFloat8E4M3 : DType::kBFloat16,
                      static_cast<int32_t>(page),
                      static_cast<int32_t>(m.kv_heads),
                      256};
        args.q_gate = q_gate;
        args.key = key;
        args.value = value;
        args.query_norm = head_norm;
        args.key_norm = head_norm;
        args.out = {mixed.data, DType::kBFloat16, m.query_heads * 256};
        args.max_context = o_.context + own_rows;
        args.workspace = attention_workspace;
        add_phase("2 attention", sequences * (o_.context + own_rows) * m.kv_heads * (o_.kv_fp8 ? 512 : 1024), args,
                  &cuda::decode_attention);
        linear("3 out-projection (attention)", args.out, nullptr, {},
               {{arena_.matrix(m.hidden, m.query_heads * 256, o_.fp8), x, true}});
      }
      const int64_t element = o_.fp8 ? 1 : 2;
      cuda::DecodeGateUp up;
      cuda::DecodeDown down;
      up.rows = down.rows = rows;
      up.hidden = down.hidden = m.hidden;
      up.width = down.width = m.width;
      up.shared_width = down.shared_width = m.shared_width;
      up.shared_gate_up = arena_.matrix(2 * m.shared_width, m.hidden, o_.fp8);
      up.h = h;
      const Matrix shared_down = arena_.matrix(m.hidden, m.shared_width, o_.fp8);
      if (m.experts == 0) {
        up.x = x;
        up.norm_weight = norm;
        add_phase("5 gate and up", 2 * m.shared_width * m.hidden * element, up, &cuda::decode_gate_up);
        linear("6 down", {h, DType::kBFloat16, m.shared_width}, nullptr, {}, {{shared_down, x, true}});
        continue;
      }
      linear("4 router", x, norm, normed,
             {{arena_.matrix(m.experts, m.hidden, false), router}, {arena_.matrix(1, m.hidden, false), gate}});
      up.x = normed;
      up.routed = {m.experts,
                   m.top_k,
                   true,
                   static_cast<const float*>(router.data),
                   router.stride,
                   arena_.matrix(2 * m.width, m.hidden, o_.fp8, m.experts),
                   arena_.matrix(m.hidden, m.width, o_.fp8, m.experts)};
      down.routed = up.routed;
      down.shared_down = shared_down;
      down.shared_gate_logit = static_cast<const float*>(gate.data);
      down.shared_gate_stride = gate.stride;
      down.h = h;
      down.y = x;
      up.expert_ids = reinterpret_cast<int32_t*>(arena_.take(rows * m.top_k * 4));
      up.expert_weights = reinterpret_cast<float*>(arena_.take(rows * m.top_k * 4));
      add_phase("5 gate and up", 0, up, &cuda::decode_gate_up);
      add_phase("6 down", 0, down, &cuda::decode_down);
    }
    linear("7 head", x, norm, {}, {{arena_.matrix(m.vocabulary, m.hidden, false), logits}});
    const cuda::DecodeArgmax argmax{rows,          m.vocabulary, static_cast<const float*>(logits.data),
                                    logits.stride, tokens,       argmax_workspace};
    add("8 argmax", rows * m.vocabulary * 4,
        [argmax](const cuda::Launch& launch) { return cuda::decode_argmax(argmax, launch); });
    require(cudaDeviceSynchronize(), "fill");
  }

  Options o_;
  Arena arena_;
  std::vector<Op> ops_;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto next = [&]() -> std::string { return i + 1 < argc ? argv[++i] : ""; };
    if (flag == "--model") {
      const std::string name = next();
      bool found = false;
      for (const Model& m : kModels) {
        if (name != m.name) continue;
        o.model = m;
        found = true;
      }
      if (!found) exit((fprintf(stderr, "unknown model %s\n", name.c_str()), 2));
    } else if (flag == "--dtype") {
      o.fp8 = next() == "fp8";
    } else if (flag == "--rows") {
      o.rows = atoi(next().c_str());
    } else if (flag == "--sequences") {
      o.sequences = atoi(next().c_str());
    } else if (flag == "--context") {
      o.context = atoll(next().c_str());
    } else if (flag == "--kv-fp8") {
      o.kv_fp8 = true;
    } else if (flag == "--quick") {
      o.quick = true;
    } else {
      exit((fprintf(stderr, "unknown flag %s\n", flag.c_str()), 2));
    }
  }
  if (o.sequences < 1 || o.rows % o.sequences != 0) {
    exit((fprintf(stderr, "--rows must be a multiple of --sequences\n"), 2));
  }
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  cudaStream_t stream;
  require(cudaStreamCreate(&stream), "stream");
  double bandwidth = 0;
  {
    Arena scratch(int64_t{8} << 30);
    void* const data = scratch.filled((int64_t{8} << 30) - 4096, Fill::kBf16, 1.0f);
    bandwidth = read_bandwidth(stream, data, (int64_t{8} << 30) - 4096, reinterpret_cast<uint32_t*>(scratch.take(256)));
  }
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, 0), "properties");
  printf("%s, measured read bandwidth %.3f TB/s; %s %s, %lld rows, %lld sequences, context %lld\n", properties.name,
         bandwidth * 1e-12, o.model.name, o.fp8 ? "fp8" : "bf16", static_cast<long long>(o.rows),
         static_cast<long long>(o.sequences), static_cast<long long>(o.context));
  Step step(o);
  const int repeats = o.quick ? 20 : 50;
  for (const Op& op : step.ops()) require(op.launch({stream, true}));
  require(cudaStreamSynchronize(stream), "first step");
  step.count_experts();

  std::vector<const Op*> all;
  std::vector<std::string> kinds;
  int64_t bytes = 0;
  for (const Op& op : step.ops()) {
    all.push_back(&op);
    bytes += op.bytes;
    if (std::find(kinds.begin(), kinds.end(), op.kind) == kinds.end()) kinds.push_back(op.kind);
  }
  const auto share = [&](double us) { return static_cast<double>(bytes) / (us * 1e-6) / bandwidth * 100; };
  const auto report = [&](const char* what, double us) {
    printf("step, %-28s %8.1f us = %6.0f rows/s, %.1f%% of bandwidth\n", what, us,
           static_cast<double>(o.rows) / us * 1e6, share(us));
  };
  printf("step: %.3f GB, floor %.1f us\n", static_cast<double>(bytes) * 1e-9,
         static_cast<double>(bytes) / bandwidth * 1e6);
  const double whole = graph_time_us(stream, all, true, repeats);
  report("one launch per op", whole);
  void* workspace = nullptr;
  require(cudaMalloc(&workspace, cuda::kDecodeLayersWorkspaceBytes), "workspace");
  require(cudaMemset(workspace, 0, cuda::kDecodeLayersWorkspaceBytes), "workspace");
  report("layers", layers_time_us(stream, all, workspace, repeats));
  report("layers, again", layers_time_us(stream, all, workspace, repeats));
#ifdef TOKENSPEED_LAYER_CLOCKS
  static long long clocks[24][8][132];
  cuda::fetch_layer_clocks(&clocks[0][0][0]);
  printf("phase: mean (max) cycles of warp 0 from the phase's start to: staged, streamed, barrier, published; next phase\n");
  for (int p = 0; p < 23; ++p) {
    printf("%2d", p);
    for (int m = 1; m <= 5; ++m) {
      double sum = 0, most = 0;
      int n = 0;
      for (int b = 0; b < 132; ++b) {
        const long long begin = clocks[p][0][b];
        const long long end = m == 5 ? (p < 22 ? clocks[p + 1][0][b] : 0) : clocks[p][m][b];
        if (end < begin || end - begin > 1000000) continue;
        sum += static_cast<double>(end - begin);
        most = std::max(most, static_cast<double>(end - begin));
        ++n;
      }
      printf(" %6.0f (%6.0f)", n ? sum / n : 0.0, most);
    }
    printf("\n");
  }
#endif
  if (o.quick) return 0;
  report("one after the other", graph_time_us(stream, all, false, repeats));
  printf("%-30s %5s %9s %9s %9s %9s %7s %9s\n", "op", "count", "MB each", "floor us", "alone us", "chain us", "chain %",
         "in step");
  for (const std::string& kind : kinds) {
    std::vector<const Op*> some, others;
    int64_t kind_bytes = 0;
    for (const Op& op : step.ops()) {
      (kind == op.kind ? some : others).push_back(&op);
      if (kind == op.kind) kind_bytes += op.bytes;
    }
    const double count = static_cast<double>(some.size());
    // A lone op (the head) is timed as it is: its weights exceed L2.
    const double alone = graph_time_us(stream, some, false, repeats) / count;
    const double chained = graph_time_us(stream, some, true, repeats) / count;
    const double without = others.empty() ? 0 : graph_time_us(stream, others, true, repeats);
    const double each = static_cast<double>(kind_bytes) / count;
    printf("%-30s %5.0f %9.3f %9.2f %9.2f %9.2f %6.1f%% %9.2f\n", kind.c_str(), count, each * 1e-6,
           each / bandwidth * 1e6, alone, chained, each / (chained * 1e-6) / bandwidth * 100,
           (whole - without) / count);
  }
  return 0;
}

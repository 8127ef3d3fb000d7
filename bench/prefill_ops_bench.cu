// Times every op of one step of many tokens at the shapes of qwen3.5-35b-a3b on random weights and adds them up over
// the layers: where the time to the first token goes.
//
//   prefill_ops_bench [--rows T] [--context N] [--sequences S] [--dtype fp8|bf16]
//                     [--kv-cache-dtype fp8|bf16]
//   prefill_ops_bench --mixer T,T,... [--context N] [--sequences S]    the stages of the delta rule's mixer alone
//
// One sequence of T rows after N tokens (or S of them). Medians of event-timed calls; FLOP/s against 790 TFLOP/s (a
// large bfloat16 product of this machine) and the bytes an op must move against 4.6 TB/s.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <sstream>
#include <string>

#include "bench/device_data.cuh"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/gated_delta_net.h"
#include "kernels/cuda/gdn_stages.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mlp.h"
#include "kernels/cuda/norm.h"

namespace {

using namespace tokenspeed;
using namespace tokenspeed::kernels;
using bench::Arena;
using bench::Fill;

constexpr double kPeakFlops = 790e12;
constexpr double kPeakBytes = 4.6e12;
constexpr int64_t kHidden = 2048, kQueryHeads = 16, kKvHeads = 2, kHeadDim = 256, kKeyHeads = 16, kValueHeads = 32,
                  kExperts = 256, kTopK = 8, kWidth = 512;
constexpr int kGdnLayers = 30, kAttentionLayers = 10, kLayers = 40;
constexpr int32_t kPageSize = 64;

struct Options {
  int64_t rows = 8192;
  int64_t context = 0;
  int64_t sequences = 1;
  bool fp8 = true;
  bool kv_fp8 = false;
  std::vector<int64_t> mixer_rows;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--rows") options.rows = atoll(argv[i + 1]);
    if (name == "--context") options.context = atoll(argv[i + 1]);
    if (name == "--sequences") options.sequences = atoll(argv[i + 1]);
    if (name == "--dtype") options.fp8 = strcmp(argv[i + 1], "bf16") != 0;
    if (name == "--kv-cache-dtype") options.kv_fp8 = strcmp(argv[i + 1], "fp8") == 0;
    if (name == "--mixer") {
      std::istringstream list(argv[i + 1]);
      for (std::string rows; std::getline(list, rows, ',');) options.mixer_rows.push_back(atoll(rows.c_str()));
    }
  }
  return options;
}

class Table {
 public:
  void add(const char* name, int layers, double flops, double bytes, double microseconds) {
    const double seconds = microseconds * 1e-6;
    printf("%-34s %3d %10.1f us %8.1f TFLOP/s %5.1f%% %8.2f TB/s %5.1f%% %9.2f ms in all\n", name, layers, microseconds,
           flops / seconds * 1e-12, flops / seconds / kPeakFlops * 100, bytes / seconds * 1e-12,
           bytes / seconds / kPeakBytes * 100, microseconds * layers * 1e-3);
    total_ += microseconds * layers * 1e-3;
  }
  double total() const { return total_; }

 private:
  double total_ = 0;
};

class Bench {
 public:
  Bench(const Options& options, Arena* arena) : o_(options), a_(*arena) {
    const int64_t length = o_.rows / o_.sequences;
    std::vector<int32_t> begin, context, position, sequence, in, out;
    for (int64_t s = 0; s <= o_.sequences; ++s) begin.push_back(static_cast<int32_t>(s * length));
    for (int64_t s = 0; s < o_.sequences; ++s) {
      context.push_back(static_cast<int32_t>(o_.context));
      in.push_back(o_.context ? static_cast<int32_t>(s) : -1);
      out.push_back(static_cast<int32_t>(s));
      for (int64_t i = 0; i < length; ++i) {
        position.push_back(static_cast<int32_t>(o_.context + i));
        sequence.push_back(static_cast<int32_t>(s));
      }
    }
    o_.rows = length * o_.sequences;
    pages_ = (o_.context + length + kPageSize - 1) / kPageSize;
    std::vector<int32_t> table(static_cast<size_t>(pages_ * o_.sequences));
    std::iota(table.begin(), table.end(), 0);
    for (size_t i = table.size() - 1; i > 0; --i) std::swap(table[i], table[(i * 7919 + 13) % (i + 1)]);
    batch_.sequences = static_cast<int32_t>(o_.sequences);
    batch_.tokens = static_cast<int32_t>(o_.rows);
    batch_.token_begin = a_.upload(begin);
    batch_.context = a_.upload(context);
    batch_.position = a_.upload(position);
    batch_.sequence = a_.upload(sequence);
    batch_.page_table = a_.upload(table);
    batch_.page_table_stride = pages_;
    batch_.state_in = a_.upload(in);
    batch_.state_out = a_.upload(out);
  }

  void run() {
    print_case();
    norm();
    gdn();
    attention();
    experts();
    printf("sum over layers (without embedding and head): %.2f ms\n", table_.total());
  }

  void run_mixer() {
    print_case();
    mixer();
  }

 private:
  void print_case() const {
    printf("T=%lld context=%lld sequences=%lld %s\n", static_cast<long long>(o_.rows),
           static_cast<long long>(o_.context), static_cast<long long>(o_.sequences), o_.fp8 ? "fp8" : "bf16");
  }
  double rows() const { return static_cast<double>(o_.rows); }
  static Rows part(Rows rows, int64_t column) {
    rows.data = static_cast<std::byte*>(rows.data) + column * 2;
    return rows;
  }

  void norm() {
    const Rows x = a_.rows(o_.rows, kHidden), add = a_.rows(o_.rows, kHidden), out = a_.rows(o_.rows, kHidden);
    const float* weight = a_.floats(kHidden, 0.1f);
    table_.add("add_rms_norm", 2 * kLayers, 0, rows() * kHidden * 8, bench::time_microseconds([&] {
                 cuda::rms_norm({o_.rows, kHidden, x, add, weight, 1e-6f, out}, nullptr);
               }));
  }

  void linear(const char* name, int layers, int64_t n, int64_t k, bool fp8, DType y_dtype = DType::kBFloat16) {
    Linear args{
        .rows = o_.rows, .x = a_.rows(o_.rows, k), .weight = a_.matrix(n, k, fp8), .y = a_.rows(o_.rows, n, y_dtype)};
    args.workspace = a_.take(cuda::linear_workspace_bytes(o_.rows, k));
    const double bytes = rows() * (k + n) * 2 + static_cast<double>(n) * k * (fp8 ? 1 : 2);
    table_.add(name, layers, 2.0 * rows() * n * k, bytes,
               bench::time_microseconds([&] { bench::require(cuda::linear(args, nullptr)); }));
  }

  void quantize(int64_t columns) {
    const Rows x = a_.rows(o_.rows, columns);
    void* const out = a_.take(o_.rows * columns);
    float* const scale = reinterpret_cast<float*>(a_.take(o_.rows * columns / 32));
    const double time =
        bench::time_microseconds([&] { cuda::quantize_rows(x.data, x.stride, o_.rows, columns, out, scale, nullptr); });
    printf("  (in each FP8 linear of k=%lld: %.1f us of quantising)\n", static_cast<long long>(columns), time);
  }

  void gdn() {
    constexpr int64_t kKeys = kKeyHeads * 128, kValues = kValueHeads * 128;
    linear("gdn in_proj qkv+z", kGdnLayers, 2 * kKeys + 2 * kValues, kHidden, o_.fp8);
    linear("gdn in_proj b+a", kGdnLayers, 2 * kValueHeads, kHidden, false);
    if (o_.fp8) quantize(kHidden);
    mixer();
    linear("gdn out_proj", kGdnLayers, kHidden, kValues, o_.fp8);
    if (o_.fp8) quantize(kValues);
  }

  void mixer() {
    const GdnShape shape{kKeyHeads, kValueHeads, 128, 128, 4};
    const int64_t values = kValueHeads * 128;
    const int64_t recurrent = values * 128 * 4, slot = recurrent + 3 * shape.channels() * 2;
    std::byte* const slots = static_cast<std::byte*>(a_.filled(slot * o_.sequences, Fill::kBf16, 0.1f));
    const GdnState state{slots, slots + recurrent, DType::kBFloat16, slot};
    const Rows qkvz = a_.rows(o_.rows, shape.channels() + values), ba = a_.rows(o_.rows, 2 * kValueHeads);
    const Rows conv = a_.rows(o_.rows, shape.channels()), out = a_.rows(o_.rows, values);
    const float* const taps = a_.floats(shape.channels() * 4, 0.5f);
    const float* const a_log = a_.floats(kValueHeads, 1.0f);
    const float* const dt_bias = a_.floats(kValueHeads, 1.0f);
    const float* const norm = a_.floats(128, 1.0f);
    float* const beta = a_.floats(o_.rows * kValueHeads, 1.0f);
    float* const decay = a_.floats(o_.rows * kValueHeads, 1.0f);
    void* const workspace = a_.take(cuda::gdn_mixer_workspace_bytes(shape, o_.rows));
    const double rule_flops = rows() * kValueHeads * 2 * (64 * 128 * 5 + 3 * 128 * 128);
    const double rule_bytes = rows() * (shape.channels() + values) * 2;
    const auto show = [&](const char* name, double flops, double bytes, double time) {
      printf("  %-32s     %10.1f us %8.1f TFLOP/s %5.1f%% %8.2f TB/s\n", name, time, flops / time * 1e-6,
             flops / time * 1e6 / kPeakFlops * 100, bytes / time * 1e-6);
    };
    show("convolution, l2 norm", 0, rows() * shape.channels() * 4, bench::time_microseconds([&] {
           cuda::causal_conv_normalised({shape, batch_, state, qkvz, taps, conv}, nullptr);
         }));
    cuda::gdn_gates({o_.rows, kValueHeads, ba, part(ba, kValueHeads), a_log, dt_bias, beta, decay}, nullptr);
    const GatedDeltaRule rule{shape, batch_, state, conv, beta, decay, out};
    void* const chunk_space = a_.take(cuda::chunked_rule_workspace_bytes(shape, o_.rows));
    show("delta rule, token by token", rule_flops, rule_bytes,
         bench::time_microseconds([&] { cuda::gated_delta_rule(rule, nullptr); }, 1, 3));
    show("delta rule, by chunks", rule_flops, rule_bytes,
         bench::time_microseconds([&] { cuda::chunked_rule(rule, chunk_space, nullptr); }));
    show("gated norm", 0, rows() * values * 6, bench::time_microseconds([&] {
           cuda::gated_rms_norm({o_.rows, kValueHeads, 128, out, part(qkvz, shape.channels()), norm, 1e-6f, out},
                                nullptr);
         }));
    const GdnMixer mixer{
        shape, batch_, state, qkvz,     part(qkvz, shape.channels()), ba, part(ba, kValueHeads), taps, a_log, dt_bias,
        norm,  1e-6f,  out,   workspace};
    table_.add("gdn_mixer", kGdnLayers, rule_flops, rows() * (shape.channels() + 2 * values) * 2,
               bench::time_microseconds([&] { cuda::gdn_mixer(mixer, nullptr); }));
  }

  void attention() {
    const AttentionShape shape{kQueryHeads, kKvHeads, kHeadDim, 64, 1e7f};
    const int64_t query = kQueryHeads * kHeadDim, kv = kKvHeads * kHeadDim, stride = 2 * query + 2 * kv;
    linear("attention q+k+v_proj", kAttentionLayers, stride, kHidden, o_.fp8);
    const int64_t cache = pages_ * o_.sequences * kPageSize * kv * (o_.kv_fp8 ? 1 : 2);
    const Fill fill = o_.kv_fp8 ? Fill::kFp8 : Fill::kBf16;
    const KvPages pages{a_.filled(cache, fill, 1.0f),
                        a_.filled(cache, fill, 1.0f),
                        o_.kv_fp8 ? DType::kFloat8E4M3 : DType::kBFloat16,
                        kPageSize,
                        kKvHeads,
                        kHeadDim};
    const Rows projected = a_.rows(o_.rows, stride), queries = a_.rows(o_.rows, query), out = a_.rows(o_.rows, query);
    const float* const norm = a_.floats(kHeadDim, 0.1f);
    table_.add("attention_prepare", kAttentionLayers, 0, rows() * (2 * query + 4 * kv) * 2,
               bench::time_microseconds([&] {
                 cuda::attention_prepare({shape, batch_, pages, projected, part(projected, 2 * query),
                                          part(projected, 2 * query + kv), norm, norm, 1e-6f, queries},
                                         nullptr);
               }));
    const double length = rows() / o_.sequences;
    const double pairs = rows() * (o_.context + (length + 1) / 2);
    table_.add("paged_attention", kAttentionLayers, 4 * pairs * query, rows() * query * 6,
               bench::time_microseconds(
                   [&] {
                     cuda::paged_attention(
                         {shape, batch_, pages, queries, part(projected, kHeadDim), 2 * kHeadDim, out}, nullptr);
                   },
                   2, 3));
    linear("attention o_proj", kAttentionLayers, kHidden, query, o_.fp8);
  }

  void experts() {
    linear("router projection", kLayers, kExperts, kHidden, false, DType::kFloat32);
    const float* const logits = a_.floats(o_.rows * kExperts, 2.0f);
    int32_t* const ids = reinterpret_cast<int32_t*>(a_.take(o_.rows * kTopK * 4));
    float* const weights = a_.floats(o_.rows * kTopK, 1.0f);
    table_.add("router", kLayers, 0, rows() * kExperts * 4, bench::time_microseconds([&] {
                 cuda::moe_router({o_.rows, kExperts, kTopK, true, logits, ids, weights}, nullptr);
               }));
    const int64_t element = o_.fp8 ? 1 : 2;
    MoeExperts args{.rows = o_.rows,
                    .experts = kExperts,
                    .top_k = kTopK,
                    .hidden = kHidden,
                    .width = kWidth,
                    .x = a_.rows(o_.rows, kHidden),
                    .gate_up = a_.matrix(2 * kWidth, kHidden, o_.fp8, kExperts),
                    .gate_up_stride = 2 * kWidth * kHidden * element,
                    .down = a_.matrix(kHidden, kWidth, o_.fp8, kExperts),
                    .down_stride = kHidden * kWidth * element,
                    .expert_ids = ids,
                    .expert_weights = weights,
                    .y = a_.rows(o_.rows, kHidden)};
    args.workspace = a_.take(cuda::moe_experts_workspace_bytes(o_.rows, kExperts, kTopK, kHidden, kWidth));
    const double weight_bytes = 3.0 * kWidth * kHidden * kExperts * element;
    table_.add("experts", kLayers, 6.0 * rows() * kTopK * kWidth * kHidden, weight_bytes + rows() * kHidden * 4,
               bench::time_microseconds([&] { cuda::moe_experts(args, nullptr); }));
    linear("shared gate+up", kLayers, 2 * kWidth, kHidden, o_.fp8);
    const Rows gate_up = a_.rows(o_.rows, 2 * kWidth), activation = a_.rows(o_.rows, kWidth);
    table_.add("swiglu", kLayers, 0, rows() * kWidth * 6, bench::time_microseconds([&] {
                 cuda::swiglu({o_.rows, kWidth, gate_up, activation}, nullptr);
               }));
    linear("shared down", kLayers, kHidden, kWidth, o_.fp8);
    const float* const gate = a_.floats(kHidden, 0.05f);
    const Rows shared = a_.rows(o_.rows, kHidden), y = a_.rows(o_.rows, kHidden);
    table_.add("shared_expert_combine", kLayers, 0, rows() * kHidden * 8, bench::time_microseconds([&] {
                 cuda::shared_expert_combine({o_.rows, kHidden, args.x, gate, shared, args.y, {}, y}, nullptr);
               }));
  }

  Options o_;
  Arena& a_;
  SequenceBatch batch_;
  int64_t pages_ = 0;
  Table table_;
};

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  Arena arena(int64_t{24} << 30);
  if (options.mixer_rows.empty()) Bench(options, &arena).run();
  for (const int64_t rows : options.mixer_rows) {
    Options alone = options;
    alone.rows = rows;
    arena.reset();
    Bench(alone, &arena).run_mixer();
  }
  return 0;
}

// The official sizes compiled: parameters, bytes, FLOPs, memory and FP8 coverage of the model document.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "compile/cost.h"
#include "model/compiled_presets.h"

namespace tokenspeed::model {
namespace {

// Bytes in the checkpoint's precision: vectors and FP8 scales are bfloat16 there and float32 in a Program.
int64_t checkpoint_bytes(const ProgramWeight& weight) {
  if (weight.form == WeightForm::kVector) return weight.bytes() / 2;
  const int64_t elements = weight.rows * weight.columns * weight.count;
  return weight.dtype == kFp8 ? elements + (weight.bytes() - elements) / 2 : weight.bytes();
}

struct Bytes {
  double memory = 0;     // GB of all weights
  double per_token = 0;  // GB read for one token, the embedding's row apart
};

Bytes bytes_of(const Program& program) {
  Bytes bytes;
  for (const ProgramWeight& weight : program.weights) {
    const double gigabytes = static_cast<double>(checkpoint_bytes(weight)) / 1e9;
    bytes.memory += gigabytes;
    if (weight.form == WeightForm::kTable) continue;
    double share = 1;
    for (const Operation& operation : program.operations) {
      if (operation.kind != OpKind::kExperts || weight.form != WeightForm::kExperts) continue;
      share = static_cast<double>(operation.attributes.top_k) / static_cast<double>(operation.attributes.experts);
    }
    bytes.per_token += gigabytes * share;
  }
  return bytes;
}

int64_t parameters(const Program& program) {
  int64_t count = 0;
  for (const ProgramWeight& weight : program.weights) count += weight.rows * weight.columns * weight.count;
  return count;
}

struct SizeRow {
  const char* name;
  double text_billion, mtp_billion, bf16_gb, fp8_gb, gflop;
  int64_t attention_flop, kv_bytes;
  double ssm_mib, conv_mib, recurrence_gflop;
  int64_t mtp_kv_bytes;
};

// Both tables of section 8 of the model document.
constexpr SizeRow kSizes[] = {
    {"qwen3.5-0.8b", 0.7524, 0.0205, 1.50, 1.01, 1.50, 49152, 12288, 18, 0.63, 0.033, 2048},
    {"qwen3.5-2b", 1.8818, 0.0608, 3.76, 2.39, 3.76, 49152, 12288, 18, 0.63, 0.033, 2048},
    {"qwen3.5-4b", 4.2058, 0.1206, 8.41, 4.85, 8.41, 131072, 32768, 48, 1.12, 0.088, 4096},
    {"qwen3.5-9b", 8.9538, 0.2433, 15.87, 8.96, 15.87, 131072, 32768, 48, 1.12, 0.088, 4096},
    {"qwen3.5-27b", 26.8960, 0.4247, 51.25, 26.93, 51.25, 393216, 65536, 144, 2.81, 0.264, 4096},
    {"qwen3.5-35b-a3b", 34.6606, 0.8446, 5.89, 3.48, 5.89, 163840, 20480, 60, 1.41, 0.110, 2048},
    {"qwen3.5-122b-a10b", 122.1115, 2.5237, 18.02, 9.83, 18.02, 393216, 24576, 144, 2.53, 0.264, 2048},
    {"qwen3.5-397b-a17b", 396.3464, 6.5956, 32.66, 17.50, 32.66, 491520, 30720, 180, 3.16, 0.330, 2048},
};
constexpr double kRounding2 = 0.0051;    // the document's columns are rounded to two decimals,
constexpr double kRounding3 = 0.00051;   // three
constexpr double kRounding4 = 0.000051;  // or four

// Of the kinds given, or of all.
double flops_of(const Program& program, const Cost& cost, const std::set<OpKind>& of) {
  double flops = 0;
  for (size_t i = 0; i < program.operations.size(); ++i) {
    if (of.contains(program.operations[i].kind)) flops += cost.operations[i].flops;
  }
  return flops;
}

TEST(ProgramSizes, HaveTheSizesAndCostsOfTheModelDocument) {
  const DeviceSpec device = *find_device("h100");
  for (const SizeRow& row : kSizes) {
    SCOPED_TRACE(row.name);
    const ModelGraph graph = graph_of(preset(row.name));
    const Program program = compiled(graph.body, without({"fuse_gdn_mixer"}));
    EXPECT_NEAR(static_cast<double>(parameters(program)) / 1e9, row.text_billion, kRounding4);
    EXPECT_NEAR(bytes_of(program).per_token, row.bf16_gb, kRounding2);
    EXPECT_NEAR(bytes_of(compiled(graph.body, without({}, kFp8))).per_token, row.fp8_gb, kRounding2);

    const Cost cost = *estimate_cost(program, device);
    const Cost later = *estimate_cost(program, device, {.context = 1000});
    const double matrices = flops_of(program, cost, {OpKind::kLinear, OpKind::kExperts, OpKind::kSharedExpertCombine});
    // The document counts two for every active parameter, those of norms, taps and gates too.
    double others = 0;
    for (const ProgramWeight& weight : program.weights) {
      const bool multiplied = weight.form != WeightForm::kVector || weight.name.ends_with("shared_expert_gate.weight");
      if (!multiplied) others += static_cast<double>(weight.rows * weight.columns);
    }
    EXPECT_NEAR((matrices + 2 * others) / 1e9, row.gflop, kRounding2);
    EXPECT_NEAR(flops_of(program, cost, {OpKind::kGatedDeltaRule}) / 1e9, row.recurrence_gflop, kRounding3);
    EXPECT_EQ(later.total.flops - cost.total.flops, 1000.0 * static_cast<double>(row.attention_flop));
    EXPECT_EQ(later.total.cache_bytes - cost.total.cache_bytes, 1000 * row.kv_bytes);

    const auto last = static_cast<int32_t>(program.kv.layers.size()) - 1;
    EXPECT_EQ(program.kv.bytes_per_position(last), row.mtp_kv_bytes);
    EXPECT_EQ(program.kv.bytes_per_position() - row.mtp_kv_bytes, row.kv_bytes);
    double ssm = 0;
    double conv = 0;
    for (const StateLayout::Layer& layer : program.state.layers) {
      ssm += static_cast<double>(layer.shape.value_heads * layer.shape.value_dim * layer.shape.key_dim * 4);
      conv += static_cast<double>(layer.shape.conv_rows * layer.shape.channels * 2);
    }
    EXPECT_NEAR(ssm / (1 << 20), row.ssm_mib, kRounding2);
    EXPECT_NEAR(conv / (1 << 20), row.conv_mib, kRounding2);
    EXPECT_EQ(static_cast<double>(program.state.bytes_per_slot), ssm + conv) << "no layer needs padding";

    // The head and the embedding are the body's.
    const Program mtp = compiled(graph.mtp);
    const Program* const both[] = {&program, &mtp};
    int64_t shared = 0;
    for (const ProgramWeight& weight : mtp.weights) {
      const bool known = std::any_of(program.weights.begin(), program.weights.end(),
                                     [&](const ProgramWeight& other) { return other.name == weight.name; });
      if (known) shared += weight.rows * weight.columns;
    }
    EXPECT_NEAR(static_cast<double>(parameters(mtp) - shared) / 1e9, row.mtp_billion, kRounding4);
    EXPECT_LT(weight_memory(both), weight_memory({both, 1}) + weight_memory({both + 1, 1}));
  }
}

// Section 8.1.
TEST(ProgramSizes, The397BRankOfEight) {
  const ModelGraph graph = graph_of(preset("qwen3.5-397b-a17b"), 8);
  const Program bf16 = compiled(graph.body);
  const Program fp8 = compiled(graph.body, without({}, kFp8));
  EXPECT_NEAR(bytes_of(bf16).memory, 99.36, kRounding2);
  EXPECT_NEAR(bytes_of(fp8).memory, 50.07, kRounding2);
  EXPECT_NEAR(bytes_of(bf16).per_token, 4.35, kRounding2);
  EXPECT_NEAR(bytes_of(fp8).per_token, 2.43, kRounding2);
  EXPECT_NEAR(static_cast<double>(parameters(bf16)) / 1e9, 49.678, kRounding2);

  const Cost cost = *estimate_cost(fp8, *find_device("h100"));
  EXPECT_NEAR(static_cast<double>(cost.total.weight_bytes) / 1e9, 2.43, 0.01) << "norms and taps are float32 here";
  EXPECT_NEAR(static_cast<double>(cost.memory.weights) / 1e9, 50.07, 0.02);
  EXPECT_TRUE(cost.memory.fits);
  EXPECT_EQ(fp8.kv.bytes_per_position() - fp8.kv.bytes_per_position(static_cast<int32_t>(fp8.kv.layers.size()) - 1),
            15360);
  const StateShape& state = fp8.state.layers[0].shape;
  EXPECT_EQ(state.value_heads, 8);
  EXPECT_EQ(45 * state.value_heads * state.value_dim * state.key_dim * 4, 45 << 19) << "22.5 MiB";
  EXPECT_EQ(45 * state.conv_rows * state.channels * 2, 405 << 10);

  const Cost whole =
      *estimate_cost(compiled(graph_of(preset("qwen3.5-397b-a17b")).body, without({}, kFp8)), *find_device("h100"));
  EXPECT_FALSE(whole.memory.fits);

  const Program mtp_bf16 = compiled(graph.mtp);
  const Program mtp_fp8 = compiled(graph.mtp, without({}, kFp8));
  const double vocabulary = 2 * 31040.0 * 4096 * 2 / 1e9;  // embedding and head are counted with the body
  EXPECT_NEAR(bytes_of(mtp_bf16).memory - vocabulary, 1.71, kRounding2);
  EXPECT_NEAR(bytes_of(mtp_fp8).memory - vocabulary, 0.89, kRounding2);
}

// Section 1.4: what the official FP8 releases leave in bfloat16.
TEST(ProgramSizes, Fp8ExactlyWhereTheReleasesHaveIt) {
  for (const char* name : {"qwen3.5-27b", "qwen3.5-397b-a17b"}) {
    const ModelGraph graph = graph_of(preset(name));
    for (const Graph* part : {&graph.body, &graph.mtp}) {
      const Program program = compiled(*part, without({}, kFp8));
      for (const ProgramWeight& weight : program.weights) {
        for (const WeightPiece& piece : weight.pieces) {
          const auto is = [&](const std::string& suffix) { return piece.tensor.ends_with(suffix); };
          const bool kept = is("lm_head.weight") || is("embed_tokens.weight") || is("in_proj_a.weight") ||
                            is("in_proj_b.weight") || is("mlp.gate.weight") || is("mtp.fc.weight");
          const DType expected = weight.form == WeightForm::kVector ? DType::kFloat32 : kept ? kBf16 : kFp8;
          EXPECT_EQ(weight.dtype, expected) << weight.name << ": " << piece.tensor;
          const bool small = is("norm.weight") || is("conv1d.weight") || is("A_log") || is("dt_bias") ||
                             is("shared_expert_gate.weight");
          const bool norm = is("layernorm.weight") || is("norm_embedding.weight") || is("norm_hidden.weight");
          EXPECT_EQ(weight.form == WeightForm::kVector, small || norm) << piece.tensor;
        }
      }
    }
  }
}

TEST(ProgramSizes, Fp8BlocksAreNeverCut) {
  // 512 / 8 = 64 expert rows a rank: half a block.
  const Program program = compiled(graph_of(preset("qwen3.5-35b-a3b"), 8).body, without({}, kFp8));
  int experts = 0;
  int fp8 = 0;
  for (const ProgramWeight& weight : program.weights) {
    if (weight.dtype == kFp8) ++fp8;
    if (weight.form == WeightForm::kExperts) {
      ++experts;
      EXPECT_EQ(weight.dtype, kBf16) << weight.name;
    }
  }
  EXPECT_EQ(experts, 80);
  EXPECT_GT(fp8, 0);
}

}  // namespace
}  // namespace tokenspeed::model

#include "compile/cost.h"

#include <gtest/gtest.h>

#include <string>

#include "compile/print.h"

namespace tokenspeed::compile {
namespace {

// A device with round numbers: a byte takes 1 us, a FLOP a tenth of that, an operation 100 us besides.
DeviceSpec simple_device() {
  return {.name = "simple",
          .memory_bytes = 1'000'000,
          .read_bandwidth = 1e6,
          .bf16_flops = 1e7,
          .fp8_flops = 2e7,
          .operation_seconds = 100e-6,
          .collective_seconds = 500e-6,
          .collective_bandwidth = 2e6};
}

constexpr double kTight = 1e-12;
constexpr int64_t kNoPhases = 65;  // tokens of a step that runs operation by operation

// embedding -> x; two matrices [16, 16] of x, the second on `side_stream`; their sum -> norm -> rows -> logits.
Graph small_graph(int32_t side_stream, int32_t ranks) {
  Graph graph;
  graph.name = "small";
  graph.mesh.sizes[0] = ranks;
  const auto value = [&](const char* name, RowSymbol rows = RowSymbol::kTokens, Placements placements = {}) {
    return graph.add_value({.name = name, .rows = rows, .columns = 16, .placements = placements});
  };
  const auto matrix = [&](const char* name) {
    return graph.add_weight({.name = name, .parts = {{name, 16, 0, 16, 1}}, .columns = 16});
  };
  const auto add = [&](OpKind kind, const char* name, std::vector<ValueId> in, ValueId out,
                       std::vector<WeightId> weights, int32_t stream = 0) {
    Node node{
        .kind = kind, .name = name, .layer = 0, .stream = stream, .inputs = in, .outputs = {out}, .weights = weights};
    node.required.resize(in.size());
    graph.nodes.push_back(node);
  };
  const ValueId x = value("x", RowSymbol::kTokens, on_tensor_axis(ranks > 1 ? partial() : replicate()));
  const ValueId a = value("a");
  const ValueId b = value("b");
  const ValueId sum = value("sum");
  graph.hidden = value("hidden");
  const ValueId wanted = value("wanted", RowSymbol::kLogitRows);
  graph.logits = value("logits", RowSymbol::kLogitRows);
  add(OpKind::kEmbedding, "embedding", {}, x, {matrix("table")});
  add(OpKind::kLinear, "a", {x}, a, {matrix("a")});
  add(OpKind::kLinear, "b", {x}, b, {matrix("b")}, side_stream);
  add(OpKind::kAdd, "add", {a, b}, sum, {});
  const WeightId norm =
      graph.add_weight({.name = "norm", .form = WeightForm::kVector, .parts = {{"norm", 16, 0, 16, 1}}, .columns = 1});
  add(OpKind::kRmsNorm, "norm", {sum}, graph.hidden, {norm});
  add(OpKind::kGatherRows, "gather", {graph.hidden}, wanted, {});
  add(OpKind::kLinear, "head", {wanted}, graph.logits, {matrix("head")});
  return graph;
}

CompileOptions plain_options(int64_t tokens) {
  CompileOptions options;
  options.tokens = tokens;
  options.passes.disabled = {"fuse_all_reduce_residual_norm", "fuse_norm_into_projection", "merge_projections"};
  return options;
}

Program small_program(int32_t side_stream, int64_t tokens, int32_t ranks = 1) {
  Result<Program> program = compile_program(small_graph(side_stream, ranks), plain_options(tokens));
  EXPECT_TRUE(program.ok()) << program.status().message();
  return std::move(program).value();
}

TEST(Cost, AnOperationTakesItsBytesOrItsFlopsAndTheOverhead) {
  const DeviceSpec device = simple_device();
  Program program = small_program(0, 1);
  Result<Cost> cost = estimate_cost(program, device);
  ASSERT_TRUE(cost.ok());
  const OperationCost& a = cost->operations[1];
  EXPECT_EQ(a.weight_bytes, 16 * 16 * 2);
  EXPECT_EQ(a.activation_bytes, 2 * 16 * 2);
  EXPECT_EQ(a.flops, 2 * 16 * 16);
  EXPECT_NEAR(a.seconds, (512 + 64) * 1e-6 + 100e-6, kTight) << "bound by bytes";
  EXPECT_EQ(cost->operations[0].weight_bytes, 16 * 2) << "one row of the table";

  program = small_program(0, kNoPhases);
  DeviceSpec slow = device;
  slow.bf16_flops = 1e6;
  cost = estimate_cost(program, slow, {.sequences = kNoPhases});
  EXPECT_NEAR(cost->operations[1].seconds, kNoPhases * 512 * 1e-6 + 100e-6, kTight) << "bound by FLOPs";
}

TEST(Cost, StreamsHideOverheadButShareTheBandwidth) {
  const DeviceSpec device = simple_device();
  const Result<Cost> one = estimate_cost(small_program(0, kNoPhases), device);
  const Result<Cost> two = estimate_cost(small_program(1, kNoPhases), device);
  ASSERT_TRUE(one.ok() && two.ok());
  EXPECT_EQ(one->total.bytes(), two->total.bytes());
  double sum = 0;
  for (const OperationCost& operation : one->operations) sum += operation.seconds;
  EXPECT_NEAR(one->total.seconds, sum, kTight);
  // Both matrices' bytes queue for the memory; only the second's overhead disappears.
  EXPECT_NEAR(one->total.seconds - two->total.seconds, 100e-6, kTight);
  EXPECT_NEAR(two->roofline_seconds, static_cast<double>(two->total.bytes()) * 1e-6, kTight);
}

TEST(Cost, APhasePaysItsFixedTimeOnce) {
  const DeviceSpec device = simple_device();
  const Program program = small_program(0, 1);
  const Result<Cost> cost = estimate_cost(program, device);
  ASSERT_TRUE(cost.ok());
  double sum = 0;
  for (const OperationCost& operation : cost->operations) sum += operation.seconds;
  EXPECT_NEAR(cost->total.seconds, sum, kTight);
  // Embedding; a and b; the head with sum, norm and the choice of rows before it.
  EXPECT_EQ(cost->total.phases, 3);
  EXPECT_EQ(cost->operations[1].phases + cost->operations[2].phases, 1) << "both matrices are one phase";
  EXPECT_EQ(cost->operations.back().phases, 1);
  EXPECT_NEAR(cost->phase_floor_seconds, cost->roofline_seconds + 3 * 100e-6, kTight);
}

TEST(Cost, CalibrationSlowsItsFamilyInItsRegime) {
  DeviceSpec device = simple_device();
  const auto rates = [&](TokenRegime regime) -> FamilyRate& {
    return device.calibration.rates[static_cast<size_t>(regime)][static_cast<size_t>(OpFamily::kProjection)];
  };
  rates(TokenRegime::kFew) = {.fixed_seconds = 5e-6, .token_seconds = 2e-6, .bandwidth_share = 0.5, .flops_share = 0.1};
  rates(TokenRegime::kMany) = {.fixed_seconds = 0, .bandwidth_share = 1, .flops_share = 0.01};
  device.calibration.step_seconds[static_cast<size_t>(TokenRegime::kFew)] = 3e-3;
  const Result<Cost> few = estimate_cost(small_program(0, 1), device);
  const Result<Cost> plain = estimate_cost(small_program(0, 1), simple_device());
  ASSERT_TRUE(few.ok() && plain.ok());
  EXPECT_NEAR(few->operations[1].seconds, 2 * (512 + 64) * 1e-6 + 107e-6, kTight);
  EXPECT_NEAR(few->operations[0].seconds, plain->operations[0].seconds, kTight) << "another family";
  EXPECT_EQ(few->roofline_seconds, plain->roofline_seconds);
  EXPECT_EQ(few->phase_floor_seconds, plain->phase_floor_seconds);
  double sum = 0;
  for (const OperationCost& operation : few->operations) sum += operation.seconds;
  EXPECT_NEAR(few->total.seconds, sum + 3e-3, kTight);

  const Result<Cost> many = estimate_cost(small_program(0, kNoPhases), device);
  ASSERT_TRUE(many.ok());
  EXPECT_NEAR(many->operations[1].seconds, kNoPhases * 512 / 1e7 / 0.01 + 100e-6, kTight) << "bound by FLOPs";
}

TEST(Cost, APromptIsTheSumOfItsSteps) {
  const DeviceSpec device = simple_device();
  const Graph graph = small_graph(0, 1);
  const auto step = [&](int64_t tokens, bool head) {
    const Result<Cost> cost = estimate_cost(small_program(0, tokens), device);
    return cost->total.seconds - (head ? 0 : cost->operations[6].seconds + cost->operations[5].seconds);
  };
  ASSERT_EQ(small_program(0, 1).head_begin, 5);
  const Result<double> seconds = estimate_prompt_seconds(graph, plain_options(1), device, 50, 20);
  ASSERT_TRUE(seconds.ok());
  EXPECT_NEAR(*seconds, 2 * step(20, false) + step(10, true), kTight);
  EXPECT_FALSE(estimate_prompt_seconds(graph, plain_options(1), device, 0, 20).ok());
  EXPECT_FALSE(estimate_prompt_seconds(graph, plain_options(1), device, 5, 0).ok());
}

TEST(Cost, CollectivesPayLatencyAndLinks) {
  const Result<Cost> cost = estimate_cost(small_program(0, 1, 4), simple_device());
  ASSERT_TRUE(cost.ok());
  const OperationCost& reduce = cost->operations[1];
  EXPECT_EQ(reduce.link_bytes, 2 * 3 * 32 / 4);
  EXPECT_NEAR(reduce.seconds, 64 * 1e-6 + 500e-6 + 48 / 2e6, kTight);
  EXPECT_EQ(cost->total.link_bytes, reduce.link_bytes);
}

TEST(Cost, TheHeadRunsOncePerGroupOfRows) {
  const Result<Cost> cost = estimate_cost(small_program(0, 8), simple_device(), {.sequences = 8});
  ASSERT_TRUE(cost.ok());
  EXPECT_EQ(cost->operations.back().weight_bytes, 8 * 512) << "logit_rows is 1";
  EXPECT_EQ(cost->operations[1].weight_bytes, 512);
}

TEST(Cost, SaysWhetherItFits) {
  const Program program = small_program(0, 1);
  DeviceSpec device = simple_device();
  Result<Cost> cost = estimate_cost(program, device);
  ASSERT_TRUE(cost.ok());
  EXPECT_TRUE(cost->memory.fits);
  EXPECT_EQ(cost->memory.weights, 4 * 512 + 16 * 4);
  EXPECT_EQ(cost->memory.arena, program.arena_bytes);
  device.memory_bytes = cost->memory.weights;
  cost = estimate_cost(program, device);
  EXPECT_FALSE(cost->memory.fits);
  EXPECT_EQ(cost->memory.kv_tokens, 0);
  EXPECT_NE(print_plan(program, device, *cost).find("NO"), std::string::npos);
}

TEST(Cost, PricesAMillionTokens) {
  const Result<Cost> cost = estimate_cost(small_program(0, 1, 4), simple_device(), {.price_per_hour = 3.6});
  ASSERT_TRUE(cost.ok());
  // 4 devices at 0.001 a second each.
  EXPECT_NEAR(cost->price_per_million_tokens(), 4 * 0.001 * cost->total.seconds * 1e6, 1e-9);
}

TEST(Cost, RefusesImpossibleWorkloads) {
  const Program program = small_program(0, 4);
  const DeviceSpec device = simple_device();
  const auto code = [&](const Workload& workload) { return estimate_cost(program, device, workload).status().code(); };
  EXPECT_EQ(code({.sequences = 0}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.sequences = 5}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.sequences = 4}), StatusCode::kOk);
  EXPECT_EQ(code({.context = -1}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.price_per_hour = -1}), StatusCode::kInvalidArgument);
}

// The model document's table for 397B: experts a layer must read, rounded there to one decimal.
TEST(Cost, ExpectedDistinctExperts) {
  const std::vector<std::pair<int64_t, double>> table = {{1, 10},     {2, 19.8},   {4, 38.8},  {8, 74.7},   {16, 138.6},
                                                         {32, 239.6}, {64, 367.1}, {128, 471}, {256, 508.7}};
  for (const auto& [tokens, experts] : table)
    EXPECT_NEAR(expected_distinct_experts(512, 10, tokens), experts, 0.051) << tokens;
}

TEST(Device, GpusAreFoundByTheirDriversNames) {
  EXPECT_EQ(find_gpu("NVIDIA H200")->name, "h200");
  EXPECT_EQ(find_gpu("NVIDIA H100 80GB HBM3")->name, "h100");
  EXPECT_EQ(find_gpu("NVIDIA GeForce RTX 4090")->name, "rtx4090");
  EXPECT_EQ(find_gpu("NVIDIA T4").status().code(), StatusCode::kNotFound);
}

TEST(Device, CalibratedRatesArePossible) {
  for (const std::string& name : device_names()) {
    const Calibration calibration = find_device(name)->calibration;
    for (const auto& regime : calibration.rates) {
      for (const FamilyRate& rate : regime) {
        EXPECT_GE(rate.fixed_seconds, 0) << name;
        EXPECT_GE(rate.token_seconds, 0) << name;
        for (const double share : {rate.bandwidth_share, rate.flops_share}) {
          EXPECT_GT(share, 0) << name;
          EXPECT_LE(share, 1) << name;
        }
      }
    }
    for (const double seconds : calibration.step_seconds) EXPECT_GE(seconds, 0) << name;
  }
}

TEST(Device, PresetsAreKnownByName) {
  for (const std::string& name : device_names()) {
    const Result<DeviceSpec> device = find_device(name);
    ASSERT_TRUE(device.ok()) << name;
    EXPECT_EQ(device->name, name);
    EXPECT_GT(device->memory_bytes, int64_t{1} << 30) << name;
    EXPECT_GT(device->read_bandwidth, 1e10) << name;
    EXPECT_GE(device->fp8_flops, device->bf16_flops) << name;
    EXPECT_GT(device->operation_seconds, 0) << name;
    EXPECT_GT(device->collective_seconds, 0) << name;
    EXPECT_GT(device->collective_bandwidth, 0) << name;
  }
  EXPECT_NEAR(find_device("h100")->read_bandwidth, 3.1e12, 1e6) << "as measured";
  const Result<DeviceSpec> unknown = find_device("h900");
  EXPECT_EQ(unknown.status().code(), StatusCode::kNotFound);
  EXPECT_NE(unknown.status().message().find("h100"), std::string::npos) << unknown.status().message();
}

}  // namespace
}  // namespace tokenspeed::compile

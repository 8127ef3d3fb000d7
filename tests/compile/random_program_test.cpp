// Random graphs with in-place operations, views and side streams: no two values alive together share memory.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <string>

#include "compile/program_check.h"

namespace tokenspeed::compile {
namespace {

class RandomGraph {
 public:
  Graph build() {
    graph_.name = "random";
    graph_.hidden_size = kColumns;
    graph_.vocabulary_size = kColumns;
    std::vector<ValueId> pool = {value()};
    graph_.nodes.push_back(
        {.kind = OpKind::kEmbedding, .name = "embedding", .outputs = {pool[0]}, .weights = {matrix()}});
    for (int32_t steps = *rc::gen::inRange(1, 12); steps > 0; --steps) {
      if (*rc::gen::inRange(0, 3) == 0) {
        fork(&pool);
      } else {
        grow(&pool, pool.size(), 0);
      }
    }
    graph_.hidden = value();
    add(OpKind::kRmsNorm, {pool.back()}, {graph_.hidden}, 0);
    // The head runs again for every group of rows: what it reads of the body must outlive its own values.
    graph_.logits = value(RowSymbol::kLogitRows);
    add(OpKind::kGatherRows, {(*rc::gen::elementOf(pool))}, {graph_.logits}, 0);
    for (int32_t i = 0; i < 3; ++i) {
      const ValueId next = value(RowSymbol::kLogitRows);
      add(OpKind::kLinear, {graph_.logits}, {next}, 0);
      graph_.logits = next;
    }
    return std::move(graph_);
  }

 private:
  static constexpr int64_t kColumns = 48;

  ValueId value(RowSymbol rows = RowSymbol::kTokens, int64_t columns = kColumns) {
    return graph_.add_value(
        {.name = "value " + std::to_string(graph_.values.size()), .rows = rows, .columns = columns});
  }
  WeightId matrix() {
    const std::string name = "weight " + std::to_string(graph_.weights.size());
    return graph_.add_weight({.name = name, .parts = {{name, kColumns, 0, kColumns, 1}}, .columns = kColumns});
  }
  void add(OpKind kind, std::vector<ValueId> inputs, std::vector<ValueId> outputs, int32_t stream) {
    Node node{.kind = kind, .name = std::string(op_kind_name(kind)), .stream = stream};
    node.required.resize(inputs.size());
    node.inputs = std::move(inputs);
    node.outputs = std::move(outputs);
    if (kind == OpKind::kLinear) node.weights = {matrix()};
    graph_.nodes.push_back(std::move(node));
  }

  // One more node on `stream`, reading any of the pool; only its entries from `own` on may be overwritten.
  void grow(std::vector<ValueId>* pool, size_t own, int32_t stream) {
    const size_t at = *rc::gen::inRange<size_t>(0, pool->size());
    const ValueId x = (*pool)[at];
    switch (*rc::gen::inRange(0, 4)) {
      case 0: {
        pool->push_back(value());
        add(OpKind::kLinear, {x}, {pool->back()}, stream);
        return;
      }
      case 1: {
        const ValueId other = (*pool)[*rc::gen::inRange<size_t>(0, pool->size())];
        pool->push_back(value());
        add(OpKind::kAdd, {x, other}, {pool->back()}, stream);
        return;
      }
      case 2: {  // two views of one wider row, each written and read by itself
        const ValueId wide = value(RowSymbol::kTokens, 2 * kColumns);
        add(OpKind::kLinear, {x}, {wide}, stream);
        for (int64_t half = 0; half < 2; ++half) {
          pool->push_back(value());
          graph_.values[pool->back()].parent = wide;
          graph_.values[pool->back()].column_offset = half * kColumns;
        }
        return;
      }
      default: {
        if (at < own) return;
        (*pool)[at] = value();
        graph_.values[(*pool)[at]].parent = x;
        add(OpKind::kHeadRmsNorm, {x}, {(*pool)[at]}, stream);
        return;
      }
    }
  }

  // Some nodes on stream 1 beside some on stream 0, then a node that reads both.
  void fork(std::vector<ValueId>* pool) {
    std::vector<ValueId> side = *pool;
    const size_t shared = pool->size();
    for (int32_t i = *rc::gen::inRange(1, 5); i > 0; --i) {
      if (*rc::gen::inRange(0, 2) == 0) grow(pool, shared, 0);
      grow(&side, shared, 1);
    }
    for (size_t i = shared; i < side.size(); ++i) {
      const ValueId joined = value();
      add(OpKind::kAdd, {pool->back(), side[i]}, {joined}, 0);
      pool->push_back(joined);
    }
  }

  Graph graph_;
};

TEST(RandomProgram, NothingAliveIsOverwritten) {
  bool shared = false;
  EXPECT_TRUE(rc::check([&] {
    const Graph graph = RandomGraph().build();
    for (int64_t tokens : {1, 8, 100}) {
      CompileOptions options;
      options.tokens = tokens;
      options.logit_rows = 2;
      const Result<Program> program = compile_program(graph, options);
      RC_ASSERT(program.ok());
      ProgramCheck check(*program);
      RC_ASSERT(check.run() == "");
      shared = shared || check.shares_memory();

      options.passes.disabled = {"plan_memory"};
      const Result<Program> spread = compile_program(graph, options);
      RC_ASSERT(spread.ok());
      RC_ASSERT(spread->arena_bytes >= program->arena_bytes);
      ProgramCheck alone(*spread);
      RC_ASSERT(alone.run() == "");
      RC_ASSERT(!alone.shares_memory());
    }
  }));
  EXPECT_TRUE(shared) << "the plan never reused memory: the test saw nothing";
}

TEST(CompileProgram, RefusesBadOptions) {
  Graph graph;
  graph.mesh.sizes[0] = 2;
  const auto message = [&](const CompileOptions& options) {
    const Result<Program> program = compile_program(graph, options);
    EXPECT_EQ(program.status().code(), StatusCode::kInvalidArgument);
    return program.status().message();
  };
  CompileOptions options;
  options.rank = 2;
  EXPECT_NE(message(options).find("rank 2"), std::string::npos);
  options.rank = 0;
  options.tokens = 0;
  EXPECT_NE(message(options).find("at least 1 token"), std::string::npos);
  options.tokens = 1;
  options.passes.disabled = {"fuse_everything"};
  EXPECT_NE(message(options).find("'fuse_everything'"), std::string::npos);
  EXPECT_NE(message(options).find("merge_projections"), std::string::npos) << "names the passes there are";
}

}  // namespace
}  // namespace tokenspeed::compile

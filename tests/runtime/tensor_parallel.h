// A Runner of several tensor-parallel ranks in one process, for comparison: every rank's Program in lockstep, the
// collectives computed here in the order of the ranks.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/norm.h"
#include "runtime/cpu_runner.h"
#include "test_model.h"

namespace tokenspeed::runtime {

class TensorParallelRunner : public Runner {
 public:
  TensorParallelRunner(const TestModel& model, int32_t ranks, const CpuRunnerOptions& options)
      : pool_(options.threads), capacity_(capacity_of(model, options)), batch_(capacity_) {
    const compile::ModelGraph graph = must(model::build_graph(model.config, {.tensor_parallel = ranks}));
    for (int32_t r = 0; r < ranks; ++r) {
      compile::CompileOptions compiled;
      compiled.rank = r;
      compiled.activation = options.activation;
      compiled.weights = options.weights;
      compiled.kv = options.kv;
      compiled.tokens = options.max_step_tokens;
      compiled.logit_rows = options.max_step_tokens;
      compiled.passes = options.passes;
      ranks_.push_back(
          std::make_unique<Rank>(must(compile::compile_program(graph.body, compiled)), model, capacity_, &pool_));
    }
  }

  const Capacity& capacity() const override { return capacity_; }

  Status submit(std::span<const SequenceStep> sequences) override {
    TS_RETURN_IF_ERROR(batch_.assign(sequences));
    results_.assign(sequences.size(), {});
    list_wanted_rows(sequences, &wanted_);
    std::vector<int32_t> rows;
    for (const WantedRow& row : wanted_) rows.push_back(batch_.first_row(row.sequence) + row.index);
    const CpuStep step{&batch_.batch(), batch_.token_ids(), rows.data(), static_cast<int32_t>(rows.size())};
    for (size_t i = 0; i < ranks_[0]->bound.program().operations.size(); ++i) run(step, i);
    const Rank& first = *ranks_[0];
    for (size_t i = 0; i < wanted_.size(); ++i) {
      const kernels::Rows logits = first.bound.rows(first.at, first.bound.program().logits, static_cast<int64_t>(i));
      finish_row(wanted_[i], sequences[wanted_[i].sequence], static_cast<const float*>(logits.data),
                 capacity_.vocabulary_size, &results_[wanted_[i].sequence]);
    }
    return {};
  }
  Status wait(std::vector<SequenceResult>* results) override {
    results->swap(results_);
    return {};
  }

 private:
  struct Rank {
    Rank(compile::Program program, const TestModel& model, const Capacity& capacity, ThreadPool* pool) {
      const compile::Program* one = &program;
      weights = must(CpuWeights::load({&one, 1}, *model.source, kernels::MatrixLayout::kPanel16, pool));
      bound = CpuProgram(std::move(program), weights);
      const compile::Program& held = bound.program();
      caches = must(CpuCaches::allocate(held.kv, held.state, capacity.pages, capacity.page_size, capacity.state_slots));
      arena = must(HostMemory::allocate(held.arena_bytes, "activations"));
      workspace = must(HostMemory::allocate(bound.workspace_bytes(), "the kernels' workspace"));
      at = {arena.data(), workspace.data(), &caches, pool, false};
    }
    CpuWeights weights;
    CpuProgram bound;
    CpuCaches caches;
    HostMemory arena, workspace;
    CpuRank at;
  };

  static Capacity capacity_of(const TestModel& model, const CpuRunnerOptions& options) {
    Capacity capacity;
    capacity.pages = options.pages;
    capacity.page_size = options.page_size;
    capacity.state_slots = options.max_sequences;
    capacity.max_step_tokens = options.max_step_tokens;
    capacity.max_sequences = options.max_sequences;
    capacity.max_model_length = options.max_model_length;
    capacity.vocabulary_size = static_cast<int32_t>(model.config.vocabulary_size);
    return capacity;
  }

  void run(const CpuStep& step, size_t index) {
    const compile::Operation& op = ranks_[0]->bound.program().operations[index];
    switch (op.kind) {
      case compile::OpKind::kEmbedding:
        return embed(step, index);
      case compile::OpKind::kAllReduce:
        return all_reduce(step, op.inputs[0], op.outputs[0]);
      case compile::OpKind::kAllGather:
        return all_gather(step, op);
      case compile::OpKind::kAllReduceRmsNorm:
        return all_reduce_norm(step, op);
      case compile::OpKind::kReduceScatter:
        FAIL() << "no reduce-scatter in this model";
      default:
        for (const auto& rank : ranks_) rank->bound.run_operation(rank->at, step, index);
    }
  }

  // A rank's table is its share of the vocabulary; rows of other ranks' tokens are zero.
  void embed(const CpuStep& step, size_t index) {
    for (size_t r = 0; r < ranks_.size(); ++r) {
      const Rank& rank = *ranks_[r];
      const compile::Program& program = rank.bound.program();
      const compile::Operation& op = program.operations[index];
      const int64_t rows = program.weights[op.weights[0]].rows;
      const int64_t first = static_cast<int64_t>(r) * rows;
      const auto mine = [&](int32_t id) { return id >= first && id < first + rows; };
      std::vector<int32_t> ids(step.token_ids, step.token_ids + step.batch->tokens);
      for (int32_t& id : ids) id = mine(id) ? id - static_cast<int32_t>(first) : 0;
      CpuStep local = step;
      local.token_ids = ids.data();
      rank.bound.run_operation(rank.at, local, index);
      for (size_t row = 0; row < ids.size(); ++row) {
        if (mine(step.token_ids[row])) continue;
        std::fill_n(row_of(r, op.outputs[0], row), program.values[op.outputs[0]].columns, 0.0f);
      }
    }
  }

  // float32 only.
  float* row_of(size_t rank, int32_t value, size_t row) const {
    return static_cast<float*>(ranks_[rank]->bound.rows(ranks_[rank]->at, value, static_cast<int64_t>(row)).data);
  }
  const compile::ProgramValue& value(int32_t id) const { return ranks_[0]->bound.program().values[id]; }
  size_t rows(const CpuStep& step, int32_t id) const {
    return static_cast<size_t>(value(id).rows == compile::RowSymbol::kTokens ? step.batch->tokens : step.wanted_count);
  }

  void all_reduce(const CpuStep& step, int32_t from, int32_t to) {
    std::vector<float> sum(value(from).columns);
    for (size_t row = 0; row < rows(step, from); ++row) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (size_t r = 0; r < ranks_.size(); ++r) {
        for (size_t i = 0; i < sum.size(); ++i) sum[i] += row_of(r, from, row)[i];
      }
      for (size_t r = 0; r < ranks_.size(); ++r) std::copy(sum.begin(), sum.end(), row_of(r, to, row));
    }
  }

  void all_gather(const CpuStep& step, const compile::Operation& op) {
    const int64_t columns = value(op.inputs[0]).columns;
    for (size_t row = 0; row < rows(step, op.inputs[0]); ++row) {
      for (size_t r = 0; r < ranks_.size(); ++r) {
        for (size_t to = 0; to < ranks_.size(); ++to) {
          std::copy_n(row_of(r, op.inputs[0], row), columns, row_of(to, op.outputs[0], row) + r * columns);
        }
      }
    }
  }

  void all_reduce_norm(const CpuStep& step, const compile::Operation& op) {
    all_reduce(step, op.inputs[1], op.inputs[1]);
    for (const auto& rank : ranks_) {
      const auto at = [&](int32_t id) { return rank->bound.rows(rank->at, id); };
      kernels::cpu::rms_norm({.rows = step.batch->tokens,
                              .columns = value(op.outputs[0]).columns,
                              .x = at(op.inputs[0]),
                              .add = at(op.inputs[1]),
                              .weight = rank->weights.at(rank->bound.program().weights[op.weights[0]].name).vector(),
                              .epsilon = op.attributes.epsilon,
                              .out = at(op.outputs[0])},
                             pool_);
    }
  }

  ThreadPool pool_;
  const Capacity capacity_;
  StepBatch batch_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<WantedRow> wanted_;
  std::vector<SequenceResult> results_;
};

}  // namespace tokenspeed::runtime

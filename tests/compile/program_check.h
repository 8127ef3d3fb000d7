// What every Program promises, checked from its operations alone, without the compiler's own idea of lifetimes.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "compile/phases.h"
#include "compile/program.h"

namespace tokenspeed::compile {

class ProgramCheck {
 public:
  explicit ProgramCheck(const Program& program)
      : program_(program), last_(static_cast<int32_t>(program.operations.size())) {}

  // The first broken promise, empty when there is none.
  std::string run() {
    check_values();
    check_order();
    if (problem_.empty()) find_accesses();
    if (problem_.empty()) find_what_precedes();
    if (problem_.empty()) check_sharing();
    return problem_;
  }

 private:
  void expect(bool holds, const std::string& problem) {
    if (!holds && problem_.empty()) problem_ = problem;
  }

  int64_t bytes(const ProgramValue& value) const {
    const int64_t rows = value.rows == RowSymbol::kTokens ? program_.tokens : program_.logit_rows;
    return rows * value.stride * static_cast<int64_t>(dtype_size(value.dtype));
  }

  void check_values() {
    for (size_t i = 0; i < program_.values.size(); ++i) {
      const ProgramValue& value = program_.values[i];
      const ProgramValue& root = program_.values[value.root];
      const int64_t column = (value.offset - root.offset) / static_cast<int64_t>(dtype_size(value.dtype));
      expect(root.root == value.root, value.name + ": root is a view");
      expect(root.offset % kArenaAlignment == 0, value.name + ": not aligned");
      expect(root.offset >= 0 && root.offset + bytes(root) <= program_.arena_bytes, value.name + ": outside the arena");
      expect(column >= 0 && column + value.columns <= root.columns, value.name + ": outside its root");
      expect(value.stride == root.columns, value.name + ": stride");
    }
  }

  void check_order() {
    std::set<int32_t> written;
    if (program_.hidden_in != kNone) written.insert(program_.values[program_.hidden_in].root);
    for (const Operation& operation : program_.operations) {
      for (int32_t id : operation.inputs) {
        expect(written.contains(program_.values[id].root), operation.name + " reads what nothing wrote");
      }
      for (int32_t id : operation.outputs) written.insert(program_.values[id].root);
      for (int32_t id : operation.weights) {
        expect(id >= 0 && id < static_cast<int32_t>(program_.weights.size()), operation.name + ": no such weight");
      }
    }
  }

  // Operations that touch each root's memory; `last_` is everything after the step.
  void find_accesses() {
    accesses_.resize(program_.values.size());
    for (int32_t i = 0; i < last_; ++i) {
      for (int32_t id : program_.operations[i].inputs) {
        accesses_[program_.values[id].root].insert(i);
        if (i >= program_.head_begin) accesses_[program_.values[id].root].insert(last_);
      }
      for (int32_t id : program_.operations[i].outputs) accesses_[program_.values[id].root].insert(i);
      // The last norm may be left to the head.
      const std::vector<int32_t>& outputs = program_.operations[i].outputs;
      if (std::find(outputs.begin(), outputs.end(), program_.hidden) == outputs.end()) continue;
      for (int32_t id : program_.operations[i].inputs) accesses_[program_.values[id].root].insert(last_);
    }
    accesses_[program_.values[program_.hidden].root].insert(last_);
    accesses_[program_.values[program_.logits].root].insert(last_);
    if (program_.hidden_in != kNone) accesses_[program_.values[program_.hidden_in].root].insert(-1);
  }

  // precedes_[j][i]: i is certainly over when j starts, through its stream or through what it reads.
  void find_what_precedes() {
    precedes_.assign(last_, std::vector<bool>(last_, false));
    std::vector<int32_t> written(program_.values.size(), kNone);
    std::vector<int32_t> on_stream(8, kNone);
    const auto follow = [&](int32_t after, int32_t before) {
      if (before == kNone) return;
      precedes_[after][before] = true;
      for (int32_t i = 0; i < before; ++i) {
        if (precedes_[before][i]) precedes_[after][i] = true;
      }
    };
    for (int32_t i = 0; i < last_; ++i) {
      const Operation& operation = program_.operations[i];
      follow(i, on_stream[operation.stream]);
      for (int32_t id : operation.inputs) follow(i, written[program_.values[id].root]);
      for (int32_t id : operation.outputs) written[program_.values[id].root] = i;
      on_stream[operation.stream] = i;
    }
  }

  bool over_before(const std::set<int32_t>& first, const std::set<int32_t>& second) const {
    for (int32_t i : first) {
      for (int32_t j : second) {
        const bool before = i == -1 ? j != -1 : i == last_ ? false : j == last_ || (j >= 0 && precedes_[j][i]);
        if (!before) return false;
      }
    }
    return true;
  }

  void check_sharing() {
    std::vector<std::pair<int64_t, int64_t>> phase_of(last_, {last_, -1});
    const std::vector<Phase> phases = group_into_phases(program_);
    for (size_t p = 0; p < phases.size(); ++p) {
      for (const PhaseStep& step : phases[p].steps) {
        auto& of = phase_of[step.operation];
        of = {std::min<int64_t>(of.first, p), std::max<int64_t>(of.second, p)};
      }
    }
    const auto phase_range = [&](const std::set<int32_t>& operations) {
      std::pair<int64_t, int64_t> range = {last_ + 1, -1};
      for (int32_t i : operations) {
        const auto of = i < 0        ? std::pair<int64_t, int64_t>{-1, -1}
                        : i == last_ ? std::pair<int64_t, int64_t>{last_, last_}
                                     : phase_of[i];
        range = {std::min(range.first, of.first), std::max(range.second, of.second)};
      }
      return range;
    };
    for (int32_t a = 0; a < static_cast<int32_t>(program_.values.size()); ++a) {
      const ProgramValue& one = program_.values[a];
      if (one.root != a) continue;
      for (int32_t b = a + 1; b < static_cast<int32_t>(program_.values.size()); ++b) {
        const ProgramValue& other = program_.values[b];
        if (other.root != b) continue;
        if (one.offset + bytes(one) <= other.offset || other.offset + bytes(other) <= one.offset) continue;
        shared_ = true;
        expect(over_before(accesses_[a], accesses_[b]) || over_before(accesses_[b], accesses_[a]),
               "'" + one.name + "' and '" + other.name + "' share memory while both may be alive");
        if (program_.tokens > kMaxPhaseTokens) continue;
        const auto range_a = phase_range(accesses_[a]);
        const auto range_b = phase_range(accesses_[b]);
        expect(range_a.second < range_b.first || range_b.second < range_a.first,
               "'" + one.name + "' and '" + other.name + "' share memory within a phase");
      }
    }
  }

 public:
  bool shares_memory() const { return shared_; }

 private:
  const Program& program_;
  const int32_t last_;
  std::string problem_;
  std::vector<std::set<int32_t>> accesses_;
  std::vector<std::vector<bool>> precedes_;
  bool shared_ = false;
};

inline void expect_sound(const Program& program) { EXPECT_EQ(ProgramCheck(program).run(), "") << program.name; }

}  // namespace tokenspeed::compile

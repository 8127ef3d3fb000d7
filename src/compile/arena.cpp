#include "compile/arena.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "compile/memory_plan.h"
#include "compile/phases.h"

namespace tokenspeed::compile {
namespace {

struct Stretch {
  int64_t begin = 0;
  int64_t end = 0;
};

class Placing {
 public:
  explicit Placing(Program* program)
      : program_(*program), lives_(program->values.size(), {std::numeric_limits<int64_t>::max(), -1, 0}) {}

  void run(bool reuse) {
    find_lifetimes();
    extend_over(concurrent_stretches());
    if (program_.tokens <= kMaxPhaseTokens) extend_over_phases();

    std::vector<int32_t> roots;
    std::vector<Lifetime> planned;
    for (int32_t id = 0; id < static_cast<int32_t>(program_.values.size()); ++id) {
      const ProgramValue& value = program_.values[id];
      if (value.root != id) continue;
      const int64_t rows = value.rows == RowSymbol::kTokens ? program_.tokens : program_.logit_rows;
      lives_[id].bytes = rows * value.columns * static_cast<int64_t>(dtype_size(value.dtype));
      roots.push_back(id);
      planned.push_back(lives_[id]);
    }
    const MemoryPlan plan = plan_memory(planned, kArenaAlignment, reuse);
    program_.arena_bytes = plan.bytes;
    std::vector<int64_t> base(program_.values.size(), 0);
    for (size_t i = 0; i < roots.size(); ++i) base[roots[i]] = plan.offsets[i];
    for (ProgramValue& value : program_.values) value.offset += base[value.root];
  }

 private:
  int64_t operations() const { return static_cast<int64_t>(program_.operations.size()); }
  int32_t root(int32_t value) const { return program_.values[value].root; }

  void touch(int32_t value, int64_t at) {
    Lifetime& life = lives_[root(value)];
    life.begin = std::min(life.begin, at);
    life.end = std::max(life.end, at);
  }

  void find_lifetimes() {
    for (int64_t i = 0; i < operations(); ++i) {
      const Operation& operation = program_.operations[i];
      for (int32_t id : operation.inputs) {
        touch(id, i);
        // The head runs several times: what it reads stays until the end.
        if (i >= program_.head_begin) touch(id, operations());
      }
      for (int32_t id : operation.outputs) touch(id, i);
      // A runner may leave the last norm to the head.
      const bool last_norm =
          std::find(operation.outputs.begin(), operation.outputs.end(), program_.hidden) != operation.outputs.end();
      if (!last_norm) continue;
      for (int32_t id : operation.inputs) touch(id, operations());
    }
    if (program_.hidden_in != kNone) touch(program_.hidden_in, -1);
    touch(program_.hidden, operations());
    touch(program_.logits, operations());
  }

  // Stretches of the list in which operations of different streams may run at the same time: from behind the last write
  // of what a side stream's operation reads to before the last reader of what it writes. Disjoint, ascending.
  std::vector<Stretch> concurrent_stretches() const {
    std::vector<int64_t> written(program_.values.size(), -1);
    std::vector<int64_t> last_read(program_.values.size(), -1);
    for (int64_t i = 0; i < operations(); ++i) {
      for (int32_t id : program_.operations[i].inputs) last_read[root(id)] = i;
    }
    std::vector<Stretch> stretches;
    for (int64_t i = 0; i < operations(); ++i) {
      const Operation& operation = program_.operations[i];
      if (operation.stream != 0) {
        Stretch stretch = {0, i};
        for (int32_t id : operation.inputs) stretch.begin = std::max(stretch.begin, written[root(id)] + 1);
        for (int32_t id : operation.outputs) stretch.end = std::max(stretch.end, last_read[root(id)] - 1);
        while (!stretches.empty() && stretch.begin <= stretches.back().end + 1) {
          stretch.begin = std::min(stretch.begin, stretches.back().begin);
          stretch.end = std::max(stretch.end, stretches.back().end);
          stretches.pop_back();
        }
        stretches.push_back(stretch);
      }
      for (int32_t id : operation.outputs) written[root(id)] = i;
    }
    return stretches;
  }

  // Whatever is alive in a stretch stays alive over all of it.
  void extend_over(const std::vector<Stretch>& stretches) {
    for (Lifetime& life : lives_) {
      for (const Stretch& stretch : stretches) {
        if (life.begin > stretch.end || stretch.begin > life.end) continue;
        life.begin = std::min(life.begin, stretch.begin);
        life.end = std::max(life.end, stretch.end);
      }
    }
  }

  // A value lives from its first phase to its last, and over every operation of those: then values with disjoint lives
  // are never alive together in the order of phases either.
  void extend_over_phases() {
    const std::vector<Phase> phases = group_into_phases(program_);
    std::vector<Stretch> phases_of(operations(), {std::numeric_limits<int64_t>::max(), -1});
    std::vector<Stretch> hulls(phases.size(), {std::numeric_limits<int64_t>::max(), -1});
    for (size_t p = 0; p < phases.size(); ++p) {
      for (const PhaseStep& step : phases[p].steps) {
        Stretch& of = phases_of[step.operation];
        of = {std::min<int64_t>(of.begin, p), std::max<int64_t>(of.end, p)};
        hulls[p] = {std::min<int64_t>(hulls[p].begin, step.operation), std::max<int64_t>(hulls[p].end, step.operation)};
      }
    }
    for (Lifetime& life : lives_) {
      Stretch alive = {std::numeric_limits<int64_t>::max(), -1};
      for (int64_t i = std::max<int64_t>(0, life.begin); i <= std::min(life.end, operations() - 1); ++i) {
        alive = {std::min(alive.begin, phases_of[i].begin), std::max(alive.end, phases_of[i].end)};
      }
      for (int64_t p = alive.begin; p <= alive.end; ++p) {
        life.begin = std::min(life.begin, hulls[p].begin);
        life.end = std::max(life.end, hulls[p].end);
      }
    }
  }

  Program& program_;
  std::vector<Lifetime> lives_;  // of each root value, in operations
};

}  // namespace

void place_values(Program* program, bool reuse) { Placing(program).run(reuse); }

}  // namespace tokenspeed::compile

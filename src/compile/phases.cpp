#include "compile/phases.h"

#include <algorithm>
#include <limits>

namespace tokenspeed::compile {
namespace {

enum class Role : uint8_t { kPrologue, kMain, kEpilogue };

Role role_of(OpKind kind) {
  switch (kind) {
    case OpKind::kRmsNorm:
    case OpKind::kGatherRows:
      return Role::kPrologue;
    case OpKind::kSwiGlu:
    case OpKind::kRouter:
    case OpKind::kAdd:
    case OpKind::kSigmoidMultiply:
    case OpKind::kScaleRowsBySigmoid:
    case OpKind::kGdnGates:
    case OpKind::kSharedExpertCombine:
      return Role::kEpilogue;
    default:
      return Role::kMain;
  }
}

// One step of an operation with the steps it waits for.
struct Work {
  PhaseStep step;
  Role role = Role::kMain;
  std::vector<int32_t> after;  // indices of earlier work
  int32_t level = 0;
};

class Grouping {
 public:
  explicit Grouping(const Program& program) : program_(program), writers_(program.values.size()) {}

  std::vector<Phase> run() {
    for (int32_t i = 0; i < static_cast<int32_t>(program_.operations.size()); ++i) split(i);
    for (Work& work : work_) {
      for (int32_t other : work.after)
        work.level = std::max(work.level, work_[other].level + delay(work_[other], work));
    }
    delay_side_work();
    return collect();
  }

 private:
  int32_t root(int32_t value) const { return program_.values[value].root; }

  int32_t add(int32_t operation, PhasePart part, Role role, const std::vector<int32_t>& inputs) {
    Work work{.step = {operation, part}, .role = role};
    for (int32_t value : inputs) {
      const std::vector<int32_t>& writers = writers_[root(value)];
      work.after.insert(work.after.end(), writers.begin(), writers.end());
    }
    work_.push_back(std::move(work));
    return static_cast<int32_t>(work_.size()) - 1;
  }

  void split(int32_t index) {
    const Operation& operation = program_.operations[index];
    if (operation.kind == OpKind::kExperts) {
      const int32_t gate_up = add(index, PhasePart::kGateUp, Role::kMain, operation.inputs);
      const int32_t down = add(index, PhasePart::kDown, Role::kMain, {});
      work_[down].after.push_back(gate_up);
      wrote(operation.outputs[0], down);
      return;
    }
    if (operation.kind == OpKind::kRmsNorm && operation.inputs.size() == 2) {
      const int32_t residual = add(index, PhasePart::kResidual, Role::kEpilogue, operation.inputs);
      const int32_t norm = add(index, PhasePart::kNorm, Role::kPrologue, {});
      work_[norm].after.push_back(residual);
      wrote(operation.outputs[0], norm);
      wrote(operation.outputs[1], residual);
      return;
    }
    // The query is prepared by the blocks that attend with it.
    const Role role = is_prepared_attention(operation) ? Role::kEpilogue : role_of(operation.kind);
    const int32_t work = add(index, PhasePart::kWhole, role, operation.inputs);
    // Keys and values are no values of the Program: attention waits for the layer's write in list order.
    if (operation.kind == OpKind::kAttention && last_kv_write_ != kNone) work_[work].after.push_back(last_kv_write_);
    if (operation.kind == OpKind::kKvWrite || operation.kind == OpKind::kAttentionPrepare) last_kv_write_ = work;
    for (int32_t value : operation.outputs) wrote(value, work);
  }

  bool is_prepared_attention(const Operation& operation) const {
    if (operation.kind != OpKind::kAttention) return false;
    const std::vector<int32_t>& writers = writers_[root(operation.inputs[0])];
    return writers.size() == 1 && kind_of(work_[writers[0]]) == OpKind::kAttentionPrepare;
  }

  // A value that fills only some columns of its memory leaves the other columns' writers.
  void wrote(int32_t value, int32_t work) {
    std::vector<int32_t>& writers = writers_[root(value)];
    if (program_.values[value].columns == program_.values[root(value)].columns) writers.clear();
    writers.push_back(work);
  }

  OpKind kind_of(const Work& work) const { return program_.operations[work.step.operation].kind; }

  // Phases from `first` to `second`, which reads it.
  int32_t delay(const Work& first, const Work& second) const {
    if (is_collective(kind_of(first)) || is_collective(kind_of(second))) return 1;
    return first.role == Role::kPrologue || second.role == Role::kEpilogue ? 0 : 1;
  }

  // Prologues and work on streams other than 0 move to the latest phase their readers allow.
  void delay_side_work() {
    std::vector<int32_t> latest(work_.size(), std::numeric_limits<int32_t>::max());
    for (size_t i = work_.size(); i-- > 0;) {
      Work& work = work_[i];
      const bool movable = work.role == Role::kPrologue || program_.operations[work.step.operation].stream != 0;
      if (movable && latest[i] != std::numeric_limits<int32_t>::max()) {
        work.level = std::max(work.level, latest[i]);
      }
      for (int32_t other : work.after) latest[other] = std::min(latest[other], work.level - delay(work_[other], work));
    }
  }

  std::vector<Phase> collect() const {
    int32_t levels = 0;
    for (const Work& work : work_) levels = std::max(levels, work.level + 1);
    std::vector<Phase> phases(levels);
    for (const Work& work : work_) {
      Phase& phase = phases[work.level];
      phase.steps.push_back(work.step);
      phase.communication = phase.communication || is_collective(kind_of(work));
      if (work.role == Role::kMain) phase.layer = program_.operations[work.step.operation].layer;
    }
    std::erase_if(phases, [](const Phase& phase) { return phase.steps.empty(); });
    return phases;
  }

  const Program& program_;
  std::vector<std::vector<int32_t>> writers_;  // of each root value: the work whose results it holds
  std::vector<Work> work_;
  int32_t last_kv_write_ = kNone;
};

}  // namespace

std::vector<Phase> group_into_phases(const Program& program) { return Grouping(program).run(); }

PhaseCount count_phases(const std::vector<Phase>& phases, int32_t layer) {
  PhaseCount count;
  for (const Phase& phase : phases) {
    if (phase.layer == layer) ++(phase.communication ? count.communication : count.compute);
  }
  return count;
}

}  // namespace tokenspeed::compile

#include "runtime/cpu_weights.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "base/progress.h"
#include "kernels/linear.h"
#include "runtime/weight_pieces.h"

namespace tokenspeed::runtime {
namespace {

using compile::ProgramWeight;
using compile::WeightForm;
using kernels::MatrixLayout;

constexpr int64_t kPanelRows = 16;
constexpr int64_t kAlignment = 64;
constexpr int64_t kTaskBytes = int64_t{1} << 20;

struct Plan {
  const ProgramWeight* weight = nullptr;
  std::vector<ResolvedMatrix> matrices;
  DType dtype = DType::kFloat32;
  MatrixLayout layout = MatrixLayout::kRowMajor;
  int64_t matrix_bytes = 0;
  int64_t offset = 0;
};

// Rows [row_begin, row_end) of one matrix; whole panels when packed.
struct Task {
  const Plan* plan = nullptr;
  int64_t matrix = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
};

int64_t row_bytes(const Plan& plan) { return plan.weight->columns * static_cast<int64_t>(dtype_size(plan.dtype)); }

Result<Plan> plan_weight(const ProgramWeight& weight, const compile::WeightSource& source, MatrixLayout layout) {
  Plan plan;
  plan.weight = &weight;
  bool all_bfloat16 = true;
  for (int64_t i = 0; i < weight.count; ++i) {
    TS_ASSIGN_OR_RETURN(ResolvedMatrix matrix, resolve(weight, i, source));
    all_bfloat16 = all_bfloat16 && matrix.all_bfloat16;
    plan.matrices.push_back(std::move(matrix));
  }
  const bool small = weight.form == WeightForm::kVector;
  plan.dtype = !small && (all_bfloat16 || weight.dtype != DType::kFloat32) ? DType::kBFloat16 : DType::kFloat32;
  plan.layout = small || weight.form == WeightForm::kTable ? MatrixLayout::kRowMajor : layout;
  plan.matrix_bytes = plan.layout == MatrixLayout::kPanel16
                          ? kernels::packed_bytes(weight.rows, weight.columns, plan.dtype)
                          : weight.rows * row_bytes(plan);
  plan.matrix_bytes = (plan.matrix_bytes + kAlignment - 1) / kAlignment * kAlignment;
  return plan;
}

// The piece that holds all of these rows in a form the packer reads as it lies in the file, or null.
const ResolvedPiece* direct_piece(const ResolvedMatrix& matrix, int64_t row, int64_t rows) {
  for (const ResolvedPiece& piece : matrix.pieces) {
    if (row < piece.row_begin || row + rows > piece.row_begin + piece.rows) continue;
    const bool readable = piece.view.dtype == DType::kFloat32 || piece.view.dtype == DType::kBFloat16;
    return readable ? &piece : nullptr;
  }
  return nullptr;
}

void pack(const Task& task, std::byte* out) {
  const ProgramWeight& weight = *task.plan->weight;
  const ResolvedMatrix& matrix = task.plan->matrices[task.matrix];
  const DType dtype = task.plan->dtype;
  const int64_t panel_bytes = kernels::packed_bytes(kPanelRows, weight.columns, dtype);
  std::vector<std::byte> staged;
  for (int64_t row = task.row_begin; row < task.row_end; row += kPanelRows) {
    const int64_t rows = std::min(kPanelRows, task.row_end - row);
    std::byte* panel = out + row / kPanelRows * panel_bytes;
    if (const ResolvedPiece* piece = direct_piece(matrix, row, rows)) {
      const int64_t first = (piece->source_row + row - piece->row_begin) * piece->source_columns + piece->source_column;
      kernels::pack_panels(piece->view.data + first * static_cast<int64_t>(dtype_size(piece->view.dtype)),
                           piece->view.dtype, piece->source_columns, rows, weight.columns, dtype, 0, 1, panel);
      continue;
    }
    staged.resize(static_cast<size_t>(kPanelRows * row_bytes(*task.plan)));
    read_rows(matrix, row, rows, weight.columns, dtype, staged.data());
    kernels::pack_panels(staged.data(), dtype, weight.columns, rows, weight.columns, dtype, 0, 1, panel);
  }
}

void fill(const Task& task, std::byte* base) {
  const Plan& plan = *task.plan;
  std::byte* out = base + plan.offset + task.matrix * plan.matrix_bytes;
  if (plan.layout == MatrixLayout::kPanel16) {
    pack(task, out);
  } else {
    read_rows(plan.matrices[task.matrix], task.row_begin, task.row_end - task.row_begin, plan.weight->columns,
              plan.dtype, out + task.row_begin * row_bytes(plan));
  }
}

std::vector<Task> split(const std::vector<Plan>& plans) {
  std::vector<Task> tasks;
  for (const Plan& plan : plans) {
    const int64_t rows =
        std::max(kPanelRows, kTaskBytes / std::max<int64_t>(1, row_bytes(plan)) / kPanelRows * kPanelRows);
    for (int64_t matrix = 0; matrix < plan.weight->count; ++matrix) {
      for (int64_t row = 0; row < plan.weight->rows; row += rows) {
        tasks.push_back({&plan, matrix, row, std::min(row + rows, plan.weight->rows)});
      }
    }
  }
  return tasks;
}

}  // namespace

Result<CpuWeights> CpuWeights::load(std::span<const compile::Program* const> programs,
                                    const compile::WeightSource& source, kernels::MatrixLayout layout,
                                    ThreadPool* pool) {
  std::map<std::string, const ProgramWeight*> wanted;
  for (const compile::Program* program : programs) {
    for (const ProgramWeight& weight : program->weights) {
      const auto [entry, added] = wanted.try_emplace(weight.name, &weight);
      // A table that another Program multiplies with must be packed.
      if (!added && entry->second->form == WeightForm::kTable) entry->second = &weight;
    }
  }
  std::vector<Plan> plans;
  int64_t bytes = 0;
  int64_t unpadded_bytes = 0;
  for (const auto& [name, weight] : wanted) {
    TS_ASSIGN_OR_RETURN(Plan plan, plan_weight(*weight, source, layout));
    plan.offset = bytes;
    bytes += plan.matrix_bytes * weight->count;
    unpadded_bytes += row_bytes(plan) * weight->rows * weight->count;
    plans.push_back(std::move(plan));
  }

  CpuWeights loaded;
  TS_ASSIGN_OR_RETURN(loaded.memory_, HostMemory::allocate(bytes, "the weights"));
  {
    Progress progress("loading weights", unpadded_bytes);
    const std::vector<Task> tasks = split(plans);
    pool->parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      fill(tasks[i], loaded.memory_.data());
      progress.advance((tasks[i].row_end - tasks[i].row_begin) * row_bytes(*tasks[i].plan));
    });
  }
  for (const Plan& plan : plans) {
    LoadedWeight& weight = loaded.weights_[plan.weight->name];
    weight.matrix = {
        loaded.memory_.data() + plan.offset, plan.dtype, plan.layout, plan.weight->rows, plan.weight->columns, nullptr};
    weight.matrix_stride = plan.matrix_bytes;
  }
  return loaded;
}

}  // namespace tokenspeed::runtime

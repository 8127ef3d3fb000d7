#include "runtime/cuda/cuda_weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/progress.h"
#include "runtime/weight_pieces.h"

namespace tokenspeed::runtime {
namespace {

using compile::ProgramWeight;
using compile::WeightForm;

constexpr int64_t kAlignment = 256;
constexpr int64_t kBlock = 128;                      // FP8 scales
constexpr int64_t kStagingBytes = int64_t{8} << 20;  // one buffer; each thread has two
constexpr int32_t kMostThreads = 8;                  // the bus is full before

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int64_t blocks(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

struct Plan {
  const ProgramWeight* weight = nullptr;
  std::vector<ResolvedMatrix> matrices;
  DType dtype = DType::kBFloat16;
  int64_t offset = 0;
  int64_t matrix_bytes = 0;
  int64_t scale_offset = 0;  // FP8: of all matrices, packed
  int64_t scale_count() const { return blocks(weight->rows) * blocks(weight->columns); }
  int64_t row_bytes() const { return weight->columns * static_cast<int64_t>(dtype_size(dtype)); }
};

// Rows [row_begin, row_end) of one matrix, or all its block scales.
struct Task {
  const Plan* plan = nullptr;
  int64_t matrix = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  bool scales = false;
};

// Whether each block of the weight is a whole block of one source tensor.
bool keeps_fp8(const ResolvedMatrix& matrix, int64_t columns) {
  return columns % kBlock == 0 &&
         std::all_of(matrix.pieces.begin(), matrix.pieces.end(), [](const ResolvedPiece& piece) {
           return piece.view.dtype == DType::kFloat8E4M3 && piece.view.scale != nullptr &&
                  piece.row_begin % kBlock == 0 && piece.rows % kBlock == 0 && piece.source_row % kBlock == 0 &&
                  piece.source_column % kBlock == 0;
         });
}

Result<Plan> plan_weight(const ProgramWeight& weight, const compile::WeightSource& source) {
  Plan plan;
  plan.weight = &weight;
  bool fp8 = weight.dtype == DType::kFloat8E4M3;
  for (int64_t i = 0; i < weight.count; ++i) {
    TS_ASSIGN_OR_RETURN(ResolvedMatrix matrix, resolve(weight, i, source));
    fp8 = fp8 && keeps_fp8(matrix, weight.columns);
    plan.matrices.push_back(std::move(matrix));
  }
  plan.dtype = weight.form == WeightForm::kVector ? DType::kFloat32 : fp8 ? DType::kFloat8E4M3 : DType::kBFloat16;
  plan.matrix_bytes = weight.rows * plan.row_bytes();
  return plan;
}

void read_fp8_rows(const ResolvedMatrix& matrix, int64_t row, int64_t rows, int64_t columns, std::byte* out) {
  for (const ResolvedPiece& piece : matrix.pieces) {
    const int64_t begin = std::max(row, piece.row_begin);
    const int64_t end = std::min(row + rows, piece.row_begin + piece.rows);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t from = (piece.source_row + r - piece.row_begin) * piece.source_columns + piece.source_column;
      std::memcpy(out + (r - row) * columns, piece.view.data + from, static_cast<size_t>(columns));
    }
  }
}

void read_scales(const ResolvedMatrix& matrix, int64_t columns, float* out) {
  for (const ResolvedPiece& piece : matrix.pieces) {
    for (int64_t block = 0; block < piece.rows / kBlock; ++block) {
      const int64_t from =
          (piece.source_row / kBlock + block) * blocks(piece.source_columns) + piece.source_column / kBlock;
      std::copy_n(piece.view.scale + from, blocks(columns), out + (piece.row_begin / kBlock + block) * blocks(columns));
    }
  }
}

// Fills `staging` and says where it goes.
std::pair<int64_t, int64_t> fill(const Task& task, std::byte* staging) {
  const Plan& plan = *task.plan;
  const ResolvedMatrix& matrix = plan.matrices[task.matrix];
  if (task.scales) {
    read_scales(matrix, plan.weight->columns, reinterpret_cast<float*>(staging));
    return {plan.scale_offset + task.matrix * plan.scale_count() * 4, plan.scale_count() * 4};
  }
  const int64_t rows = task.row_end - task.row_begin;
  if (plan.dtype == DType::kFloat8E4M3) {
    read_fp8_rows(matrix, task.row_begin, rows, plan.weight->columns, staging);
  } else {
    read_rows(matrix, task.row_begin, rows, plan.weight->columns, plan.dtype, staging);
  }
  return {plan.offset + task.matrix * plan.matrix_bytes + task.row_begin * plan.row_bytes(), rows * plan.row_bytes()};
}

Result<std::vector<Task>> split(const std::vector<Plan>& plans) {
  std::vector<Task> tasks;
  for (const Plan& plan : plans) {
    if (plan.row_bytes() > kStagingBytes || plan.scale_count() * 4 > kStagingBytes) {
      return unimplemented("weight '" + plan.weight->name + "' has rows of " + std::to_string(plan.row_bytes()) +
                           " bytes; the limit is " + std::to_string(kStagingBytes));
    }
    const int64_t rows = std::max<int64_t>(1, kStagingBytes / std::max<int64_t>(1, plan.row_bytes()));
    for (int64_t matrix = 0; matrix < plan.weight->count; ++matrix) {
      for (int64_t row = 0; row < plan.weight->rows; row += rows) {
        tasks.push_back({&plan, matrix, row, std::min(row + rows, plan.weight->rows), false});
      }
      if (plan.dtype == DType::kFloat8E4M3) tasks.push_back({&plan, matrix, 0, 0, true});
    }
  }
  return tasks;
}

// Threads that fill their two staging buffers in turn while the other is on its way.
class Uploader {
 public:
  Uploader(const std::vector<Task>& tasks, std::byte* memory, Progress* progress)
      : tasks_(tasks), memory_(memory), progress_(progress) {
    cudaGetDevice(&device_);
  }

  Status run(int32_t threads) {
    std::vector<std::thread> workers;
    workers.reserve(threads);
    for (int32_t i = 0; i < threads; ++i) {
      workers.emplace_back([this] {
        if (Status status = work(); !status.ok()) fail(std::move(status));
      });
    }
    for (std::thread& worker : workers) worker.join();
    return std::move(error_);
  }

 private:
  void fail(Status status) {
    std::lock_guard lock(mutex_);
    if (error_.ok()) error_ = std::move(status);
    next_ = tasks_.size();
  }

  Status work() {
    TS_RETURN_IF_ERROR(cuda_check(cudaSetDevice(device_), "choosing the GPU"));
    TS_ASSIGN_OR_RETURN(Stream stream, make_stream());
    TS_ASSIGN_OR_RETURN(PinnedMemory staging, PinnedMemory::allocate(2 * kStagingBytes, "loading weights"));
    CudaEvent sent[2];
    for (CudaEvent& event : sent) {
      TS_ASSIGN_OR_RETURN(event, make_event(false));
    }
    for (size_t turn = 0;; ++turn) {
      const size_t index = next_.fetch_add(1);
      if (index >= tasks_.size()) break;
      std::byte* buffer = staging.data() + turn % 2 * kStagingBytes;
      TS_RETURN_IF_ERROR(cuda_check(cudaEventSynchronize(sent[turn % 2].get()), "loading weights"));
      const auto [offset, bytes] = fill(tasks_[index], buffer);
      TS_RETURN_IF_ERROR(cuda_check(
          cudaMemcpyAsync(memory_ + offset, buffer, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream.get()),
          "loading weights"));
      TS_RETURN_IF_ERROR(cuda_check(cudaEventRecord(sent[turn % 2].get(), stream.get()), "loading weights"));
      progress_->advance(bytes);
    }
    return cuda_check(cudaStreamSynchronize(stream.get()), "loading weights");
  }

  const std::vector<Task>& tasks_;
  std::byte* const memory_;
  Progress* const progress_;
  int device_ = 0;
  std::atomic<size_t> next_{0};
  std::mutex mutex_;
  Status error_;
};

}  // namespace

Result<CudaWeights> CudaWeights::load(std::span<const compile::Program* const> programs,
                                      const compile::WeightSource& source, int32_t threads) {
  std::map<std::string, const ProgramWeight*> wanted;
  for (const compile::Program* program : programs) {
    for (const ProgramWeight& weight : program->weights) wanted.try_emplace(weight.name, &weight);
  }
  std::vector<Plan> plans;
  int64_t bytes = 0;
  int64_t payload = 0;
  for (const auto& [name, weight] : wanted) {
    TS_ASSIGN_OR_RETURN(Plan plan, plan_weight(*weight, source));
    plan.offset = bytes;
    bytes += aligned(plan.matrix_bytes * weight->count);
    payload += plan.matrix_bytes * weight->count;
    if (plan.dtype == DType::kFloat8E4M3) {
      plan.scale_offset = bytes;
      bytes += aligned(plan.scale_count() * weight->count * 4);
      payload += plan.scale_count() * weight->count * 4;
    }
    plans.push_back(std::move(plan));
  }

  CudaWeights loaded;
  TS_ASSIGN_OR_RETURN(loaded.memory_, DeviceMemory::allocate(bytes, "the weights"));
  TS_ASSIGN_OR_RETURN(const std::vector<Task> tasks, split(plans));
  {
    Progress progress("loading weights onto the GPU", payload);
    const int32_t available = static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
    const int32_t count = threads > 0 ? threads : std::min(available, kMostThreads);
    TS_RETURN_IF_ERROR(Uploader(tasks, loaded.memory_.data(), &progress).run(count));
  }
  for (const Plan& plan : plans) {
    LoadedWeight& weight = loaded.weights_[plan.weight->name];
    const float* scale = reinterpret_cast<const float*>(loaded.memory_.data() + plan.scale_offset);
    weight.matrix = {loaded.memory_.data() + plan.offset,
                     plan.dtype,
                     kernels::MatrixLayout::kRowMajor,
                     plan.weight->rows,
                     plan.weight->columns,
                     plan.dtype == DType::kFloat8E4M3 ? scale : nullptr};
    weight.matrix_stride = plan.matrix_bytes;
  }
  return loaded;
}

}  // namespace tokenspeed::runtime

#include "kernels/cuda/linear.h"

#include <cublasLt.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/norm.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr size_t kLibraryWorkspace = size_t{32} << 20;
constexpr int64_t kAlignment = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

Status library_status(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return {};
  return internal_error(std::string("linear: ") + what + " failed with " + cublasLtGetStatusName(status));
}

// Chosen once per shape; choosing takes tens of microseconds.
struct Shape {
  int64_t rows, n, k, x_stride, y_stride;
  DType y_dtype;
  auto operator<=>(const Shape&) const = default;
};

struct Choice {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t weight = nullptr;
  cublasLtMatrixLayout_t x = nullptr;
  cublasLtMatrixLayout_t y = nullptr;
  cublasLtMatmulAlgo_t algorithm;
};

// The library's handle and its choices live as long as the process.
class Library {
 public:
  static Library& instance() {
    static Library* library = new Library;
    return *library;
  }

  Status multiply(const Linear& args, const Rows& x, void* workspace, cudaStream_t stream) {
    const Shape shape = {args.rows, args.weight.n, args.weight.k, x.stride, args.y.stride, args.y.dtype};
    const Choice* choice = nullptr;
    {
      std::lock_guard lock(mutex_);
      if (!handle_) TS_RETURN_IF_ERROR(library_status(cublasLtCreate(&handle_), "cublasLtCreate"));
      auto [entry, added] = choices_.try_emplace(shape);
      if (added) {
        if (Status status = choose(shape, &entry->second); !status.ok()) {
          choices_.erase(entry);
          return status;
        }
      }
      choice = &entry->second;
    }
    const float alpha = 1.0f;
    const float beta = args.accumulate ? 1.0f : 0.0f;
    return library_status(cublasLtMatmul(handle_, choice->operation, &alpha, args.weight.data, choice->weight, x.data, choice->x,
                                         &beta, args.y.data, choice->y, args.y.data, choice->y, &choice->algorithm, workspace,
                                         kLibraryWorkspace, stream),
                          "cublasLtMatmul");
  }

 private:
  // Column-major: y^T [n, rows] = weight^T' [n, k] x^T [k, rows].
  Status choose(const Shape& shape, Choice* choice) {
    const cudaDataType_t y_type = shape.y_dtype == DType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF;
    TS_RETURN_IF_ERROR(library_status(cublasLtMatmulDescCreate(&choice->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a descriptor"));
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cublasLtMatmulDescSetAttribute(choice->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed));
    TS_RETURN_IF_ERROR(library_status(cublasLtMatrixLayoutCreate(&choice->weight, CUDA_R_16BF, shape.k, shape.n, shape.k), "a layout"));
    TS_RETURN_IF_ERROR(library_status(cublasLtMatrixLayoutCreate(&choice->x, CUDA_R_16BF, shape.k, shape.rows, shape.x_stride), "a layout"));
    TS_RETURN_IF_ERROR(library_status(cublasLtMatrixLayoutCreate(&choice->y, y_type, shape.n, shape.rows, shape.y_stride), "a layout"));
    cublasLtMatmulPreference_t preference = nullptr;
    TS_RETURN_IF_ERROR(library_status(cublasLtMatmulPreferenceCreate(&preference), "a preference"));
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kLibraryWorkspace,
                                         sizeof(kLibraryWorkspace));
    cublasLtMatmulHeuristicResult_t result = {};
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle_, choice->operation, choice->weight, choice->x, choice->y, choice->y, preference, 1,
                                       &result, &found);
    cublasLtMatmulPreferenceDestroy(preference);
    TS_RETURN_IF_ERROR(library_status(status, "the choice of an algorithm"));
    if (found == 0) {
      return internal_error("linear: cuBLASLt has no algorithm for " + std::to_string(shape.rows) + " rows of a " +
                            std::to_string(shape.n) + " x " + std::to_string(shape.k) + " weight");
    }
    choice->algorithm = result.algo;
    return {};
  }

  std::mutex mutex_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<Shape, Choice> choices_;
};

void multiply_fp8(const Linear& args, const Rows& x, std::byte* workspace, cudaStream_t stream) {
  float* scale = reinterpret_cast<float*>(workspace + aligned(args.rows * args.weight.k));
  quantize_rows(x.data, x.stride, args.rows, args.weight.k, workspace, scale, stream);
  tile_gemm({.dtype = DType::kFloat8E4M3, .n = args.weight.n, .k = args.weight.k, .a = workspace, .a_stride = args.weight.k,
             .a_scale = scale, .b = args.weight.data, .b_scale = args.weight.scale, .rows = args.rows, .y = args.y.data,
             .y_dtype = args.y.dtype, .y_stride = args.y.stride, .accumulate = args.accumulate},
            stream);
}

}  // namespace

int64_t linear_workspace_bytes(int64_t rows, int64_t k) {
  return aligned(rows * k * 2) + aligned(rows * k) + aligned(rows * k / 128 * 4) + static_cast<int64_t>(kLibraryWorkspace);
}

Status linear(const Linear& args, cudaStream_t stream) {
  std::byte* workspace = static_cast<std::byte*>(args.workspace);
  Rows x = args.x;
  if (args.norm_weight) {
    const Rows normed = {workspace, DType::kBFloat16, args.weight.k};
    rms_norm({.rows = args.rows, .columns = args.weight.k, .x = args.x, .weight = args.norm_weight, .epsilon = args.norm_epsilon,
              .out = normed},
             stream);
    x = normed;
  }
  workspace += aligned(args.rows * args.weight.k * 2);
  if (args.weight.dtype != DType::kFloat8E4M3) return Library::instance().multiply(args, x, workspace, stream);
  multiply_fp8(args, x, workspace, stream);
  return {};
}

}  // namespace tokenspeed::kernels::cuda

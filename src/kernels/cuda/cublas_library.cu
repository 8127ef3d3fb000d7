#include "kernels/cuda/cublas_library.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <string>

namespace tokenspeed::kernels::cuda {
namespace {

const std::string& library_name() {
  static const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
  return name;
}

// Stays open for the life of the process. Threads may meet here at once.
void* library() {
  static void* const handle = dlopen(library_name().c_str(), RTLD_NOW | RTLD_LOCAL);
  return handle;
}

template <typename Function>
Function find(const char* name) {
  return library() ? reinterpret_cast<Function>(dlsym(library(), name)) : nullptr;
}

}  // namespace

Status find_cublas() {
  if (library()) return {};
  const char* reason = dlerror();
  return failed_precondition(library_name() + " was not found (" + (reason ? reason : "no reason given") +
                             "); install cuBLAS of CUDA " + std::to_string(CUBLAS_VER_MAJOR) +
                             " or put its directory into LD_LIBRARY_PATH, or run with --device cpu");
}

}  // namespace tokenspeed::kernels::cuda

// Calls the library's function of the same name.
#define TS_FORWARD(name, ...)                                                            \
  static const auto function = tokenspeed::kernels::cuda::find<decltype(&name)>(#name); \
  return function ? function(__VA_ARGS__) : CUBLAS_STATUS_NOT_INITIALIZED

cublasStatus_t CUBLASWINAPI cublasLtCreate(cublasLtHandle_t* handle) { TS_FORWARD(cublasLtCreate, handle); }

const char* CUBLASWINAPI cublasLtGetStatusName(cublasStatus_t status) {
  static const auto function =
      tokenspeed::kernels::cuda::find<decltype(&cublasLtGetStatusName)>("cublasLtGetStatusName");
  return function ? function(status) : "no cuBLASLt";
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* descriptor, cublasComputeType_t compute,
                                                     cudaDataType_t scale) {
  TS_FORWARD(cublasLtMatmulDescCreate, descriptor, compute, scale);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t descriptor,
                                                           cublasLtMatmulDescAttributes_t attribute, const void* value,
                                                           size_t bytes) {
  TS_FORWARD(cublasLtMatmulDescSetAttribute, descriptor, attribute, value, bytes);
}

cublasStatus_t CUBLASWINAPI cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                                       uint64_t columns, int64_t stride) {
  TS_FORWARD(cublasLtMatrixLayoutCreate, layout, type, rows, columns, stride);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  TS_FORWARD(cublasLtMatmulPreferenceCreate, preference);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  TS_FORWARD(cublasLtMatmulPreferenceDestroy, preference);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                                 cublasLtMatmulPreferenceAttributes_t attribute,
                                                                 const void* value, size_t bytes) {
  TS_FORWARD(cublasLtMatmulPreferenceSetAttribute, preference, attribute, value, bytes);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int wanted,
    cublasLtMatmulHeuristicResult_t results[], int* found) {
  TS_FORWARD(cublasLtMatmulAlgoGetHeuristic, handle, operation, a, b, c, d, preference, wanted, results, found);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha,
                                           const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                                           cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                                           cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                                           const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                                           size_t workspace_bytes, cudaStream_t stream) {
  TS_FORWARD(cublasLtMatmul, handle, operation, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout,
             algorithm, workspace, workspace_bytes, stream);
}

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/embedding.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void gather_kernel(const int32_t* index, const uint4* table, int64_t table_stride, int chunks, uint4* out,
                              int64_t out_stride) {
  wait_for_predecessor();
  allow_successor();
  const uint4* from = table + index[blockIdx.x] * table_stride;
  uint4* to = out + blockIdx.x * out_stride;
  for (int c = threadIdx.x; c < chunks; c += kThreads) to[c] = from[c];
}

Status gather(const char* op, int64_t rows, int64_t columns, const int32_t* index, const void* table,
              int64_t table_stride, const Rows& out, const Launch& launch) {
  return launch_kernel(op, launch, gather_kernel, dim3(static_cast<unsigned>(rows)), kThreads, 0, 1, index,
                       static_cast<const uint4*>(table), table_stride / 8, static_cast<int>(columns / 8),
                       static_cast<uint4*>(out.data), out.stride / 8);
}

}  // namespace

// The step's first launches are short: each starts while the one before it ends.
Status embedding(const Embedding& args, cudaStream_t stream) {
  return gather("embedding", args.rows, args.table.k, args.ids, args.table.data, args.table.k, args.out,
                {.stream = stream});
}

Status gather_rows(const GatherRows& args, cudaStream_t stream) {
  return gather("gather_rows", args.rows, args.columns, args.index, args.x.data, args.x.stride, args.out,
                {.stream = stream, .dependent = false});
}

}  // namespace tokenspeed::kernels::cuda

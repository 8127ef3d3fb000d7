#include "kernels/cuda/embedding.h"

#include "kernels/cuda/device.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void gather_kernel(const int32_t* index, const uint4* table, int64_t table_stride, int chunks, uint4* out,
                              int64_t out_stride) {
  const uint4* from = table + index[blockIdx.x] * table_stride;
  uint4* to = out + blockIdx.x * out_stride;
  for (int c = threadIdx.x; c < chunks; c += kThreads) to[c] = from[c];
}

void gather(int64_t rows, int64_t columns, const int32_t* index, const void* table, int64_t table_stride, const Rows& out,
            cudaStream_t stream) {
  gather_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
      index, static_cast<const uint4*>(table), table_stride / 8, static_cast<int>(columns / 8), static_cast<uint4*>(out.data),
      out.stride / 8);
}

}  // namespace

void embedding(const Embedding& args, cudaStream_t stream) {
  gather(args.rows, args.table.k, args.ids, args.table.data, args.table.k, args.out, stream);
}

void gather_rows(const GatherRows& args, cudaStream_t stream) {
  gather(args.rows, args.columns, args.index, args.x.data, args.x.stride, args.out, stream);
}

}  // namespace tokenspeed::kernels::cuda

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/step.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__device__ inline uint64_t clock_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__global__ void expand_kernel(ExpandBatch args) {
  allow_successor();  // not launched as a dependent one: all that came before has ended
  const int thread = blockIdx.x * kThreads + threadIdx.x;
  if (thread == 0) *args.begin_ns = clock_ns();
  const int changes = *args.change_count;
  for (int i = thread; i < changes; i += static_cast<int>(gridDim.x) * kThreads) {
    args.page_table[args.changes[i].index] = args.changes[i].page;
  }
  if (thread >= args.tokens) return;
  int low = 0;
  int high = args.sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (args.token_begin[middle] <= thread) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  args.sequence[thread] = low;
  args.position[thread] = args.context[low] + thread - args.token_begin[low];
  const int id = args.ids[thread];
  if (id < 0) args.ids[thread] = max(args.sampled[~id], 0);
}

__global__ void publish_kernel(PublishTokens args) {
  const uint64_t number = *args.number << 32;
  if (threadIdx.x == 0) *args.end_ns = clock_ns();
  for (int i = threadIdx.x; i < max(args.count, 1); i += kThreads) {
    const int token = i < args.count ? args.tokens[i] : -1;
    *static_cast<volatile uint64_t*>(args.host_words + i) = number | static_cast<uint32_t>(token);
  }
}

}  // namespace

void expand_batch(const ExpandBatch& args, cudaStream_t stream) {
  expand_kernel<<<static_cast<unsigned>(ceil_div(args.tokens, kThreads)), kThreads, 0, stream>>>(args);
}

void publish_tokens(const PublishTokens& args, cudaStream_t stream) {
  publish_kernel<<<1, kThreads, 0, stream>>>(args);
}

}  // namespace tokenspeed::kernels::cuda

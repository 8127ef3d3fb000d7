// Causal attention over paged keys and values for many query rows: tiles of 64 (token, head of the group) rows per
// block, blocks of 64 keys through shared memory, online softmax in registers.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/fp8_pages.cuh"
#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kRows = 64;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

template <int kHeadDim>
struct Shared {
  alignas(128) bf16 query[kRows * kHeadDim];
  alignas(128) bf16 keys[kAttentionBlock * kHeadDim];
  alignas(128) bf16 values[kAttentionBlock * kHeadDim];
};

template <int kHeadDim>
__device__ inline void load_block(uint32_t shared, const void* pages, const KvPages& layout, const int32_t* table,
                                  int head, int first, int count) {
  constexpr int kChunks = kHeadDim / 8;
  for (int i = threadIdx.x; i < kAttentionBlock * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const int position = min(first + row, count - 1);
    const int64_t at =
        (static_cast<int64_t>(table[position / layout.page_size]) * layout.page_size + position % layout.page_size) *
            layout.heads +
        head;
    const uint32_t to = shared + swizzled<kHeadDim * 2>(row, chunk);
    if (layout.dtype != DType::kFloat8E4M3) {
      copy16_async(to, static_cast<const bf16*>(pages) + at * kHeadDim + chunk * 8, first + row < count);
      continue;
    }
    uint4 values = {};
    if (first + row < count) {
      values = bf16_from_fp8(
          *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(pages) + at * kHeadDim + chunk * 8));
    }
    *reinterpret_cast<uint4*>(__cvta_shared_to_generic(to)) = values;
  }
}

// S = Q K^T of this warp's 16 rows.
template <int kHeadDim>
__device__ inline void score(float (&s)[kAttentionBlock / 8][4], uint32_t query, uint32_t keys) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[4];
    load_matrices(a, query + swizzled<kHeadDim * 2>(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < kAttentionBlock / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, keys + swizzled<kHeadDim * 2>(n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      multiply_add(s[2 * n], a, b[0], b[1]);
      multiply_add(s[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// O += P V.
template <int kHeadDim>
__device__ inline void accumulate(float (&o)[kHeadDim / 8][4], const float (&p)[kAttentionBlock / 8][4],
                                  uint32_t values) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kAttentionBlock / 16; ++k) {
    const uint32_t a[4] = {pack_bf16(p[2 * k][0], p[2 * k][1]), pack_bf16(p[2 * k][2], p[2 * k][3]),
                           pack_bf16(p[2 * k + 1][0], p[2 * k + 1][1]), pack_bf16(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, values + swizzled<kHeadDim * 2>(k * 16 + lane % 16, 2 * n + lane / 16));
      multiply_add(o[2 * n], a, b[0], b[1]);
      multiply_add(o[2 * n + 1], a, b[2], b[3]);
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_kernel(PagedAttention args) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared<kHeadDim>& shared = *reinterpret_cast<Shared<kHeadDim>*>(memory);
  const SequenceBatch& batch = args.batch;
  const int group = static_cast<int>(args.shape.query_heads / args.shape.kv_heads);
  const int kv_head = blockIdx.y;
  QueryTile tile;
  // Late tiles see the most keys: they start first.
  if (!find_query_tile<kRows>(batch, group, static_cast<int>(gridDim.x - 1 - blockIdx.x), &tile)) return;

  const int first_token = batch.token_begin[tile.sequence];
  const int context = batch.context[tile.sequence];
  const int32_t* table = batch.page_table + tile.sequence * batch.page_table_stride;
  const int last_row = min(tile.first_row + kRows, tile.rows) - 1;
  const int key_count = context + last_row / group + 1;

  constexpr int kChunks = kHeadDim / 8;
  const uint32_t query = shared_address(shared.query);
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = min(tile.first_row + i / kChunks, tile.rows - 1);
    const int head = kv_head * group + row % group;
    const bf16* from = static_cast<const bf16*>(args.query.data) + (first_token + row / group) * args.query.stride +
                       head * kHeadDim + i % kChunks * 8;
    copy16_async(query + swizzled<kHeadDim * 2>(i / kChunks, i % kChunks), from,
                 tile.first_row + i / kChunks < tile.rows);
  }
  const uint32_t keys = shared_address(shared.keys);
  const uint32_t values = shared_address(shared.values);
  load_block<kHeadDim>(keys, args.pages.keys, args.pages, table, kv_head, 0, key_count);
  commit_copies();

  const int lane = threadIdx.x % kWarp;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * 16 + lane / 4;
  int limit[2];  // greatest key position each of this lane's two rows sees
#pragma unroll
  for (int i = 0; i < 2; ++i) limit[i] = context + min(tile.first_row + warp_row + 8 * i, tile.rows - 1) / group;
  const float scale = 1.4426950408889634f * rsqrtf(static_cast<float>(kHeadDim));  // exp2 instead of exp

  float o[kHeadDim / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
  for (int first = 0; first < key_count; first += kAttentionBlock) {
    load_block<kHeadDim>(values, args.pages.values, args.pages, table, kv_head, first, key_count);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    float s[kAttentionBlock / 8][4] = {};
    score<kHeadDim>(s, query, keys);
    __syncthreads();
    if (first + kAttentionBlock < key_count) {
      load_block<kHeadDim>(keys, args.pages.keys, args.pages, table, kv_head, first + kAttentionBlock, key_count);
    }
    commit_copies();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = maximum[i];
#pragma unroll
      for (int n = 0; n < kAttentionBlock / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[n][2 * i + j];
          x = first + n * 8 + lane % 4 * 2 + j <= limit[i] ? x * scale : -INFINITY;
          top = fmaxf(top, x);
        }
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float shrink = exp2f(maximum[i] - top);
      maximum[i] = top;
      float part = 0;
#pragma unroll
      for (int n = 0; n < kAttentionBlock / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[n][2 * i + j];
          x = exp2f(x - top);
          part += x;
        }
      }
      sum[i] = sum[i] * shrink + part;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        o[n][2 * i] *= shrink;
        o[n][2 * i + 1] *= shrink;
      }
    }
    wait_copies<1>();
    __syncthreads();
    accumulate<kHeadDim>(o, s, values);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
    sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    const int row = tile.first_row + warp_row + 8 * i;
    if (row >= tile.rows) continue;
    const int64_t token = first_token + row / group;
    const int head = kv_head * group + row % group;
    bf16* out = static_cast<bf16*>(args.out.data) + token * args.out.stride + head * kHeadDim;
    const bf16* gate = args.gate.data ? static_cast<const bf16*>(args.gate.data) + token * args.gate.stride +
                                            head * args.gate_head_stride
                                      : nullptr;
    const float inverse = 1.0f / sum[i];
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      float x = o[n][2 * i] * inverse;
      float y = o[n][2 * i + 1] * inverse;
      if (gate) {
        const float2 g = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(gate + column));
        x *= sigmoid(g.x);
        y *= sigmoid(g.y);
      }
      *reinterpret_cast<__nv_bfloat162*>(out + column) = __floats2bfloat162_rn(x, y);
    }
  }
}

template <int kHeadDim>
void launch(const PagedAttention& args, cudaStream_t stream) {
  const int64_t group = args.shape.query_heads / args.shape.kv_heads;
  const int64_t tiles = args.batch.tokens * group / kRows + args.batch.sequences;
  constexpr int kBytes = sizeof(Shared<kHeadDim>);
  cudaFuncSetAttribute(attention_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(args.shape.kv_heads));
  attention_kernel<kHeadDim><<<grid, kThreads, kBytes, stream>>>(args);
}

}  // namespace

void paged_attention(const PagedAttention& args, cudaStream_t stream) {
  switch (args.shape.head_dim) {
    case 64:
      return launch<64>(args, stream);
    case 128:
      return launch<128>(args, stream);
    default:
      return attends_by_warpgroups(args) ? warpgroup_attention(args, stream) : launch<256>(args, stream);
  }
}

}  // namespace tokenspeed::kernels::cuda

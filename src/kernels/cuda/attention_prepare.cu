// Everything between the projections and the attention itself, fused and as separate steps: one warp per head of a
// token, a block has a few tokens and computes their angles once.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/fp8_pages.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;

// A lane holds kPerLane consecutive dims of its head.
template <int kPerLane>
struct HeadValues {
  float v[kPerLane];

  __device__ void load(const bf16* p) {
    p += threadIdx.x % kWarp * kPerLane;
    if constexpr (kPerLane == 8) {
      load8(p, v);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; i += 2) {
        const float2 pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p + i));
        v[i] = pair.x;
        v[i + 1] = pair.y;
      }
    }
  }
  __device__ void store(bf16* p) const {
    p += threadIdx.x % kWarp * kPerLane;
    if constexpr (kPerLane == 8) {
      store8(p, v);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; i += 2) {
        *reinterpret_cast<__nv_bfloat162*>(p + i) = __floats2bfloat162_rn(v[i], v[i + 1]);
      }
    }
  }
  // Rounded to bfloat16 on the way, as every key and value is.
  __device__ void store(uint8_t* p) const {
    p += threadIdx.x % kWarp * kPerLane;
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2)
      *reinterpret_cast<uint16_t*>(p + i) = static_cast<uint16_t>(fp8_from_bf16(pack_bf16(v[i], v[i + 1])));
  }
  __device__ void norm(const float* weight, float epsilon) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) squares += v[i] * v[i];
    const float scale = rsqrtf(warp_sum(squares) / (kPerLane * kWarp) + epsilon);
    weight += threadIdx.x % kWarp * kPerLane;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) v[i] *= scale * (1.0f + weight[i]);
  }
  // Pairs (i, i + rotary_dim / 2); rotary_dim / 2 is a multiple of kPerLane, so a pair lies in two lanes at one index.
  __device__ void rotate(int rotary_dim, const float2* turns) {
    const int half_lanes = rotary_dim / 2 / kPerLane;
    const int lane = threadIdx.x % kWarp;
    const int partner = lane < half_lanes ? lane + half_lanes : lane - half_lanes;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float other = __shfl_sync(~0u, v[i], partner & (kWarp - 1));
      if (lane >= 2 * half_lanes) continue;
      const float2 turn = turns[lane % half_lanes * kPerLane + i];
      v[i] = lane < half_lanes ? v[i] * turn.x - other * turn.y : v[i] * turn.x + other * turn.y;
    }
  }
};

constexpr int kMaxRotaryPairs = 128;
constexpr int kBlockTokens = 4;

// Cosine and sine, rounded to bfloat16, of every pair at the positions of the block's tokens. The frequencies are
// computed in double: at long contexts a float32 exponential would be radians off.
__device__ const float2 (*turns_of(const int32_t* position, int64_t first_token, int64_t tokens, int rotary_dim,
                                   float theta))[kMaxRotaryPairs] {
  __shared__ float frequencies[kMaxRotaryPairs];
  __shared__ float2 turns[kBlockTokens][kMaxRotaryPairs];
  const int pairs = rotary_dim / 2;
  if (static_cast<int>(threadIdx.x) < pairs) {
    frequencies[threadIdx.x] =
        1.0f / static_cast<float>(pow(static_cast<double>(theta), 2.0 * threadIdx.x / rotary_dim));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBlockTokens * pairs; i += blockDim.x) {
    const int64_t token = min(first_token + i / pairs, tokens - 1);
    float sine, cosine;
    sincosf(position[token] * frequencies[i % pairs], &sine, &cosine);
    turns[i / pairs][i % pairs] =
        make_float2(__bfloat162float(__float2bfloat16(cosine)), __bfloat162float(__float2bfloat16(sine)));
  }
  __syncthreads();
  return turns;
}

__device__ inline int64_t page_row(const SequenceBatch& batch, const KvPages& pages, int token) {
  const int position = batch.position[token];
  const int32_t* table = batch.page_table + batch.sequence[token] * batch.page_table_stride;
  return static_cast<int64_t>(table[position / pages.page_size]) * pages.page_size + position % pages.page_size;
}

// One head of one token.
template <int kPerLane>
__device__ inline void prepare_head(const AttentionPrepare& args, int token, int head, const float2* turns) {
  constexpr int kHeadDim = kPerLane * kWarp;
  const int rotary_dim = static_cast<int>(args.shape.rotary_dim);
  const int query_heads = static_cast<int>(args.shape.query_heads);
  const int kv_heads = static_cast<int>(args.shape.kv_heads);
  HeadValues<kPerLane> values;
  if (head < query_heads) {
    values.load(static_cast<const bf16*>(args.q_gate.data) + token * args.q_gate.stride + head * 2 * kHeadDim);
    values.norm(args.query_norm, args.epsilon);
    values.rotate(rotary_dim, turns);
    values.store(static_cast<bf16*>(args.query.data) + token * args.query.stride + head * kHeadDim);
    return;
  }
  head -= query_heads;
  const bool is_key = head < kv_heads;
  if (!is_key) head -= kv_heads;
  const Rows& from = is_key ? args.key : args.value;
  values.load(static_cast<const bf16*>(from.data) + token * from.stride + head * kHeadDim);
  if (is_key) {
    values.norm(args.key_norm, args.epsilon);
    values.rotate(rotary_dim, turns);
  }
  void* const to = is_key ? args.pages.keys : args.pages.values;
  const int64_t at = (page_row(args.batch, args.pages, token) * kv_heads + head) * kHeadDim;
  if (args.pages.dtype == DType::kFloat8E4M3) {
    values.store(static_cast<uint8_t*>(to) + at);
  } else {
    values.store(static_cast<bf16*>(to) + at);
  }
}

template <int kPerLane>
__global__ void prepare_kernel(AttentionPrepare args) {
  const int first_token = blockIdx.x * kBlockTokens;
  const int tokens = args.batch.tokens;
  const float2(*turns)[kMaxRotaryPairs] = turns_of(args.batch.position, first_token, tokens,
                                                   static_cast<int>(args.shape.rotary_dim), args.shape.rope_theta);
  const int heads = static_cast<int>(args.shape.query_heads + 2 * args.shape.kv_heads);
  const int count = min(kBlockTokens, tokens - first_token) * heads;
  for (int i = threadIdx.x / kWarp; i < count; i += kWarpsPerBlock) {
    prepare_head<kPerLane>(args, first_token + i / heads, i % heads, turns[i / heads]);
  }
}

template <int kPerLane>
__global__ void rope_kernel(Rope args) {
  const int rotary_dim = static_cast<int>(args.shape.rotary_dim);
  const int64_t first_token = int64_t{blockIdx.x} * kBlockTokens;
  const float2(*turns)[kMaxRotaryPairs] =
      turns_of(args.position, first_token, args.tokens, rotary_dim, args.shape.rope_theta);
  const int heads = static_cast<int>(args.heads);
  const int64_t left = args.tokens - first_token;
  const int count = static_cast<int>(left < kBlockTokens ? left : kBlockTokens) * heads;
  for (int i = threadIdx.x / kWarp; i < count; i += kWarpsPerBlock) {
    bf16* const at =
        static_cast<bf16*>(args.x.data) + (first_token + i / heads) * args.x.stride + i % heads * kPerLane * kWarp;
    HeadValues<kPerLane> values;
    values.load(at);
    values.rotate(rotary_dim, turns[i / heads]);
    values.store(at);
  }
}

__global__ void split_kernel(SplitQueryGate args) {
  const int64_t columns = args.shape.query_heads * 2 * args.shape.head_dim / 8;
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index >= args.tokens * columns) return;
  const int64_t token = index / columns;
  const int64_t column = index % columns * 8;
  const int64_t head = column / (2 * args.shape.head_dim);
  const int64_t in_head = column % (2 * args.shape.head_dim);
  const bool is_query = in_head < args.shape.head_dim;
  const Rows& to = is_query ? args.query : args.gate;
  const int64_t at = head * args.shape.head_dim + (is_query ? in_head : in_head - args.shape.head_dim);
  *reinterpret_cast<uint4*>(static_cast<bf16*>(to.data) + token * to.stride + at) =
      *reinterpret_cast<const uint4*>(static_cast<const bf16*>(args.q_gate.data) + token * args.q_gate.stride + column);
}

__global__ void kv_write_kernel(KvWrite args) {
  const int64_t columns = args.shape.kv_heads * args.shape.head_dim;
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index >= args.batch.tokens * columns / 8) return;
  const int token = static_cast<int>(index / (columns / 8));
  const int64_t column = index % (columns / 8) * 8;
  const int64_t row = page_row(args.batch, args.pages, token);
  const auto copy = [&](const Rows& from, void* to) {
    const uint4 values =
        *reinterpret_cast<const uint4*>(static_cast<const bf16*>(from.data) + token * from.stride + column);
    if (args.pages.dtype == DType::kFloat8E4M3) {
      *reinterpret_cast<uint2*>(static_cast<uint8_t*>(to) + row * columns + column) = fp8_from_bf16(values);
    } else {
      *reinterpret_cast<uint4*>(static_cast<bf16*>(to) + row * columns + column) = values;
    }
  };
  copy(args.key, args.pages.keys);
  copy(args.value, args.pages.values);
}

__global__ void sigmoid_multiply_kernel(SigmoidMultiply args) {
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index >= args.rows * args.columns / 8) return;
  const int64_t row = index / (args.columns / 8);
  const int64_t column = index % (args.columns / 8) * 8;
  float x[8], gate[8];
  load8(static_cast<const bf16*>(args.x.data) + row * args.x.stride + column, x);
  load8(static_cast<const bf16*>(args.gate.data) + row * args.gate.stride + column, gate);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= sigmoid(gate[i]);
  store8(static_cast<bf16*>(args.out.data) + row * args.out.stride + column, x);
}

constexpr int kThreads = 256;
unsigned blocks_for(int64_t work) { return static_cast<unsigned>(ceil_div(work, kThreads)); }

}  // namespace

void split_query_gate(const SplitQueryGate& args, cudaStream_t stream) {
  split_kernel<<<blocks_for(args.tokens * args.shape.query_heads * 2 * args.shape.head_dim / 8), kThreads, 0, stream>>>(
      args);
}

void rope(const Rope& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(args.tokens, kBlockTokens));
  switch (args.shape.head_dim) {
    case 64:
      rope_kernel<2><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(args);
      break;
    case 128:
      rope_kernel<4><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(args);
      break;
    default:
      rope_kernel<8><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(args);
      break;
  }
}

void kv_write(const KvWrite& args, cudaStream_t stream) {
  kv_write_kernel<<<blocks_for(args.batch.tokens * args.shape.kv_heads * args.shape.head_dim / 8), kThreads, 0,
                    stream>>>(args);
}

void sigmoid_multiply(const SigmoidMultiply& args, cudaStream_t stream) {
  sigmoid_multiply_kernel<<<blocks_for(args.rows * args.columns / 8), kThreads, 0, stream>>>(args);
}

void attention_prepare(const AttentionPrepare& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(args.batch.tokens, kBlockTokens));
  switch (args.shape.head_dim) {
    case 64:
      prepare_kernel<2><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(args);
      break;
    case 128:
      prepare_kernel<4><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(args);
      break;
    default:
      prepare_kernel<8><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(args);
      break;
  }
}

}  // namespace tokenspeed::kernels::cuda

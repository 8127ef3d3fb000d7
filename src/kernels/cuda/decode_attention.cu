// decode_attention: softmax over all keys for the step's few tokens, split over blocks of kDecodeKeyBlock keys.
//
// A block takes (64 keys, KV head, sequence): it fetches the older keys and values before the wait, forms the normed
// and turned queries of its group from the projections, adds the step's own keys and values where they fall into its
// range (and writes them to the pages), and computes S = Q K^T, P = exp(S - m), O = P V on the tensor cores, 16 (token,
// head) rows at a time. Its m, l and O go to the workspace; decode_attention_combine_kernel adds a row's blocks in an
// order that depends on their number alone. With one block the result is final and the second launch is not made.
#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kHeadDim = 256;
constexpr int kRowBytes = kHeadDim * 2;
constexpr int kKeys = kDecodeKeyBlock;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxGroup = 16;
constexpr int kMaxPairs = 32;  // rotary pairs

struct AttentionParameters {
  SequenceBatch batch;
  KvPages pages;
  const bf16* q_gate;
  int64_t q_gate_stride;
  const bf16* key;
  int64_t key_stride;
  const bf16* value;
  int64_t value_stride;
  const float* query_norm;
  const float* key_norm;
  float epsilon;
  float scale;
  int group;
  int query_heads;
  int pairs;
  bf16* out;
  int64_t out_stride;
  float* partial;        // [block][T][query head][kHeadDim]; null: results are final
  float2* greatest_sum;  // [block][T][query head] m and l
  float frequencies[kMaxPairs];
};

struct AttentionShared {
  alignas(128) uint8_t keys[kKeys * kRowBytes];
  alignas(128) uint8_t values[kKeys * kRowBytes];
  alignas(128) uint8_t probabilities[16 * kKeys * 2];
  float scores[16][kKeys + 4];
  float2 greatest_sum[16];
  float2 turn[kDecodeTokens][kMaxPairs];  // cosine, sine
  int64_t page_row[kKeys];                // (page * page_size + slot) of each key, -1: not an older token's
  int position[kDecodeTokens];
};

// Eight dims per lane of a head: zero-centred norm over 256, then the rotation of the first 2 * pairs dims (pairs is
// 32: dim i and i + 32 are four lanes apart), rounded once.
__device__ inline uint4 norm_and_turn(const uint4& raw, const float* weight, float epsilon, const float2* turn) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  float v[8];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = bf16_low(words[i]);
    v[2 * i + 1] = bf16_high(words[i]);
    squares += v[2 * i] * v[2 * i] + v[2 * i + 1] * v[2 * i + 1];
  }
  const float inverse = rsqrtf(warp_sum(squares) / kHeadDim + epsilon);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= inverse * (1.0f + weight[lane * 8 + i]);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float other = __shfl_xor_sync(~0u, v[i], 4);
    if (lane >= 8) continue;
    const float2 angle = turn[lane % 4 * 8 + i];
    v[i] = lane < 4 ? v[i] * angle.x - other * angle.y : v[i] * angle.x + other * angle.y;
  }
  return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

__device__ inline uint8_t float_to_fp8(float value) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  return static_cast<uint8_t>(pair);
}
__device__ inline uint2 pack_fp8(const uint4& pairs) {
  const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
  uint32_t bytes[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bytes[2 * i] = float_to_fp8(bf16_low(words[i]));
    bytes[2 * i + 1] = float_to_fp8(bf16_high(words[i]));
  }
  return {bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24,
          bytes[4] | bytes[5] << 8 | bytes[6] << 16 | bytes[7] << 24};
}
// Eight FP8 values as bfloat16 in order, exact.
__device__ inline uint4 unpack_fp8(const uint2& raw) {
  const uint32_t words[2] = {raw.x, raw.y};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t even, odd;
    fp8_to_bf16(words[i], even, odd);
    const float v[4] = {bf16_low(even) * kFp8Scale, bf16_low(odd) * kFp8Scale, bf16_high(even) * kFp8Scale,
                        bf16_high(odd) * kFp8Scale};
    out[2 * i] = pack_bf16(v[0], v[1]);
    out[2 * i + 1] = pack_bf16(v[2], v[3]);
  }
  return {out[0], out[1], out[2], out[3]};
}

template <bool kFp8>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(const __grid_constant__ AttentionParameters p) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  AttentionShared& s = *reinterpret_cast<AttentionShared*>(dynamic);
  const uint32_t query_tile = shared_address(dynamic + sizeof(AttentionShared));
  constexpr int kElement = kFp8 ? 1 : 2;

  const int block = blockIdx.x;
  const int kv_head = blockIdx.y;
  const int sequence = blockIdx.z;
  const int thread = threadIdx.x;
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int token_begin = p.batch.token_begin[sequence];
  const int tokens = p.batch.token_begin[sequence + 1] - token_begin;
  const int context = p.batch.context[sequence];
  const int first = block * kKeys;
  if (tokens == 0 || first >= context + tokens) {
    wait_for_predecessor();
    allow_successor();
    return;
  }
  if (thread < kKeys) {
    const int position = first + thread;
    int64_t row = -1;
    if (position < context) {
      const int32_t page = p.batch.page_table[sequence * p.batch.page_table_stride + position / p.pages.page_size];
      row = static_cast<int64_t>(page) * p.pages.page_size + position % p.pages.page_size;
    }
    s.page_row[thread] = row;
  } else if (thread < kKeys + kDecodeTokens && thread - kKeys < tokens) {
    s.position[thread - kKeys] = p.batch.position[token_begin + thread - kKeys];
  }
  __syncthreads();
  const auto page_offset = [&](int64_t row) { return (row * p.pages.heads + kv_head) * kHeadDim * kElement; };
  const uint32_t keys = shared_address(s.keys);
  const uint32_t values = shared_address(s.values);
  if constexpr (!kFp8) {
    for (int tensor = 0; tensor < 2; ++tensor) {
      const auto* const from = static_cast<const uint8_t*>(tensor == 0 ? p.pages.keys : p.pages.values);
      for (int i = thread; i < kKeys * kWarp; i += kThreads) {
        const int64_t row = s.page_row[i / kWarp];
        copy16_async((tensor == 0 ? keys : values) + swizzled<kRowBytes>(i / kWarp, i % kWarp),
                     from + (row >= 0 ? page_offset(row) + i % kWarp * 16 : 0), row >= 0);
      }
      commit_copies();
    }
  } else {
    uint2 raw[2][kKeys * kWarp / kThreads];
#pragma unroll
    for (int j = 0; j < kKeys * kWarp / kThreads; ++j) {
      const int64_t row = s.page_row[warp + j * kWarps];
      raw[0][j] = raw[1][j] = {0, 0};
      if (row < 0) continue;
      raw[0][j] =
          *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p.pages.keys) + page_offset(row) + lane * 8);
      raw[1][j] =
          *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p.pages.values) + page_offset(row) + lane * 8);
    }
#pragma unroll
    for (int j = 0; j < kKeys * kWarp / kThreads; ++j) {
      const uint32_t at = swizzled<kRowBytes>(warp + j * kWarps, lane);
      *reinterpret_cast<uint4*>(s.keys + at) = unpack_fp8(raw[0][j]);
      *reinterpret_cast<uint4*>(s.values + at) = unpack_fp8(raw[1][j]);
    }
  }
  for (int i = thread; i < tokens * p.pairs; i += kThreads) {
    float sine, cosine;
    sincosf(static_cast<float>(s.position[i / p.pairs]) * p.frequencies[i % p.pairs], &sine, &cosine);
    s.turn[i / p.pairs][i % p.pairs] = {round_bf16(cosine), round_bf16(sine)};
  }

  wait_for_predecessor();
  allow_successor();
  wait_copies<0>();
  __syncthreads();  // the angles; and older keys must not overwrite the step's own
  const int rows = tokens * p.group;
  const int tiles = (rows + 15) / 16;
  for (int row = warp; row < tiles * 16; row += kWarps) {
    uint4 query = {};
    if (row < rows) {
      const int t = row / p.group;
      const int head = kv_head * p.group + row % p.group;
      const uint4 raw = *reinterpret_cast<const uint4*>(p.q_gate + (token_begin + t) * p.q_gate_stride +
                                                        head * 2 * kHeadDim + lane * 8);
      query = norm_and_turn(raw, p.query_norm, p.epsilon, s.turn[t]);
    }
    *reinterpret_cast<uint4*>(dynamic + sizeof(AttentionShared) + swizzled<kRowBytes>(row, lane)) = query;
  }
  for (int t = warp; t < tokens; t += kWarps) {
    const int local = context + t - first;
    if (local < 0 || local >= kKeys) continue;
    const uint4 raw =
        *reinterpret_cast<const uint4*>(p.key + (token_begin + t) * p.key_stride + kv_head * kHeadDim + lane * 8);
    uint4 key = norm_and_turn(raw, p.key_norm, p.epsilon, s.turn[t]);
    uint4 value =
        *reinterpret_cast<const uint4*>(p.value + (token_begin + t) * p.value_stride + kv_head * kHeadDim + lane * 8);
    const int position = context + t;
    const int32_t page = p.batch.page_table[sequence * p.batch.page_table_stride + position / p.pages.page_size];
    const int64_t at = page_offset(static_cast<int64_t>(page) * p.pages.page_size + position % p.pages.page_size);
    uint8_t* const key_to = static_cast<uint8_t*>(p.pages.keys) + at + lane * 8 * kElement;
    uint8_t* const value_to = static_cast<uint8_t*>(p.pages.values) + at + lane * 8 * kElement;
    if constexpr (kFp8) {
      const uint2 narrow_key = pack_fp8(key);
      const uint2 narrow_value = pack_fp8(value);
      *reinterpret_cast<uint2*>(key_to) = narrow_key;
      *reinterpret_cast<uint2*>(value_to) = narrow_value;
      key = unpack_fp8(narrow_key);  // as a later step will read them
      value = unpack_fp8(narrow_value);
    } else {
      *reinterpret_cast<uint4*>(key_to) = key;
      *reinterpret_cast<uint4*>(value_to) = value;
    }
    *reinterpret_cast<uint4*>(s.keys + swizzled<kRowBytes>(local, lane)) = key;
    *reinterpret_cast<uint4*>(s.values + swizzled<kRowBytes>(local, lane)) = value;
  }
  __syncthreads();

  const uint32_t probabilities = shared_address(s.probabilities);
  for (int tile = 0; tile < tiles; ++tile) {
    // Scores of keys 8 warp .. 8 warp + 7, two sums over halves of every 32 dims.
    float score[2][4] = {};
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      uint32_t b[4];
      load_matrices(b, keys + swizzled<kRowBytes>(warp * 8 + lane % 8, i * 4 + lane / 8));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[4];
        load_matrices(a, query_tile + swizzled<kRowBytes>(tile * 16 + lane % 16, i * 4 + half * 2 + lane / 16));
        multiply_add(score[half], a, b[2 * half], b[2 * half + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s.scores[lane / 4 + i / 2 * 8][warp * 8 + lane % 4 * 2 + i % 2] = (score[0][i] + score[1][i]) * p.scale;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = warp * 2 + i;
      const int row = tile * 16 + r;
      const int visible = row < rows ? context + row / p.group - first : -1;  // keys 0..visible of the block
      const float2 pair = *reinterpret_cast<const float2*>(&s.scores[r][lane * 2]);
      const float x = lane * 2 <= visible ? pair.x : -INFINITY;
      const float y = lane * 2 + 1 <= visible ? pair.y : -INFINITY;
      const float greatest = warp_max(fmaxf(x, y));
      // The sum is that of the rounded values which multiply V.
      const uint32_t rounded = visible < 0 ? 0 : pack_bf16(__expf(x - greatest), __expf(y - greatest));
      const float sum = warp_sum(bf16_low(rounded) + bf16_high(rounded));
      *reinterpret_cast<uint32_t*>(s.probabilities + swizzled<kKeys * 2>(r, lane / 4) + lane % 4 * 4) = rounded;
      if (lane == 0) s.greatest_sum[r] = {greatest, sum};
    }
    __syncthreads();
    // Dims 32 warp .. 32 warp + 31.
    float o[4][4] = {};
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      uint32_t a[4];
      load_matrices(a, probabilities + swizzled<kKeys * 2>(lane % 16, i * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t b[4];
        load_matrices_transposed(b, values + swizzled<kRowBytes>(i * 16 + lane % 16, warp * 4 + j * 2 + lane / 16));
        multiply_add(o[2 * j], a, b[0], b[1]);
        multiply_add(o[2 * j + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = lane / 4 + half * 8;
      const int row = tile * 16 + r;
      if (row >= rows) continue;
      const int t = token_begin + row / p.group;
      const int head = kv_head * p.group + row % p.group;
      const float2 ml = s.greatest_sum[r];
      const int dim = warp * 32 + lane % 4 * 2;
      if (p.partial == nullptr) {
        const bf16* const gate = p.q_gate + t * p.q_gate_stride + head * 2 * kHeadDim + kHeadDim;
        bf16* const out = p.out + t * p.out_stride + head * kHeadDim;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t g = *reinterpret_cast<const uint32_t*>(gate + dim + j * 8);
          *reinterpret_cast<uint32_t*>(out + dim + j * 8) = pack_bf16(
              o[j][half * 2] / ml.y * sigmoid(bf16_low(g)), o[j][half * 2 + 1] / ml.y * sigmoid(bf16_high(g)));
        }
        continue;
      }
      const int64_t at = (static_cast<int64_t>(block) * p.batch.tokens + t) * p.query_heads + head;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        *reinterpret_cast<float2*>(p.partial + at * kHeadDim + dim + j * 8) = {o[j][half * 2], o[j][half * 2 + 1]};
      }
      if (warp == 0 && lane % 4 == 0) p.greatest_sum[at] = ml;
    }
    // The next tile's scores and probabilities are written after the barrier between them; its first writes go to
    // `scores`, which nobody reads any more, and greatest_sum is rewritten after that barrier.
    __syncthreads();
  }
}

constexpr int kCombineThreads = 512;
constexpr int kCombineDims = 64;                                      // per block
constexpr int kCombineGroups = kCombineThreads / (kCombineDims / 4);  // blocks of keys added side by side

__global__ void __launch_bounds__(kCombineThreads)
    decode_attention_combine_kernel(const __grid_constant__ AttentionParameters p) {
  extern __shared__ __align__(16) float weights[];  // [key blocks]
  __shared__ float4 sums[kCombineGroups][kCombineDims / 4];
  __shared__ float reduced[kCombineThreads / kWarp];
  const int head = blockIdx.x;
  const int t = blockIdx.y;
  const int dim = blockIdx.z * kCombineDims;
  const int thread = threadIdx.x;
  const int blocks = p.batch.position[t] / kKeys + 1;
  wait_for_predecessor();
  allow_successor();
  const int64_t stride = static_cast<int64_t>(p.batch.tokens) * p.query_heads;
  const int64_t at = static_cast<int64_t>(t) * p.query_heads + head;
  float greatest = -INFINITY;
  for (int b = thread; b < blocks; b += kCombineThreads) greatest = fmaxf(greatest, p.greatest_sum[b * stride + at].x);
  greatest = warp_max(greatest);
  if (thread % kWarp == 0) reduced[thread / kWarp] = greatest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCombineThreads / kWarp; ++i) greatest = fmaxf(greatest, reduced[i]);
  __syncthreads();
  float sum = 0;
  for (int b = thread; b < blocks; b += kCombineThreads) {
    const float2 ml = p.greatest_sum[b * stride + at];
    weights[b] = __expf(ml.x - greatest);
    sum += weights[b] * ml.y;
  }
  sum = warp_sum(sum);
  if (thread % kWarp == 0) reduced[thread / kWarp] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int i = 0; i < kCombineThreads / kWarp; ++i) sum += reduced[i];

  const int column = thread % (kCombineDims / 4);
  const int group = thread / (kCombineDims / 4);
  float4 o = {};
#pragma unroll 8
  for (int b = group; b < blocks; b += kCombineGroups) {
    const float4 v = *reinterpret_cast<const float4*>(p.partial + (b * stride + at) * kHeadDim + dim + column * 4);
    const float w = weights[b];
    o.x += w * v.x;
    o.y += w * v.y;
    o.z += w * v.z;
    o.w += w * v.w;
  }
  sums[group][column] = o;
  __syncthreads();
  if (thread >= kCombineDims) return;
  float total = 0;
#pragma unroll
  for (int g = 0; g < kCombineGroups; ++g) total += reinterpret_cast<const float*>(sums[g])[thread];
  const float gate = __bfloat162float(p.q_gate[t * p.q_gate_stride + head * 2 * kHeadDim + kHeadDim + dim + thread]);
  p.out[t * p.out_stride + head * kHeadDim + dim + thread] = __float2bfloat16_rn(total / sum * sigmoid(gate));
}

int64_t key_blocks(int64_t max_context) { return (max_context + kKeys - 1) / kKeys; }

Status check(const DecodeAttention& a) {
  const auto bad = [](const std::string& what) { return invalid_argument("decode_attention: " + what); };
  if (a.shape.head_dim != kHeadDim || a.shape.rotary_dim != 2 * kMaxPairs)
    return bad("head_dim must be 256, rotary_dim 64");
  if (a.shape.kv_heads < 1 || a.shape.query_heads % a.shape.kv_heads != 0 ||
      a.shape.query_heads / a.shape.kv_heads > kMaxGroup) {
    return bad("at most 16 query heads per KV head are taken");
  }
  if (a.batch.tokens < 1 || a.batch.tokens > kDecodeTokens) return bad("1 to 8 tokens are taken");
  if (a.pages.dtype != DType::kBFloat16 && a.pages.dtype != DType::kFloat8E4M3) {
    return bad("KV pages must be bfloat16 or float8_e4m3");
  }
  if (a.max_context < 1) return bad("max_context must be at least 1");
  if (key_blocks(a.max_context) > 1 && a.workspace == nullptr) return bad("a workspace is needed");
  return {};
}

}  // namespace

int64_t decode_attention_workspace_bytes(const AttentionShape& shape, int64_t tokens, int64_t max_context) {
  const int64_t blocks = key_blocks(max_context);
  if (blocks <= 1) return 0;
  return blocks * tokens * shape.query_heads * static_cast<int64_t>(kHeadDim * sizeof(float) + sizeof(float2));
}

Status decode_attention(const DecodeAttention& args, const Launch& launch) {
  TS_RETURN_IF_ERROR(check(args));
  const int64_t blocks = key_blocks(args.max_context);
  AttentionParameters p = {};
  p.batch = args.batch;
  p.pages = args.pages;
  p.q_gate = static_cast<const bf16*>(args.q_gate.data);
  p.q_gate_stride = args.q_gate.stride;
  p.key = static_cast<const bf16*>(args.key.data);
  p.key_stride = args.key.stride;
  p.value = static_cast<const bf16*>(args.value.data);
  p.value_stride = args.value.stride;
  p.query_norm = args.query_norm;
  p.key_norm = args.key_norm;
  p.epsilon = args.epsilon;
  p.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  p.group = static_cast<int>(args.shape.query_heads / args.shape.kv_heads);
  p.query_heads = static_cast<int>(args.shape.query_heads);
  p.pairs = kMaxPairs;
  p.out = static_cast<bf16*>(args.out.data);
  p.out_stride = args.out.stride;
  if (blocks > 1) {
    p.partial = static_cast<float*>(args.workspace);
    p.greatest_sum = reinterpret_cast<float2*>(p.partial + blocks * args.batch.tokens * p.query_heads * kHeadDim);
  }
  for (int i = 0; i < kMaxPairs; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(args.shape.rotary_dim);
    p.frequencies[i] = 1.0f / static_cast<float>(std::pow(static_cast<double>(args.shape.rope_theta), exponent));
  }
  const int64_t tiles = (args.batch.tokens * p.group + 15) / 16;
  const size_t shared = sizeof(AttentionShared) + static_cast<size_t>(tiles) * 16 * kRowBytes;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.shape.kv_heads),
                  static_cast<unsigned>(args.batch.sequences));
  auto* const kernel =
      args.pages.dtype == DType::kFloat8E4M3 ? decode_attention_kernel<true> : decode_attention_kernel<false>;
  TS_RETURN_IF_ERROR(launch_kernel("decode_attention", launch, kernel, grid, kThreads, shared, 1, p));
  if (blocks <= 1) return {};
  const dim3 combine(static_cast<unsigned>(p.query_heads), static_cast<unsigned>(args.batch.tokens),
                     kHeadDim / kCombineDims);
  return launch_kernel("decode_attention", launch, decode_attention_combine_kernel, combine, kCombineThreads,
                       static_cast<size_t>(blocks) * sizeof(float), 1, p);
}

}  // namespace tokenspeed::kernels::cuda

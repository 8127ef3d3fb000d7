// Types shared by all op contracts. kernels/ takes pointers, shapes and strides and knows nothing of models.
//
// Each op has one header with a parameter struct (its contract: formula, shapes, dtypes, aliasing, bytes) and one
// function per implementation:
//   reference::op(args)            plain loops, fp32 storage arithmetic in double where sums are long; the oracle
//   cpu::op(args, pool)            fastest for this machine (AVX-512-BF16, AVX-512, AVX2), chosen at run time
//   cuda::op(args, stream)         kernels/cuda/*.h, where a CUDA toolkit was found
//
// Row invariance: for every op, the bits of an output row depend on that row's own inputs only, never on how many rows
// are computed with it, nor on the number of threads. Batched, chunked and speculative steps rely on it.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace tokenspeed {
class ThreadPool;
}

namespace tokenspeed::kernels {

// How a weight matrix [n, k] (n output features, k input features) lies in memory.
//
//  kRowMajor      w[n][k], as in checkpoint files. dtype float32, bfloat16 or float8_e4m3.
//
//  kPanel16       For CPUs: panels of 16 output rows, the k axis innermost but for groups of `pair` elements:
//                     panel p = n / 16 :  [k / pair][lane = n % 16][k % pair]
//                 pair = 2 for bfloat16 (the operand order of VDPBF16PS), 1 for float32. One 64-byte line holds one
//                 step of k for 16 outputs, so a GEMV and a GEMM stream the same bytes and add in the same order of k.
//                 n is padded to a multiple of 16 and k to a multiple of pair with zeros.
enum class MatrixLayout : uint8_t { kRowMajor, kPanel16 };

struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  MatrixLayout layout = MatrixLayout::kRowMajor;
  int64_t n = 0;
  int64_t k = 0;
  // float8_e4m3 only: w = w8 * scale[n / 128][k / 128], float32 [ceil(n/128), ceil(k/128)], row-major.
  const float* scale = nullptr;
};

// T rows of activations; dtype float32 or bfloat16. stride is in elements and >= the row's length.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;
};

// Which rows of a step belong to which sequence. Rows of one sequence are consecutive and in order of position.
struct SequenceBatch {
  int32_t sequences = 0;                 // S
  int32_t tokens = 0;                    // T, all rows of the step
  const int32_t* token_begin = nullptr;  // [S + 1] first row of each sequence; token_begin[S] = T
  const int32_t* context = nullptr;      // [S] tokens of the sequence already in its caches before this step
  const int32_t* position = nullptr;     // [T] position of each row in its sequence
  const int32_t* sequence = nullptr;     // [T] sequence of each row
  const int32_t* page_table = nullptr;   // [S, page_table_stride] KV page of each run of page_size positions
  int64_t page_table_stride = 0;
  const int32_t* state_in = nullptr;   // [S] state slot read; -1 means the zero state (a new sequence)
  const int32_t* state_out = nullptr;  // [S] state slot written; may equal state_in
};

// One layer's keys or values in pages: element (page, i, head, d) at ((page * page_size + i) * heads + head) * head_dim
// + d.
struct KvPages {
  void* keys = nullptr;
  void* values = nullptr;
  DType dtype = DType::kBFloat16;  // float32 (CPU), bfloat16 or float8_e4m3: the value itself, saturated at 448
  int32_t page_size = 0;
  int32_t heads = 0;  // KV heads
  int32_t head_dim = 0;
};

}  // namespace tokenspeed::kernels

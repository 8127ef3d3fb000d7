// The two ends of a step on the device: from the host's input block to a SequenceBatch, and from tokens to the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/types.h"

namespace tokenspeed::kernels::cuda {

struct PageChange {
  int32_t index = 0;  // in the page table
  int32_t page = 0;
};

// position[t] and sequence[t] of every row from token_begin and context; page_table[change.index] = change.page. A
// token id below 0 stands for sampled[~id], which the step before left; where that is no token (a failed row), for
// token 0.
struct ExpandBatch {
  int32_t sequences = 0;
  int32_t tokens = 0;
  const int32_t* token_begin = nullptr;
  const int32_t* context = nullptr;
  const PageChange* changes = nullptr;
  const int32_t* change_count = nullptr;
  const int32_t* sampled = nullptr;
  int32_t* ids = nullptr;  // replaced in place
  int32_t* position = nullptr;
  int32_t* sequence = nullptr;
  int32_t* page_table = nullptr;
  uint64_t* begin_ns = nullptr;  // the GPU's clock
};
void expand_batch(const ExpandBatch& args, cudaStream_t stream);

// words[i] = the low half of *number above tokens[i], in mapped host memory: a word whose upper half is the number
// holds the token, so that nothing has to be waited for between the two. One word, of token -1, when there are no
// tokens. *end_ns is the GPU's clock before, to be read when the next step has ended: nothing waits until it is there.
struct PublishTokens {
  int32_t count = 0;
  const int32_t* tokens = nullptr;
  const uint64_t* number = nullptr;
  uint64_t* end_ns = nullptr;
  uint64_t* host_words = nullptr;
};
void publish_tokens(const PublishTokens& args, cudaStream_t stream);

}  // namespace tokenspeed::kernels::cuda

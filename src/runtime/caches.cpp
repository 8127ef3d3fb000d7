#include "runtime/caches.h"

namespace tokenspeed::runtime {

void CacheLayers::lay_out(const compile::KvLayout& kv, const compile::StateLayout& state, int64_t positions,
                          int32_t page_size, std::byte* kv_memory, std::byte* state_memory) {
  for (int32_t layer = 0; layer < static_cast<int32_t>(kv.layers.size()); ++layer) {
    const int64_t half = positions * kv.bytes_per_position(layer) / 2;
    kernels::KvPages pages;
    pages.keys = kv_memory;
    pages.values = kv_memory + half;
    pages.dtype = kv.dtype;
    pages.page_size = page_size;
    pages.heads = static_cast<int32_t>(kv.layers[layer].heads);
    pages.head_dim = static_cast<int32_t>(kv.layers[layer].head_dim);
    kv_layers_.push_back(pages);
    kv_memory += 2 * half;
  }
  for (const compile::StateLayout::Layer& layer : state.layers) {
    state_layers_.push_back({state_memory + layer.recurrent_offset, state_memory + layer.conv_offset, state.conv_dtype,
                             state.bytes_per_slot});
  }
}

}  // namespace tokenspeed::runtime

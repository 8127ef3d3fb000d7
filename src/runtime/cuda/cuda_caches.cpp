#include "runtime/cuda/cuda_caches.h"

#include <string>

namespace tokenspeed::runtime {

Result<CudaCaches> CudaCaches::allocate(const compile::KvLayout& kv, const compile::StateLayout& state, int64_t pages,
                                        int32_t page_size, int64_t slots) {
  CudaCaches caches;
  const int64_t positions = pages * page_size;
  TS_ASSIGN_OR_RETURN(caches.kv_memory_,
                      DeviceMemory::allocate(positions * kv.bytes_per_position(), std::to_string(pages) + " KV pages"));
  TS_ASSIGN_OR_RETURN(caches.state_memory_,
                      DeviceMemory::allocate(slots * state.bytes_per_slot, std::to_string(slots) + " state slots"));
  std::byte* next = caches.kv_memory_.data();
  for (int32_t layer = 0; layer < static_cast<int32_t>(kv.layers.size()); ++layer) {
    const int64_t half = positions * kv.bytes_per_position(layer) / 2;
    kernels::KvPages layer_pages;
    layer_pages.keys = next;
    layer_pages.values = next + half;
    layer_pages.dtype = kv.dtype;
    layer_pages.page_size = page_size;
    layer_pages.heads = static_cast<int32_t>(kv.layers[layer].heads);
    layer_pages.head_dim = static_cast<int32_t>(kv.layers[layer].head_dim);
    caches.kv_layers_.push_back(layer_pages);
    next += 2 * half;
  }
  for (const compile::StateLayout::Layer& layer : state.layers) {
    caches.state_layers_.push_back({caches.state_memory_.data() + layer.recurrent_offset,
                                    caches.state_memory_.data() + layer.conv_offset, state.conv_dtype,
                                    state.bytes_per_slot});
  }
  return caches;
}

}  // namespace tokenspeed::runtime

// What a rank remembers of its sequences: the pages of keys and values and the recurrent-state slots, in its device's
// memory. A step only reads positions and slots that it or an earlier step wrote.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "compile/program.h"
#include "kernels/gated_delta_net.h"
#include "kernels/types.h"

namespace tokenspeed::runtime {

// The layers' places in that memory.
class CacheLayers {
 public:
  const kernels::KvPages& kv(int32_t kv_layer) const { return kv_layers_[kv_layer]; }
  const kernels::GdnState& state(int32_t state_layer) const { return state_layers_[state_layer]; }

 protected:
  void lay_out(const compile::KvLayout& kv, const compile::StateLayout& state, int64_t positions, int32_t page_size,
               std::byte* kv_memory, std::byte* state_memory);

 private:
  std::vector<kernels::KvPages> kv_layers_;
  std::vector<kernels::GdnState> state_layers_;
};

// Memory: HostMemory, DeviceMemory.
template <typename Memory>
class Caches : public CacheLayers {
 public:
  // resource_exhausted when the device has not that memory.
  static Result<Caches> allocate(const compile::KvLayout& kv, const compile::StateLayout& state, int64_t pages,
                                 int32_t page_size, int64_t slots) {
    Caches caches;
    const int64_t positions = pages * page_size;
    TS_ASSIGN_OR_RETURN(caches.kv_memory_,
                        Memory::allocate(positions * kv.bytes_per_position(), std::to_string(pages) + " KV pages"));
    TS_ASSIGN_OR_RETURN(caches.state_memory_,
                        Memory::allocate(slots * state.bytes_per_slot, std::to_string(slots) + " state slots"));
    caches.lay_out(kv, state, positions, page_size, caches.kv_memory_.data(), caches.state_memory_.data());
    return caches;
  }

 private:
  Memory kv_memory_;
  Memory state_memory_;
};

}  // namespace tokenspeed::runtime

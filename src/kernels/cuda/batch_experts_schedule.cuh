// The kernel of batch_experts.cu: its parameters, its shared memory, and which items a block works on.
#pragma once

#include "kernels/cuda/batch_experts.cuh"
#include "kernels/cuda/batch_tiles.cuh"

namespace tokenspeed::kernels::cuda::batch_experts_parts {

inline constexpr int kConsumers = 2;  // warpgroups
inline constexpr int kStagingWarps = 4;
inline constexpr int kThreads = kConsumers * kWarpgroup + (kStagingWarps + 1) * kWarp;
inline constexpr int kSlots = 8;
inline constexpr int kItemRows = 128;
inline constexpr int kPairedRows = kItemRows / 2;
inline constexpr int kWeightBytes = kConsumers * kBatchTile;
template <bool kFp8>
inline constexpr int kMostColumns = kColumnsPerRow<kFp8>* kEntryRows;
inline constexpr int kRowBytes = kMostColumns<true> * kBatchChunk;
inline constexpr int kArrivalsPerTile = kConsumers;
static_assert(kSlots % kStagingWarps == 0);

struct ExpertsParameters {
  ExpertList list;
  uint32_t* arrived;
  const bf16* x;
  int64_t x_stride;
  bf16* activations;  // by place
  int64_t activation_stride;
  float* results;         // by pair
  const float* scale[2];  // of gate_up, down
  const float* shared_scale[2];
  int experts;
  int hidden;
  int width;
  int shared_width;
};

struct Shared {
  unsigned char weights[kSlots][kWeightBytes];
  unsigned char rows[kSlots][kRowBytes];
  float row_scale[kSlots][kEntryRows];
  float weight_scale[kSlots][2];  // of gate and up rows, or twice the same
  alignas(8) uint64_t full[kSlots];
  alignas(8) uint64_t empty[kSlots];
  alignas(16) uint32_t list[];
};

struct Item {
  bool down;
  int entry;
  int tile;
  int steps;
  uint32_t packed;  // the entry
};

// The items of this block in order. Blocks with one gate/up item less do as many down items more as take the same time.
template <bool kFp8>
class Schedule {
 public:
  __device__ Schedule(const ExpertsParameters& p, const uint32_t* list)
      : p_(p),
        entries_(list + 4),
        shared_entries_(static_cast<int>(list[1])),
        blocks_(static_cast<int>(gridDim.x)),
        block_(static_cast<int>(blockIdx.x)) {
    const int routed_entries = static_cast<int>(list[0]) - shared_entries_;
    shared_items_ = shared_entries_ * (p.shared_width / kPairedRows);
    gate_items_ = shared_items_ + routed_entries * (p.width / kPairedRows);
    down_items_ = static_cast<int>(list[0]) * (p.hidden / kItemRows);
    const int heavy = gate_items_ % blocks_;
    light_ = heavy == 0 ? 0 : blocks_ - heavy;
    extra_ = light_ == 0 ? 0 : min(p.hidden / p.width, down_items_ / light_);
    own_extra_ = light_ > 0 && block_ >= heavy ? extra_ : 0;
    place_ = block_ - heavy;
  }
  __device__ bool next(Item* item) {
    const int gate = block_ + count_ * blocks_;
    if (gate < gate_items_) {
      ++count_;
      const bool shared = gate < shared_items_;
      const int tiles = (shared ? p_.shared_width : p_.width) / kPairedRows;
      const int index = shared ? gate : gate - shared_items_;
      item->down = false;
      item->entry = (shared ? 0 : shared_entries_) + index / tiles;
      item->tile = index % tiles;
      item->steps = p_.hidden / kChunkElements<kFp8>;
    } else {
      const int n = down_++;
      const int index = n < own_extra_ ? n * light_ + place_ : extra_ * light_ + block_ + (n - own_extra_) * blocks_;
      if (index >= down_items_) return false;
      const int tiles = p_.hidden / kItemRows;
      item->down = true;
      item->entry = index / tiles;
      item->tile = index % tiles;
      item->steps = (item->entry < shared_entries_ ? p_.shared_width : p_.width) / kChunkElements<kFp8>;
    }
    item->packed = entries_[item->entry];
    return true;
  }

 private:
  const ExpertsParameters& p_;
  const uint32_t* entries_;
  int shared_entries_, blocks_, block_;
  int shared_items_, gate_items_, down_items_, light_, extra_, own_extra_, place_;
  int count_ = 0;
  int down_ = 0;
};

}  // namespace tokenspeed::kernels::cuda::batch_experts_parts

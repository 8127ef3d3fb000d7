// The kernel of batch_experts.cu: the step's rows on their way into the ring.
#pragma once

#include "kernels/cuda/batch_experts_schedule.cuh"

namespace tokenspeed::kernels::cuda::batch_experts_parts {

// The slots that a staging warp serves, one after the other, and what it reads for them.
template <bool kFp8>
class Stager {
 public:
  static constexpr int kLanes = kLanesPerRow<kFp8>;
  static constexpr int kRowsAtOnce = kWarp / kLanes;
  static constexpr int kAhead = 2;  // pieces fetched a slot ahead
  static constexpr int kBurst = 8;  // in flight together when there are more

  __device__ Stager(const ExpertsParameters& p, Shared& shared)
      : p_(p),
        shared_(shared),
        schedule_(p, shared.list),
        places_(shared.list + 4 + p.list.entry_capacity),
        warp_(static_cast<int>(threadIdx.x) / kWarp % kStagingWarps),
        lane_(static_cast<int>(threadIdx.x) % kWarp) {}

  // To this warp's next slot; false when there is none.
  __device__ bool advance() {
    step_ += kStagingWarps;
    while (step_ >= item_.steps) {
      done_ += item_.steps;
      if (!schedule_.next(&item_)) return false;
      step_ = (warp_ - done_) & (kStagingWarps - 1);
      open();
    }
    return true;
  }
  // Without waiting for activations that are not there yet.
  __device__ bool may_fetch() {
    if (item_.down && ready_entry_ != item_.entry) ready_entry_ = activations_ready() ? item_.entry : ready_entry_;
    return !item_.down || ready_entry_ == item_.entry;
  }
  __device__ void wait_until_ready() {
    while (!may_fetch()) {
    }
  }
  __device__ void fetch() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead_[i] = piece(i);
    if constexpr (kFp8) weight_scale_ = __ldg(scale_ + step_);
  }
  struct Slot {
    uint4 raw[kAhead];
    float weight_scale;
    int rows;
    int number;
  };
  __device__ Slot slot() const {
    Slot slot;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) slot.raw[i] = ahead_[i];
    slot.weight_scale = weight_scale_;
    slot.rows = rows_;
    slot.number = done_ + step_;
    return slot;
  }
  // The pieces beyond those fetched ahead; the slot must be this stager's present one.
  __device__ void stage_rest(int s) {
    const uint32_t tile = shared_address(shared_.rows[s]);
    for (int begin = kAhead; begin * kRowsAtOnce < rows_; begin += kBurst) {
      uint4 raw[kBurst];
#pragma unroll
      for (int i = 0; i < kBurst; ++i) raw[i] = piece(begin + i);
#pragma unroll
      for (int i = 0; i < kBurst; ++i) {
        if ((begin + i) * kRowsAtOnce >= rows_) break;
        const int row = (begin + i) * kRowsAtOnce + lane_ / kLanes;
        stage_piece<kFp8>(raw[i], row, row < rows_, tile, shared_.row_scale[s]);
      }
    }
  }

 private:
  __device__ void open() {
    const int expert = entry_expert(item_.packed);
    first_ = entry_first(item_.packed);
    rows_ = entry_rows(item_.packed);
    const bool is_shared = expert == p_.experts;
    if constexpr (kFp8) {
      const int width = is_shared ? p_.shared_width : p_.width;
      const float* const all = (is_shared ? p_.shared_scale : p_.scale)[item_.down];
      const int scale_rows = ((item_.down ? p_.hidden : 2 * width) + 127) / 128;
      const int row = item_.down ? item_.tile * kItemRows : item_.tile * kPairedRows + lane_ % 2 * width;
      scale_ = all + ((is_shared ? 0 : static_cast<int64_t>(expert)) * scale_rows + row / 128) * item_.steps;
    }
  }
  // This lane's 16 bytes of row `index * kRowsAtOnce + lane / kLanes`; zeros beyond the rows.
  __device__ uint4 piece(int index) const {
    if (index * kRowsAtOnce >= rows_) return uint4{};
    const int place = first_ + min(index * kRowsAtOnce + lane_ / kLanes, rows_ - 1);
    const bf16* const row =
        item_.down ? p_.activations + place * p_.activation_stride : p_.x + (places_[place] >> 16) * p_.x_stride;
    return __ldcg(reinterpret_cast<const uint4*>(row + lane_ % kLanes * 8 + step_ * kChunkElements<kFp8>));
  }
  __device__ bool activations_ready() const {
    const int width = entry_expert(item_.packed) == p_.experts ? p_.shared_width : p_.width;
    uint32_t seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(p_.arrived + item_.entry) : "memory");
    return __all_sync(~0u, seen >= static_cast<uint32_t>(width / kPairedRows * kArrivalsPerTile));
  }

  const ExpertsParameters& p_;
  Shared& shared_;
  Schedule<kFp8> schedule_;
  const uint32_t* places_;
  int warp_, lane_;
  Item item_ = {};
  int done_ = 0;
  int step_ = 0;
  int first_ = 0;
  int rows_ = 0;
  int ready_entry_ = -1;
  const float* scale_ = nullptr;
  uint4 ahead_[kAhead] = {};
  float weight_scale_ = 0;
};

template <bool kFp8>
__device__ inline void stage_rows(const ExpertsParameters& p, Shared& shared) {
  using S = Stager<kFp8>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  S stager(p, shared);
  bool more = stager.advance();
  bool fetched = false;
  while (more) {
    if (!fetched) {
      stager.wait_until_ready();
      stager.fetch();
    }
    const typename S::Slot slot = stager.slot();
    const int s = slot.number % kSlots;
    const uint32_t tile = shared_address(shared.rows[s]);
    barrier_wait(shared_address(&shared.empty[s]), (slot.number / kSlots + 1) % 2);
    stager.stage_rest(s);
    more = stager.advance();
    fetched = more && stager.may_fetch();
    if (fetched) stager.fetch();
#pragma unroll
    for (int i = 0; i < S::kAhead; ++i) {
      if (i * S::kRowsAtOnce >= slot.rows) break;
      const int row = i * S::kRowsAtOnce + lane / S::kLanes;
      stage_piece<kFp8>(slot.raw[i], row, row < slot.rows, tile, shared.row_scale[s]);
    }
    if constexpr (kFp8) {
      if (lane < 2) shared.weight_scale[s][lane] = slot.weight_scale;
    }
    publish_shared();
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&shared.full[s]));
  }
}

}  // namespace tokenspeed::kernels::cuda::batch_experts_parts

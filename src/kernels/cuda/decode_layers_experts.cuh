// Routed and shared experts as phases: the router's choice, gate and up, then down.
#pragma once

#include "kernels/cuda/decode_layers_project.cuh"

namespace tokenspeed::kernels::cuda {

inline constexpr int kUnitRows = kLayerTileRows / 2;  // rows of h per tile: 8 gate rows and the 8 up rows beside them

// ---- the router's choice ----

// A row's logits in the lanes of its warp, as keys in the order of floats: expert i * 32 + lane. 0: none, or a NaN of
// ones.
template <int kKeys>
struct RowKeys {
  uint32_t key[kKeys];

  // rehearse: whatever words are there will do.
  __device__ void load(const GateUpPhase& p, const uint2* logits, unsigned launch, bool rehearse) {
    const int lane = threadIdx.x % kWarp;
    uint2 word[kKeys];
    bool complete;
#pragma unroll 1
    do {
      complete = true;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) word[i] = load_word(logits + min(i * kWarp + lane, p.experts - 1));
#pragma unroll
      for (int i = 0; i < kKeys; ++i) complete &= word[i].y == launch || rehearse;
    } while (!__all_sync(~0u, complete));
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      key[i] = i * kWarp + lane < p.experts ? ordered_bits(__uint_as_float(word[i].x)) : 0;
    }
  }
  __device__ uint32_t greatest() const {
    uint32_t best = key[0];
#pragma unroll
    for (int i = 1; i < kKeys; ++i) best = max(best, key[i]);
    return best;
  }
};

// The top_k greatest keys one after the other: only where many are equal.
template <int kKeys>
static __device__ __noinline__ void choose_slowly(RowKeys<kKeys> keys, int top_k, int* ids, uint32_t* chosen) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int choice = 0; choice < top_k; ++choice) {
    const uint32_t best = __reduce_max_sync(~0u, keys.greatest());
    unsigned found = kDecodeExperts;
#pragma unroll
    for (int i = kKeys - 1; i >= 0; --i) {
      if (keys.key[i] == best) found = i * kWarp + lane;
    }
    const unsigned id = __reduce_min_sync(~0u, found);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (id == i * kWarp + lane) keys.key[i] = 0;
    }
    if (lane == 0 && best != 0) {
      ids[choice] = static_cast<int>(id);
      chosen[choice] = best;
    }
  }
}

// How many of keys[0 .. kCount - 1] are greater than `key`; 16-byte aligned.
template <int kCount>
__device__ __forceinline__ int count_greater(const uint32_t* keys, uint32_t key) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint4 other = *reinterpret_cast<const uint4*>(keys + i);
    count += ((other.x > key) + (other.y > key)) + ((other.z > key) + (other.w > key));
  }
  return count;
}

// The ids of the row's top_k greatest logits, in order, and their keys, of which s.chosen begins with zeros; ties go to
// the lower id. At least top_k pairs of lanes have a greatest key that is as great as the top_k-th of these, so all
// that are chosen are, and few others.
template <int kKeys>
__device__ __forceinline__ void choose_ids(const RowKeys<kKeys>& keys, int top_k, RowChoice& s, int* ids) {
  static_assert(kDecodeTopK <= kWarp / 2, "a pair of lanes for each choice");
  const int lane = threadIdx.x % kWarp;
  const uint32_t own = keys.greatest();
  const uint32_t pair = max(own, __shfl_xor_sync(~0u, own, 1));
  if (lane % 2 == 0) s.greatest[lane / 2] = pair;
  s.keys[lane] = 0;
  __syncwarp();
  const bool leads = count_greater<kWarp / 2>(s.greatest, pair) < top_k;
  const uint32_t least = max(__reduce_min_sync(~0u, leads ? pair : ~0u), 1u);
  int count = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const bool is_candidate = keys.key[i] >= least;
    const unsigned mask = __ballot_sync(~0u, is_candidate);
    const int at = count + __popc(mask & ((1u << lane) - 1));
    if (is_candidate && at < kWarp) {
      s.keys[at] = keys.key[i];
      s.ids[at] = i * kWarp + lane;
    }
    count += __popc(mask);
  }
  if (count > kWarp) {
    choose_slowly<kKeys>(keys, top_k, ids, s.chosen);
    return;
  }
  __syncwarp();
  const uint32_t key = s.keys[lane];
  int place = __popc(__match_any_sync(~0u, key) & ((1u << lane) - 1));
#pragma unroll 1
  for (int i = 0; i < count; i += 8) place += count_greater<8>(s.keys + i, key);
  if (lane < count && place < top_k) {
    ids[place] = s.ids[lane];
    s.chosen[place] = key;
  }
}

__device__ __forceinline__ float float_of_ordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Row t's ids. The whole warp calls.
template <int kKeys>
__device__ __forceinline__ void choose_row(const GateUpPhase& p, LayerRouting& routing, unsigned launch, int t,
                                           int* ids, bool rehearse) {
  const int lane = threadIdx.x % kWarp;
  RowChoice& choice = routing.choice[t];
  RowKeys<kKeys> keys;
  keys.load(p, p.logits + t * (p.experts + 1), launch, rehearse);
  if (lane < p.top_k) {  // stays where logits are NaN
    ids[lane] = lane;
    choice.chosen[lane] = 0;
  }
  choose_ids(keys, p.top_k, choice, ids);
  __syncwarp();
}
// And its weights.
__device__ __forceinline__ void weigh_row(const GateUpPhase& p, LayerRouting& routing, unsigned launch, int t,
                                          bool rehearse) {
  const int lane = threadIdx.x % kWarp;
  const int top_k = p.top_k;
  const uint2* const logits = p.logits + t * (p.experts + 1);
  const uint32_t* const chosen = routing.choice[t].chosen;
  const float greatest = float_of_ordered(chosen[0]);
  const float mine = lane < top_k ? __expf(float_of_ordered(chosen[lane]) - greatest) : 0.0f;
  float all = mine;
  if (!p.normalize) {
    all = 0;
#pragma unroll 1
    for (int i = lane; i < p.experts; i += kWarp) all += __expf(__uint_as_float(load_word(logits + i).x) - greatest);
  }
  all = warp_sum(all);
  uint2 gate;
  do {
    gate = load_word(logits + (p.has_gate ? p.experts : 0));
  } while (!__all_sync(~0u, gate.y == launch || rehearse));
  const int first = p.shared.width > 0;
  float* const weights = routing.weights + t * (top_k + 1) + first;
  if (lane < top_k) weights[lane] = mine / all;
  if (lane == top_k && first != 0) weights[-1] = p.has_gate ? sigmoid(__uint_as_float(gate.x)) : 1.0f;
}

// The warps that choose the experts of several rows, one each, meet.
template <int kRows>
__device__ __forceinline__ void choosers_barrier() {
  named_barrier(2, kRows * kWarp);
}

// Before list_rows(), and a choosers_barrier() between. first_choice: of every expert that rows chose, the first row
// and its place there: row * 32 + place.
template <int kRows>
__device__ __forceinline__ void clear_lists(LayerRouting& routing, int* first_choice) {
  for (int i = threadIdx.x; i < kDecodeExperts; i += kRows * kWarp) first_choice[i] = kDecodeTokens * kWarp;
  for (int i = threadIdx.x; i <= kRoutingPairsMax; i += kRows * kWarp) {
    *reinterpret_cast<uint2*>(routing.place[i]) = {~0u, ~0u};
  }
}

// The distinct experts of several rows and their places, by warp t of row t, whose lanes have a choice each.
template <int kRows>
__device__ __forceinline__ void list_rows(const GateUpPhase& p, LayerRouting& routing, int* first_choice, int rows,
                                          int t) {
  const int lane = threadIdx.x % kWarp;
  const int first = p.shared.width > 0;
  const bool chosen = t < rows && lane < p.top_k;
  const int id = chosen ? routing.ids[t * p.top_k + lane] : 0;
  const int own = t * kWarp + lane;
  if (chosen) atomicMin(first_choice + id, own);
  choosers_barrier<kRows>();
  const int choice = first_choice[id];
  const unsigned firsts = __ballot_sync(~0u, chosen && choice == own);
  if (lane == 0) routing.firsts[t] = firsts;
  choosers_barrier<kRows>();
  int entry = first;
  int entries = first;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const unsigned bits = routing.firsts[row];
    const int before = choice - row * kWarp;  // at most so many of the row's choices come before
    entry += __popc(before >= kWarp ? bits : before > 0 ? bits & ((1u << before) - 1) : 0);
    entries += __popc(bits);
  }
  if (chosen) {
    if (choice == own) routing.expert[entry] = id;
    routing.place[entry][t] = static_cast<int8_t>(first + lane);
  }
  if (t < rows && lane == 0 && first != 0) routing.place[0][t] = 0;
  if (threadIdx.x == 0) routing.entries = entries;
  choosers_barrier<kRows>();
}

// The rows of every entry, of which nobody asks before gate and up are there.
template <int kRows>
__device__ __forceinline__ void list_entry_rows(LayerRouting& routing) {
  for (int entry = threadIdx.x; entry < routing.entries; entry += kRows * kWarp) {
    const int8_t* const place = routing.place[entry];
    EntryRows found;
#pragma unroll
    for (int t = kRows - 1; t >= 0; --t) {
      if (place[t] < 0) continue;
      found.rows = found.rows << 4 | static_cast<uint32_t>(t);
      found.places = found.places << 4 | static_cast<uint32_t>(place[t]);
    }
    routing.rows[entry] = found;
  }
}

// ---- gate and up ----

// A tile of the phase: those of entry 0 come first, then entry 1's and so on.
struct UnitPlace {
  int entry;
  int tile;
  __device__ UnitPlace(const GateUpPhase& p, int index)
      : entry(index >> p.log_tiles), tile(index & ((1 << p.log_tiles) - 1)) {}
};
__device__ __forceinline__ bool is_shared(const GateUpPhase& p, int entry) { return entry == 0 && p.shared.width > 0; }

// Scales of a tile's gate rows and up rows for a chunk.
__device__ __forceinline__ float2 unit_scale(const GateUpPhase& p, const LayerRouting& routing, const UnitPlace& unit,
                                             int chunk) {
  const bool shared = is_shared(p, unit.entry);
  const float* const scale = shared ? p.shared.scale : p.routed.scale;
  const int expert = shared ? 0 : routing.expert[unit.entry];
  const int columns = p.k >> 7;
  const int width = p.routed.width;
  const int first = expert * ((2 * width + 127) >> 7);
  const int gate = first + (unit.tile * kUnitRows >> 7);
  const int up = first + ((width + unit.tile * kUnitRows) >> 7);
  return {scale[static_cast<int64_t>(gate) * columns + chunk], scale[static_cast<int64_t>(up) * columns + chunk]};
}

// silu(gate) * up of `count` tiles, of which the first is the block's number `first`.
template <int kRows>
__device__ __forceinline__ void finish_units(const GateUpPhase& p, LayerConsumer& c, int first, int count,
                                             const PartBatch& batch, float scale) {
  constexpr int kOutputs = kUnitRows * kRows;
  if (c.warp * kWarp >= batch.tiles * kOutputs) return;
  const int own = threadIdx.x / kOutputs;
  const int t = threadIdx.x % kOutputs / kUnitRows;
  const int row = threadIdx.x % kUnitRows;
  const UnitPlace unit(p, blockIdx.x + (first + own) * gridDim.x);
  const int place = own >= count ? -1 : kRows == 1 ? unit.entry : c.shared.routing.place[unit.entry][t];
  float h = 0;
  if (place >= 0) {
    const float* const parts = batch.parts + own * layer_tile_floats(kRows);
    const int element = t * kLayerTileRows + row;
    scale *= inverse_norm(c.shared, t, p.k, p.epsilon);
    const float gate = add_element<kRows>(parts, element) * scale;
    const float up = add_element<kRows>(parts, element + kUnitRows) * scale;
    h = silu(gate) * up;
  }
  float odd;
  if (!pair_up(h, &odd) || place < 0) return;
  const int at = (t * (p.top_k + 1) + place) * p.routed.width + unit.tile * kUnitRows + row;
  store_word(p.h + (at >> 1), pack_bf16(h, odd), c.launch);
}

// One row's, by a warp of its own. The choice is a few hundred instructions that are executed nowhere else, so that
// most of its time would go into fetching them: the warp goes through them once before the logits are there.
template <int kKeys>
__device__ __forceinline__ void route_row(const GateUpPhase& p, LayerShared& shared, unsigned launch) {
  const int first = p.shared.width > 0;
  if (threadIdx.x % kWarp == 0) shared.routing.entries = first + p.top_k;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool rehearse = pass == 0;
    // Entry 0 is the shared expert, if there is one; then come the row's choices in order. An entry is its place as
    // well.
    choose_row<kKeys>(p, shared.routing, launch, 0, shared.routing.expert + first, rehearse);
    if (!rehearse) warp_arrive(shared_address(&shared.routed));
    weigh_row(p, shared.routing, launch, 0, rehearse);
    __syncwarp();
  }
  warp_arrive(shared_address(&shared.weighted));
}

// Several rows', by the first kRows computing warps; they have no time to rehearse.
template <int kKeys, int kRows>
__device__ __forceinline__ void route_rows(const GateUpPhase& p, LayerConsumer& c) {
  LayerRouting& routing = c.shared.routing;
  const bool has_row = c.warp < c.rows;
  // Nobody has part sums before the choice is made.
  int* const first_choice = reinterpret_cast<int*>(c.buffer<kRows>());
  static_assert(layer_batch_tiles(kRows) * layer_tile_floats(kRows) >= kDecodeExperts);
  c.begin_batch<kRows>();
  clear_lists<kRows>(routing, first_choice);
  choosers_barrier<kRows>();
  if (has_row) choose_row<kKeys>(p, routing, c.launch, c.warp, routing.ids + c.warp * p.top_k, false);
  list_rows<kRows>(p, routing, first_choice, c.rows, c.warp);
  if (threadIdx.x == 0) barrier_arrive(shared_address(&c.shared.routed));
  if (has_row) weigh_row(p, routing, c.launch, c.warp, false);
  list_entry_rows<kRows>(routing);
  __syncwarp();
}

template <bool kFp8, int kRows, int kKeys>
__device__ __forceinline__ void consume_gate_up(const GateUpPhase& p, LayerConsumer& c) {
  const int lane = threadIdx.x % kWarp;
  const int turns = p.turns;
  const int log_turns = turns >> 1;
  const bool active = c.warp < p.warps;
  const LayerRouting& routing = c.shared.routing;
  if constexpr (kRows > 1) {
    if (c.warp < kRows) route_rows<kKeys, kRows>(p, c);
  }
  barrier_wait(shared_address(&c.shared.routed), c.parity(LayerConsumer::kRouted));
  c.mark(1);
  c.at.parity ^= LayerConsumer::kRouted;
  const int tiles = routing.entries << p.log_tiles;
  const int all = tiles_of_block(tiles);
  float2 scales = {1.0f, 1.0f};
  HeldTiles held;
  int first = 0;
  do {
    const PartBatch batch = part_batch<kFp8, kRows>(c, turns);
    if constexpr (kFp8) {
      const bool fetches = held.renew(first, batch.tiles, log_turns);
      const int tile = blockIdx.x + (first + (lane >> log_turns)) * gridDim.x;
      if (fetches && active && tile < tiles) {
        scales = unit_scale(p, routing, UnitPlace(p, tile), c.warp * turns + (lane & (turns - 1)));
      }
    }
    const int count = min(batch.tiles, all - first);
    stream_tiles<kFp8, kRows, true>(c, count, turns, active, scales, (first - held.first) << log_turns, batch.parts);
    c.mark(2);
    consumer_barrier();
    c.mark(3);
    finish_units<kRows>(p, c, first, count, batch, kFp8 ? 1.0f / kLayerStagedScale : 1.0f);
    c.end_batch<kRows>();
    first += batch.tiles;
  } while (first < all);
  c.mark(4);
}

// ---- down ----
//
// A block owns tiles of 16 rows of the result. A slot holds chunks of 16 / chunks experts; warp w multiplies the w-th
// chunk of each slot. A row of the step adds its own experts' parts, weighted, in the order of its choices, whatever
// the others chose: part sums are [row of the step][row of the tile][place * chunks + chunk].

struct DownChunk {
  int entry;
  int chunk;  // of the entry
  __device__ DownChunk(const DownPhase& p, int slot, int warp) {
    const int index = slot * kLayerWarps + warp;
    entry = index >> p.log_chunks;
    chunk = index & ((1 << p.log_chunks) - 1);
  }
  __device__ bool shared(const DownPhase& p) const { return entry == 0 && p.shared.width > 0; }
};

// A lane's values of h: {pair, flag, pair, flag}, of which bfloat16 chunks have the first half.
template <bool kFp8>
__device__ __forceinline__ uint4 load_h(const uint2* from) {
  if constexpr (kFp8) return load_words2(from);
  const uint2 word = load_word(from);
  return {word.x, word.y, 0, word.y};
}
template <bool kFp8, int kRows>
__device__ __forceinline__ void stage_h(const uint4& value, uint8_t* chunk, int t) {
  const LanePairs<kFp8> pairs = [&]() -> LanePairs<kFp8> {
    if constexpr (kFp8) return {{value.x, value.z}};
    return {{value.x}};
  }();
  float v[kLaneValues<kFp8>];
#pragma unroll
  for (int j = 0; j < kLaneValues<kFp8>; ++j) v[j] = pairs.value(j);
  stage_values<kFp8, kRows>(chunk, t, v);
}

// Stages the chunks that this warp multiplies with `slots` slots, of a step of one row.
template <bool kFp8>
__device__ __forceinline__ void stage_down_row(const DownPhase& p, LayerConsumer& c, int first_slot, int slots) {
  constexpr int kSlots = layer_down_slots(1);
  // The entries' results follow each other as their chunks do.
  const int first = first_slot * kLayerWarps + c.warp;
  const int count = min(((c.shared.routing.entries << p.log_chunks) - first + kLayerWarps - 1) / kLayerWarps, slots);
  const uint2* const from = p.h + (first * kWarp + static_cast<int>(threadIdx.x) % kWarp) * (kLaneValues<kFp8> / 2);
  uint4 value[kSlots] = {};
  bool complete;
#pragma unroll 1
  do {
    complete = true;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i < count) value[i] = load_h<kFp8>(from + i * (kLayerConsumers * (kLaneValues<kFp8> / 2)));
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) complete &= i >= count || (value[i].y == c.launch && value[i].w == c.launch);
  } while (!__all_sync(~0u, complete));
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (i < count) stage_h<kFp8, 1>(value[i], c.staged + i * kStagedTurn<kFp8, 1>, 0);
  }
  __syncwarp();
}

// What this warp stages of a slot, of a step of several rows: the rows that chose the expert, as the results of the
// others are not looked at. Most experts have one or two, whose words are asked for while the slot before is
// multiplied.
template <bool kFp8, int kRows>
class DownRows {
 public:
  // Asks for the first two.
  __device__ void fetch(const DownPhase& p, const LayerConsumer& c, int slot) {
    const DownChunk at(p, slot, c.warp);
    left_ = {};
    if (at.entry < c.shared.routing.entries) left_ = c.shared.routing.rows[at.entry];
    words_ = p.h + (((at.chunk * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kLaneValues<kFp8>) >> 1);
    fetch_two(p);
  }
  // Stages all.
  __device__ void stage(const DownPhase& p, const LayerConsumer& c) {
#pragma unroll 1
    while (row_[0] < kRows) {
      while (!__all_sync(~0u, is_there(c.launch))) load();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row_[i] < kRows) stage_h<kFp8, kRows>(value_[i], c.staged, row_[i]);
      }
      fetch_two(p);
    }
    __syncwarp();
  }

 private:
  __device__ void fetch_two(const DownPhase& p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_[i] = static_cast<int>(left_.rows & 15);
      from_[i] = words_ + (row_[i] * (p.top_k + 1) + static_cast<int>(left_.places & 15)) * (p.k >> 1);
      left_.rows = left_.rows >> 4 | 15u << 28;
      left_.places >>= 4;
    }
    load();
  }
  __device__ void load() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row_[i] < kRows) value_[i] = load_h<kFp8>(from_[i]);
    }
  }
  __device__ bool is_there(unsigned launch) const {
    bool complete = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) complete &= row_[i] >= kRows || (value_[i].y == launch && value_[i].w == launch);
    return complete;
  }

  EntryRows left_;  // that have not been asked for
  const uint2* words_;
  int row_[2];  // that have been asked for
  const uint2* from_[2];
  uint4 value_[2];
};

// This warp's chunk of a slot, weighted, to the part sums.
template <bool kFp8, int kRows>
__device__ __forceinline__ void multiply_down(const DownPhase& p, LayerConsumer& c, int slot, int staged,
                                              uint32_t chunk_address, float scale) {
  const LayerRouting& routing = c.shared.routing;
  const DownChunk at(p, slot, c.warp);
  const bool there = at.entry < routing.entries;
  // The only row's products of a chunk that is not there are dropped, as a branch would cost more.
  if (kRows > 1 && !there) return;
  const int lane = threadIdx.x % kWarp;
  const uint8_t* const from = c.staged + staged * kStagedTurn<kFp8, kRows>;
  const ChunkWeights w = load_chunk(chunk_address);
  float acc[4] = {};
  if constexpr (kFp8) {
    multiply_fp8(acc, w, Operand<4>().load<kRows>(from, 0, lane, c.rows), {scale, scale});
  } else {
    multiply_bf16<false>(acc, w, Operand<2>().load<kRows>(from, 0, lane, c.rows));
  }
  const int stride = layer_down_stride((p.top_k + 1) << p.log_chunks);
  c.begin_batch<kRows>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane % 4 * 2 + i;
    if (t >= kRows) break;
    const int place = kRows == 1 ? at.entry : routing.place[at.entry][t];
    if (kRows == 1 ? !there : place < 0) continue;
    const float weight = routing.weights[t * (p.top_k + 1) + place];
    float* const to = c.buffer<kRows>() + (t * kLayerTileRows + lane / 4) * stride + (place << p.log_chunks) + at.chunk;
    to[0] = acc[i] * weight;
    to[8 * stride] = acc[2 + i] * weight;
  }
}

template <bool kFp8>
__device__ __forceinline__ float down_scale(const DownPhase& p, const LayerConsumer& c, int slot, int tile) {
  const LayerRouting& routing = c.shared.routing;
  const DownChunk at(p, slot, c.warp);
  if (!kFp8 || at.entry >= routing.entries) return 1.0f;
  const LayerExperts& m = at.shared(p) ? p.shared : p.routed;
  const int64_t expert = at.shared(p) ? 0 : routing.expert[at.entry];
  const int columns = p.k >> 7;
  return m.scale[(expert * (p.hidden >> 7) + tile / (128 / kLayerTileRows)) * columns + at.chunk];
}

// The part sums of one row of the tile, in order; zeros follow up to the end of a vector.
__device__ __forceinline__ float add_down_parts(const float* row, int parts) {
  constexpr int kAtOnce = 3;  // vectors; 8 + 1 experts of 512 FP8 columns are 9
  float sum[4] = {};
#pragma unroll 1
  for (int begin = 0; begin < parts; begin += 4 * kAtOnce) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float4 v = {};
      if (begin + 4 * i < parts) v = *reinterpret_cast<const float4*>(row + begin + 4 * i);
      sum[0] += v.x;
      sum[1] += v.y;
      sum[2] += v.z;
      sum[3] += v.w;
    }
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
// The zeros, by the threads that add the parts; before the barrier in between.
__device__ __forceinline__ void pad_down_parts(float* row, int parts) {
#pragma unroll 1
  for (int i = parts; i % 4 != 0; ++i) row[i] = 0;
}

template <bool kFp8, int kRows>
__device__ __forceinline__ void consume_down(const DownPhase& p, LayerConsumer& c) {
  constexpr int kSlots = layer_down_slots(kRows);
  constexpr int kOutputs = kLayerTileRows * kRows;
  const LayerRouting& routing = c.shared.routing;
  const int lane = threadIdx.x % kWarp;
  const int slots = ((routing.entries << p.log_chunks) + kLayerWarps - 1) / kLayerWarps;
  const bool has_shared = p.shared.width > 0;
  // Several rows' weights are known when gate and up are.
  if constexpr (kRows == 1) barrier_wait(shared_address(&c.shared.weighted), c.parity(LayerConsumer::kRouted) ^ 1);
  int tile_number = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < p.hidden / kLayerTileRows; tile += gridDim.x, ++tile_number) {
    float scales = down_scale<kFp8>(p, c, lane, tile);  // of 32 slots, one per lane
    DownRows<kFp8, kRows> ahead;
    if constexpr (kRows > 1) ahead.fetch(p, c, 0);
#pragma unroll 1
    for (int first = 0; first < slots; first += kSlots) {
      const int count = min(kSlots, slots - first);
      if constexpr (kRows == 1) {
        stage_down_row<kFp8>(p, c, first, count);
      } else {
        ahead.stage(p, c);
        if (first + 1 < slots) ahead.fetch(p, c, first + 1);
      }
      c.mark(1);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const int slot = first + i;
        if (kRows > 1 && slot % kWarp == 0 && slot > 0) scales = down_scale<kFp8>(p, c, slot + lane, tile);
        int ring_slot;
        const uint32_t chunk = c.wait(&ring_slot);
        multiply_down<kFp8, kRows>(p, c, slot, i, chunk, __shfl_sync(~0u, scales, slot % kWarp));
        c.release(ring_slot);
      }
    }
    const int e = static_cast<int>(threadIdx.x) - tile_number * kOutputs;
    const int t = e / kLayerTileRows;
    const bool valid = e >= 0 && e < kOutputs && t < c.rows;
    float* const row = c.buffer<kRows>() + e * layer_down_stride((p.top_k + 1) << p.log_chunks);
    const int parts = (p.top_k + has_shared) << p.log_chunks;
    const bool adds = __any_sync(~0u, valid);
    if (adds) c.begin_batch<kRows>();
    if (valid) pad_down_parts(row, parts);
    c.mark(2);
    consumer_barrier();
    c.mark(3);
    if (adds) {
      const float sum = valid ? add_down_parts(row, parts) * (kFp8 ? 1.0f / kLayerStagedScale : 1.0f) : 0.0f;
      add_to_residual<kRows>(c, sum, valid, tile, t, e % kLayerTileRows, p.residual_words);
    }
    c.mark(4);
    c.end_batch<kRows>();
  }
  if (tile_number == 0) {
    consumer_barrier();
    c.end_batch<kRows>();
  }
}

}  // namespace tokenspeed::kernels::cuda

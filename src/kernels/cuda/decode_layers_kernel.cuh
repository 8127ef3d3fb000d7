// The persistent kernel itself: one warp fetches the weights of all phases, one chooses a single row's experts, sixteen
// compute phase after phase. Formulas are those of the ops (decode.h, gated_delta_net.h).
// Launch: one block per multiprocessor of 576 or 640 threads (layer_threads()) with up to 227 KiB of shared memory.
// Bytes: every weight of the phases' layers once, of experts those that a row chose; the states once in and once out;
// and between blocks, through L2, 8 bytes for every two activations: written once and read by every block that needs
// them (x, a mixer's result and h by all: about 55 KB per row, layer and block for qwen3.5-35b-a3b).
#pragma once

#include <cstddef>

#include "kernels/cuda/decode_layers_experts.cuh"

namespace tokenspeed::kernels::cuda {

// For the host, should the GPU fail: DecodeProgress. The store goes out behind whatever the block does next.
enum class LayerProgress { kBegun, kFetching };
__device__ __forceinline__ void tell_progress(const LayerProgram& program, LayerProgress what, int phase) {
  if (blockIdx.x != 0 || program.progress.ops == nullptr) return;
  const_cast<volatile uint32_t*>(program.progress.ops)[static_cast<int>(what)] = program.progress.first + phase;
}

// ---- the warp that copies; one lane of it ----

struct LayerProducer {
  const LayerProgram& program;
  LayerShared& shared;
  uint32_t ring;
  RingPosition at;
  RingPosition last = {};  // the slot before
  bool has_last = false;
  // What a phase reads crosses memory's queues behind all weights that were asked for before it. So those that are
  // asked for while blocks may still wait for it, at most a ring of them, are asked for one after the other.
  int to_spread = 0;       // slots
  RingPosition first;      // slot of the phase: when it is released, the phase's input was there
  uint32_t next_copy = 0;  // at which cycle

  // Waits for what has been asked for. What is needed later must not come between: memory would serve it to the blocks
  // that have less to wait for at the cost of the others, and all wait for the last.
  __device__ void settle() const {
    if (has_last) barrier_wait(shared_address(&shared.full[last.slot]), last.parity);
  }
  // Opens the next slot for `bytes`.
  __device__ void open(uint32_t bytes) {
    barrier_wait(shared_address(&shared.empty[at.slot]), at.parity ^ 1);
    barrier_arrive_expecting(shared_address(&shared.full[at.slot]), bytes);
  }
  __device__ void begin_phase(bool spreads) {
    first = at;
    to_spread = spreads ? program.slots : 0;
  }
  // Before a copy of `chunks`.
  __device__ void take_turn(int chunks) {
    if (to_spread <= 0) return;
    while (static_cast<int>(cycle_count() - next_copy) < 0) {
      if (!barrier_test(shared_address(&shared.empty[first.slot]), first.parity)) continue;
      to_spread = 0;
      return;
    }
    next_copy = cycle_count() + chunks * program.spread;
  }
  // `chunks` from a row's `from`-th on, to the slot's `chunk`-th and on.
  __device__ void copy(int chunk, int chunks, int map, int row, int outer, int turn, int from) {
    take_turn(chunks);
    box_copy(ring + at.slot * kLayerSlotBytes + chunk * kLayerTileChunk, program.maps[map], row, outer, turn, from,
             shared_address(&shared.full[at.slot]));
  }
  // A slot of `chunks` of a tile's turn.
  __device__ void fetch(int chunks, int map, int row, int outer, int turn) {
    const int box = layer_box_chunks(chunks);
    open(chunks * kLayerTileChunk);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk += box) copy(chunk, box, map, row, outer, turn, chunk);
    close();
  }
  __device__ void copy_states(const std::byte* from, int bytes) {
    bulk_copy(ring + at.slot * kLayerSlotBytes, from, bytes, shared_address(&shared.full[at.slot]));
  }
  __device__ void close() {
    last = at;
    has_last = true;
    --to_spread;
    at.advance(program.slots);
  }
};

__device__ __forceinline__ void produce_project(const ProjectPhase& p, LayerProducer& producer) {
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const LayerSegment& s = p.segments[segment_of(p, tile)];
    for (int turn = 0; turn < s.turns; ++turn) producer.fetch(s.chunks, s.map, 0, (tile - s.first_tile) * 2, turn);
  }
}

// The states of the block's tasks; of a sequence that has none yet nothing is copied.
__device__ __forceinline__ void produce_states(const MixerPhase& p, int log_parts, LayerProducer& producer) {
  const LayerShared& shared = producer.shared;
  const int tasks = mixer_tasks(p, producer.program.batch.sequences, log_parts);
#pragma unroll 1
  for (int index = blockIdx.x; index < tasks; index += gridDim.x) {
    const MixerTask task(p, index, log_parts);
    if (shared.token_begin[task.sequence] == shared.token_begin[task.sequence + 1]) continue;
    const int state = shared.state_in[task.sequence];
    const std::byte* const from = p.recurrent + state * p.slot_stride + task.state_offset();
#pragma unroll 1
    for (int part = 0; part < task.parts; part += kMixerSlotParts) {
      const int bytes = state < 0 ? 0 : min(kMixerSlotParts, task.parts - part) * kMixerPartBytes;
      producer.open(bytes);
      if (bytes > 0) producer.copy_states(from + part * kMixerPartBytes, bytes);
      producer.close();
    }
  }
}

__device__ __forceinline__ void produce_gate_up(const GateUpPhase& p, uint32_t routed_parity, LayerProducer& producer) {
  const LayerRouting& routing = producer.shared.routing;
  const int turns = p.turns;
  const int routed_map = p.routed.map;
  const int rows = 2 * p.routed.width;
  const int chunks = p.chunks;
  int index = blockIdx.x;
  const auto fetch = [&](int map, int row) {
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) producer.fetch(chunks, map, row, 0, turn);
    index += gridDim.x;
  };
  while (is_shared(p, UnitPlace(p, index).entry)) fetch(p.shared.map, UnitPlace(p, index).tile * kUnitRows);
  barrier_wait(shared_address(&producer.shared.routed), routed_parity);
  const int tiles = routing.entries << p.log_tiles;
#pragma unroll 1
  while (index < tiles) {
    const UnitPlace unit(p, index);
    fetch(routed_map, routing.expert[unit.entry] * rows + unit.tile * kUnitRows);
  }
}

__device__ __forceinline__ void produce_down(const DownPhase& p, LayerProducer& producer) {
  const LayerRouting& routing = producer.shared.routing;
  const int entries = routing.entries;
  const int entries_per_slot = kLayerWarps >> p.log_chunks;
  for (int tile = blockIdx.x; tile < p.hidden / kLayerTileRows; tile += gridDim.x) {
    for (int entry = 0; entry < entries; entry += entries_per_slot) {
      const int count = min(entries_per_slot, entries - entry);
      producer.open((count << p.log_chunks) * kLayerTileChunk);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const bool shared = entry + i == 0 && p.shared.width > 0;
        const int expert = shared ? 0 : routing.expert[entry + i];
        producer.copy(i << p.log_chunks, 1 << p.log_chunks, shared ? p.shared.map : p.routed.map, 0,
                      (expert * p.hidden + tile * kLayerTileRows) / 8, 0, 0);
      }
      producer.close();
    }
  }
}

template <int kRows>
__device__ __forceinline__ void produce(const LayerProgram& program, LayerShared& shared, uint32_t ring) {
  LayerProducer producer = {program, shared, ring, {}};
  producer.next_copy = cycle_count();
  uint32_t routed_parity = 0;
#pragma unroll 1
  for (int i = 0; i < program.phase_count; ++i) {
    const LayerPhase& phase = shared.phases[i];
    tell_progress(program, LayerProgress::kFetching, i);
    producer.begin_phase(phase.is(LayerPhaseKind::kProject) || program.spreads_experts);
    switch (phase.kind) {
      case LayerPhaseKind::kProject:
        if (i > 0 && shared.phases[i - 1].kind == LayerPhaseKind::kDown) producer.settle();
        produce_project(phase.project, producer);
        break;
      case LayerPhaseKind::kGateUp:
        produce_gate_up(phase.gate_up, routed_parity, producer);
        routed_parity ^= 1;
        break;
      case LayerPhaseKind::kDown:
        producer.settle();
        produce_down(phase.down, producer);
        break;
      case LayerPhaseKind::kMixer:
        if constexpr (kRows > 1) producer.settle();
        produce_states(phase.mixer, kRows == 1 ? 0 : phase.mixer.log_parts, producer);
        break;
      case LayerPhaseKind::kRouter:
        break;
    }
  }
}

__device__ __forceinline__ unsigned launch_number(const LayerProgram& program) {
  return load_word(reinterpret_cast<const uint2*>(program.counters)).x + 1;
}

// By each block when its threads have read the launch's number: the last one counts the launch.
__device__ __forceinline__ void count_block(const LayerProgram& program, unsigned launch) {
  if (atomicAdd(program.counters + 1, 1u) + 1 != gridDim.x) return;
  program.counters[1] = 0;
  program.counters[0] = launch;
}

// ---- the warp that chooses a single row's experts ----

template <int kKeys>
__device__ __forceinline__ void choose(const LayerProgram& program, LayerShared& shared) {
  wait_for_predecessor();
  const unsigned launch = launch_number(program);
  uint32_t parity = 0;
#pragma unroll 1
  for (int i = 0; i < program.phase_count; ++i) {
    const LayerPhase& phase = shared.phases[i];
    if (phase.kind != LayerPhaseKind::kGateUp) continue;
    barrier_wait(shared_address(&shared.router_begun), parity);
    route_row<kKeys>(phase.gate_up, shared, launch);
    parity ^= 1;
  }
  // Not at the launch's end, which would wait for the answer.
  if (program.chooser_counts && threadIdx.x % kWarp == 0) count_block(program, launch);
}

// ---- the warps that compute ----

// x of this thread's element, as add_to_residual() takes it.
template <int kRows>
__device__ __forceinline__ bf16* residual_element(const LayerProgram& program) {
  constexpr int kOutputs = kLayerTileRows * kRows;
  const int tile = blockIdx.x + threadIdx.x / kOutputs * gridDim.x;
  const int t = threadIdx.x % kOutputs / kLayerTileRows;
  if (tile * kLayerTileRows >= program.hidden || t >= program.rows) return nullptr;
  return program.x + t * program.x_stride + tile * kLayerTileRows + threadIdx.x % kLayerTileRows;
}

template <bool kFp8, int kRows, int kKeys>
__device__ __forceinline__ void consume(LayerConsumer& c) {
  const LayerProgram& program = c.program;
  wait_for_predecessor();
  allow_successor();
  c.launch = launch_number(program);
  bf16* const x = residual_element<kRows>(program);
  if (x != nullptr) c.residual = __bfloat162float(*x);
#pragma unroll 1
  for (int i = 0; i < program.phase_count; ++i) {
    const LayerPhase& phase = c.shared.phases[i];
    if (threadIdx.x == 0) tell_progress(program, LayerProgress::kBegun, i);
    c.mark(0);
    if (phase.is(LayerPhaseKind::kProject)) {
      consume_project<kFp8, kRows>(phase.project, c);
    } else if (phase.is(LayerPhaseKind::kMixer)) {
      consume_mixer<kRows>(phase.mixer, c);
    } else if (phase.is(LayerPhaseKind::kRouter)) {
      consume_router<kFp8, kRows, kKeys>(phase.router, c);
    } else if (phase.is(LayerPhaseKind::kGateUp)) {
      consume_gate_up<kFp8, kRows, kKeys>(phase.gate_up, c);
    } else {
      consume_down<kFp8, kRows>(phase.down, c);
    }
#ifdef TOKENSPEED_LAYER_CLOCKS
    if (threadIdx.x == 0 && program.phase_count == 23) {
      for (int m = 0; m < 5; ++m) layer_clocks[(i * 8 + m) * 132 + blockIdx.x] = c.shared.clocks[m];
    }
#endif
  }
  if (program.updates_x && x != nullptr) *x = __float2bfloat16_rn(c.residual);
  if (threadIdx.x == 0) tell_progress(program, LayerProgress::kBegun, program.phase_count);
  if ((kRows > 1 || !program.chooser_counts) && threadIdx.x == 0) count_block(program, c.launch);
}

static_assert(offsetof(LayerShared, full) == 0, "LayerConsumer");
static_assert(offsetof(LayerShared, empty) == offsetof(LayerShared, full) + kLayerMaxSlots * 8, "LayerConsumer");
static_assert(sizeof(LayerShared) <= kLayerSharedReserve, "the writer leaves so much for it");

// Where a step has several rows: of 4 x 4 warps and of 4 that were launched with 96 each.
inline constexpr int kConsumerRegisters = 112;
inline constexpr int kProducerRegisters = 32;

// Phases and sequences to shared memory. All loads are on their way before the first is needed: a launch behind an
// attention has blocks whose multiprocessors become free last, and all others wait for what they do.
__device__ __forceinline__ void copy_program(const LayerProgram& program, LayerShared& shared) {
  static_assert(kLayerMaxPhases * sizeof(LayerPhase) / sizeof(uint4) <= kLayerConsumers, "a vector for each thread");
  static_assert(kLayerMaxMaps <= kLayerConsumers, "and a map");
  const int thread = threadIdx.x;
  const SequenceBatch& batch = program.batch;
  const bool has_batch = batch.token_begin != nullptr;
  int begin = 0, in = 0, out = 0;
  if (has_batch && thread <= batch.sequences) begin = batch.token_begin[thread];
  if (has_batch && thread < batch.sequences) {
    in = batch.state_in[thread];
    out = batch.state_out[thread];
  }
  const bool has_vector = thread < program.phase_count * static_cast<int>(sizeof(LayerPhase) / sizeof(uint4));
  uint4 vector = {};
  if (has_vector) vector = static_cast<const uint4*>(as_memory(program.phases))[thread];
  if (thread < program.map_count) prefetch_map(program.maps[thread]);
  if (has_vector) reinterpret_cast<uint4*>(shared.phases)[thread] = vector;
  if (has_batch && thread <= batch.sequences) shared.token_begin[thread] = begin;
  if (has_batch && thread < batch.sequences) {
    shared.state_in[thread] = in;
    shared.state_out[thread] = out;
  }
}

// A block of layer_threads(kRows). kKeys: experts of a lane in the router's choice.
template <bool kFp8, int kRows, int kKeys>
__device__ __forceinline__ void run_layers(const LayerProgram& program) {
  uint8_t* const memory = dynamic_shared();
  const int thread = threadIdx.x;
  uint8_t* const staged = memory + program.slots * kLayerSlotBytes;
  uint8_t* const partial = staged + program.staged_bytes;
  LayerShared& shared = *reinterpret_cast<LayerShared*>(partial + layer_buffers(kRows) * program.partial_bytes);
  // A thread that has no part in what is copied.
  if (thread == kLayerConsumers) {
    for (int i = 0; i < program.slots; ++i) {
      barrier_init(shared_address(&shared.full[i]), 1);
      barrier_init(shared_address(&shared.empty[i]), kLayerWarps * kWarpArrivals);
    }
    barrier_init(shared_address(&shared.router_begun), 1);
    barrier_init(shared_address(&shared.routed), kRows == 1 ? kWarpArrivals : 1);
    barrier_init(shared_address(&shared.weighted), kWarpArrivals);
    barrier_init(shared_address(&shared.added), kLayerWarps * kWarpArrivals);
    publish_barriers();
  }
  copy_program(program, shared);
  __syncthreads();
  const int warp = __shfl_sync(~0u, thread / kWarp, 0);  // so that the compiler knows that it is the warp's
  if (kRows > 1 && warp >= kLayerWarps) give_registers<kProducerRegisters>();
  if (warp == kLayerWarps) {
    if (thread == kLayerConsumers) produce<kRows>(program, shared, shared_address(memory));
    return;
  }
  if constexpr (kRows == 1) {
    if (warp > kLayerWarps) {
      choose<kKeys>(program, shared);
      return;
    }
  } else {
    if (warp > kLayerWarps) return;
    take_registers<kConsumerRegisters>();
  }
  LayerConsumer c = {program,
                     shared,
                     warp,
                     program.rows,
                     program.slots,
                     shared_address(shared.full),
                     shared_address(memory) + warp * kLayerTileChunk,
                     staged + warp * layer_staged_chunk(kFp8, kRows),
                     reinterpret_cast<float*>(partial)};
  consume<kFp8, kRows, kKeys>(c);
}

}  // namespace tokenspeed::kernels::cuda

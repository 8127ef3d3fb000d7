// decode_phases: the persistent kernel (decode_phase.cuh) and the translation of ops into its phases.
#include <algorithm>
#include <bit>
#include <string>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_phase.cuh"
#include "kernels/cuda/decode_phase_experts.cuh"
#include "kernels/cuda/decode_phase_gdn.cuh"
#include "kernels/cuda/decode_phase_linear.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

__device__ __forceinline__ void produce(const PhaseProgram& program, PhaseShared& shared, uint8_t* ring_data) {
  RingProducer ring(shared, ring_data, program.slots);
  uint32_t routed_parity = 0;
  for (int i = 0; i < program.phase_count; ++i) {
    if (ring.warp() == 0) describe_phase(program, shared, i);
    const Phase& phase = described_phase(shared, i);
    switch (phase.kind) {
      case PhaseKind::kLinear:
        produce_linear(phase.linear, ring);
        break;
      case PhaseKind::kGdn:
        produce_gdn(program, phase.gdn, shared, ring);
        break;
      case PhaseKind::kGateUp:
        produce_gate_up(phase.gate_up, shared, routed_parity, ring);
        if (phase.gate_up.router.logits != nullptr) routed_parity ^= 1;
        break;
      case PhaseKind::kDown:
        produce_down(phase.down, shared, ring);
        break;
    }
  }
}

template <int kRows>
__device__ __forceinline__ void consume(const PhaseProgram& program, PhaseShared& shared, uint8_t* staged,
                                        uint8_t* ring) {
  Consumer c = {program, shared, staged, RingConsumer(shared, ring, program.slots), GridBarrier(program.counters)};
  for (int i = 0; i < program.phase_count; ++i) {
    const Phase& phase = described_phase(shared, i);
    switch (phase.kind) {
      case PhaseKind::kLinear:
        consume_linear<kRows>(phase.linear, c);
        break;
      case PhaseKind::kGdn:
        consume_gdn(phase.gdn, c);
        break;
      case PhaseKind::kGateUp:
        consume_gate_up<kRows>(phase.gate_up, c);
        break;
      case PhaseKind::kDown:
        consume_down<kRows>(phase.down, c);
        break;
    }
    if (i + 1 < program.phase_count) c.grid.arrive();
  }
  allow_successor();
  c.grid.finish();
}

// kRows: rows of the step, rounded up to a power of two.
template <int kRows>
__global__ void __launch_bounds__(kPhaseThreads, 1) decode_phases_kernel(const __grid_constant__ PhaseProgram program) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ PhaseShared shared;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < program.slots; ++i) {
      barrier_init(shared_address(&shared.full[i]), kFullArrivals);
      barrier_init(shared_address(&shared.empty[i]), kQuadWarps);
    }
    barrier_init(shared_address(&shared.routed), 1);
    shared.described = 0;
    publish_barriers();
  }
  if (program.batch.token_begin != nullptr) {
    if (thread <= program.batch.sequences) shared.token_begin[thread] = program.batch.token_begin[thread];
    if (thread < program.batch.sequences) {
      shared.state_in[thread] = program.batch.state_in[thread];
      shared.state_out[thread] = program.batch.state_out[thread];
    }
  }
  __syncthreads();
  uint8_t* const ring = dynamic + program.staged_bytes;
  if (thread >= kStreamThreads) {
    produce(program, shared, ring);
  } else {
    consume<kRows>(program, shared, dynamic, ring);
  }
}

// Shared memory left for the ring beside `staged` bytes, in slots.
int ring_slots(int staged) {
  const int free = static_cast<int>(kSharedLimit - sizeof(PhaseShared)) - staged;
  return std::min(kMaxSlots, free / kSlotBytes / kQuads * kQuads);
}
int columns_of(int64_t rows) { return rows <= 1 ? 1 : rows <= 2 ? 2 : rows <= 4 ? 4 : 8; }
int round_up(int bytes) { return (bytes + 127) / 128 * 128; }

bool streams(const Matrix& m) {
  const bool fp8 = m.dtype == DType::kFloat8E4M3;
  return (fp8 || m.dtype == DType::kBFloat16) && m.layout == MatrixLayout::kRowMajor && m.k % 64 == 0 &&
         (!fp8 || m.scale != nullptr);
}
StagedInput staged_input(const Rows& x, const float* norm_weight, float epsilon, int64_t rows, int64_t k, bool fp8) {
  return {static_cast<const bf16*>(x.data),
          x.stride,
          norm_weight,
          epsilon,
          nullptr,
          0,
          static_cast<int>(rows),
          static_cast<int>(k),
          fp8};
}
ExpertWeights expert_weights(const Matrix& m, int64_t width) {
  return {static_cast<const uint8_t*>(m.data), m.scale, static_cast<int>(width)};
}
RouterParameters router_parameters(const DecodeExperts& e) {
  if (e.experts == 0) return {};
  return {e.router_logits, e.router_stride, static_cast<int>(e.experts), static_cast<int>(e.top_k), e.normalize};
}

// Each returns the bytes of shared memory that the phase stages, or 0 for an op that has no phase.
int to_phase(const DecodeLinear& a, LinearPhase& p) {
  if (a.rows < 1 || a.rows > kDecodeTokens || a.segment_count < 1 || a.segment_count > kDecodeSegments) return 0;
  const int64_t k = a.segments[0].weight.k;
  if (a.x.dtype != DType::kBFloat16 || (a.norm_weight != nullptr && k > kNormLimit)) return 0;
  p.input = staged_input(a.x, a.norm_weight, a.norm_epsilon, a.rows, k, false);
  p.input.normed = static_cast<bf16*>(a.normed.data);
  p.input.normed_stride = a.normed.stride;
  p.tail = -1;
  int first[kDecodeSegments];
  for (int i = 0; i < a.segment_count; ++i) {
    const DecodeSegment& s = a.segments[i];
    if (!streams(s.weight) || s.weight.k != k || s.weight.n < 1) return 0;
    if (s.y.dtype != DType::kBFloat16 && s.y.dtype != DType::kFloat32) return 0;
    const bool fp8 = s.weight.dtype == DType::kFloat8E4M3;
    first[i] = p.tiles;
    p.tiles += static_cast<int>((s.weight.n + kTileRows - 1) / kTileRows);
    p.segments[i] = {static_cast<const uint8_t*>(s.weight.data),
                     s.weight.scale,
                     s.y.data,
                     static_cast<int>(s.y.stride),
                     static_cast<int>(s.weight.n),
                     static_cast<int>(k * (fp8 ? 1 : 2)),
                     fp8,
                     s.y.dtype == DType::kFloat32,
                     s.accumulate};
    p.input.fp8 |= fp8;
  }
  for (int i = a.segment_count; i < kDecodeSegments; ++i) first[i] = p.tiles;
  p.first_tile = {first[0], first[1], first[2], first[3]};
  return streaming_phase_bytes(columns_of(a.rows), p.input.k);
}

// The mixer and the projection that reads its result.
int to_phases(const GdnMixer& a, const DecodeLinear& next, GdnPhase& p, LinearPhase& out) {
  const GdnShape& shape = a.shape;
  if (shape.key_dim != kGdnDim || shape.value_dim != kGdnDim || shape.conv_kernel != kGdnTaps) return 0;
  if (shape.key_heads < 1 || shape.value_heads % shape.key_heads != 0) return 0;
  if (a.batch.tokens > kDecodeTokens || a.batch.sequences > kDecodeTokens) return 0;
  if (a.state.conv_dtype != DType::kBFloat16 || a.qkv.dtype != DType::kBFloat16) return 0;
  if (next.x.data != a.out.data || next.norm_weight != nullptr || next.rows != a.batch.tokens) return 0;
  const int bytes = to_phase(next, out);
  if (bytes == 0 || out.input.k != shape.value_heads * shape.value_dim) return 0;
  out.z = static_cast<const bf16*>(a.z.data);
  out.z_stride = static_cast<int>(a.z.stride);
  out.gated_weight = a.norm_weight;
  out.input.epsilon = a.epsilon;
  p = {a.state.recurrent,
       a.state.conv,
       a.state.slot_stride,
       static_cast<const bf16*>(a.qkv.data),
       static_cast<const bf16*>(a.b.data),
       static_cast<const bf16*>(a.a.data),
       a.conv_weight,
       a.a_log,
       a.dt_bias,
       static_cast<bf16*>(a.out.data),
       static_cast<int>(a.qkv.stride),
       static_cast<int>(a.b.stride),
       static_cast<int>(a.a.stride),
       static_cast<int>(a.out.stride),
       static_cast<int>(shape.key_heads),
       static_cast<int>(shape.value_heads)};
  return std::max<int>(bytes, sizeof(GdnStaged));
}

int to_phase(const DecodeGateUp& a, GateUpPhase& p) {
  const bool routed = a.routed.experts > 0;
  const bool has_shared = a.shared_gate_up.data != nullptr;
  const Matrix& m = routed ? a.routed.gate_up : a.shared_gate_up;
  if (a.rows < 1 || a.rows > kDecodeTokens || !streams(m) || a.hidden % 64 != 0) return 0;
  if (has_shared && (!streams(a.shared_gate_up) || a.shared_gate_up.dtype != m.dtype)) return 0;
  if (a.routed.experts > kDecodeExperts || a.routed.top_k > kDecodeTopK) return 0;
  if (a.width % kUnitRows != 0 || a.shared_width % kUnitRows != 0) return 0;
  if (a.norm_weight != nullptr && (routed || a.hidden > kNormLimit)) return 0;
  p.input = staged_input(a.x, a.norm_weight, a.norm_epsilon, a.rows, a.hidden, m.dtype == DType::kFloat8E4M3);
  p.router = router_parameters(a.routed);
  if (routed) {
    p.routed = expert_weights(a.routed.gate_up, a.width);
    p.routed_tiles = static_cast<int>(a.width / kUnitRows);
  }
  if (has_shared) {
    p.shared = expert_weights(a.shared_gate_up, a.shared_width);
    p.shared_tiles = static_cast<int>(a.shared_width / kUnitRows);
  }
  p.h = static_cast<bf16*>(a.h);
  p.h_width = static_cast<int>(std::max(routed ? a.width : 0, has_shared ? a.shared_width : 0));
  p.expert_ids = a.expert_ids;
  p.expert_weights = a.expert_weights;
  return streaming_phase_bytes(columns_of(a.rows), p.input.k);
}

int to_phase(const DecodeDown& a, DownPhase& p) {
  const bool has_shared = a.shared_down.data != nullptr;
  const Matrix& m = a.routed.down;
  if (a.routed.experts == 0 || !streams(m) || a.hidden % kTileRows != 0) return 0;
  if (has_shared && (a.shared_down.dtype != m.dtype || a.shared_width != a.width)) return 0;
  p.fp8 = m.dtype == DType::kFloat8E4M3;
  const int64_t row_bytes = a.width * (p.fp8 ? 1 : 2);
  if (!std::has_single_bit(static_cast<uint64_t>(row_bytes)) || row_bytes < kChunkBytes) return 0;
  p.log_row_bytes = std::countr_zero(static_cast<uint64_t>(row_bytes));
  if (p.fp8 && a.width % 128 != 0) return 0;
  p.router = router_parameters(a.routed);
  p.routed = expert_weights(m, a.width);
  if (has_shared) p.shared = expert_weights(a.shared_down, a.shared_width);
  p.gate_logit = a.shared_gate_logit;
  p.gate_stride = static_cast<int>(a.shared_gate_stride);
  p.h = static_cast<const bf16*>(a.h);
  p.rows = static_cast<int>(a.rows);
  p.width = static_cast<int>(a.width);
  p.hidden = static_cast<int>(a.hidden);
  p.y = static_cast<bf16*>(a.y.data);
  p.y_stride = static_cast<int>(a.y.stride);
  p.accumulate = a.accumulate;
  return down_phase_bytes(static_cast<int>(a.rows), p.router.top_k, a.width, p.fp8);
}

Status launch_alone(const DecodePhase& phase, const Launch& launch) {
  if (const auto* linear = std::get_if<DecodeLinear>(&phase)) return decode_linear(*linear, launch);
  if (const auto* mixer = std::get_if<GdnMixer>(&phase)) return decode_gdn(*mixer, launch);
  if (const auto* attention = std::get_if<DecodeAttention>(&phase)) return decode_attention(*attention, launch);
  if (const auto* gate_up = std::get_if<DecodeGateUp>(&phase)) return decode_gate_up(*gate_up, launch);
  return decode_down(std::get<DecodeDown>(phase), launch);
}

class PhaseWriter {
 public:
  PhaseWriter(std::span<const DecodePhase> ops, void* workspace, const Launch& launch) : ops_(ops), launch_(launch) {
    program_.counters = static_cast<unsigned*>(workspace);
  }

  Status run() {
    for (size_t i = 0; i < ops_.size();) {
      size_t taken = take(i);
      if (taken == 0 && program_.phase_count > 0) {
        TS_RETURN_IF_ERROR(flush());
        taken = take(i);
      }
      if (taken == 0) {
        TS_RETURN_IF_ERROR(launch_alone(ops_[i], launch_));
        taken = 1;
      }
      i += taken;
    }
    return flush();
  }

 private:
  template <typename Op>
  const Op* at(size_t index) const {
    return index < ops_.size() ? std::get_if<Op>(&ops_[index]) : nullptr;
  }
  // Room for `count` more phases of `rows` that stage `bytes` (0: no such phase).
  bool room(int count, int64_t rows, int bytes) const {
    if (program_.phase_count > 0 && columns_of(rows) != columns_) return false;
    return bytes > 0 && program_.phase_count + count <= kPhasesPerLaunch &&
           ring_slots(round_up(std::max(program_.staged_bytes, bytes))) > 0;
  }
  Phase& add(PhaseKind kind, int64_t rows, int bytes) {
    columns_ = columns_of(rows);
    program_.staged_bytes = std::max(program_.staged_bytes, round_up(bytes));
    Phase& phase = program_.phases[program_.phase_count++];
    phase.kind = kind;
    return phase;
  }
  // Writes the phases of ops_[index] and of what belongs to it; returns how many ops that were.
  size_t take(size_t index) {
    if (const auto* linear = at<DecodeLinear>(index)) {
      LinearPhase p = {};
      const int bytes = to_phase(*linear, p);
      if (!room(1, linear->rows, bytes)) return 0;
      add(PhaseKind::kLinear, linear->rows, bytes).linear = p;
      return 1;
    }
    if (const auto* mixer = at<GdnMixer>(index)) {
      const auto* next = at<DecodeLinear>(index + 1);
      GdnPhase p = {};
      LinearPhase out = {};
      const int bytes = next == nullptr ? 0 : to_phases(*mixer, *next, p, out);
      if (!room(2, mixer->batch.tokens, bytes)) return 0;
      program_.batch = mixer->batch;
      out.tail = program_.phase_count;
      add(PhaseKind::kGdn, next->rows, bytes).gdn = p;
      add(PhaseKind::kLinear, next->rows, bytes).linear = out;
      return 2;
    }
    if (const auto* gate_up = at<DecodeGateUp>(index)) {
      GateUpPhase p = {};
      int bytes = to_phase(*gate_up, p);
      if (gate_up->routed.experts == 0) {
        if (!room(1, gate_up->rows, bytes)) return 0;
        add(PhaseKind::kGateUp, gate_up->rows, bytes).gate_up = p;
        return 1;
      }
      // Down uses the router's choice that gate and up made.
      const auto* down = at<DecodeDown>(index + 1);
      DownPhase d = {};
      const int down_bytes = down == nullptr ? 0 : to_phase(*down, d);
      if (down_bytes == 0 || bytes == 0 || down->routed.router_logits != gate_up->routed.router_logits) return 0;
      bytes = std::max(bytes, down_bytes);
      if (!room(2, gate_up->rows, bytes)) return 0;
      add(PhaseKind::kGateUp, gate_up->rows, bytes).gate_up = p;
      add(PhaseKind::kDown, gate_up->rows, bytes).down = d;
      return 2;
    }
    return 0;
  }

  Status flush() {
    if (program_.phase_count == 0) return {};
    program_.slots = ring_slots(program_.staged_bytes);
    const size_t shared = static_cast<size_t>(program_.staged_bytes) + program_.slots * kSlotBytes;
    auto* const kernel = columns_ == 1   ? decode_phases_kernel<1>
                         : columns_ == 2 ? decode_phases_kernel<2>
                         : columns_ == 4 ? decode_phases_kernel<4>
                                         : decode_phases_kernel<8>;
    const Status status =
        launch_kernel("decode_phases", launch_, kernel, dim3(multiprocessors()), kPhaseThreads, shared, 1, program_);
    program_.phase_count = 0;
    program_.staged_bytes = 0;
    program_.batch = {};
    return status;
  }

  std::span<const DecodePhase> ops_;
  const Launch& launch_;
  PhaseProgram program_ = {};
  int columns_ = 1;
};

}  // namespace

Status decode_phases(std::span<const DecodePhase> phases, void* workspace, const Launch& launch) {
  return PhaseWriter(phases, workspace, launch).run();
}

}  // namespace tokenspeed::kernels::cuda

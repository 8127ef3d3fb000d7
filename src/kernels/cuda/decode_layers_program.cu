#include <algorithm>
#include <bit>

#include "kernels/cuda/decode_layers_program.h"
#include "kernels/cuda/tensor_map.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr size_t kMostSharedBytes = 227 * 1024;
constexpr size_t kLeastSlots = 2;
// From a copy to the next one, of the cycles that memory takes for it, while the phase's input is not there; of one row
// with FP8 weights, whose experts are so few bytes that theirs are not spread at all (gpu_lab.md).
constexpr double kSpread = 1.0;
constexpr double kSpreadOneRow = 0.8;

bool streams(const Matrix& m) {
  if (m.layout != MatrixLayout::kRowMajor || m.n % 8 != 0 || m.k % 128 != 0) return false;
  return m.dtype == DType::kBFloat16 || (m.dtype == DType::kFloat8E4M3 && m.scale != nullptr);
}
bool is_fp8(const Matrix& m) { return m.dtype == DType::kFloat8E4M3; }

// How the chunks of a row of k values are dealt to the warps; turns 0: not at all.
struct Cut {
  int turns;
  int warps;
};
Cut cut_rows(int64_t k, bool fp8) {
  const int64_t chunks = k / layer_chunk_values(fp8);
  for (int turns = 1; turns <= layer_max_turns(fp8); turns *= 2) {
    if (k % layer_chunk_values(fp8) == 0 && chunks % turns == 0 && chunks / turns <= kLayerWarps) {
      return {turns, static_cast<int>(chunks / turns)};
    }
  }
  return {0, 0};
}
// A task convolves its head's q and k whatever its part of the head, so it is as large as keeps the blocks busy.
int mixer_log_parts(int64_t heads, int blocks) {
  const int64_t enough = blocks - blocks / 4;
  return heads >= enough ? 2 : 2 * heads >= enough ? 1 : 0;
}
int tiles_of(int64_t rows) { return static_cast<int>((rows + kLayerTileRows - 1) / kLayerTileRows); }
// Plain rows are read four elements at a time.
bool readable(const Rows& rows) { return rows.stride % 4 == 0; }
// Results are stored two at a time.
bool writable(const Rows& rows) {
  return rows.stride % 2 == 0 && (rows.dtype == DType::kBFloat16 || rows.dtype == DType::kFloat32);
}
const __nv_bfloat16* elements(const Rows& rows) { return static_cast<const __nv_bfloat16*>(rows.data); }

// Where a projection leaves the words of an array that is all of one of its results, or some columns of one.
struct Columns {
  const uint2* words = nullptr;
  int stride = 0;
};
Columns columns_of(const DecodeLinear& op, const ProjectPhase& phase, const Rows& array) {
  for (int i = 0; i < op.segment_count; ++i) {
    const Rows& y = op.segments[i].y;
    const auto* const begin = static_cast<const __nv_bfloat16*>(y.data);
    const auto* const at = static_cast<const __nv_bfloat16*>(array.data);
    if (at < begin || at >= begin + op.segments[i].weight.n || array.stride != y.stride) continue;
    if (op.segments[i].accumulate || (at - begin) % 2 != 0) return {};
    return {static_cast<const uint2*>(phase.segments[i].to) + (at - begin) / 2, phase.segments[i].stride};
  }
  return {};
}

}  // namespace

void LayerProgramWriter::clear() {
  program_ = {};
  program_.counters = reinterpret_cast<unsigned*>(workspace_);
  used_words_ = 0;
  x_words_ = nullptr;
  max_turns_ = 1;
  down_stride_ = 0;
  experts_ = 0;
}

// Room for so many phases and maps of a step of these rows.
bool LayerProgramWriter::begin(int64_t rows, bool fp8, int64_t hidden, int phases, int maps) {
  if (rows < 1 || rows > kDecodeTokens || hidden % 128 != 0) return false;
  const int columns = layer_columns(rows);
  // A block keeps the residual stream's elements that are its own, one per thread.
  const int64_t own_tiles = (hidden / kLayerTileRows + blocks_ - 1) / blocks_;
  if (own_tiles > layer_batch_tiles(columns) || own_tiles * kLayerTileRows * columns > kLayerConsumers) return false;
  if (empty()) {
    fp8_ = fp8;
    columns_ = columns;
    program_.rows = static_cast<int>(rows);
    program_.hidden = static_cast<int>(hidden);
    return true;
  }
  return program_.rows == rows && fp8_ == fp8 && program_.hidden == hidden &&
         program_.phase_count + phases <= kLayerMaxPhases && program_.map_count + maps <= kLayerMaxMaps;
}

// The residual stream is the same rows for all phases of a launch.
bool LayerProgramWriter::residual(const Rows& x, int64_t hidden) {
  if (x.dtype != DType::kBFloat16 || hidden != program_.hidden) return false;
  auto* const data = static_cast<__nv_bfloat16*>(x.data);
  if (program_.x != nullptr && (program_.x != data || program_.x_stride != x.stride)) return false;
  program_.x = data;
  program_.x_stride = x.stride;
  return true;
}

bool LayerProgramWriter::input_of_norm(const Rows& x, const uint2** words, const __nv_bfloat16** rows,
                                       int64_t* stride) {
  if (!readable(x) || !residual(x, program_.hidden)) return false;
  *words = x_words_;
  *rows = elements(x);
  *stride = x.stride;
  return true;
}

// Words of `per_row` for each row of the step; null when the workspace is used up.
uint2* LayerProgramWriter::words(int64_t per_row) {
  const int64_t begin = used_words_;
  const int64_t end = begin + (per_row * program_.rows + 15) / 16 * 16;
  if (kLayerWordsOffset + end * static_cast<int64_t>(sizeof(uint2)) > kDecodeLayersWorkspaceBytes) return nullptr;
  used_words_ = end;
  return reinterpret_cast<uint2*>(workspace_ + kLayerWordsOffset) + begin;
}

int LayerProgramWriter::map(const Matrix& weight, bool fp8, int turns, int chunks, int box_chunks) {
  const int64_t row_bytes = weight.k * (fp8 ? 1 : 2);
  program_.maps[program_.map_count] =
      box_map(weight.data, row_bytes, 8, weight.n / 8, 8 * row_bytes, turns, chunks, box_chunks);
  return program_.map_count++;
}
// Of `matrices` [2 * width, k] one after the other: boxes of eight gate rows and the eight up rows beside them.
int LayerProgramWriter::paired_map(const Matrix& first, int64_t matrices, int64_t width, int turns, int chunks) {
  const int64_t row_bytes = first.k * (fp8_ ? 1 : 2);
  program_.maps[program_.map_count] = box_map(first.data, row_bytes, (2 * matrices - 1) * width, 2, width * row_bytes,
                                              turns, chunks, layer_box_chunks(chunks));
  return program_.map_count++;
}

LayerPhase& LayerProgramWriter::add(LayerPhaseKind kind) {
  LayerPhase& phase = program_.phases[program_.phase_count++];
  phase.kind = kind;
  return phase;
}

// What is staged at a time, and one of the layer_buffers() of part sums, for steps of `columns` rows.
int LayerProgramWriter::staged_bytes(int columns) const {
  return std::max(max_turns_, down_stride_ > 0 ? layer_down_slots(columns) : 0) * kLayerWarps *
         layer_staged_chunk(fp8_, columns);
}
int LayerProgramWriter::partial_bytes(int columns) const {
  const int sums =
      std::max(layer_batch_tiles(columns) * layer_tile_floats(columns), kLayerTileRows * columns * down_stride_);
  const bool mixes = program_.batch.token_begin != nullptr;
  return std::max(sums * 4, mixes ? layer_mixer_bytes(columns) : 0);
}
// Shared memory beside the ring.
size_t LayerProgramWriter::buffer_bytes(int columns) const {
  return kLayerSharedReserve +
         static_cast<size_t>(staged_bytes(columns) + layer_buffers(columns) * partial_bytes(columns));
}
// Whether the phases so far leave room for a ring, whatever the number of rows: a row's bits must not depend on it.
bool LayerProgramWriter::fits() const {
  return buffer_bytes(kDecodeTokens) + kLeastSlots * kLayerSlotBytes <= kMostSharedBytes;
}

// All but where the input lies.
bool LayerProgramWriter::project(const DecodeLinear& op, bool to_words, ProjectPhase* phase) {
  ProjectPhase& p = *phase;
  p = {};
  p.tail = -1;
  if (op.segment_count < 1 || op.segment_count > kLayerSegments || op.x.dtype != DType::kBFloat16) return false;
  const int64_t k = op.segments[0].weight.k;
  const Cut cut = cut_rows(k, fp8_);
  if (cut.turns == 0) return false;
  p.norm_weight = op.norm_weight;
  p.epsilon = op.norm_epsilon;
  p.k = static_cast<int>(k);
  p.turns = cut.turns;
  p.warps = cut.warps;
  p.segment_count = op.segment_count;
  for (int i = 0; i < op.segment_count; ++i) {
    const DecodeSegment& from = op.segments[i];
    const bool fp8 = is_fp8(from.weight);
    const bool floats = from.y.dtype == DType::kFloat32;
    if (!streams(from.weight) || from.weight.k != k || (fp8 && !fp8_) || !writable(from.y)) return false;
    if (floats && (to_words || from.accumulate)) return false;
    // A bfloat16 weight beside FP8 ones is cut at the same columns.
    const int turns = fp8_ && !fp8 ? 2 * cut.turns : cut.turns;
    LayerSegment& s = p.segments[i];
    s.rows_count = static_cast<int>(from.weight.n);
    s.scale = from.weight.scale;
    s.to = to_words ? words(from.weight.n / 2) : from.y.data;
    s.stride = static_cast<int>(to_words ? from.weight.n / 2 : from.y.stride);
    s.result = to_words ? LayerResult::kWords : floats ? LayerResult::kFloatRows : LayerResult::kRows;
    if (s.to == nullptr) return false;
    s.first_tile = p.tiles;
    s.map = static_cast<int8_t>(map(from.weight, fp8, turns, cut.warps, layer_box_chunks(cut.warps)));
    s.turns = static_cast<int8_t>(turns);
    s.chunks = static_cast<int8_t>(cut.warps);
    if (fp8 == fp8_ && p.own_tiles < p.tiles) return false;
    p.tiles += tiles_of(from.weight.n);
    if (fp8 == fp8_) p.own_tiles = p.tiles;
  }
  max_turns_ = std::max(max_turns_, cut.turns);
  return true;
}

// norm(x) -> qkv, z, b, a; the mixer; x += its projection.
size_t LayerProgramWriter::take_mixer(std::span<const DecodePhase> ops) {
  if (ops.size() < 3) return 0;
  const auto* in = std::get_if<DecodeLinear>(&ops[0]);
  const auto* mixer = std::get_if<GdnMixer>(&ops[1]);
  const auto* out = std::get_if<DecodeLinear>(&ops[2]);
  if (in == nullptr || mixer == nullptr || out == nullptr) return 0;
  const GdnShape& shape = mixer->shape;
  if (shape.key_dim != 128 || shape.value_dim != 128 || shape.conv_kernel != 4 || shape.value_heads % 2 != 0) return 0;
  if (shape.key_heads < 1 || shape.value_heads % shape.key_heads != 0 ||
      !std::has_single_bit(static_cast<uint64_t>(shape.value_heads / shape.key_heads))) {
    return 0;
  }
  if (mixer->state.conv_dtype != DType::kBFloat16 || out->segment_count != 1) return 0;
  if (in->norm_weight == nullptr || in->normed.data != nullptr || out->norm_weight != nullptr) return 0;
  if (!out->segments[0].accumulate || out->x.data != mixer->out.data) return 0;
  if (mixer->batch.tokens != in->rows || mixer->batch.sequences > kDecodeTokens || out->rows != in->rows) return 0;
  if (program_.batch.token_begin != nullptr && program_.batch.token_begin != mixer->batch.token_begin) return 0;
  if (!begin(in->rows, is_fp8(out->segments[0].weight), in->segments[0].weight.k, 3, in->segment_count + 1)) return 0;

  ProjectPhase first, last;
  if (!project(*in, true, &first) || !project(*out, false, &last)) return 0;
  if (!input_of_norm(in->x, &first.words, &first.rows, &first.row_stride)) return 0;
  if (!residual(out->segments[0].y, out->segments[0].weight.n) || last.k != shape.value_heads * 128) return 0;
  const Columns qkv = columns_of(*in, first, mixer->qkv), z = columns_of(*in, first, mixer->z),
                b = columns_of(*in, first, mixer->b), a = columns_of(*in, first, mixer->a);
  if (qkv.words == nullptr || z.words == nullptr || b.words == nullptr || a.words == nullptr) return 0;
  const int64_t value_words = shape.value_heads * 64;
  uint2* const o = words(value_words);
  uint2* const squares = words(shape.value_heads * 4);
  uint2* const x = words(program_.hidden / 2);
  if (o == nullptr || squares == nullptr || x == nullptr) return 0;
  program_.batch = mixer->batch;
  add(LayerPhaseKind::kProject).project = first;
  last.words = o;
  last.squares = squares;
  last.epsilon = mixer->epsilon;
  last.tail = program_.phase_count;
  last.accumulate = true;
  last.residual_words = x;
  add(LayerPhaseKind::kMixer).mixer = {mixer->state.recurrent,
                                       mixer->state.conv,
                                       mixer->state.slot_stride,
                                       qkv.words,
                                       z.words,
                                       b.words,
                                       a.words,
                                       qkv.stride,
                                       z.stride,
                                       b.stride,
                                       a.stride,
                                       mixer->conv_weight,
                                       mixer->a_log,
                                       mixer->dt_bias,
                                       mixer->norm_weight,
                                       o,
                                       squares,
                                       static_cast<int>(shape.key_heads),
                                       static_cast<int>(shape.value_heads),
                                       std::countr_zero(static_cast<uint64_t>(shape.value_heads / shape.key_heads)),
                                       mixer_log_parts(mixer->batch.sequences * shape.value_heads, blocks_)};
  add(LayerPhaseKind::kProject).project = last;
  x_words_ = x;
  program_.updates_x = true;
  return 3;
}

// norm(x) -> router; gate and up; x += down.
size_t LayerProgramWriter::take_experts(std::span<const DecodePhase> ops) {
  if (ops.size() < 3) return 0;
  const auto* router = std::get_if<DecodeLinear>(&ops[0]);
  const auto* up = std::get_if<DecodeGateUp>(&ops[1]);
  const auto* down = std::get_if<DecodeDown>(&ops[2]);
  if (router == nullptr || up == nullptr || down == nullptr) return 0;
  const DecodeExperts& routed = up->routed;
  const bool has_shared = up->shared_gate_up.data != nullptr;
  const bool has_gate = router->segment_count == 2;
  if (routed.experts < 1 || routed.experts > kDecodeExperts || routed.top_k > kDecodeTopK ||
      router->norm_weight == nullptr)
    return 0;
  if (router->segment_count > 2 || router->segments[0].y.data != routed.router_logits || up->norm_weight != nullptr)
    return 0;
  if (router->segments[0].weight.dtype != DType::kBFloat16 || router->segments[0].weight.n != routed.experts) return 0;
  if (has_gate && (router->segments[1].weight.dtype != DType::kBFloat16 || router->segments[1].weight.n != 1 ||
                   router->segments[1].y.data != down->shared_gate_logit)) {
    return 0;
  }
  if (!has_gate && down->shared_gate_logit != nullptr) return 0;
  if (up->expert_ids != nullptr || down->routed.router_logits != routed.router_logits || !down->accumulate) return 0;
  if (!streams(routed.gate_up) || !streams(routed.down) || up->width % 16 != 0 ||
      !std::has_single_bit(static_cast<uint64_t>(up->width))) {
    return 0;
  }
  if (has_shared &&
      (!streams(up->shared_gate_up) || !streams(down->shared_down) || up->shared_width != up->width ||
       up->shared_gate_up.dtype != routed.gate_up.dtype || down->shared_down.dtype != routed.gate_up.dtype)) {
    return 0;
  }
  const bool fp8 = is_fp8(routed.gate_up);
  const int64_t hidden = up->hidden;
  if (is_fp8(routed.down) != fp8 || router->segments[0].weight.k != hidden || down->hidden != hidden) return 0;
  if (!begin(router->rows, fp8, hidden, 3, 4)) return 0;
  const Cut cut = cut_rows(hidden, fp8_);
  const int64_t down_chunks = up->width / layer_chunk_values(fp8_);
  if (cut.turns == 0 || up->width % layer_chunk_values(fp8_) != 0 || down_chunks > kLayerWarps ||
      !std::has_single_bit(static_cast<uint64_t>(down_chunks))) {
    return 0;
  }
  if (routed.experts + 1 > int64_t{layer_router_rows(kLayerManyKeys)} * blocks_) return 0;

  RouterPhase r = {};
  if (!input_of_norm(router->x, &r.words, &r.rows, &r.row_stride) || !residual(down->y, hidden)) return 0;
  r.norm_weight = router->norm_weight;
  r.epsilon = router->norm_epsilon;
  r.k = static_cast<int>(hidden);
  r.turns = cut.turns;
  r.warps = cut.warps;
  r.weight = static_cast<const __nv_bfloat16*>(router->segments[0].weight.data);
  r.gate = has_gate ? static_cast<const __nv_bfloat16*>(router->segments[1].weight.data) : nullptr;
  r.experts = static_cast<int>(routed.experts);
  r.block_rows = r.experts / blocks_ + 1;  // all and the gate
  r.logits = words(routed.experts + 1);

  GateUpPhase g = {};
  g.logits = r.logits;
  g.epsilon = r.epsilon;
  g.k = r.k;
  g.turns = cut.turns;
  g.warps = g.chunks = cut.warps;
  g.experts = r.experts;
  g.top_k = static_cast<int>(routed.top_k);
  g.normalize = routed.normalize;
  g.has_gate = has_gate;
  const int width = static_cast<int>(up->width);
  g.routed = {routed.gate_up.scale, width, paired_map(routed.gate_up, routed.experts, width, cut.turns, cut.warps)};
  if (has_shared) {
    g.shared = {up->shared_gate_up.scale, width, paired_map(up->shared_gate_up, 1, width, cut.turns, cut.warps)};
  }
  g.log_tiles = std::countr_zero(static_cast<uint64_t>(width / (kLayerTileRows / 2)));
  g.h = words((routed.top_k + 1) * width / 2);

  DownPhase d = {};
  d.h = g.h;
  d.k = width;
  d.log_chunks = std::countr_zero(static_cast<uint64_t>(down_chunks));
  d.hidden = r.k;
  d.top_k = g.top_k;
  Matrix all = routed.down;
  all.n = hidden * routed.experts;
  const int chunks = 1 << d.log_chunks;
  d.routed = {routed.down.scale, width, map(all, fp8_, 1, chunks, chunks)};
  if (has_shared) d.shared = {down->shared_down.scale, width, map(down->shared_down, fp8_, 1, chunks, chunks)};
  d.residual_words = words(hidden / 2);
  if (r.logits == nullptr || g.h == nullptr || d.residual_words == nullptr) return 0;

  add(LayerPhaseKind::kRouter).router = r;
  add(LayerPhaseKind::kGateUp).gate_up = g;
  add(LayerPhaseKind::kDown).down = d;
  max_turns_ = std::max(max_turns_, cut.turns);
  down_stride_ = std::max(down_stride_, layer_down_stride((g.top_k + 1) << d.log_chunks));
  experts_ = std::max(experts_, r.experts);
  x_words_ = d.residual_words;
  program_.updates_x = true;
  return 3;
}

// norm(x) -> plain rows, or x += W u of plain rows. bfloat16 weights alone are taken beside FP8 ones as well.
size_t LayerProgramWriter::take_projection(const DecodeLinear& op) {
  const bool accumulates = op.segments[0].accumulate;
  if (op.segment_count < 1 || op.normed.data != nullptr) return 0;
  if (accumulates == (op.norm_weight != nullptr)) return 0;
  if (accumulates && op.segment_count != 1) return 0;
  // Which rows are wanted is known of the launch, and for results of float32.
  if (program_.wanted != nullptr || (op.wanted != nullptr && op.segments[0].y.dtype != DType::kFloat32)) return 0;
  bool fp8 = false;
  for (int i = 0; i < op.segment_count; ++i) {
    fp8 |= is_fp8(op.segments[i].weight);
    if (op.segments[i].accumulate != accumulates) return 0;
  }
  const int64_t hidden = accumulates ? op.segments[0].weight.n : op.segments[0].weight.k;
  if (!begin(op.rows, fp8 || (!empty() && fp8_), hidden, 1, op.segment_count)) return 0;
  ProjectPhase p;
  if (!project(op, false, &p)) return 0;
  program_.wanted = op.wanted;
  program_.wanted_count = op.wanted_count;
  if (accumulates) {
    if (!readable(op.x) || !residual(op.segments[0].y, hidden)) return 0;
    p.rows = elements(op.x);
    p.row_stride = op.x.stride;
    p.accumulate = true;
    p.residual_words = words(hidden / 2);
    if (p.residual_words == nullptr) return 0;
    x_words_ = p.residual_words;
    program_.updates_x = true;
  } else if (!input_of_norm(op.x, &p.words, &p.rows, &p.row_stride)) {
    return 0;
  }
  add(LayerPhaseKind::kProject).project = p;
  return 1;
}

size_t LayerProgramWriter::take(std::span<const DecodePhase> ops) {
  // A part that turns out not to fit must leave no trace.
  const LayerProgramWriter before = *this;
  size_t taken = take_mixer(ops);
  if (taken == 0) {
    *this = before;
    taken = take_experts(ops);
  }
  if (taken == 0) {
    *this = before;
    const auto* linear = ops.empty() ? nullptr : std::get_if<DecodeLinear>(&ops[0]);
    // A projection whose results a mixer or the experts read would need them as words.
    const bool read_inside =
        ops.size() > 1 && (std::holds_alternative<GdnMixer>(ops[1]) || std::holds_alternative<DecodeGateUp>(ops[1]));
    if (linear != nullptr && !read_inside) taken = take_projection(*linear);
  }
  if (taken > 0 && !fits()) taken = 0;
  if (taken == 0) *this = before;
  return taken;
}

const LayerProgram& LayerProgramWriter::finish(const DecodeProgress& progress, double chunk_cycles) {
  program_.progress = progress;
  const bool one_fp8_row = columns_ == 1 && fp8_;
  program_.spread = static_cast<int>(chunk_cycles * (one_fp8_row ? kSpreadOneRow : kSpread));
  program_.spreads_experts = !one_fp8_row;
  // By then the computing warps have met, in the phases before a router.
  program_.chooser_counts = experts_ > 0 && !program_.phases[0].is(LayerPhaseKind::kRouter);
  program_.staged_bytes = staged_bytes(columns_);
  program_.partial_bytes = partial_bytes(columns_);
  program_.slots =
      static_cast<int>(std::min<size_t>(kLayerMaxSlots, (kMostSharedBytes - buffer_bytes(columns_)) / kLayerSlotBytes));
  return program_;
}

size_t LayerProgramWriter::shared_bytes() const {
  return buffer_bytes(columns_) + static_cast<size_t>(program_.slots) * kLayerSlotBytes;
}

}  // namespace tokenspeed::kernels::cuda

// Routed experts: the (row, choice) pairs are sorted by expert, then each expert multiplies its rows as one product.
#include <algorithm>
#include <array>

#include "base/thread_pool.h"
#include "kernels/cpu/linear_panels.h"
#include "kernels/cpu/linear_with.h"
#include "kernels/elements.h"
#include "kernels/mlp.h"

namespace tokenspeed::kernels {
namespace {

constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Where the parts of the workspace lie. Pairs are numbered row * top_k + choice.
struct Workspace {
  int64_t begin = 0;       // int32 [experts + 1] first slot of each expert; a slot is a pair's place in expert order
  int64_t active = 0;      // int32 [experts] experts that have rows, ascending
  int64_t slot = 0;        // int32 [pairs] slot of each pair, -1 for a skipped expert
  int64_t row = 0;         // int32 [pairs] row of x of each slot
  int64_t gate_up = 0;     // float [pairs, 2 * width] by slot
  int64_t activation = 0;  // [pairs, width] by slot, of x's dtype
  int64_t down = 0;        // float [pairs, hidden] by slot
  int64_t bytes = 0;
};

Workspace workspace_layout(int64_t rows, int64_t experts, int64_t top_k, int64_t hidden, int64_t width) {
  Workspace layout;
  const int64_t pairs = rows * top_k;
  const auto take = [&](int64_t elements) {
    const int64_t offset = layout.bytes;
    layout.bytes += aligned(elements * 4);
    return offset;
  };
  layout.begin = take(experts + 1);
  layout.active = take(experts);
  layout.slot = take(pairs);
  layout.row = take(pairs);
  layout.gate_up = take(pairs * 2 * width);
  layout.activation = take(pairs * width);
  layout.down = take(pairs * hidden);
  return layout;
}

// The rows of every expert.
struct Routing {
  int32_t* begin;
  int32_t* active;
  int32_t* slot;
  int32_t* row;
  int64_t active_count = 0;
  int64_t slot_count = 0;
};

// A counting sort, stable: an expert's rows stay ascending.
void sort_by_expert(const MoeExperts& args, Routing& routing) {
  const int64_t pairs = args.rows * args.top_k;
  const auto routed = [&](int64_t pair) { return args.expert_ids[pair] >= 0 && args.expert_ids[pair] < args.experts; };
  std::fill_n(routing.begin, args.experts + 1, 0);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (routed(pair)) ++routing.begin[args.expert_ids[pair] + 1];
  }
  for (int64_t expert = 0; expert < args.experts; ++expert) {
    if (routing.begin[expert + 1] > 0) routing.active[routing.active_count++] = static_cast<int32_t>(expert);
    routing.begin[expert + 1] += routing.begin[expert];
  }
  routing.slot_count = routing.begin[args.experts];
  // Filling moves each begin to its expert's end, which is the next one's begin; the shift below undoes it.
  for (int64_t pair = 0; pair < pairs; ++pair) {
    routing.slot[pair] = routed(pair) ? routing.begin[args.expert_ids[pair]]++ : -1;
    if (routing.slot[pair] >= 0) routing.row[routing.slot[pair]] = static_cast<int32_t>(pair / args.top_k);
  }
  for (int64_t expert = args.experts; expert > 0; --expert) routing.begin[expert] = routing.begin[expert - 1];
  routing.begin[0] = 0;
}

// y[slot] = weight_e x[slot or row of the slot] for every active expert.
void multiply_experts(const Routing& routing, cpu::PanelProduct product, int64_t weight_stride, ThreadPool& pool) {
  const int64_t panels = cpu::panel_count(product.weight);
  const int64_t mean_rows = (routing.slot_count + routing.active_count - 1) / routing.active_count;
  const int64_t threads_each = (pool.size() + routing.active_count - 1) / routing.active_count;
  const cpu::PanelSplit split = cpu::split_product(
      *product.kernels, product.weight, std::min(mean_rows, cpu::kMaxBlockRows), static_cast<int>(threads_each));
  pool.parallel_for(routing.active_count * split.panel_blocks, [&](int64_t task) {
    const int32_t expert = routing.active[task / split.panel_blocks];
    const int64_t panel = task % split.panel_blocks * split.block_panels;
    cpu::PanelProduct part = product;
    part.weight.data = static_cast<const std::byte*>(product.weight.data) + expert * weight_stride;
    const int64_t end = routing.begin[expert + 1];
    for (int64_t row = routing.begin[expert]; row < end; row += cpu::kMaxBlockRows) {
      cpu::multiply_block(part, row, std::min(row + cpu::kMaxBlockRows, end), panel,
                          std::min(panel + split.block_panels, panels));
    }
  });
}

constexpr int64_t kCombineColumns = 512;

// y[t, columns] = sum over choices, in their order, of weight * down[slot].
void combine(const MoeExperts& args, const int32_t* slot, const float* down, int64_t row, int64_t column) {
  const int64_t count = std::min(kCombineColumns, args.hidden - column);
  std::array<float, kCombineColumns> sums{};
  for (int64_t i = 0; i < args.top_k; ++i) {
    const int64_t pair = row * args.top_k + i;
    if (slot[pair] < 0) continue;
    const float weight = args.expert_weights[pair];
    const float* from = down + slot[pair] * args.hidden + column;
    for (int64_t c = 0; c < count; ++c) sums[c] += weight * from[c];
  }
  for (int64_t c = 0; c < count; ++c) store_element(args.y, row, column + c, sums[c]);
}

}  // namespace

int64_t moe_experts_workspace_bytes(int64_t rows, int64_t experts, int64_t top_k, int64_t hidden, int64_t width) {
  return workspace_layout(rows, experts, top_k, hidden, width).bytes;
}

namespace cpu {

void moe_experts(const MoeExperts& args, ThreadPool& pool, InstructionSet set) {
  const Workspace layout = workspace_layout(args.rows, args.experts, args.top_k, args.hidden, args.width);
  std::byte* base = static_cast<std::byte*>(args.workspace);
  const auto indices = [&](int64_t offset) { return reinterpret_cast<int32_t*>(base + offset); };
  Routing routing{indices(layout.begin), indices(layout.active), indices(layout.slot), indices(layout.row)};
  sort_by_expert(args, routing);

  const Rows gate_up{base + layout.gate_up, DType::kFloat32, 2 * args.width};
  const Rows activation{base + layout.activation, args.x.dtype, args.width};
  const Rows down{base + layout.down, DType::kFloat32, args.hidden};
  if (routing.slot_count > 0) {
    multiply_experts(routing,
                     {.kernels = &linear_kernels(set, args.x.dtype, args.gate_up.dtype),
                      .x = args.x,
                      .x_row = routing.row,
                      .weight = args.gate_up,
                      .y = gate_up},
                     args.gate_up_stride, pool);
    swiglu({.rows = routing.slot_count, .width = args.width, .gate_up = gate_up, .out = activation}, pool);
    multiply_experts(routing,
                     {.kernels = &linear_kernels(set, args.x.dtype, args.down.dtype),
                      .x = activation,
                      .weight = args.down,
                      .y = down},
                     args.down_stride, pool);
  }
  const int64_t column_blocks = (args.hidden + kCombineColumns - 1) / kCombineColumns;
  pool.parallel_for(args.rows * column_blocks, [&](int64_t task) {
    combine(args, routing.slot, static_cast<const float*>(down.data), task / column_blocks,
            task % column_blocks * kCombineColumns);
  });
}

void moe_experts(const MoeExperts& args, ThreadPool& pool) { moe_experts(args, pool, instruction_set()); }

}  // namespace cpu
}  // namespace tokenspeed::kernels

#include "emulation/box_copy.h"

#include <cstring>

#include "kernels/cuda/tensor_map.h"

namespace tokenspeed::emulation {
namespace {

constexpr int kLine = 128;  // bytes of a chunk's row
constexpr int kUnit = 16;
constexpr int kInnerRows = 8;
constexpr int kGroups = 2;
constexpr uint8_t kNotThere = 0xff;  // a NaN in FP8 and in bfloat16

// What kernels::cuda::box_map() was given, in the bytes that the driver would fill.
struct Box {
  const uint8_t* data;
  int64_t row_bytes;
  int64_t inner_rows;
  int64_t outer;
  int64_t outer_stride;
  int turns;
  int chunks;
  int box_chunks;

  size_t bytes() const { return static_cast<size_t>(kInnerRows * kGroups * box_chunks * kLine); }
};
static_assert(sizeof(Box) <= sizeof(CUtensorMap));

struct Corner {
  int row, outer, turn, chunk;
};

// Null: outside of the matrix, which is zeros.
const uint8_t* line_of(const Box& box, const Corner& corner, int chunk, int group, int inner) {
  const int64_t row = corner.row + inner;
  const int64_t outer = corner.outer + group;
  const bool inside = row >= 0 && row < box.inner_rows && outer >= 0 && outer < box.outer && corner.turn >= 0 &&
                      corner.turn < box.turns && chunk >= 0 && chunk < box.chunks;
  if (!inside) return nullptr;
  return box.data + row * box.row_bytes + outer * box.outer_stride + corner.turn * int64_t{kLine} +
         chunk * int64_t{kLine} * box.turns;
}

void write_box(const Box& box, const Corner& corner, uint8_t* to, uint32_t address) {
  for (int chunk = corner.chunk; chunk < corner.chunk + box.box_chunks; ++chunk) {
    for (int group = 0; group < kGroups; ++group) {
      for (int inner = 0; inner < kInnerRows; ++inner, to += kLine, address += kLine) {
        const uint8_t* const from = line_of(box, corner, chunk, group, inner);
        for (uint32_t unit = 0; unit < kLine / kUnit; ++unit) {
          uint8_t* const place = to + (unit ^ (address / kLine & 7)) * kUnit;
          if (from == nullptr) {
            std::memset(place, 0, kUnit);
          } else {
            std::memcpy(place, from + unit * kUnit, kUnit);
          }
        }
      }
    }
  }
}

}  // namespace

void box_copy(uint32_t shared, const CUtensorMap& map, int row, int outer, int turn, int chunk, uint32_t barrier,
              Place place) {
  Box box;
  std::memcpy(&box, &map, sizeof(box));
  if (shared % kLine != 0) fail("a box goes to shared memory that is not aligned to 128 bytes", place);
  uint8_t* const to = at_shared(shared, box.bytes(), place);
  std::memset(to, kNotThere, box.bytes());
  copy_later(
      barrier, static_cast<uint32_t>(box.bytes()),
      [=, corner = Corner{row, outer, turn, chunk}] { write_box(box, corner, to, shared); }, place);
}

void bulk_copy(uint32_t shared, const void* from, uint32_t bytes, uint32_t barrier, Place place) {
  const bool aligned = shared % kUnit == 0 && bytes % kUnit == 0 && reinterpret_cast<uintptr_t>(from) % kUnit == 0;
  if (!aligned) fail("a bulk copy is not aligned to 16 bytes", place);
  uint8_t* const to = at_shared(shared, bytes, place);
  std::memset(to, kNotThere, bytes);
  copy_later(
      barrier, bytes, [=] { std::memcpy(to, from, bytes); }, place);
}

}  // namespace tokenspeed::emulation

namespace tokenspeed::kernels::cuda {

CUtensorMap box_map(const void* data, int64_t row_bytes, int64_t inner_rows, int64_t outer, int64_t outer_stride,
                    int turns, int chunks, int box_chunks) {
  const emulation::Box box = {
      static_cast<const uint8_t*>(data), row_bytes, inner_rows, outer, outer_stride, turns, chunks, box_chunks};
  CUtensorMap map = {};
  std::memcpy(&map, &box, sizeof(box));
  return map;
}

}  // namespace tokenspeed::kernels::cuda

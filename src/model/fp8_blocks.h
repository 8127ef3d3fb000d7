// The official FP8 releases' geometry: one scale per 128x128 block of a matrix.
#pragma once

#include <cstdint>

namespace tokenspeed::model {

inline constexpr int64_t kFp8Block = 128;

// Blocks along an extent; the last may be partial.
constexpr int64_t fp8_blocks(int64_t extent) { return extent / kFp8Block + (extent % kFp8Block != 0); }

}  // namespace tokenspeed::model

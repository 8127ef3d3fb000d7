// A weight as a runner holds it: one matrix or several of one shape (experts), in its device's memory.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace tokenspeed::runtime {

struct LoadedWeight {
  kernels::Matrix matrix;     // the first of `count`; FP8 scales of the matrices follow one another
  int64_t matrix_stride = 0;  // bytes from one to the next
  const float* vector() const { return static_cast<const float*>(matrix.data); }
};

}  // namespace tokenspeed::runtime

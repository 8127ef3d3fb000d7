// Copies of boxes from mapped matrices to shared memory (cp.async.bulk.tensor), completing on barriers.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "emulation/machine.h"

namespace tokenspeed::emulation {

// `map` is one of kernels::cuda::box_map(), which is defined beside this in place of the real one.
void box_copy(uint32_t shared, const CUtensorMap& map, int row, int outer, int turn, uint32_t barrier, Place place);

}  // namespace tokenspeed::emulation

// Copies to shared memory that complete on barriers: boxes of mapped matrices (cp.async.bulk.tensor), and plain runs of
// bytes (cp.async.bulk).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "emulation/machine.h"

namespace tokenspeed::emulation {

// `map` is one of kernels::cuda::box_map(), which is defined beside this in place of the real one.
void box_copy(uint32_t shared, const CUtensorMap& map, int row, int outer, int turn, int chunk, uint32_t barrier,
              Place place);

void bulk_copy(uint32_t shared, const void* from, uint32_t bytes, uint32_t barrier, Place place);

}  // namespace tokenspeed::emulation

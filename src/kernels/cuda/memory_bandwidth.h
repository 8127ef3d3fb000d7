// The read bandwidth of the GPU's memory: the roofline that decoding is reported against.
#pragma once

#include <cstdint>

#include "base/status.h"

namespace tokenspeed::kernels::cuda {

// Bytes per second of all multiprocessors reading one buffer of random `bytes` front to back with 16-byte loads, the
// median of `repetitions` passes timed by events. Give many times the L2 cache, or it measures that. Allocates and
// fills the buffer on the current device and frees it. Errors: resource_exhausted without the memory; internal_error.
Result<double> measure_read_bandwidth(int64_t bytes, int repetitions);

}  // namespace tokenspeed::kernels::cuda

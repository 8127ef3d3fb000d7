// The read bandwidth of this machine's memory: the roofline that decode is reported against.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"

namespace tokenspeed::kernels::cpu {

// GB/s (1e9 bytes) of all threads of the pool reading one buffer of `bytes` front to back, the best of `repetitions`
// passes. Give several times the last-level cache, or it measures that. Allocates and writes the buffer once first;
// returns 0 if it cannot be had.
double measure_read_bandwidth(int64_t bytes, int repetitions, ThreadPool& pool);

}  // namespace tokenspeed::kernels::cpu

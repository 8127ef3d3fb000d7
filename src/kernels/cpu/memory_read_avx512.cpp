#include "kernels/cpu/memory_read.h"

namespace tokenspeed::kernels::cpu {

using Vector = int64_t __attribute__((vector_size(64), may_alias));

int64_t read_memory_avx512(const std::byte* data, int64_t bytes) { return read_memory<Vector>(data, bytes); }

}  // namespace tokenspeed::kernels::cpu

// Which launches a GPU was running when it failed: the driver writes a small core dump at a fault, whose launch
// parameters (pointers among them) tell one operation from another. Steps take half a percent longer with it.
//
// arm_fault_dump() must come before the process uses the CUDA driver, while it has one thread. Where the driver cannot
// write dumps, or the user has asked for dumps of their own (CUDA_ENABLE_COREDUMP_ON_EXCEPTION), the list is empty.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"

namespace tokenspeed::runtime {

using LaunchParameters = std::vector<uint64_t>;  // of one launch, as 8-byte words

void arm_fault_dump();
// Of the launches that were running, from the dump of this process, which is removed. Empty when the driver has not
// finished it: while blocks of a persistent kernel wait for the one that failed it may stop after the first 80 KB.
std::vector<LaunchParameters> take_faulted_launches();
// The same from a dump's bytes: an ELF file with a section of parameters per launch. Anything else has none.
std::vector<LaunchParameters> launches_of_dump(std::span<const std::byte> dump);

}  // namespace tokenspeed::runtime

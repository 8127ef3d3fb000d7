// Stacks between which a thread of the processor goes back and forth.
#pragma once

#include <cstddef>
#include <vector>

namespace tokenspeed::emulation {

// Saves the registers a call must keep on the current stack, whose pointer goes to *from, and continues on `to`.
extern "C" void tokenspeed_switch_stack(void** from, void* to);

// Stacks of equal size in one mapping, every 32nd with a page below it that may not be touched.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();
  void reserve(size_t count);
  // A pointer for tokenspeed_switch_stack() that starts `entry`, which must not return, on stack `index`.
  void* start(size_t index, void (*entry)()) const;

 private:
  void release();
  std::byte* memory_ = nullptr;
  size_t count_ = 0;
};

}  // namespace tokenspeed::emulation

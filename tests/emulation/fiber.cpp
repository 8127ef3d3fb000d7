#include "emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifndef __x86_64__
#error "the switch between stacks is written for x86-64"
#endif

// What the System V ABI lets a callee change needs no saving; the rounding modes are never changed here.
asm(R"(
.text
.globl tokenspeed_switch_stack
.type tokenspeed_switch_stack, @function
tokenspeed_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tokenspeed_switch_stack, .-tokenspeed_switch_stack
)");

namespace tokenspeed::emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;  // the build allows no frame that comes near
constexpr size_t kGuardBytes = 4096;
constexpr size_t kGuardEvery = 32;  // stacks: a process may have 65,530 mappings, and every guard splits one
constexpr size_t kSavedRegisters = 6;

}  // namespace

Stacks::~Stacks() { release(); }

void Stacks::release() {
  if (memory_ != nullptr) munmap(memory_, count_ * kStackBytes);
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  release();
  void* const memory =
      mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::byte*>(memory);
  count_ = count;
  for (size_t i = 0; i < count; i += kGuardEvery) mprotect(memory_ + i * kStackBytes, kGuardBytes, PROT_NONE);
}

void* Stacks::start(size_t index, void (*entry)()) const {
#ifdef __SANITIZE_ADDRESS__
  // What an earlier thread had on the stack is gone.
  __asan_unpoison_memory_region(memory_ + index * kStackBytes + kGuardBytes, kStackBytes - kGuardBytes);
#endif
  // The entry is the return address of the first switch; above it lies the place of its own, as after a call.
  auto* const top = reinterpret_cast<void**>(memory_ + (index + 1) * kStackBytes) - 2;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  for (size_t i = 1; i <= kSavedRegisters; ++i) top[-static_cast<ptrdiff_t>(i)] = nullptr;
  return top - kSavedRegisters;
}

}  // namespace tokenspeed::emulation

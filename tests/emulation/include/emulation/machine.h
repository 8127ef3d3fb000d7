// Runs CUDA device code as ordinary C++. Every thread of a grid is a fiber, and what threads do with each other
// (barriers, collectives of a warp, copies, words in global memory) goes through the functions below, which are also
// the only places where the machine goes on with another thread. Which one is drawn from a seed, so that every seed is
// another interleaving, with warps and blocks that are slow for a while.
//
// Weaker than memory on a GPU promises: a stored word is seen by the other threads only later, in random order between
// addresses, and a copy arrives later, in random order between copies. Plain loads and stores happen at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace tokenspeed::emulation {

using Place = std::source_location;  // of a primitive's call, for what is said about a thread

struct Grid {
  int blocks = 1;
  int threads = 32;  // of a block, a multiple of 32
  size_t shared_bytes = 0;
  uint64_t seed = 1;
};

// Calls `kernel` in every thread. Empty, or what went wrong and where every thread was then: a deadlock, a misuse of a
// primitive.
std::string run(const Grid& grid, const std::function<void()>& kernel);

// ---- what device code asks for; only within run() ----

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct Extent {
  unsigned x = 1, y = 1, z = 1;
};
struct ThreadPlace {
  Index thread, block;
  Extent block_extent, grid_extent;
};
extern const ThreadPlace* current_place;  // of the thread that runs

// Ends the run with a report.
[[noreturn]] void fail(const std::string& what, Place place);

// Other threads come first for a while.
void sleep(Place place);

// ---- shared memory ----

uint8_t* shared_memory();  // 1024-byte aligned
uint32_t shared_address(const void* p);
// `bytes` at a shared address.
uint8_t* at_shared(uint32_t address, size_t bytes, Place place);

// ---- threads of a block ----

// All `threads` threads that call with this id wait for each other.
void block_barrier(int id, int threads, const char* name, Place place);

// The lanes of `mask` must all call the same collective; the last one to come calls combine(operands, mask), where
// operands[lane] is what the lane gave.
using Combine = void (*)(void* const* operands, unsigned mask);
void meet(const char* name, unsigned mask, void* operand, Combine combine, Place place);
inline int lane() { return static_cast<int>(current_place->thread.x % 32); }

// ---- barriers that count bytes ----

void barrier_init(uint32_t barrier, int arrivals, Place place);
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes, Place place);
void barrier_wait(uint32_t barrier, uint32_t parity, Place place);
// Whether it would return at once.
bool barrier_test(uint32_t barrier, uint32_t parity, Place place);
// Calls `write` at a later time and then completes `bytes` on the barrier.
void copy_later(uint32_t barrier, uint32_t bytes, std::function<void()> write, Place place);

// ---- words of eight bytes in global memory ----

// `words` (1 or 2) neighbouring words.
void load_words(const void* p, int words, uint64_t* values, Place place);
void store_word(void* p, uint64_t value);

}  // namespace tokenspeed::emulation

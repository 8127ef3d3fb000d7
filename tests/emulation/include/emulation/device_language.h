// The part of CUDA's device language that kernels run by the machine use, for a C++ compiler: built-in variables,
// collectives of a warp, intrinsics. Types and conversions on the host come from CUDA's own headers, under which the
// function qualifiers are nothing.
//
// `__shared__` arrays are not there: where one is used, the compiler says that it is an uninitialised constant.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation/machine.h"
#include "kernels/cuda/launch.h"  // its members have names that are macros below

#undef __shared__
#define __shared__ const
#undef __launch_bounds__
#define __launch_bounds__(...)
#define __noinline__

#define threadIdx (::tokenspeed::emulation::current_place->thread)
#define blockIdx (::tokenspeed::emulation::current_place->block)
#define blockDim (::tokenspeed::emulation::current_place->block_extent)
#define gridDim (::tokenspeed::emulation::current_place->grid_extent)

// ---- threads of a block and of a warp ----

inline void __syncthreads(tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  tokenspeed::emulation::block_barrier(0, static_cast<int>(blockDim.x), "__syncthreads", place);
}
inline void __syncwarp(unsigned mask = ~0u,
                       tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  tokenspeed::emulation::meet(
      "__syncwarp", mask, nullptr, [](void* const*, unsigned) {}, place);
}

namespace tokenspeed::emulation {

template <typename T>
struct Shuffled {
  T value;
  int source;  // lane; outside of 0..31: the own value stays
  T result;
};
// `source`: the lane whose value this one gets.
template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, Place place) {
  if (source >= 0 && source < 32 && !(mask >> source & 1))
    fail("a shuffle reads from a lane outside of the mask", place);
  Shuffled<T> own = {value, source, value};
  meet(
      name, mask, &own,
      [](void* const* operands, unsigned lanes) {
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (!(lanes >> lane & 1)) continue;
          auto* const to = static_cast<Shuffled<T>*>(operands[lane]);
          if (to->source >= 0 && to->source < 32) {
            to->result = static_cast<const Shuffled<T>*>(operands[to->source])->value;
          }
        }
      },
      place);
  return own.result;
}

struct Voted {
  bool value;
  unsigned result;
};
inline unsigned ballot(const char* name, unsigned mask, bool value, Place place) {
  Voted own = {value, 0};
  meet(
      name, mask, &own,
      [](void* const* operands, unsigned lanes) {
        unsigned result = 0;
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (lanes >> lane & 1 && static_cast<const Voted*>(operands[lane])->value) result |= 1u << lane;
        }
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (lanes >> lane & 1) static_cast<Voted*>(operands[lane])->result = result;
        }
      },
      place);
  return own.result;
}

// The greatest or the least of the lanes' values.
template <typename T, bool kGreatest>
T extreme(const char* name, unsigned mask, T value, Place place) {
  meet(
      name, mask, &value,
      [](void* const* operands, unsigned lanes) {
        T found = *static_cast<const T*>(operands[std::countr_zero(lanes)]);
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (!(lanes >> lane & 1)) continue;
          const T other = *static_cast<const T*>(operands[lane]);
          if (kGreatest ? other > found : other < found) found = other;
        }
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (lanes >> lane & 1) *static_cast<T*>(operands[lane]) = found;
        }
      },
      place);
  return value;
}

}  // namespace tokenspeed::emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source,
              tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  return tokenspeed::emulation::shuffle("__shfl_sync", mask, value, source & 31, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits,
                  tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  return tokenspeed::emulation::shuffle("__shfl_xor_sync", mask, value, tokenspeed::emulation::lane() ^ bits, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance,
                 tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  const int source = tokenspeed::emulation::lane() - static_cast<int>(distance);
  return tokenspeed::emulation::shuffle("__shfl_up_sync", mask, value, source, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance,
                   tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  const int source = tokenspeed::emulation::lane() + static_cast<int>(distance);
  return tokenspeed::emulation::shuffle("__shfl_down_sync", mask, value, source, place);
}
inline unsigned __ballot_sync(unsigned mask, bool value,
                              tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  return tokenspeed::emulation::ballot("__ballot_sync", mask, value, place);
}
inline bool __any_sync(unsigned mask, bool value,
                       tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  return tokenspeed::emulation::ballot("__any_sync", mask, value, place) != 0;
}
inline bool __all_sync(unsigned mask, bool value,
                       tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  return tokenspeed::emulation::ballot("__all_sync", mask, value, place) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value,
                          tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  unsigned same = 0;
  for (int other = 0; other < 32; ++other) {
    const bool is_same = tokenspeed::emulation::shuffle("__match_any_sync", mask, value, other, place) == value;
    same |= static_cast<unsigned>(is_same) << other;
  }
  return same & mask;
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value,
                    tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  static_assert(sizeof(T) == 4);
  return tokenspeed::emulation::extreme<T, true>("__reduce_max_sync", mask, value, place);
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value,
                    tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  static_assert(sizeof(T) == 4);
  return tokenspeed::emulation::extreme<T, false>("__reduce_min_sync", mask, value, place);
}

// ---- memory ----

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
// Seen by all at once.
template <typename T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}
template <typename T>
T atomicMin(T* p, T value) {
  const T before = *p;
  if (value < before) *p = value;
  return before;
}
template <typename T>
T atomicExch(T* p, T value) {
  const T before = *p;
  *p = value;
  return before;
}

// ---- control ----

inline void __nanosleep(unsigned, tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  tokenspeed::emulation::sleep(place);
}
[[noreturn]] inline void __trap(tokenspeed::emulation::Place place = tokenspeed::emulation::Place::current()) {
  tokenspeed::emulation::fail("__trap", place);
}

// ---- arithmetic ----

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1; }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __fdividef(float a, float b) { return a / b; }
// The C library declares functions of these names.
#define __expf(value) expf(value)
#define __logf(value) logf(value)

namespace tokenspeed::kernels::cuda {

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

}  // namespace tokenspeed::kernels::cuda

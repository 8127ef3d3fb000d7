// The machine that runs device code: each primitive against what CUDA says of it, and that mistakes are found.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode_layers_words.cuh"
#include "kernels/cuda/tensor_map.h"

namespace tokenspeed::kernels::cuda {
namespace {

using emulation::Grid;
using emulation::run;

constexpr int kSeeds = 20;

void expect_runs(const Grid& grid, const std::function<void()>& kernel) {
  const std::string failure = run(grid, kernel);
  EXPECT_TRUE(failure.empty()) << failure;
}

TEST(Machine, EveryThreadRunsOnce) {
  std::vector<int> runs(3 * 64);
  expect_runs({3, 64}, [&] { ++runs[blockIdx.x * blockDim.x + threadIdx.x]; });
  EXPECT_EQ(runs, std::vector<int>(3 * 64, 1));
}

TEST(Machine, Shuffles) {
  expect_runs({1, 64}, [] {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int value = static_cast<int>(threadIdx.x) * 10;
    const int first = value - lane * 10;
    EXPECT_EQ(__shfl_sync(~0u, value, 5), first + 50);
    EXPECT_EQ(__shfl_xor_sync(~0u, value, 3), first + (lane ^ 3) * 10);
    EXPECT_EQ(__shfl_up_sync(~0u, value, 2), lane < 2 ? value : value - 20);
    EXPECT_EQ(__shfl_down_sync(~0u, value, 2), lane > 29 ? value : value + 20);
    EXPECT_EQ(warp_sum(static_cast<float>(lane)), 31 * 16);
    EXPECT_EQ(warp_max(static_cast<float>(-lane)), 0);
  });
}

TEST(Machine, VotesAndReductions) {
  expect_runs({1, 32}, [] {
    const int lane = static_cast<int>(threadIdx.x);
    EXPECT_EQ(__ballot_sync(~0u, lane % 2 == 1), 0xaaaaaaaau);
    EXPECT_TRUE(__any_sync(~0u, lane == 7));
    EXPECT_FALSE(__all_sync(~0u, lane != 7));
    EXPECT_EQ(__match_any_sync(~0u, lane / 4), 0xfu << lane / 4 * 4);
    EXPECT_EQ(__reduce_max_sync(~0u, static_cast<unsigned>(lane)), 31u);
    EXPECT_EQ(__reduce_min_sync(~0u, 5 - lane), -26);
    // Halves of a warp on their own.
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    EXPECT_EQ(__ballot_sync(half, true), half);
  });
}

TEST(Machine, ABarrierIsTestedWithoutWaiting) {
  expect_runs({1, 32, 1024}, [] {
    if (threadIdx.x != 0) return;
    const uint32_t barrier = shared_address(dynamic_shared());
    barrier_init(barrier, 1);
    EXPECT_TRUE(barrier_test(barrier, 1));
    EXPECT_FALSE(barrier_test(barrier, 0));
    barrier_arrive(barrier);
    EXPECT_TRUE(barrier_test(barrier, 0));
  });
}

TEST(Machine, NamedBarriersSeparateWritesFromReads) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    expect_runs({2, 128, 4096, seed}, [] {
      auto* const values = reinterpret_cast<unsigned*>(dynamic_shared());
      if (threadIdx.x >= 96) return;
      for (unsigned round = 0; round < 5; ++round) {
        values[threadIdx.x] = threadIdx.x + round;
        named_barrier(1, 96);
        EXPECT_EQ(values[95 - threadIdx.x], 95 - threadIdx.x + round);
        named_barrier(1, 96);
      }
    });
  }
}

TEST(Machine, PhasesOfAByteBarrier) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    expect_runs({1, 96, 1024, seed}, [] {
      uint8_t* const memory = dynamic_shared();
      const uint32_t barrier = shared_address(memory);
      auto* const sum = reinterpret_cast<int*>(memory + 8);
      if (threadIdx.x == 0) {
        barrier_init(barrier, 2);
        *sum = 0;
      }
      __syncthreads();
      barrier_wait(barrier, 1);  // at once
      __syncthreads();
      for (uint32_t phase = 0; phase < 6; ++phase) {
        if (threadIdx.x < 64) {
          if (threadIdx.x % 32 == 0) ++*sum;
          warp_arrive(barrier);
        }
        barrier_wait(barrier, phase & 1);
        EXPECT_EQ(*sum, static_cast<int>(phase + 1) * 2);
        __syncthreads();
      }
    });
  }
}

// A map of two turns and three chunks in rows of 768 bytes, boxes of two chunks.
struct Boxes {
  Boxes() : bytes(64 * 768) {
    std::mt19937 engine(7);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(engine());
  }
  // Byte `column` of line `row` of group `outer` in memory, 0 outside.
  uint8_t at(int row, int outer, int column) const {
    return row < 8 && outer < 7 && column < 768 ? bytes[static_cast<size_t>((outer * 8 + row) * 768 + column)]
                                                : uint8_t{0};
  }
  std::vector<uint8_t> bytes;
  CUtensorMap map = box_map(bytes.data(), 768, 8, 7, 8 * 768, 2, 3, 2);
};

void check_box(const Boxes& boxes, const uint8_t* memory, uint32_t base, const int (&corner)[4]) {
  const auto& [row, outer, turn, first] = corner;
  for (int line = 0; line < 2 * 16; ++line) {
    const int chunk = first + line / 16;
    for (int unit = 0; unit < 8; ++unit) {
      const uint8_t* const got = memory + line * 128 + ((static_cast<uint32_t>(unit) ^ (base / 128 + line)) & 7) * 16;
      for (int i = 0; i < 16; ++i) {
        const int column = (chunk * 2 + turn) * 128 + unit * 16 + i;
        ASSERT_EQ(got[i], boxes.at(row + line % 8, outer + line / 8 % 2, column)) << line << " " << unit;
      }
    }
  }
}

TEST(Machine, BoxesArriveSwizzledAndZeroOutside) {
  const Boxes boxes;
  constexpr int kBytes = 2 * 2048;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    expect_runs({2, 32, 4 * 8192 + 1024, seed}, [&] {
      uint8_t* const memory = dynamic_shared();
      const uint32_t ring = shared_address(memory);
      const uint32_t barrier = ring + 4 * 8192;
      const int corner[4][4] = {{0, 0, 0, 0}, {0, 4, 1, 1}, {0, 6, 1, 2}, {3, 2, 0, 1}};
      if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < 4; ++i) barrier_init(barrier + i * 8, 1);
        publish_barriers();
        for (uint32_t i = 0; i < 4; ++i) {
          barrier_arrive_expecting(barrier + i * 8, kBytes);
          const auto& [row, outer, turn, chunk] = corner[i];
          box_copy(ring + i * 8192, boxes.map, row, outer, turn, chunk, barrier + i * 8);
          EXPECT_EQ(memory[i * 8192], 0xff);
        }
      }
      __syncthreads();
      for (uint32_t i = 0; i < 4; ++i) {
        barrier_wait(barrier + i * 8, 0);
        if (threadIdx.x == 0) {
          check_box(boxes, memory + i * 8192, ring + i * 8192, corner[i]);
        }
      }
    });
  }
}

TEST(Machine, ProductsOfAWarp) {
  std::mt19937 engine(3);
  float a[16][16], b[16][8];
  for (auto& row : a) {
    for (float& value : row) value = static_cast<float>(static_cast<int>(engine() % 17) - 8) / 4;
  }
  for (auto& row : b) {
    for (float& value : row) value = static_cast<float>(static_cast<int>(engine() % 17) - 8) / 8;
  }
  expect_runs({1, 32}, [&] {
    const int group = static_cast<int>(threadIdx.x) / 4;
    const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
    const auto check = [&](auto pack, auto multiply) {
      const uint32_t left[4] = {
          pack(a[group][pair], a[group][pair + 1]), pack(a[group + 8][pair], a[group + 8][pair + 1]),
          pack(a[group][pair + 8], a[group][pair + 9]), pack(a[group + 8][pair + 8], a[group + 8][pair + 9])};
      float d[4] = {1, 2, 3, 4};
      multiply(d, left, pack(b[pair][group], b[pair + 1][group]), pack(b[pair + 8][group], b[pair + 9][group]));
      for (int i = 0; i < 4; ++i) {
        float expected = static_cast<float>(i + 1);
        for (int k = 0; k < 16; ++k) expected += a[group + i / 2 * 8][k] * b[k][pair + i % 2];
        EXPECT_EQ(d[i], expected);
      }
    };
    check([](float x, float y) { return pack_bf16(x, y); },
          [](auto& d, const auto& left, uint32_t b0, uint32_t b1) { multiply_add(d, left, b0, b1); });
    check([](float x, float y) { return pack_f16(x, y); },
          [](auto& d, const auto& left, uint32_t b0, uint32_t b1) { multiply_add_half(d, left, b0, b1); });
  });
}

TEST(Machine, Fp8IsExactAsFloat16) {
  for (uint32_t code = 0; code < 256; ++code) {
    if ((code & 0x7f) == 0x7f) continue;
    const int exponent = static_cast<int>(code >> 3 & 15);
    const float mantissa = static_cast<float>(code & 7) / 8;
    const float size = exponent == 0 ? std::ldexp(mantissa, -6) : std::ldexp(1 + mantissa, exponent - 7);
    uint32_t low, high;
    fp8_to_f16(code | code << 24, low, high);
    EXPECT_EQ(low, pack_f16(code & 0x80 ? -size : size, 0));
    EXPECT_EQ(high, pack_f16(0, code & 0x80 ? -size : size));
  }
}

TEST(Machine, BlocksExchangeWords) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    alignas(16) uint2 words[4][64] = {};
    expect_runs({4, 64, 0, seed}, [&] {
      const unsigned next = (blockIdx.x + 1) % gridDim.x;
      for (unsigned round = 1; round < 4; ++round) {
        store_word(&words[blockIdx.x][threadIdx.x], round * 100 + threadIdx.x, round);
        uint4 pair;
        do {
          pair = load_words2(&words[next][threadIdx.x / 2 * 2]);
        } while (pair.y < round || pair.w < round);
        EXPECT_GE(pair.x, round * 100 + threadIdx.x / 2 * 2);
        EXPECT_EQ(pair.x % 100, threadIdx.x / 2 * 2);
        EXPECT_EQ(pair.x / 100, pair.y);
        EXPECT_EQ(load_word(&words[blockIdx.x][threadIdx.x]).y, round);
      }
    });
    EXPECT_EQ(words[3][63].x, 363u);
  }
}

TEST(Machine, SleepersLookAgain) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    int ready = 0;
    expect_runs({2, 64, 0, seed}, [&] {
      if (blockIdx.x == 1 && threadIdx.x == 0) ready = 1;
      while (*const_cast<volatile int*>(&ready) == 0) __nanosleep(100);
    });
  }
}

// A word can be seen before one that was stored earlier.
TEST(Machine, StoresOfAThreadOvertakeEachOther) {
  int overtaken = 0;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    alignas(16) uint2 words[2] = {};
    expect_runs({2, 32, 0, seed}, [&] {
      if (threadIdx.x != 0) return;
      if (blockIdx.x == 0) {
        store_word(&words[0], 1, 1);
        store_word(&words[1], 1, 1);
        return;
      }
      while (load_word(&words[1]).y == 0) {
      }
      overtaken += load_word(&words[0]).y == 0;
    });
  }
  EXPECT_GT(overtaken, 0);
}

TEST(Machine, DeadlockIsDescribed) {
  uint2 word = {};
  const std::string report = run({3, 64, 1024, 1}, [&] {
    const uint32_t barrier = shared_address(dynamic_shared());
    if (threadIdx.x == 0) barrier_init(barrier, 3);
    __syncthreads();
    if (blockIdx.x == 0) barrier_wait(barrier, 0);
    if (threadIdx.x < 32) {
      while (!__all_sync(~0u, load_word(&word).y != 0)) {
      }
    }
    while (blockIdx.x == 2) __nanosleep(100);
    named_barrier(2, 64);
  });
  const auto expect_found = [&](const std::string& line) {
    EXPECT_NE(report.find(line), std::string::npos) << line << "\nis not in\n" << report;
  };
  expect_found("no thread comes further");
  expect_found(
      "block 0 warps 0-1\n  lanes 0-31: barrier_wait(shared 0x400, parity 0): 3 of 3 arrivals and 0 bytes missing");
  expect_found("block 1 warps 0-0\n  lanes 0-31: polls the word at");
  expect_found("block 1 warps 1-1\n  lanes 0-31: named_barrier: barrier 2, 32 of 64 threads there");
  expect_found("block 2 warps 0-0\n  lanes 0-31: polls the word at");
  expect_found("block 2 warps 1-1\n  lanes 0-31: sleeps");
}

void expect_failure(const std::string& what, const std::function<void()>& kernel) {
  const std::string report = run({1, 64, 4096, 1}, kernel);
  EXPECT_NE(report.find(what), std::string::npos) << report;
}

TEST(Machine, MisuseIsFound) {
  expect_failure("is in __shfl_sync", [] {
    if (threadIdx.x < 16) {
      __syncwarp();
    } else {
      __shfl_sync(~0u, 1, 0);
    }
  });
  expect_failure("is entered for", [] { named_barrier(1, threadIdx.x < 32 ? 96 : 64); });
  expect_failure("no barrier at shared", [] { barrier_arrive(shared_address(dynamic_shared())); });
  expect_failure("one arrival too many", [] {
    const uint32_t barrier = shared_address(dynamic_shared());
    if (threadIdx.x != 0) return;
    barrier_init(barrier, 1);
    barrier_arrive_expecting(barrier, 16);
    barrier_arrive(barrier);
  });
  expect_failure("is overwritten", [] {
    if (threadIdx.x != 0) return;
    const uint32_t barrier = shared_address(dynamic_shared());
    barrier_init(barrier, 1);
    dynamic_shared()[3] = 0;
    barrier_wait(barrier, 0);
  });
  expect_failure("outside of the block's 4096 bytes", [] { load16_shared(shared_address(dynamic_shared()) + 4096); });
  const Boxes boxes;
  expect_failure("before its copies have come", [&] {
    if (threadIdx.x != 0) return;
    const uint32_t barrier = shared_address(dynamic_shared() + 2048);
    barrier_init(barrier, 1);
    barrier_arrive_expecting(barrier, 2048);
    const CUtensorMap one = box_map(boxes.bytes.data(), 128, 8, 2, 1024, 1, 1, 1);
    box_copy(shared_address(dynamic_shared()), one, 0, 0, 0, 0, barrier);
  });
}

}  // namespace
}  // namespace tokenspeed::kernels::cuda

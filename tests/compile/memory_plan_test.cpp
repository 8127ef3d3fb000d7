#include "compile/memory_plan.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

namespace tokenspeed::compile {
namespace {

constexpr int64_t kAlignment = 64;

std::vector<Lifetime> random_lifetimes() {
  std::vector<Lifetime> lives(*rc::gen::inRange(0, 40));
  for (Lifetime& life : lives) {
    life.begin = *rc::gen::inRange(0, 30);
    life.end = life.begin + *rc::gen::inRange(0, 12);
    life.bytes = *rc::gen::inRange(0, 1000);
  }
  return lives;
}

bool together(const Lifetime& a, const Lifetime& b) { return a.begin <= b.end && b.begin <= a.end; }

TEST(MemoryPlan, ValuesAliveTogetherNeverOverlap) {
  EXPECT_TRUE(rc::check([] {
    const std::vector<Lifetime> lives = random_lifetimes();
    const MemoryPlan plan = plan_memory(lives, kAlignment, true);
    int64_t alive_bytes = 0;
    for (size_t i = 0; i < lives.size(); ++i) {
      RC_ASSERT(plan.offsets[i] >= 0 && plan.offsets[i] % kAlignment == 0);
      RC_ASSERT(plan.offsets[i] + lives[i].bytes <= plan.bytes);
      alive_bytes = std::max(alive_bytes, lives[i].bytes);
      for (size_t j = 0; j < i; ++j) {
        if (!together(lives[i], lives[j])) continue;
        RC_ASSERT(plan.offsets[i] + lives[i].bytes <= plan.offsets[j] ||
                  plan.offsets[j] + lives[j].bytes <= plan.offsets[i]);
      }
    }
    RC_ASSERT(plan.bytes >= alive_bytes);
    RC_ASSERT(plan.bytes <= plan_memory(lives, kAlignment, false).bytes);
  }));
}

TEST(MemoryPlan, WithoutReuseNothingIsShared) {
  EXPECT_TRUE(rc::check([] {
    const std::vector<Lifetime> lives = random_lifetimes();
    int64_t sum = 0;
    for (const Lifetime& life : lives) sum += (life.bytes + kAlignment - 1) / kAlignment * kAlignment;
    RC_ASSERT(plan_memory(lives, kAlignment, false).bytes == sum);
  }));
}

TEST(MemoryPlan, AChainNeedsTwoBuffers) {
  std::vector<Lifetime> chain;
  for (int64_t i = 0; i < 10; ++i) chain.push_back({i, i + 1, 128});
  EXPECT_EQ(plan_memory(chain, kAlignment, true).bytes, 256);
  EXPECT_EQ(plan_memory(chain, kAlignment, false).bytes, 1280);
}

}  // namespace
}  // namespace tokenspeed::compile

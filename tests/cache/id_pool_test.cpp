#include "cache/id_pool.h"

#include <gtest/gtest.h>

#include <set>
#include <utility>

#include "base/random.h"

namespace tokenspeed::cache {
namespace {

TEST(IdPool, GivesDistinctIdsAndTakesThemBack) {
  IdPool pool(4);
  {
    const auto first = pool.acquire(3);
    ASSERT_TRUE(first);
    EXPECT_EQ(std::set<int32_t>(first->ids().begin(), first->ids().end()), (std::set<int32_t>{0, 1, 2}));
    EXPECT_EQ(pool.available(), 1);
    EXPECT_FALSE(pool.acquire(2)) << "all or none";
    EXPECT_EQ(pool.available(), 1);
  }
  EXPECT_EQ(pool.available(), 4);
}

TEST(IdPool, MovingALeaseMovesItsIds) {
  IdPool pool(2);
  auto lease = pool.acquire(2);
  Lease moved = std::move(*lease);
  lease.reset();
  EXPECT_EQ(pool.available(), 0);
  moved = Lease();
  EXPECT_EQ(pool.available(), 2);
}

TEST(IdPool, NoIdIsHeldTwiceWhateverTheOrder) {
  constexpr int32_t kIds = 37;
  constexpr uint64_t kSeed = 20261125;
  SCOPED_TRACE(kSeed);
  IdPool pool(kIds);
  std::vector<Lease> leases;
  for (uint64_t step = 0; step < 20000; ++step) {
    const auto random = philox(kSeed, 0, step);
    if (random[0] % 2 == 0) {
      if (auto lease = pool.acquire(static_cast<int32_t>(random[1] % 9))) leases.push_back(std::move(*lease));
    } else if (!leases.empty()) {
      std::swap(leases[random[1] % leases.size()], leases.back());
      leases.pop_back();
    }
    std::set<int32_t> held;
    size_t count = 0;
    for (const Lease& lease : leases) {
      held.insert(lease.ids().begin(), lease.ids().end());
      count += lease.ids().size();
    }
    ASSERT_EQ(held.size(), count);
    ASSERT_EQ(pool.available(), kIds - static_cast<int32_t>(count));
  }
}

}  // namespace
}  // namespace tokenspeed::cache

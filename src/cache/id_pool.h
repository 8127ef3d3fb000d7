// A pool of small integer ids: KV pages, or state slots. Purely logical; the Runner owns what the ids stand for.
// Invariant: an id is either free or held by exactly one Lease; a Lease returns its ids when it is destroyed.
// Cost: acquire and release are O(ids moved), without allocation in the pool. Not thread-safe: the step thread owns it.
// The pool must outlive its leases.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace tokenspeed::cache {

class IdPool;

// Holds ids of one pool, in the order they were acquired. Move-only; empty after a move.
class Lease {
 public:
  Lease() = default;
  Lease(Lease&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), ids_(std::move(other.ids_)) {}
  Lease& operator=(Lease&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(ids_, other.ids_);
    return *this;
  }
  ~Lease();
  std::span<const int32_t> ids() const { return ids_; }

 private:
  friend class IdPool;
  Lease(IdPool* pool, std::vector<int32_t> ids) : pool_(pool), ids_(std::move(ids)) {}
  IdPool* pool_ = nullptr;
  std::vector<int32_t> ids_;
};

class IdPool {
 public:
  // Ids 0..count-1, all free.
  explicit IdPool(int32_t count);
  IdPool(const IdPool&) = delete;
  IdPool& operator=(const IdPool&) = delete;

  // All `count` ids or none.
  std::optional<Lease> acquire(int32_t count);
  int32_t size() const { return size_; }
  int32_t available() const { return static_cast<int32_t>(free_.size()); }

 private:
  friend class Lease;
  void release(std::span<const int32_t> ids);

  int32_t size_;
  std::vector<int32_t> free_;  // a stack: the last released is the warmest
};

}  // namespace tokenspeed::cache

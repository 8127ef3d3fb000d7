#include "cache/id_pool.h"

namespace tokenspeed::cache {

Lease::~Lease() {
  if (pool_) pool_->release(ids_);
}

IdPool::IdPool(int32_t count) : size_(count) {
  free_.reserve(static_cast<size_t>(count));
  for (int32_t id = count - 1; id >= 0; --id) free_.push_back(id);
}

std::optional<Lease> IdPool::acquire(int32_t count) {
  if (count > available()) return std::nullopt;
  std::vector<int32_t> ids(free_.rbegin(), free_.rbegin() + count);
  free_.resize(free_.size() - static_cast<size_t>(count));
  return Lease(this, std::move(ids));
}

void IdPool::release(std::span<const int32_t> ids) { free_.insert(free_.end(), ids.rbegin(), ids.rend()); }

}  // namespace tokenspeed::cache

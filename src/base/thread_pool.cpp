#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>

namespace tokenspeed {
namespace {

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

inline void relax() { __builtin_ia32_pause(); }

constexpr auto kSpinTime = std::chrono::microseconds(50);

}  // namespace

ThreadPool::ThreadPool(int threads, bool pin) {
  const std::vector<int> cpus = allowed_cpus();
  if (threads <= 0) threads = static_cast<int>(cpus.size());
  for (int i = 1; i < threads; ++i) {
    const int cpu = pin && threads <= static_cast<int>(cpus.size()) ? cpus[i] : -1;
    workers_.emplace_back([this, cpu] { worker_main(cpu); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::work() {
  for (int64_t index = next_.fetch_add(1); index < count_; index = next_.fetch_add(1)) invoke_(context_, index);
}

void ThreadPool::run(int64_t count, Invoke invoke, const void* context) {
  if (count <= 0) return;
  count_ = count;
  invoke_ = invoke;
  context_ = context;
  next_.store(0);
  if (count == 1 || workers_.empty()) {
    work();
    return;
  }
  open_.store(true);
  generation_.fetch_add(1);
  if (sleepers_.load() > 0) {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  work();
  // Every worker that joined must have left work() before the loop's context goes out of scope; one that has not woken
  // yet (its CPU may be taken by another program) finds the loop closed and is not waited for.
  open_.store(false);
  for (int spins = 0; busy_.load() != 0; ++spins) {
    if (spins < 10000) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::worker_main(int cpu) {
  if (cpu >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // best effort: a refusal costs speed only
  }
  uint64_t seen = 0;
  while (true) {
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    while (generation_.load(std::memory_order_acquire) == seen) {
      relax();
      if (std::chrono::steady_clock::now() < deadline) continue;
      std::unique_lock lock(mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      sleepers_.fetch_sub(1);
    }
    seen = generation_.load();
    if (stop_.load()) return;
    // Joining and closing are both sequentially consistent: either the worker sees the loop closed, or run() sees it
    // busy.
    busy_.fetch_add(1);
    if (open_.load()) work();
    busy_.fetch_sub(1);
  }
}

}  // namespace tokenspeed

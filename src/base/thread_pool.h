// A fixed set of threads for data-parallel loops inside one operation.
// Invariant: one parallel_for at a time; the calling thread takes part as worker 0. Which worker runs an index never
// changes a result, so kernels must not reduce across indices in arrival order.
// Cost: waking spinning workers is about 1 µs; they sleep after some 50 µs without work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace tokenspeed {

class ThreadPool {
 public:
  // threads counts the caller; 0 takes one per CPU the process may run on. `pin` binds each worker to one CPU.
  explicit ThreadPool(int threads = 0, bool pin = false);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls function(index) for every index in [0, count), on all threads, and returns when all are done.
  // Indices are handed out dynamically, one at a time: make them coarse (several µs each).
  template <typename Function>
  void parallel_for(int64_t count, const Function& function) {
    run(
        count, [](const void* context, int64_t index) { (*static_cast<const Function*>(context))(index); }, &function);
  }

 private:
  using Invoke = void (*)(const void*, int64_t);
  void run(int64_t count, Invoke invoke, const void* context);
  void work();
  void worker_main(int cpu);

  std::vector<std::thread> workers_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<bool> open_{false};  // a loop may be joined
  std::atomic<int> busy_{0};       // workers inside it
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  int64_t count_ = 0;
  Invoke invoke_ = nullptr;
  const void* context_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace tokenspeed

#include "emulation/machine.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "emulation/fiber.h"

namespace tokenspeed::emulation {

const ThreadPlace* current_place = nullptr;

namespace {

constexpr int kLanes = 32;
constexpr uint32_t kSharedBase = 1024;                   // shared address of the first byte, so that 0 is none
constexpr uint8_t kPoison = 0xff;                        // NaN in float32, float16, bfloat16 and FP8
constexpr uint64_t kBarrierCookie = 0x6d62617272696572;  // in shared memory where a barrier is, to see it overwritten
constexpr size_t kPollWords = 24;                        // that a thread polls at a time, at most
constexpr int kPollLoads = 2 * kPollWords;  // in a row that show nothing new, after which a thread is taken to poll
constexpr int kIdleRounds =
    16;  // of all that poll or sleep without progress, after which nobody will ever come further
constexpr size_t kMostStores = 512;  // on their way

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ * 0x2545f4914f6cdd1du;
  }
  uint64_t below(uint64_t limit) { return (next() >> 32) * limit >> 32; }
  bool one_in(uint64_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

enum class Doing { kRunning, kMeeting, kBlockBarrier, kBarrier, kPolling, kSleeping, kExited };

// Where a thread is, for reports.
struct Wait {
  Doing doing = Doing::kRunning;
  const char* name = "";
  Place place;
  uint64_t a = 0, b = 0;  // mask; id and threads; address and parity; address
};

struct Warp;
struct Block;

// What a thread saw where it loaded words lately.
class Watch {
 public:
  void note(const void* p, int words, const uint64_t* values) {
    auto found = std::ranges::find(seen_, p, &Seen::address);
    if (found == seen_.end()) found = seen_.begin() + oldest_++ % seen_.size();
    const size_t bytes = sizeof(uint64_t) * static_cast<size_t>(words);
    const bool same = found->address == p && std::memcmp(found->values, values, bytes) == 0;
    found->address = p;
    found->again = same;
    std::memcpy(found->values, values, bytes);
    in_a_row_ = same ? in_a_row_ + 1 : 0;
  }
  bool polls() const { return in_a_row_ >= kPollLoads; }
  // Enough for a look at all words before the thread is taken to poll again.
  void woken() { in_a_row_ = kPollLoads - static_cast<int>(kPollWords); }
  void for_polled(auto&& take) const {
    for (const Seen& seen : seen_) {
      if (seen.again) take(seen.address, seen.values[0]);
    }
  }

 private:
  struct Seen {
    const void* address = nullptr;
    uint64_t values[2] = {};
    bool again = false;
  };
  std::array<Seen, kPollWords> seen_;
  size_t oldest_ = 0;
  int in_a_row_ = 0;
};

struct Thread {
  ThreadPlace place;
  void* stack = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  Wait wait;
  int own_stores = 0;  // still on their way
  Watch* watch = nullptr;
  uint64_t sleeps = 0;  // that have ended
};

// What a lane gave to the collective it is in.
struct Meeting {
  const char* name = nullptr;
  unsigned mask = 0;
  Place place;
};

struct Warp {
  Block* block = nullptr;
  std::array<Thread, kLanes> threads;
  unsigned ready = 0;    // lanes to run in this turn
  unsigned later = 0;    // lanes to run in the next one
  unsigned meeting = 0;  // lanes in a collective
  std::array<Meeting, kLanes> meetings;
  std::array<void*, kLanes> operands = {};
  uint64_t stalled_until = 0;
  int place_in_list = -1;  // of runnable warps
};

struct BlockBarrier {
  int threads = 0;
  std::vector<Thread*> waiting;
};

struct ByteBarrier {
  int arrivals = 0;  // of a phase
  int pending = 0;
  int64_t bytes = 0;  // expected minus come
  uint32_t parity = 0;
  std::vector<Thread*> waiting;
};

struct Block {
  unsigned index = 0;
  uint8_t* shared = nullptr;
  std::vector<Warp> warps;
  std::unordered_map<int, BlockBarrier> barriers;
  std::unordered_map<uint32_t, ByteBarrier> byte_barriers;
  int alive = 0;
  int copies = 0;  // on their way
  uint64_t stalled_until = 0;
};

struct Copy {
  Block* block;
  uint32_t barrier;
  uint32_t bytes;
  std::function<void()> write;
};

// Stale when the thread has been woken since.
struct Poller {
  Thread* thread;
  uint64_t sleep;
};

struct Store {
  Thread* thread;
  uint64_t* address;
  uint64_t value;
};

const void* line_of(const void* p) { return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) & ~15ull); }

std::string format(const char* pattern, auto... values) {
  char text[512];
  std::snprintf(text, sizeof(text), pattern, values...);
  return text;
}
std::string at(const Place& place) {
  const std::string file = place.file_name();
  return format(" at %s:%u", file.substr(file.rfind('/') + 1).c_str(), place.line());
}

class Machine {
 public:
  Machine(const Grid& grid, const std::function<void()>& kernel);
  std::string run();

  [[noreturn]] void fail(const std::string& what, const Place& place);
  void sleep(const Place& place);
  void meet(const char* name, unsigned mask, void* operand, Combine combine, const Place& place);
  void block_barrier(int id, int threads, const char* name, const Place& place);
  void barrier_init(uint32_t address, int arrivals, const Place& place);
  void barrier_arrive(uint32_t address, uint32_t expected_bytes, const Place& place);
  void barrier_wait(uint32_t address, uint32_t parity, const Place& place);
  bool barrier_test(uint32_t address, uint32_t parity, const Place& place);
  void copy_later(uint32_t barrier, uint32_t bytes, std::function<void()> write, const Place& place);
  void load_words(const void* p, int words, uint64_t* values, const Place& place);
  void store_word(void* p, uint64_t value);
  uint8_t* at_shared(uint32_t address, size_t bytes, const Place& place);
  uint32_t shared_address(const void* p);

 private:
  static void thread_main();
  void start_threads();
  void exit_thread();
  // Goes on with another thread; the caller has left the set of ready ones, or is made ready by others.
  void suspend();
  void wait(const Wait& wait);
  void yield();  // the thread runs on in the warp's next turn
  void make_ready(Thread* thread);
  void maybe_yield();

  Warp* pick();
  void stall_some(Warp* warp);
  void run_warp(Warp* warp);
  void list(Warp* warp);
  void unlist(Warp* warp);
  void deliver_some();
  void deliver_copy();
  void deliver_store(size_t index);
  bool idle();
  void wake_sleepers();
  bool wake_waiting();

  ByteBarrier& byte_barrier(uint32_t address, const Place& place);
  void settle(ByteBarrier& barrier);
  void check_meeting(const Warp& warp, const Meeting& last);
  void read_words(Thread* self, const void* p, int words, uint64_t* values);
  void sleep_until_stored(Thread* self, const Place& place);
  void wake(Thread* thread);

  std::string report() const;
  std::string describe(const Block& block, const Thread& thread) const;
  std::string describe(const Block& block, const Warp& warp) const;

  const Grid grid_;
  const std::function<void()>& kernel_;
  Random random_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Watch> watches_;  // of all threads
  std::unique_ptr<uint8_t, decltype(&std::free)> shared_;
  std::vector<Warp*> runnable_;
  std::vector<Copy> copies_;
  std::vector<Store> stores_;
  std::vector<Thread*> sleepers_;
  std::unordered_map<const void*, std::vector<Poller>> pollers_;  // by line
  void* scheduler_ = nullptr;
  uint64_t turn_ = 0;
  uint64_t copies_stalled_until_ = 0;
  uint64_t progress_ = 0;  // collectives are none: warps poll with them
  uint64_t idle_progress_ = 0;
  int idle_rounds_ = 0;
  std::string failure_;
};

Machine* machine = nullptr;
Thread* current = nullptr;

void set_current(Thread* thread) {
  current = thread;
  current_place = thread == nullptr ? nullptr : &thread->place;
}

Stacks& stacks() {
  static Stacks all;
  return all;
}

// ---- threads ----

Machine::Machine(const Grid& grid, const std::function<void()>& kernel)
    : grid_(grid), kernel_(kernel), random_(grid.seed), shared_(nullptr, &std::free) {
  const size_t block_bytes = (grid.shared_bytes + 1023) / 1024 * 1024;
  const size_t bytes = std::max<size_t>(1024, block_bytes * static_cast<size_t>(grid.blocks));
  shared_.reset(static_cast<uint8_t*>(std::aligned_alloc(1024, bytes)));
  std::memset(shared_.get(), kPoison, bytes);
  for (int i = 0; i < grid.blocks; ++i) {
    blocks_.push_back(std::make_unique<Block>());
    blocks_.back()->index = static_cast<unsigned>(i);
    blocks_.back()->shared = shared_.get() + static_cast<size_t>(i) * block_bytes;
  }
}

void Machine::start_threads() {
  watches_.resize(static_cast<size_t>(grid_.blocks) * static_cast<size_t>(grid_.threads));
  stacks().reserve(watches_.size());
  size_t index = 0;
  for (const auto& block : blocks_) {
    block->alive = grid_.threads;
    block->warps = std::vector<Warp>(static_cast<size_t>(grid_.threads / kLanes));
    for (size_t w = 0; w < block->warps.size(); ++w) {
      Warp& warp = block->warps[w];
      warp.block = block.get();
      for (int lane = 0; lane < kLanes; ++lane) {
        Thread& thread = warp.threads[static_cast<size_t>(lane)];
        thread.warp = &warp;
        thread.lane = lane;
        thread.place.thread.x = static_cast<unsigned>(static_cast<int>(w) * kLanes + lane);
        thread.place.block.x = block->index;
        thread.place.block_extent.x = static_cast<unsigned>(grid_.threads);
        thread.place.grid_extent.x = static_cast<unsigned>(grid_.blocks);
        thread.watch = &watches_[index];
        thread.stack = stacks().start(index++, &thread_main);
        make_ready(&thread);
      }
    }
  }
}

void Machine::thread_main() {
  machine->kernel_();
  machine->exit_thread();
}

void Machine::exit_thread() {
  Block& block = *current->warp->block;
  if (--block.alive == 0 && block.copies > 0) fail("the block ends before its copies have come", Place());
  ++progress_;
  wait({Doing::kExited, "", Place()});
  std::abort();
}

void Machine::suspend() {
  Thread* const self = current;
  const unsigned ready = self->warp->ready;
  if (ready == 0 || !failure_.empty()) {
    tokenspeed_switch_stack(&self->stack, scheduler_);
    return;
  }
  // The next ready lane, around the end.
  const int turned = std::countr_zero(std::rotr(ready, self->lane));
  set_current(&self->warp->threads[static_cast<size_t>((self->lane + turned) % kLanes)]);
  tokenspeed_switch_stack(&self->stack, current->stack);
}

void Machine::wait(const Wait& wait) {
  current->wait = wait;
  current->warp->ready &= ~(1u << current->lane);
  suspend();
  current->wait.doing = Doing::kRunning;
}

void Machine::make_ready(Thread* thread) {
  thread->warp->ready |= 1u << thread->lane;
  list(thread->warp);
}

void Machine::yield() {
  current->warp->ready &= ~(1u << current->lane);
  current->warp->later |= 1u << current->lane;
  suspend();
}

// Until it is its turn in deliver_some() or nobody else can run.
void Machine::sleep(const Place& place) {
  sleepers_.push_back(current);
  wait({Doing::kSleeping, "", place});
}

void Machine::maybe_yield() {
  if (random_.one_in(8)) yield();
}

void Machine::fail(const std::string& what, const Place& place) {
  failure_ = format("block %u thread %u: ", current->warp->block->index, current->place.thread.x) + what + at(place) +
             "\n" + report();
  suspend();
  std::abort();
}

// ---- the order of things ----

void Machine::list(Warp* warp) {
  if (warp->place_in_list >= 0) return;
  warp->place_in_list = static_cast<int>(runnable_.size());
  runnable_.push_back(warp);
}

void Machine::unlist(Warp* warp) {
  Warp* const last = runnable_.back();
  runnable_[static_cast<size_t>(warp->place_in_list)] = last;
  last->place_in_list = warp->place_in_list;
  warp->place_in_list = -1;
  runnable_.pop_back();
}

Warp* Machine::pick() {
  constexpr int kAttempts = 8;  // then a stalled one may run after all
  Warp* warp = nullptr;
  for (int i = 0; i < kAttempts; ++i) {
    warp = runnable_[random_.below(runnable_.size())];
    if (warp->stalled_until <= turn_ && warp->block->stalled_until <= turn_) break;
  }
  return warp;
}

void Machine::stall_some(Warp* warp) {
  if (random_.one_in(256)) warp->stalled_until = turn_ + random_.below(4000);
  if (random_.one_in(4096)) warp->block->stalled_until = turn_ + random_.below(20000);
  if (random_.one_in(2048)) copies_stalled_until_ = turn_ + random_.below(4000);
}

void Machine::run_warp(Warp* warp) {
  const int start = static_cast<int>(random_.below(kLanes));
  const int turned = std::countr_zero(std::rotr(warp->ready, start));
  set_current(&warp->threads[static_cast<size_t>((start + turned) % kLanes)]);
  tokenspeed_switch_stack(&scheduler_, current->stack);
  warp->ready |= warp->later;
  warp->later = 0;
  if (warp->ready == 0) unlist(warp);
}

void Machine::deliver_some() {
  if (!stores_.empty() && random_.one_in(2)) deliver_store(random_.below(stores_.size()));
  while (stores_.size() > kMostStores) deliver_store(random_.below(stores_.size()));
  if (!copies_.empty() && turn_ >= copies_stalled_until_ && random_.one_in(4)) deliver_copy();
  if (!sleepers_.empty() && random_.one_in(64)) wake_sleepers();
}

void Machine::wake_sleepers() {
  for (Thread* const thread : sleepers_) make_ready(thread);
  sleepers_.clear();
}

void Machine::deliver_copy() {
  std::swap(copies_[random_.below(copies_.size())], copies_.back());
  const Copy copy = std::move(copies_.back());
  copies_.pop_back();
  copy.write();
  --copy.block->copies;
  ByteBarrier& barrier = copy.block->byte_barriers[copy.barrier];
  barrier.bytes -= copy.bytes;
  settle(barrier);
}

// Of the stores to one address the first goes first.
void Machine::deliver_store(size_t index) {
  size_t first = 0;
  while (stores_[first].address != stores_[index].address) ++first;
  const Store store = stores_[first];
  stores_.erase(stores_.begin() + static_cast<ptrdiff_t>(first));
  *store.address = store.value;
  --store.thread->own_stores;
  ++progress_;
  const auto found = pollers_.find(line_of(store.address));
  if (found == pollers_.end()) return;
  for (const Poller& poller : found->second) {
    if (poller.thread->sleeps == poller.sleep) wake(poller.thread);
  }
  pollers_.erase(found);
}

void Machine::wake(Thread* thread) {
  ++thread->sleeps;
  thread->watch->woken();
  make_ready(thread);
}

// All that look at memory again and again. False when there are none.
bool Machine::wake_waiting() {
  bool any = !sleepers_.empty();
  wake_sleepers();
  for (const auto& block : blocks_) {
    for (Warp& warp : block->warps) {
      for (Thread& thread : warp.threads) {
        if (thread.wait.doing != Doing::kPolling) continue;
        wake(&thread);
        any = true;
      }
    }
  }
  return any;
}

// Nothing is runnable. False when that will not change.
bool Machine::idle() {
  if (!stores_.empty()) {
    deliver_store(random_.below(stores_.size()));
    return true;
  }
  if (!copies_.empty()) {
    deliver_copy();
    return true;
  }
  idle_rounds_ = progress_ == idle_progress_ ? idle_rounds_ + 1 : 0;
  idle_progress_ = progress_;
  return idle_rounds_ < kIdleRounds && wake_waiting();
}

std::string Machine::run() {
  start_threads();
  while (failure_.empty()) {
    if (runnable_.empty()) {
      const bool all_exited = std::ranges::all_of(blocks_, [](const auto& block) { return block->alive == 0; });
      if (all_exited && stores_.empty()) break;
      if (!idle() && failure_.empty()) failure_ = "no thread comes further\n" + report();
      continue;
    }
    ++turn_;
    Warp* const warp = pick();
    stall_some(warp);
    run_warp(warp);
    deliver_some();
  }
  return failure_;
}

// ---- primitives ----

void Machine::check_meeting(const Warp& warp, const Meeting& last) {
  for (unsigned lanes = last.mask; lanes != 0; lanes &= lanes - 1) {
    const int lane = std::countr_zero(lanes);
    const Meeting& other = warp.meetings[static_cast<size_t>(lane)];
    const bool same_name = other.name == last.name || std::strcmp(other.name, last.name) == 0;
    if (same_name && other.mask == last.mask && other.place.line() == last.place.line()) continue;
    fail(format("lane %d is in %s", lane, other.name) + at(other.place) + ", this lane in " + last.name, last.place);
  }
}

void Machine::meet(const char* name, unsigned mask, void* operand, Combine combine, const Place& place) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  const auto lane = static_cast<size_t>(self.lane);
  if (!(mask >> lane & 1)) fail(format("the mask %08x is without the lane", mask), place);
  warp.operands[lane] = operand;
  warp.meetings[lane] = {name, mask, place};
  warp.meeting |= 1u << lane;
  if ((warp.meeting & mask) != mask) {
    wait({Doing::kMeeting, name, place, mask});
    return;
  }
  check_meeting(warp, warp.meetings[lane]);
  combine(warp.operands.data(), mask);
  warp.meeting &= ~mask;
  if (random_.one_in(8)) {
    warp.ready &= ~(1u << lane);
    warp.later |= mask;
    suspend();
  } else {
    warp.ready |= mask;
  }
}

void Machine::block_barrier(int id, int threads, const char* name, const Place& place) {
  BlockBarrier& barrier = current->warp->block->barriers[id];
  if (barrier.waiting.empty()) barrier.threads = threads;
  if (barrier.threads != threads || threads % kLanes != 0) {
    fail(format("barrier %d of %d threads is entered for %d", id, barrier.threads, threads), place);
  }
  barrier.waiting.push_back(current);
  if (static_cast<int>(barrier.waiting.size()) < threads) {
    wait({Doing::kBlockBarrier, name, place, static_cast<uint64_t>(id), static_cast<uint64_t>(threads)});
    return;
  }
  for (Thread* const thread : barrier.waiting) make_ready(thread);
  barrier.waiting.clear();
  ++progress_;
  maybe_yield();
}

ByteBarrier& Machine::byte_barrier(uint32_t address, const Place& place) {
  const auto found = current->warp->block->byte_barriers.find(address);
  if (found == current->warp->block->byte_barriers.end()) fail(format("no barrier at shared 0x%x", address), place);
  uint64_t cookie;
  std::memcpy(&cookie, at_shared(address, sizeof(cookie), place), sizeof(cookie));
  if (cookie != kBarrierCookie) fail(format("the barrier at shared 0x%x is overwritten", address), place);
  return found->second;
}

// Ends the phase when all has come.
void Machine::settle(ByteBarrier& barrier) {
  ++progress_;
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.parity ^= 1;
  barrier.pending = barrier.arrivals;
  for (Thread* const thread : barrier.waiting) make_ready(thread);
  barrier.waiting.clear();
}

void Machine::barrier_init(uint32_t address, int arrivals, const Place& place) {
  if (address % 8 != 0) fail(format("a barrier at shared 0x%x", address), place);
  std::memcpy(at_shared(address, sizeof(kBarrierCookie), place), &kBarrierCookie, sizeof(kBarrierCookie));
  ByteBarrier& barrier = current->warp->block->byte_barriers[address];
  barrier = {};
  barrier.arrivals = barrier.pending = arrivals;
}

void Machine::barrier_arrive(uint32_t address, uint32_t expected_bytes, const Place& place) {
  ByteBarrier& barrier = byte_barrier(address, place);
  barrier.bytes += expected_bytes;
  if (barrier.pending == 0) fail(format("one arrival too many at shared 0x%x", address), place);
  --barrier.pending;
  settle(barrier);
  maybe_yield();
}

void Machine::barrier_wait(uint32_t address, uint32_t parity, const Place& place) {
  ByteBarrier& barrier = byte_barrier(address, place);
  // Looked at again after being woken: who is late by two phases waits on, as on a GPU.
  while (barrier.parity == parity) {
    barrier.waiting.push_back(current);
    wait({Doing::kBarrier, "", place, address, parity});
  }
  maybe_yield();
}

bool Machine::barrier_test(uint32_t address, uint32_t parity, const Place& place) {
  maybe_yield();
  return byte_barrier(address, place).parity != parity;
}

void Machine::copy_later(uint32_t barrier, uint32_t bytes, std::function<void()> write, const Place& place) {
  byte_barrier(barrier, place);
  Block* const block = current->warp->block;
  ++block->copies;
  copies_.push_back({block, barrier, bytes, std::move(write)});
}

// The thread's own stores are seen by itself at once.
void Machine::read_words(Thread* self, const void* p, int words, uint64_t* values) {
  std::memcpy(values, p, sizeof(uint64_t) * static_cast<size_t>(words));
  if (self->own_stores == 0) return;
  for (const Store& store : stores_) {
    const ptrdiff_t word = store.address - static_cast<const uint64_t*>(p);
    if (store.thread == self && word >= 0 && word < words) values[word] = store.value;
  }
}

// Until one of the words that the thread looks at again and again is stored to.
void Machine::sleep_until_stored(Thread* self, const Place& place) {
  uint64_t address = 0;
  uint64_t least = ~uint64_t{0};  // of the words, whose upper halves are flags
  self->watch->for_polled([&](const void* p, uint64_t value) {
    pollers_[line_of(p)].push_back({self, self->sleeps});
    if (value >= least) return;
    address = reinterpret_cast<uint64_t>(p);
    least = value;
  });
  wait({Doing::kPolling, "", place, address});
}

void Machine::load_words(const void* p, int words, uint64_t* values, const Place& place) {
  Thread* const self = current;
  if (reinterpret_cast<uintptr_t>(p) % (8 * static_cast<size_t>(words)) != 0) fail(format("a load from %p", p), place);
  if (random_.one_in(4)) yield();
  read_words(self, p, words, values);
  self->watch->note(p, words, values);
  if (!self->watch->polls()) return;
  sleep_until_stored(self, place);
  read_words(self, p, words, values);
}

void Machine::store_word(void* p, uint64_t value) {
  ++current->own_stores;
  stores_.push_back({current, static_cast<uint64_t*>(p), value});
}

uint8_t* Machine::at_shared(uint32_t address, size_t bytes, const Place& place) {
  if (address < kSharedBase || address - kSharedBase + bytes > grid_.shared_bytes) {
    fail(format("shared 0x%x is outside of the block's %zu bytes", address, grid_.shared_bytes), place);
  }
  return current->warp->block->shared + (address - kSharedBase);
}

uint32_t Machine::shared_address(const void* p) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - current->warp->block->shared;
  if (offset < 0 || static_cast<size_t>(offset) > grid_.shared_bytes) {
    fail(format("%p is not in the block's shared memory", p), Place());
  }
  return static_cast<uint32_t>(offset) + kSharedBase;
}

// ---- reports ----

std::string Machine::describe(const Block& block, const Thread& thread) const {
  const Wait& w = thread.wait;
  switch (w.doing) {
    case Doing::kRunning:
      return "can run";
    case Doing::kExited:
      return "exited";
    case Doing::kSleeping:
      return "sleeps" + at(w.place);
    case Doing::kMeeting:
      return format("%s(%08llx)", w.name, static_cast<unsigned long long>(w.a)) + at(w.place);
    case Doing::kBlockBarrier:
      return format("%s: barrier %llu, %zu of %llu threads there", w.name, static_cast<unsigned long long>(w.a),
                    block.barriers.at(static_cast<int>(w.a)).waiting.size(), static_cast<unsigned long long>(w.b)) +
             at(w.place);
    case Doing::kBarrier: {
      const ByteBarrier& b = block.byte_barriers.at(static_cast<uint32_t>(w.a));
      return format("barrier_wait(shared 0x%llx, parity %llu): %d of %d arrivals and %lld bytes missing",
                    static_cast<unsigned long long>(w.a), static_cast<unsigned long long>(w.b), b.pending, b.arrivals,
                    static_cast<long long>(b.bytes)) +
             at(w.place);
    }
    case Doing::kPolling: {
      uint32_t word[2];
      std::memcpy(word, reinterpret_cast<const void*>(w.a), sizeof(word));
      return format("polls the word at %p, now {0x%x, %u}", reinterpret_cast<const void*>(w.a), word[0], word[1]) +
             at(w.place);
    }
  }
  return "";
}

// Neighbouring lanes at the same place together.
std::string Machine::describe(const Block& block, const Warp& warp) const {
  std::string text;
  for (size_t first = 0, lane = 0; lane < kLanes; first = lane) {
    const std::string where = describe(block, warp.threads[first]);
    while (lane < kLanes && describe(block, warp.threads[lane]) == where) ++lane;
    text += format("  lanes %zu-%zu: ", first, lane - 1) + where + "\n";
  }
  return text;
}

std::string Machine::report() const {
  std::string text = format("%zu copies and %zu stores on their way\n", copies_.size(), stores_.size());
  for (const auto& block : blocks_) {
    const std::vector<Warp>& warps = block->warps;
    for (size_t first = 0, warp = 0; warp < warps.size(); first = warp) {
      const std::string where = describe(*block, warps[first]);
      while (warp < warps.size() && describe(*block, warps[warp]) == where) ++warp;
      text += format("block %u warps %zu-%zu\n", block->index, first, warp - 1) + where;
    }
  }
  return text;
}

}  // namespace

std::string run(const Grid& grid, const std::function<void()>& kernel) {
  Machine one(grid, kernel);
  machine = &one;
  std::string failure = one.run();
  machine = nullptr;
  set_current(nullptr);
  return failure;
}

uint8_t* shared_memory() { return current->warp->block->shared; }

void fail(const std::string& what, Place place) { machine->fail(what, place); }
void sleep(Place place) { machine->sleep(place); }
uint32_t shared_address(const void* p) { return machine->shared_address(p); }
uint8_t* at_shared(uint32_t address, size_t bytes, Place place) { return machine->at_shared(address, bytes, place); }
void block_barrier(int id, int threads, const char* name, Place place) {
  machine->block_barrier(id, threads, name, place);
}
void meet(const char* name, unsigned mask, void* operand, Combine combine, Place place) {
  machine->meet(name, mask, operand, combine, place);
}
void barrier_init(uint32_t barrier, int arrivals, Place place) { machine->barrier_init(barrier, arrivals, place); }
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes, Place place) {
  machine->barrier_arrive(barrier, expected_bytes, place);
}
void barrier_wait(uint32_t barrier, uint32_t parity, Place place) { machine->barrier_wait(barrier, parity, place); }
bool barrier_test(uint32_t barrier, uint32_t parity, Place place) {
  return machine->barrier_test(barrier, parity, place);
}
void copy_later(uint32_t barrier, uint32_t bytes, std::function<void()> write, Place place) {
  machine->copy_later(barrier, bytes, std::move(write), place);
}
void load_words(const void* p, int words, uint64_t* values, Place place) {
  machine->load_words(p, words, values, place);
}
void store_word(void* p, uint64_t value) { machine->store_word(p, value); }

}  // namespace tokenspeed::emulation

#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>

namespace hotcold {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kQuick = 64;            // pauses before the clock is looked at
constexpr int kBarrierMicros = 100;   // longer than a balanced team waits
constexpr int kRegionMicros = 1500;   // between tokens, so that sampling in Python does not cost a wake-up

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How many forks lie between this process and the one that this code was loaded in.
std::atomic<uint32_t> forks{0};
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });

// Whether `ready` came true in time.
template <class Ready>
bool spin(Ready ready, int microseconds) {
  for (int i = 0; i < kQuick; ++i, pause())
    if (ready()) return true;
  const auto end = Clock::now() + std::chrono::microseconds(microseconds);
  while (Clock::now() < end)
    for (int i = 0; i < kQuick / 4; ++i, pause())
      if (ready()) return true;
  return ready();
}

// Not std::atomic::wait, which first yields a few times: that hands the CPU to another program for milliseconds, and
// without the claim to get it back that a sleeper has.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

cpu_set_t own_cpus() {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus)) CPU_ZERO(&cpus);  // more CPUs than a cpu_set_t has: none are known
  return cpus;
}

void move_to(int cpu) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  CPU_SET(cpu, &cpus);
  sched_setaffinity(0, sizeof cpus, &cpus);
}

std::vector<int> places(const cpu_set_t& cpus, int threads) {
  std::vector<int> found;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &cpus)) found.push_back(cpu);
  return int(found.size()) == threads ? found : std::vector<int>{};
}

// Keeps the calling thread on its place inside of a region. Beside other programs the scheduler would wake it where
// another of ours runs as often as not. Outside of regions the thread is its owner's, and so is where it runs.
class Seat {
 public:
  Seat(const std::vector<int>& places, const cpu_set_t& cpus) : cpus_(cpus), taken_(!places.empty()) {
    const cpu_set_t now = taken_ ? own_cpus() : cpus;
    taken_ = taken_ && CPU_EQUAL(&now, &cpus);  // somebody has moved it: leave it there
    if (taken_) move_to(places[0]);
  }
  ~Seat() {
    if (taken_) sched_setaffinity(0, sizeof cpus_, &cpus_);
  }

 private:
  const cpu_set_t& cpus_;
  bool taken_;
};

}  // namespace

void Turns::lock() {
  std::unique_lock<std::mutex> hold(mutex_);
  const uint64_t own = begun_++;
  next_turn_.wait(hold, [&] { return ended_ == own; });
}

void Turns::unlock() {
  {
    const std::lock_guard<std::mutex> hold(mutex_);
    ++ended_;
  }
  next_turn_.notify_all();
}

int Turns::callers() {
  const std::lock_guard<std::mutex> hold(mutex_);
  return int(begun_ - ended_);
}

Team::Team(int threads)
    : size_(threads), process_(forks.load(std::memory_order_relaxed)), cpus_(own_cpus()), places_(places(cpus_, threads)), crowded_(threads > std::max(1, CPU_COUNT(&cpus_))), parts_(threads) {
  for (int t = 1; t < threads; ++t) threads_.emplace_back([this, t] { serve(t); });
}

bool Team::forked() const { return forks.load(std::memory_order_relaxed) != process_; }

Team::~Team() {
  if (forked()) {  // nobody to stop, and std::thread would wait for them, or end the process
    new std::vector<std::thread>(std::move(threads_));
    return;
  }
  stop_.store(true);
  change(region_, region_.load() + 1);
  for (std::thread& t : threads_) t.join();
}

void Team::check_process() const {
  if (forked()) throw Forked();
}

void Team::run(const std::function<void(int)>& work) {
  check_process();
  if (size_ == 1) return work(0);
  const Seat seat(places_, cpus_);
  work_ = &work;
  change(region_, region_.load(std::memory_order_relaxed) + 1);
  work(0);
  barrier();
}

void Team::serve(int thread) {
  if (!places_.empty()) move_to(places_[thread]);
  for (uint32_t seen = 0;; ++seen) {
    wait_while(region_, seen, kRegionMicros);
    if (stop_.load()) return;
    (*work_)(thread);
    barrier();
  }
}

void Team::wait_while(std::atomic<uint32_t>& word, uint32_t value, int microseconds) {
  const auto changed = [&] { return word.load(std::memory_order_acquire) != value; };
  if (spin(changed, crowded_ ? 0 : microseconds)) return;
  sleepers_.fetch_add(1);
  while (!changed()) sleep_while(word, value);
  sleepers_.fetch_sub(1);
}

// Each side writes its own word before it reads the other's, in one order for all: no sleeper is missed.
void Team::change(std::atomic<uint32_t>& word, uint32_t value) {
  word.store(value, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) wake_all(word);
}

// A quarter of what is left: few pieces, and yet an even end. A part of another call is one that its owner has not
// begun, or is done with.
Range Team::take(Part& part, uint64_t call, int least, bool owner) {
  uint64_t seen = part.left.load(std::memory_order_acquire);
  while (true) {
    Range left{int(seen >> 20 & 0xFFFFF), int(seen & 0xFFFFF)};
    const int n = left.last - left.first, count = std::min(std::max(n / 4, least), n);
    if (seen >> 40 != call || n <= 0) return {0, 0};
    const Range piece = owner ? Range{left.first, left.first + count} : Range{left.last - count, left.last};
    (owner ? left.first : left.last) = owner ? piece.last : piece.first;
    if (part.left.compare_exchange_weak(seen, pack(call, left), std::memory_order_acq_rel, std::memory_order_acquire)) return piece;
  }
}

void Team::barrier() {
  if (size_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < size_) return wait_while(phase_, phase, kBarrierMicros);
  arrived_.store(0, std::memory_order_relaxed);
  change(phase_, phase + 1);
}

}  // namespace hotcold

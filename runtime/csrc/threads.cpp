#include "threads.h"

#include <algorithm>

namespace hotcold {
namespace {

constexpr int kSpinsBeforeYield = 20000;   // under a millisecond: longer than a balanced team ever waits
constexpr int kSpinsIfCrowded = 20;        // more threads than cores: whoever is waited for needs this core
constexpr int kSpinsBeforeSleep = 100000;  // between tokens, so that sampling in Python does not cost a wake-up

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Team::Team(int threads)
    : size_(threads), spins_(threads > int(std::thread::hardware_concurrency()) ? kSpinsIfCrowded : kSpinsBeforeYield), parts_(threads) {
  for (int t = 1; t < threads; ++t) threads_.emplace_back([this, t] { serve(t); });
}

Team::~Team() {
  stop_.store(true);
  region_.fetch_add(1);
  region_.notify_all();
  for (std::thread& t : threads_) t.join();
}

void Team::run(const std::function<void(int)>& work) {
  if (size_ == 1) return work(0);
  work_ = &work;
  region_.fetch_add(1, std::memory_order_release);
  region_.notify_all();
  work(0);
  barrier();
}

void Team::serve(int thread) {
  uint32_t seen = 0;
  while (true) {
    int spins = 0;
    while (region_.load(std::memory_order_acquire) == seen) {
      if (++spins < kSpinsBeforeSleep) pause();
      else region_.wait(seen, std::memory_order_acquire);
    }
    if (stop_.load()) return;
    ++seen;
    (*work_)(thread);
    barrier();
  }
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
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
    if (++spins < spins_) pause();
    else std::this_thread::yield();
  }
}

}  // namespace hotcold

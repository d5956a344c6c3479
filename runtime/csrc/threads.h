// A team of threads that works in step: a spin barrier inside a region, sleep between regions.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace hotcold {

struct Range {
  int first, last;
};
// The part of [0, n) that belongs to `thread`, cut at multiples of `unit`.
inline Range split(int n, int thread, int threads, int unit = 1) {
  const long units = (n + unit - 1) / unit;
  const int first = int(units * thread / threads) * unit, last = int(units * (thread + 1) / threads) * unit;
  return {first < n ? first : n, last < n ? last : n};
}

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }
  // Runs work(thread) on every thread of the team, the caller being thread 0; returns when all have finished.
  void run(const std::function<void(int)>& work);
  // Inside run(): waits until every thread has come here.
  void barrier();
  // Inside run(), on every thread in the same order: work(first, last) for pieces of this thread's part of [0, n), of at
  // least `least` where so many are left, and then for pieces of what slower threads have not begun. Returns when
  // nothing is left to begin; a barrier tells when all is done.
  template <class Work>
  void share(int thread, int n, int least, Work work);

 private:
  // What is left of one thread's part in its latest call of share(). The owner takes from the front, so that it reads
  // on and on; others from the back.
  struct alignas(64) Part {
    std::atomic<uint64_t> left{0};  // call number, first, last: 32, 16 and 16 bits
    uint32_t call = 0;              // known to the owner alone
  };
  static uint64_t pack(uint32_t call, Range r) { return uint64_t(call) << 32 | uint64_t(r.first) << 16 | uint64_t(r.last); }
  Range take(Part& part, uint32_t call, int least, bool front);
  void serve(int thread);

  const int size_, spins_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> region_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::vector<Part> parts_;
  std::vector<std::thread> threads_;
};

template <class Work>
void Team::share(int thread, int n, int least, Work work) {
  Part& mine = parts_[thread];
  const uint32_t call = ++mine.call;
  mine.left.store(pack(call, split(n, thread, size_)), std::memory_order_release);
  for (int i = 0; i < size_; ++i) {
    Part& part = parts_[(thread + i) % size_];
    for (Range r = take(part, call, least, i == 0); r.first < r.last; r = take(part, call, least, i == 0)) work(r.first, r.last);
  }
}

}  // namespace hotcold

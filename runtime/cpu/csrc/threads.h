// A team of threads that works in step. Whoever waits spins for as long as a balanced team ever waits, then sleeps: other
// programs may have taken the CPU of the thread that it waits for, and a thread that has slept gets its own back at once.
#pragma once
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
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

// A lock that goes to callers in the order in which they came. A mutex goes to whoever runs, so that a thread which decodes in
// a loop would keep it from the others.
class Turns {
 public:
  void lock();
  void unlock();
  // Callers that have it or wait for it.
  int callers();

 private:
  std::mutex mutex_;
  std::condition_variable next_turn_;
  uint64_t begun_ = 0, ended_ = 0;
};

// Thrown in a process that was forked from the one that made a team, and has none of its threads.
struct Forked : std::exception {
  const char* what() const noexcept override { return "a process forked from the one that loaded the model"; }
};

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }
  // Throws Forked where that holds.
  void check_process() const;
  // Runs work(thread) on every thread of the team, the caller being thread 0; returns when all have finished.
  // Throws Forked.
  void run(const std::function<void(int)>& work);
  // Inside run(): waits until every thread has come here.
  void barrier();
  // Inside run(), by every thread in the same order of calls: work(first, last) for pieces of this thread's part of
  // [0, n), then for pieces of what slower threads have not begun, each of `least` or more where so many are left.
  // Returns when there is nothing left to begin; that all is done, a barrier tells. n < 2^20.
  template <class Work>
  void share(int thread, int n, int least, Work work);

 private:
  // What nobody has begun of one thread's part in its latest call of share().
  struct alignas(64) Part {
    std::atomic<uint64_t> left{0};  // number of the call, first, last: 24, 20 and 20 bits
    uint64_t call = 0;              // the owner's own
  };
  static uint64_t pack(uint64_t call, Range r) { return call << 40 | uint64_t(r.first) << 20 | uint64_t(r.last); }
  // A piece of `part`, empty if there is none. Its owner takes from the front, so that it reads one stream; others from the back.
  Range take(Part& part, uint64_t call, int least, bool owner);
  bool forked() const;
  void serve(int thread);
  // Waits until `word` is no longer `value`.
  void wait_while(std::atomic<uint32_t>& word, uint32_t value, int microseconds);
  void change(std::atomic<uint32_t>& word, uint32_t value);

  const int size_;
  const uint32_t process_;   // that the team was made in: how many forks came before it
  cpu_set_t cpus_;           // that the process may use
  std::vector<int> places_;  // one of them per thread where there are just as many, else none
  bool crowded_;             // more threads than CPUs: whoever is waited for needs this one
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> region_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<int> sleepers_{0};
  std::vector<Part> parts_;
  std::vector<std::thread> threads_;
};

template <class Work>
void Team::share(int thread, int n, int least, Work work) {
  const Range own = split(n, thread, size_);
  if (n <= least * size_) {  // parts of one piece: nothing to hand over
    if (own.first < own.last) work(own.first, own.last);
    return;
  }
  Part& mine = parts_[thread];
  const uint64_t call = mine.call = (mine.call + 1) & 0xFFFFFF;
  mine.left.store(pack(call, own), std::memory_order_release);
  for (int i = 0; i < size_; ++i) {
    Part& part = parts_[(thread + i) % size_];
    for (Range r; (r = take(part, call, least, i == 0)).first < r.last;) work(r.first, r.last);
  }
}

}  // namespace hotcold

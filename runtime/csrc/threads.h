// A team of threads that works in step: a spin barrier inside a region, sleep between regions.
#pragma once
#include <atomic>
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

 private:
  void serve(int thread);

  const int size_, spins_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> region_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::vector<std::thread> threads_;
};

}  // namespace hotcold

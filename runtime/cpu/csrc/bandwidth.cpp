#include "bandwidth.h"

#include <chrono>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "threads.h"

namespace hotcold {
namespace {

template <bool Prefetching>
uint64_t read(const uint64_t* data, size_t first, size_t last) {
  uint64_t lane[16] = {}, sum = 0;
  for (size_t i = first; i < last; i += 16) {
    if constexpr (Prefetching)
      for (int j = 0; j < 16; j += 8) prefetch_line_once(data + i + j + kAhead / sizeof(uint64_t));
    for (int j = 0; j < 16; ++j) lane[j] ^= data[i + j];
  }
  for (uint64_t l : lane) sum ^= l;
  return sum;
}

}  // namespace

double read_bandwidth(int threads, size_t bytes, int repetitions, bool prefetching) {
  Arena arena(bytes);
  uint64_t* data = reinterpret_cast<uint64_t*>(arena.take(bytes));
  const size_t n = bytes / sizeof(uint64_t) / 64 * 64;
  Team team(threads);
  const auto share = [&](int t) { return std::pair(n / 64 * t / threads * 64, n / 64 * (t + 1) / threads * 64); };
  // Pages that were never written all map to one zero page, which would be read from the cache.
  team.run([&](int t) {
    const auto [first, last] = share(t);
    for (size_t i = first; i < last; ++i) data[i] = i * 0x9E3779B97F4A7C15ull;
  });
  std::vector<uint64_t> sums(size_t(threads) * 8);
  double best = 0;
  for (int r = 0; r < repetitions; ++r) {
    const auto start = std::chrono::steady_clock::now();
    team.run([&](int t) {
      const auto [first, last] = share(t);
      sums[size_t(t) * 8] ^= prefetching ? read<true>(data, first, last) : read<false>(data, first, last);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(n) * sizeof(uint64_t) / elapsed.count() / 1e9);
  }
  volatile uint64_t keep = sums[0];  // the sums must be wanted, or the reads are optimized away
  (void)keep;
  return best;
}

}  // namespace hotcold

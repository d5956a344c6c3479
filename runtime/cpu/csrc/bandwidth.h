#pragma once
#include <cstddef>

namespace hotcold {

// Best of several passes over `bytes` of memory on `threads` threads, in GB/s (1e9): with plain loads, or `asking` for
// memory ahead of them as panels do, which some machines read faster.
double read_bandwidth(int threads, size_t bytes, int repetitions, bool prefetching);

}  // namespace hotcold

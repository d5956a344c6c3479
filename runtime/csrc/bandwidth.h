#pragma once
#include <cstddef>

namespace hotcold {

// Best of several passes over `bytes` of memory on `threads` threads, in GB/s (1e9).
double read_bandwidth(int threads, size_t bytes, int repetitions);

}  // namespace hotcold

// Rows, or the beginning of a panel, that will be read soon, in that order. Kernels that read or compute something else
// meanwhile ask for them line by line, at the pace of their own work: what is asked for all at once comes late or not at
// all. Four rows are asked for side by side, so that the prefetchers of the L2 cache follow four runs at a time
// (docs/performance.md).
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "prefetch.h"

namespace hotcold {

class Prefetches {
 public:
  // One of four rows side by side: nothing is asked for until they are four, or until close().
  void add(const uint8_t* row, size_t bytes) {
    Group& group = groups_[last_ % kGroups];
    group.row[open_] = row;
    group.bytes = open_ ? std::max(group.bytes, uint32_t(bytes)) : uint32_t(bytes);
    group.step = kLine;
    if (++open_ == kSide) push();
  }
  // A long run, or a row that has no others beside it: four lines of it at a time.
  void add_run(const uint8_t* run, size_t bytes) {
    close();
    Group& group = groups_[last_ % kGroups];
    for (int i = 0; i < kSide; ++i) group.row[i] = run + i * kLine;
    group.bytes = uint32_t(bytes);
    group.step = kSide * kLine;
    push();
  }
  // No more rows come to stand beside those that were added last.
  void close() {
    if (!open_) return;
    const Group& group = groups_[last_ % kGroups];
    const int n = std::exchange(open_, 0);
    const uint32_t bytes = group.bytes;
    const uint8_t* rows[kSide];
    std::copy_n(group.row, n, rows);
    for (int i = 0; i < n; ++i) add_run(rows[i], bytes);
  }
  void clear() {
    at_ = first_ = last_ = 0;
    open_ = 0;
  }
  // Prefetches the next four lines, `rounds` times, as far as there are rows. Stands in the inner loops of kernels: without a
  // call, which would make them keep their sums in memory.
  [[gnu::always_inline]] void feed(int rounds) {
    feed(rounds, [](const uint8_t* line) { prefetch_line(line); });
  }
  template <class Fetch>
  [[gnu::always_inline]] void feed(int rounds, Fetch fetch) {
    for (int i = 0; i < rounds && first_ != last_; ++i) {
      const Group& group = groups_[first_ % kGroups];
      for (const uint8_t* row : group.row) fetch(row + at_);
      at_ += group.step;
      if (at_ < group.bytes) continue;
      at_ = 0;
      ++first_;
    }
  }

 private:
  static constexpr int kSide = 4, kLine = 64;
  static constexpr uint32_t kGroups = 64;
  struct Group {
    const uint8_t* row[kSide];
    uint32_t bytes, step;
  };

  // Drops the group where there is no room: asking is a hint.
  void push() {
    open_ = 0;
    if (last_ - first_ < kGroups - 1) ++last_;
  }

  uint32_t at_ = 0;                // of the group whose turn it is
  uint32_t first_ = 0, last_ = 0;  // of the groups that wait
  int open_ = 0;                   // rows of the group that is not full yet
  Group groups_[kGroups];
};

}  // namespace hotcold

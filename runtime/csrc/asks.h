// Rows that will be read soon, in that order. Kernels that read other rows meanwhile ask for them line by line, at
// the pace of their own reading: what is asked for all at once comes late or not at all (docs/performance.md).
#pragma once
#include <cstddef>
#include <cstdint>

namespace hotcold {

class Asks {
 public:
  // Drops rows when there is no room: asking is a hint.
  void add(const uint8_t* row, size_t bytes) {
    if (!now_.end) now_ = {row, row + bytes};
    else if (last_ - first_ < kRows) rows_[last_++ % kRows] = {row, row + bytes};
  }
  void clear() {
    now_ = {};
    first_ = last_ = 0;
  }
  // Asks for the next lines, at most `lines`, of the row whose turn it is. Stands in the inner loops of kernels, where
  // `lines` is a constant and the row mostly has as many left.
  [[gnu::always_inline]] void feed(int lines) {
    if (!now_.end) return;
    const uint8_t* at = now_.at;
    if (now_.end - at >= 64 * lines) {
#pragma GCC unroll 16
      for (int i = 0; i < lines; ++i) __builtin_prefetch(at + 64 * i);
      now_.at = at + 64 * lines;
      return;
    }
    for (; at < now_.end; at += 64) __builtin_prefetch(at);
    now_ = first_ != last_ ? rows_[first_++ % kRows] : Row();
  }

 private:
  struct Row {
    const uint8_t *at = nullptr, *end = nullptr;
  };

  static constexpr uint32_t kRows = 256;
  Row now_;  // whose turn it is; none: there is nothing to ask for
  uint32_t first_ = 0, last_ = 0;
  Row rows_[kRows];
};

}  // namespace hotcold

// Working memory that is allocated once and stays where it is.
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "arena.h"
#include "layout.h"

namespace hotcold {

// 64-byte aligned, zeroed storage.
template <class T>
class Block {
 public:
  Block() = default;
  explicit Block(size_t n) {
    const size_t alignment = n * sizeof(T) < kHugePage ? 64 : kHugePage;
    bytes_ = (n * sizeof(T) + kSlack + alignment - 1) / alignment * alignment;
    p_ = static_cast<T*>(std::aligned_alloc(alignment, bytes_));
    if (!p_) throw std::bad_alloc();
    if (alignment == kHugePage) advise_huge_pages(p_, bytes_);
    std::memset(static_cast<void*>(p_), 0, bytes_);
  }
  Block(Block&& o) noexcept : bytes_(o.bytes_), p_(std::exchange(o.p_, nullptr)) {}
  Block& operator=(Block&& o) noexcept {
    std::swap(p_, o.p_);
    std::swap(bytes_, o.bytes_);
    return *this;
  }
  ~Block() { std::free(p_); }
  T* get() const { return p_; }
  T& operator[](size_t i) const { return p_[i]; }

 private:
  size_t bytes_ = 0;
  T* p_ = nullptr;
};

}  // namespace hotcold

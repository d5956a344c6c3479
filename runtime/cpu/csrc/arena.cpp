#include "arena.h"

#include <sys/mman.h>

#include <new>

#include "layout.h"

namespace hotcold {

void advise_huge_pages(void* p, size_t bytes) { madvise(p, bytes, MADV_HUGEPAGE); }

Arena::Arena(size_t bytes) : size_((bytes + 2 * kHugePage) / kHugePage * kHugePage) {
  void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<uint8_t*>(p);
  advise_huge_pages(base_, size_);
}

Arena::~Arena() { munmap(base_, size_); }

uint8_t* Arena::take(size_t bytes) {
  const size_t aligned = (bytes + kSlack + 63) / 64 * 64;
  if (aligned > size_ - used_) throw std::bad_alloc();
  uint8_t* p = base_ + used_;
  used_ += aligned;
  return p;
}

}  // namespace hotcold

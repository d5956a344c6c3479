// One reservation of address space that all packed weights are carved from: 64-byte aligned, on huge pages where the
// system gives them, and costing memory only where it is written.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hotcold {

constexpr size_t kHugePage = size_t(2) << 20;
// A wish: without huge pages everything works, 3 % slower, as prefetchers stop at the end of a page.
void advise_huge_pages(void* p, size_t bytes);

class Arena {
 public:
  explicit Arena(size_t bytes);  // throws std::bad_alloc
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* take(size_t bytes);  // throws std::bad_alloc when the reservation is used up
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t size_, used_ = 0;
};

}  // namespace hotcold

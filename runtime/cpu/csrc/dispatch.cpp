#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace hotcold {

namespace generic {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#endif

namespace {

struct Candidate {
  const Kernels* table;
  bool (*runs)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&avx512::table, has_avx512},
    {&avx2::table, has_avx2},
#elif defined(__aarch64__)
    {&neon::table, [] { return true; }},
#endif
    {&generic::table, [] { return true; }},
};

}  // namespace

const char* const* available_isas() {
  static const char* names[std::size(kCandidates) + 1] = {};
  int n = 0;
  for (const Candidate& c : kCandidates)
    if (c.runs()) names[n++] = c.table->name;
  return names;
}

const Kernels& kernels(const char* name) {
  if (!name) name = std::getenv("HOTCOLD_CPU_ISA");
  for (const Candidate& c : kCandidates)
    if (c.runs() && (!name || std::string(name) == c.table->name)) return *c.table;
  throw std::invalid_argument(std::string("this CPU does not support the kernels '") + name + "'");
}

}  // namespace hotcold

// 16-lane vectors in plain C++: right everywhere, and the model of what the other ISAs must compute.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace hotcold::generic {

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
struct B {
  uint8_t v[64];
};

constexpr int kWideOffset = 0;

template <class Op>
inline F f_map(Op op) {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = op(i);
  return r;
}
template <class Op>
inline I i_map(Op op) {
  I r;
  for (int i = 0; i < 16; ++i) r.v[i] = op(i);
  return r;
}
template <class Op>
inline B b_map(Op op) {
  B r;
  for (int i = 0; i < 64; ++i) r.v[i] = op(i);
  return r;
}
template <class T>
inline T at(const void* p, int i) {
  T v;
  std::memcpy(&v, static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  return v;
}

inline F f_zero() { return F{}; }
inline F f_set1(float x) { return f_map([&](int) { return x; }); }
inline F f_pair(float a, float b) { return f_map([&](int i) { return i < 8 ? a : b; }); }
inline F f_load(const float* p) { return f_map([&](int i) { return p[i]; }); }
inline F f_load_f32(const void* p) { return f_map([&](int i) { return at<float>(p, i); }); }
inline F f_load_f16(const void* p) { return f_map([&](int i) { return f16_to_f32(at<uint16_t>(p, i)); }); }
inline F f_load_bf16(const void* p) { return f_map([&](int i) { return bf16_to_f32(at<uint16_t>(p, i)); }); }
// Two halves: lanes 0-7 hold the first, 8-15 the second.
inline F f_pair_f16(const void* p) { return f_pair(f16_to_f32(at<uint16_t>(p, 0)), f16_to_f32(at<uint16_t>(p, 1))); }
inline void f_store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
inline void f_store_f16(void* p, F x) {
  for (int i = 0; i < 16; ++i) {
    const uint16_t h = f32_to_f16(x.v[i]);
    std::memcpy(static_cast<char*>(p) + 2 * i, &h, 2);
  }
}
inline F f_add(F x, F y) { return f_map([&](int i) { return x.v[i] + y.v[i]; }); }
inline F f_sub(F x, F y) { return f_map([&](int i) { return x.v[i] - y.v[i]; }); }
inline F f_mul(F x, F y) { return f_map([&](int i) { return x.v[i] * y.v[i]; }); }
inline F f_div(F x, F y) { return f_map([&](int i) { return x.v[i] / y.v[i]; }); }
inline F f_fma(F x, F y, F z) { return f_map([&](int i) { return x.v[i] * y.v[i] + z.v[i]; }); }
inline F f_max(F x, F y) { return f_map([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
inline F f_min(F x, F y) { return f_map([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; }); }
inline F f_abs(F x) { return f_map([&](int i) { return std::fabs(x.v[i]); }); }
inline float f_sum(F x) {
  float s = 0;
  for (float e : x.v) s += e;
  return s;
}
inline float f_hmax(F x) { return *std::max_element(x.v, x.v + 16); }
inline uint32_t f_ge_mask(F x, F y) {
  uint32_t m = 0;
  for (int i = 0; i < 16; ++i) m |= uint32_t(x.v[i] >= y.v[i]) << i;
  return m;
}
inline F f_keep(F v, F x, F y) {  // v where x >= y, else 0
  return f_map([&](int i) { return x.v[i] >= y.v[i] ? v.v[i] : 0.0f; });
}
inline F f_round(F x) { return f_map([&](int i) { return std::nearbyint(x.v[i]); }); }
inline F f_scale2(F x, F n) { return f_map([&](int i) { return std::ldexp(x.v[i], int(n.v[i])); }); }

inline I i_zero() { return I{}; }
inline I i_set1(int32_t x) { return i_map([&](int) { return x; }); }
inline I i_load(const int32_t* p) { return i_map([&](int i) { return p[i]; }); }
inline void i_store(int32_t* p, I x) { std::memcpy(p, x.v, sizeof x.v); }
inline I i_add(I x, I y) { return i_map([&](int i) { return x.v[i] + y.v[i]; }); }
inline I i_mul(I x, I y) { return i_map([&](int i) { return x.v[i] * y.v[i]; }); }
template <int N>
inline I i_shift(I x) { return i_map([&](int i) { return x.v[i] * (1 << N); }); }
// Lanes past the last block may hold anything; they become 0, so that conversion and sums stay defined.
inline I i_from_f(F x) {
  return i_map([&](int i) { return x.v[i] > -1e5f && x.v[i] < 1e5f ? int32_t(std::nearbyint(x.v[i])) : 0; });
}
inline F f_from_i(I x) { return f_map([&](int i) { return float(x.v[i]); }); }
inline int32_t i_sum(I x) {
  int32_t s = 0;
  for (int32_t e : x.v) s += e;
  return s;
}
inline void i_store_i8(int8_t* p, I x) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(std::clamp(x.v[i], -128, 127));
}

inline B b_load(const void* p) {
  B r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline void b_store(void* p, const B& x) { std::memcpy(p, x.v, 64); }
inline B b_set1(const void* p) { return b_map([&](int i) { return static_cast<const uint8_t*>(p)[i % 4]; }); }
inline B b_low(B x) { return b_map([&](int i) { return uint8_t(x.v[i] & 15); }); }
// The high nibbles, here shifted down; i_from_top brings sums of their products to scale where they are not.
inline B b_top(B x) { return b_map([&](int i) { return uint8_t(x.v[i] >> 4); }); }
inline I i_from_top(I sum) { return sum; }
// 32 bytes of nibbles -> 32 low nibbles, then 32 high ones.
inline B b_load_pair(const void* p) {
  const uint8_t* q = static_cast<const uint8_t*>(p);
  return b_map([&](int i) { return uint8_t(i < 32 ? q[i] & 15 : q[i - 32] >> 4); });
}
// Byte k of dword i is the low byte of lane i of a, b, c, d.
inline B b_join4(const I& a, const I& b, const I& c, const I& d) {
  const I* in[4] = {&a, &b, &c, &d};
  return b_map([&](int i) { return uint8_t(in[i % 4]->v[i / 4]); });
}
inline I dot4(I acc, B u, B s) {
  for (int i = 0; i < 64; ++i) acc.v[i / 4] += int32_t(u.v[i]) * int8_t(s.v[i]);
  return acc;
}
inline I dot4_wide(I acc, B u, B s) {
  for (int i = 0; i < 64; ++i) acc.v[i / 4] += (int32_t(u.v[i]) - 128) * int8_t(s.v[i]);
  return acc;
}
// Sum of the products of b_low and of b_top.
struct Nibbles {
  I total = i_zero();
  void add_low(B weights, B acts) { total = dot4(total, weights, acts); }
  void add_top(B weights, B acts) { total = dot4(total, weights, acts); }
  I sum() const { return total; }
};
// Interleaves the bytes of four vectors: dword k of out[r], 128-bit lane l, is byte 16l + 4r + k of a, b, c, d.
inline void b_interleave4(const B& a, const B& b, const B& c, const B& d, B out[4]) {
  const B* in[4] = {&a, &b, &c, &d};
  for (int r = 0; r < 4; ++r)
    out[r] = b_map([&](int i) { return in[i % 4]->v[16 * (i / 16) + 4 * r + i % 16 / 4]; });
}

}  // namespace hotcold::generic

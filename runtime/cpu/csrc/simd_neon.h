// 16-lane vectors as four NEON registers (ARMv8.2 with the dot product instructions).
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace hotcold::neon {

struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};
struct B {
  uint8x16_t v[4];
};

// dot4_wide turns the weights back to signed, so there is no offset to correct.
constexpr int kWideOffset = 0;

template <class R, class Op>
inline R map4(Op op) {
  R r;
  for (int i = 0; i < 4; ++i) r.v[i] = op(i);
  return r;
}

inline F f_zero() { return map4<F>([](int) { return vdupq_n_f32(0); }); }
inline F f_set1(float x) { return map4<F>([&](int) { return vdupq_n_f32(x); }); }
inline F f_pair(float a, float b) { return map4<F>([&](int i) { return vdupq_n_f32(i < 2 ? a : b); }); }
inline F f_load(const float* p) { return map4<F>([&](int i) { return vld1q_f32(p + 4 * i); }); }
inline F f_load_f32(const void* p) {
  return map4<F>([&](int i) { return vreinterpretq_f32_u8(vld1q_u8((const uint8_t*)p + 16 * i)); });
}
inline uint16x4_t load_halves(const void* p, int i) { return vreinterpret_u16_u8(vld1_u8((const uint8_t*)p + 8 * i)); }
inline F f_load_f16(const void* p) {
  return map4<F>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(p, i))); });
}
inline F f_load_bf16(const void* p) {
  return map4<F>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(load_halves(p, i), 16)); });
}
// Two halves: lanes 0-7 hold the first, 8-15 the second.
inline F f_pair_f16(const void* p) {
  uint16_t h[2];
  std::memcpy(h, p, 4);
  return map4<F>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h[i / 2]))); });
}
inline void f_store(float* p, F x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline void f_store_f16(void* p, F x) {
  for (int i = 0; i < 4; ++i) vst1_u8((uint8_t*)p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(x.v[i])));
}
inline F f_add(F x, F y) { return map4<F>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); }); }
inline F f_sub(F x, F y) { return map4<F>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); }); }
inline F f_mul(F x, F y) { return map4<F>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); }); }
inline F f_div(F x, F y) { return map4<F>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); }); }
inline F f_fma(F x, F y, F z) { return map4<F>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); }); }
// The "number" forms pass what is no NaN, as the other ISAs do for the lanes that count.
inline F f_max(F x, F y) { return map4<F>([&](int i) { return vmaxnmq_f32(x.v[i], y.v[i]); }); }
inline F f_min(F x, F y) { return map4<F>([&](int i) { return vminnmq_f32(x.v[i], y.v[i]); }); }
inline F f_abs(F x) { return map4<F>([&](int i) { return vabsq_f32(x.v[i]); }); }
inline float f_sum(F x) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])));
}
inline float f_hmax(F x) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.v[0], x.v[1]), vmaxnmq_f32(x.v[2], x.v[3])));
}
inline uint32_t f_ge_mask(F x, F y) {
  const uint32x4_t bits = {1, 2, 4, 8};
  uint32_t m = 0;
  for (int i = 0; i < 4; ++i) m |= vaddvq_u32(vandq_u32(vcgeq_f32(x.v[i], y.v[i]), bits)) << (4 * i);
  return m;
}
inline F f_keep(F v, F x, F y) {  // v where x >= y, else 0
  return map4<F>([&](int i) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v.v[i]), vcgeq_f32(x.v[i], y.v[i])));
  });
}
inline F f_round(F x) { return map4<F>([&](int i) { return vrndnq_f32(x.v[i]); }); }
inline F f_scale2(F x, F n) {  // x * 2^n, n in [-126, 127]
  return map4<F>([&](int i) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
    return vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  });
}

inline I i_zero() { return map4<I>([](int) { return vdupq_n_s32(0); }); }
inline I i_set1(int32_t x) { return map4<I>([&](int) { return vdupq_n_s32(x); }); }
inline I i_load(const int32_t* p) { return map4<I>([&](int i) { return vld1q_s32(p + 4 * i); }); }
inline void i_store(int32_t* p, I x) {
  for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, x.v[i]);
}
inline I i_add(I x, I y) { return map4<I>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); }); }
inline I i_mul(I x, I y) { return map4<I>([&](int i) { return vmulq_s32(x.v[i], y.v[i]); }); }
template <int N>
inline I i_shift(I x) { return map4<I>([&](int i) { return vshlq_n_s32(x.v[i], N); }); }
inline I i_from_f(F x) { return map4<I>([&](int i) { return vcvtnq_s32_f32(x.v[i]); }); }
inline F f_from_i(I x) { return map4<F>([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }
inline int32_t i_sum(I x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
inline void i_store_i8(int8_t* p, I x) {
  const int16x8_t lo = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]));
  const int16x8_t hi = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(lo), vqmovn_s16(hi)));
}

inline B b_load(const void* p) { return map4<B>([&](int i) { return vld1q_u8((const uint8_t*)p + 16 * i); }); }
inline void b_store(void* p, B x) {
  for (int i = 0; i < 4; ++i) vst1q_u8((uint8_t*)p + 16 * i, x.v[i]);
}
inline B b_set1(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return map4<B>([&](int) { return vreinterpretq_u8_u32(vdupq_n_u32(word)); });
}
inline B b_low(B x) { return map4<B>([&](int i) { return vandq_u8(x.v[i], vdupq_n_u8(15)); }); }
// Shifted down: the dot products are of signed bytes.
inline B b_top(B x) { return map4<B>([&](int i) { return vshrq_n_u8(x.v[i], 4); }); }
inline I i_from_top(I sum) { return sum; }
// 32 bytes of nibbles -> 32 low nibbles, then 32 high ones.
inline B b_load_pair(const void* p) {
  const uint8x16_t a = vld1q_u8((const uint8_t*)p), b = vld1q_u8((const uint8_t*)p + 16), low = vdupq_n_u8(15);
  return {{vandq_u8(a, low), vandq_u8(b, low), vshrq_n_u8(a, 4), vshrq_n_u8(b, 4)}};
}
// Byte k of dword i is the low byte of lane i of a, b, c, d.
inline B b_join4(I a, I b, I c, I d) {
  return map4<B>([&](int i) {
    const int32x4_t ab = vsliq_n_s32(a.v[i], b.v[i], 8), cd = vsliq_n_s32(c.v[i], d.v[i], 8);
    return vreinterpretq_u8_s32(vsliq_n_s32(ab, cd, 16));
  });
}
inline I dot4(I acc, B weights, B acts) {
  return map4<I>([&](int i) {
    return vdotq_s32(acc.v[i], vreinterpretq_s8_u8(weights.v[i]), vreinterpretq_s8_u8(acts.v[i]));
  });
}
inline I dot4_wide(I acc, B weights, B acts) {
  return map4<I>([&](int i) {
    const uint8x16_t w = veorq_u8(weights.v[i], vdupq_n_u8(0x80));
    return vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(acts.v[i]));
  });
}
// Sum of the products of b_low and of b_top.
struct Nibbles {
  I total = i_zero();
  void add_low(B weights, B acts) { total = dot4(total, weights, acts); }
  void add_top(B weights, B acts) { total = dot4(total, weights, acts); }
  I sum() const { return total; }
};
// Interleaves the bytes of four vectors: dword k of out[r], 128-bit lane l, is byte 16l + 4r + k of a, b, c, d.
inline void b_interleave4(B a, B b, B c, B d, B out[4]) {
  for (int l = 0; l < 4; ++l) {
    const uint8x16x2_t ab = vzipq_u8(a.v[l], b.v[l]), cd = vzipq_u8(c.v[l], d.v[l]);
    for (int h = 0; h < 2; ++h) {
      const uint16x8x2_t all = vzipq_u16(vreinterpretq_u16_u8(ab.val[h]), vreinterpretq_u16_u8(cd.val[h]));
      out[2 * h].v[l] = vreinterpretq_u8_u16(all.val[0]);
      out[2 * h + 1].v[l] = vreinterpretq_u8_u16(all.val[1]);
    }
  }
}

}  // namespace hotcold::neon

// 16-lane vectors as pairs of AVX2 registers (AVX2, FMA, F16C).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace hotcold::avx2 {

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
using B = I;

// dot4_wide turns the weights back to signed, so there is no offset to correct.
constexpr int kWideOffset = 0;

inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F f_set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline F f_pair(float a, float b) { return {_mm256_set1_ps(a), _mm256_set1_ps(b)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F f_load_f32(const void* p) { return f_load((const float*)p); }
inline F f_load_f16(const void* p) {
  const __m128i* h = (const __m128i*)p;
  return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
inline F f_load_bf16(const void* p) {
  const __m128i* h = (const __m128i*)p;
  const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128(h)), b = _mm256_cvtepu16_epi32(_mm_loadu_si128(h + 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
// Two halves: lanes 0-7 hold the first, 8-15 the second.
inline F f_pair_f16(const void* p) {
  uint16_t h[2];
  std::memcpy(h, p, 4);
  return {_mm256_cvtph_ps(_mm_set1_epi16(h[0])), _mm256_cvtph_ps(_mm_set1_epi16(h[1]))};
}
inline void f_store(float* p, F v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
inline void f_store_f16(void* p, F v) {
  __m128i* h = (__m128i*)p;
  _mm_storeu_si128(h, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(h + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F f_sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F f_div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F f_abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline float f_sum(F v) {
  const __m256 s = _mm256_add_ps(v.a, v.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float f_hmax(F v) {
  const __m256 s = _mm256_max_ps(v.a, v.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline uint32_t f_ge_mask(F x, F y) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ))) |
         uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))) << 8;
}
inline F f_keep(F v, F x, F y) {  // v where x >= y, else 0
  return {_mm256_and_ps(v.a, _mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ)), _mm256_and_ps(v.b, _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))};
}
inline F f_round(F v) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.a, mode), _mm256_round_ps(v.b, mode)};
}
inline __m256 scale2(__m256 v, __m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline F f_scale2(F v, F n) { return {scale2(v.a, n.a), scale2(v.b, n.b)}; }  // v * 2^n, n in [-126, 127]

inline I i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I i_set1(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline I i_load(const void* p) {
  const __m256i* q = (const __m256i*)p;
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void i_store(int32_t* p, I v) {
  _mm256_storeu_si256((__m256i*)p, v.a);
  _mm256_storeu_si256((__m256i*)p + 1, v.b);
}
inline I i_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I i_mul(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
template <int N>
inline I i_shift(I v) { return {_mm256_slli_epi32(v.a, N), _mm256_slli_epi32(v.b, N)}; }
inline I i_from_f(F v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
inline F f_from_i(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline int32_t i_sum(I v) {
  const __m256i s = _mm256_add_epi32(v.a, v.b);
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
}
inline void i_store_i8(int8_t* p, I v) {
  __m256i s = _mm256_packs_epi32(v.a, v.b);        // a0-3 b0-3 | a4-7 b4-7
  s = _mm256_permute4x64_epi64(s, 0xD8);           // a0-3 a4-7 | b0-3 b4-7
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1)));
}

inline B b_load(const void* p) { return i_load(p); }
inline void b_store(void* p, B v) { i_store((int32_t*)p, v); }
inline B b_set1(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return i_set1(v);
}
inline __m256i low(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline B b_low(B v) { return {low(v.a), low(v.b)}; }
// Shifted down: dot4 adds up pairs in 16 bits, which have no room for more.
inline B b_top(B v) { return {low(_mm256_srli_epi16(v.a, 4)), low(_mm256_srli_epi16(v.b, 4))}; }
inline I i_from_top(I sum) { return sum; }
// 32 bytes of nibbles -> 32 low nibbles, then 32 high ones.
inline B b_load_pair(const void* p) {
  const __m256i v = _mm256_loadu_si256((const __m256i*)p);
  return {low(v), low(_mm256_srli_epi16(v, 4))};
}
// Byte k of dword i is the low byte of lane i of a, b, c, d.
inline __m256i join4(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i low = _mm256_set1_epi32(255);
  const __m256i ab = _mm256_or_si256(_mm256_and_si256(a, low), _mm256_slli_epi32(_mm256_and_si256(b, low), 8));
  const __m256i cd = _mm256_or_si256(_mm256_and_si256(c, low), _mm256_slli_epi32(d, 8));
  return _mm256_or_si256(ab, _mm256_slli_epi32(cd, 16));
}
inline B b_join4(I a, I b, I c, I d) { return {join4(a.a, b.a, c.a, d.a), join4(a.b, b.b, c.b, d.b)}; }
inline __m256i dot4(__m256i acc, __m256i u, __m256i s) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
inline I dot4(I acc, B u, B s) { return {dot4(acc.a, u.a, s.a), dot4(acc.b, u.b, s.b)}; }
// |w| * sign(s, w) keeps maddubs inside 16 bits (at most 2 * 128 * 127) where unsigned weights would saturate.
inline __m256i dot4_wide(__m256i acc, __m256i u, __m256i s) {
  const __m256i w = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
  return dot4(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(s, w));
}
inline I dot4_wide(I acc, B u, B s) { return {dot4_wide(acc.a, u.a, s.a), dot4_wide(acc.b, u.b, s.b)}; }
// Sum of the products of b_low and of b_top, of one block: in 16 bits, which hold 8 pairs of products of 15 and 127.
struct Nibbles {
  I pairs = i_zero();
  static __m256i add(__m256i pairs, __m256i u, __m256i s) { return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(u, s)); }
  void add_low(B u, B s) { pairs = {add(pairs.a, u.a, s.a), add(pairs.b, u.b, s.b)}; }
  void add_top(B u, B s) { add_low(u, s); }
  I sum() const {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(pairs.a, one), _mm256_madd_epi16(pairs.b, one)};
  }
};

// Interleaves the bytes of four vectors: dword k of out[r], 128-bit lane l, is byte 16l + 4r + k of a, b, c, d.
inline void interleave4(__m256i a, __m256i b, __m256i c, __m256i d, __m256i out[4]) {
  const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
  const __m256i cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
  out[0] = _mm256_unpacklo_epi16(ab0, cd0);
  out[1] = _mm256_unpackhi_epi16(ab0, cd0);
  out[2] = _mm256_unpacklo_epi16(ab1, cd1);
  out[3] = _mm256_unpackhi_epi16(ab1, cd1);
}
inline void b_interleave4(B a, B b, B c, B d, B out[4]) {
  __m256i lo[4], hi[4];
  interleave4(a.a, b.a, c.a, d.a, lo);
  interleave4(a.b, b.b, c.b, d.b, hi);
  for (int r = 0; r < 4; ++r) out[r] = {lo[r], hi[r]};
}

}  // namespace hotcold::avx2

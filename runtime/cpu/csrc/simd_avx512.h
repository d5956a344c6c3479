// 16-lane vectors on AVX-512 (F, BW, DQ, VL, VNNI).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace hotcold::avx512 {

using F = __m512;   // 16 float
using I = __m512i;  // 16 int32
using B = __m512i;  // 64 bytes

// dot4_wide multiplies unsigned weights, so Q8_0 weights are stored with this offset taken into the bias.
constexpr int kWideOffset = 128;

inline int32_t dword(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

inline F f_zero() { return _mm512_setzero_ps(); }
inline F f_set1(float v) { return _mm512_set1_ps(v); }
inline F f_pair(float a, float b) { return _mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(a), _mm512_set1_ps(b)); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline F f_load_f32(const void* p) { return _mm512_loadu_ps(p); }
inline F f_load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F f_load_bf16(const void* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
// Two halves: lanes 0-7 hold the first, 8-15 the second.
inline F f_pair_f16(const void* p) {
  const __m256i both = _mm256_set1_epi32(dword(p));
  const __m256i order = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1,  //
                                         2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3);
  return _mm512_cvtph_ps(_mm256_shuffle_epi8(both, order));
}
inline void f_store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline void f_store_f16(void* p, F v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
inline F f_abs(F a) { return _mm512_abs_ps(a); }
inline float f_sum(F v) { return _mm512_reduce_add_ps(v); }
inline float f_hmax(F v) { return _mm512_reduce_max_ps(v); }
inline uint32_t f_ge_mask(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline F f_keep(F v, F a, F b) {  // v where a >= b, else 0
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), v);
}
inline F f_round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F f_scale2(F v, F n) { return _mm512_scalef_ps(v, n); }  // v * 2^n

inline I i_zero() { return _mm512_setzero_si512(); }
inline I i_set1(int32_t v) { return _mm512_set1_epi32(v); }
inline I i_load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void i_store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I i_mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
template <int N>
inline I i_shift(I v) { return _mm512_slli_epi32(v, N); }
inline I i_from_f(F v) { return _mm512_cvtps_epi32(v); }
inline F f_from_i(I v) { return _mm512_cvtepi32_ps(v); }
inline int32_t i_sum(I v) { return _mm512_reduce_add_epi32(v); }
inline void i_store_i8(int8_t* p, I v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(v)); }

inline B b_load(const void* p) { return _mm512_loadu_si512(p); }
inline void b_store(void* p, B v) { _mm512_storeu_si512(p, v); }
inline B b_set1(const void* p) { return _mm512_set1_epi32(dword(p)); }
inline B b_low(B v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
// High nibbles where they stand, and the sum of their products from one that is 16 times as large.
inline B b_top(B v) { return _mm512_and_si512(v, _mm512_set1_epi8(char(0xF0))); }
inline I i_from_top(I sum) { return _mm512_srai_epi32(sum, 4); }
// 32 bytes of nibbles -> 32 low nibbles, then 32 high ones.
inline B b_load_pair(const void* p) {
  const __m256i v = _mm256_loadu_si256((const __m256i*)p);
  return b_low(_mm512_inserti64x4(_mm512_castsi256_si512(v), _mm256_srli_epi16(v, 4), 1));
}
// Byte k of dword i is the low byte of lane i of a, b, c, d.
inline B b_join4(I a, I b, I c, I d) {
  const I low = _mm512_set1_epi32(255);
  const I ab = _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi32(_mm512_and_si512(b, low), 8));
  const I cd = _mm512_or_si512(_mm512_and_si512(c, low), _mm512_slli_epi32(d, 8));
  return _mm512_or_si512(ab, _mm512_slli_epi32(cd, 16));
}
inline I dot4(I acc, B weights, B acts) { return _mm512_dpbusd_epi32(acc, weights, acts); }
inline I dot4_wide(I acc, B weights, B acts) { return _mm512_dpbusd_epi32(acc, weights, acts); }
// Sum of the products of b_low and of b_top.
struct Nibbles {
  I low = i_zero(), top = i_zero();
  void add_low(B weights, B acts) { low = dot4(low, weights, acts); }
  void add_top(B weights, B acts) { top = dot4(top, weights, acts); }
  I sum() const { return i_add(low, i_from_top(top)); }
};

// Interleaves the bytes of four vectors: dword k of out[r], 128-bit lane l, is byte 16l + 4r + k of a, b, c, d.
inline void b_interleave4(B a, B b, B c, B d, B out[4]) {
  const B ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
  const B cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(ab0, cd0);
  out[1] = _mm512_unpackhi_epi16(ab0, cd0);
  out[2] = _mm512_unpacklo_epi16(ab1, cd1);
  out[3] = _mm512_unpackhi_epi16(ab1, cd1);
}

}  // namespace hotcold::avx512

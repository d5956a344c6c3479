// The kernels, written once on the 16-lane vectors of simd_*.h; each ISA's source includes that header, defines
// HOTCOLD_ISA and includes this file.
#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace hotcold::HOTCOLD_ISA {
namespace {

constexpr int kTokenTile = 4;  // tokens that share one decoding of the weights
constexpr int kRowTile = 4;    // rows that share the loads of one token

// Rounds of asking, of four lines each, while step `step` of a loop reads `lines` lines: 1.5 lines are asked for while one is
// read. A chunk of neurons asks for more gates than it reads ups and downs, so that at equal pace asking falls behind.
constexpr int pace(int lines, int step) { return (3 * lines * (step + 1) + 7) / 8 - (3 * lines * step + 7) / 8; }
static_assert(pace(4, 0) + pace(4, 1) + pace(4, 2) + pace(4, 3) == 6 && pace(8, 0) == 3 && pace(8, 1) == 3);

inline F f_exp(F x) {
  x = f_min(f_max(x, f_set1(-87.0f)), f_set1(88.0f));
  const F n = f_round(f_mul(x, f_set1(1.44269504f)));
  F r = f_fma(n, f_set1(-0.693359375f), x);
  r = f_fma(n, f_set1(2.12194440e-4f), r);
  F p = f_set1(1.9875691500e-4f);  // Cephes expf
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = f_fma(p, r, f_set1(c));
  return f_scale2(f_add(f_fma(f_mul(p, r), r, r), f_set1(1.0f)), n);
}

// ---- weights as vectors: what differs between the types
struct Q4 {
  static constexpr Type type = Type::Q4_0;
  static constexpr int loads = 4;  // 64-byte loads that hold 16 blocks
  // A quarter of 16 blocks: two vectors, and which two of eight vectors of activations they meet.
  struct Step {
    B w[2];
    Step(const uint8_t* p, int s) {
      const B v = b_load(p + 64 * s);
      w[0] = b_low(v);
      w[1] = b_top(v);
    }
    static constexpr int act(int s, int i) { return s + 4 * i; }
  };
  // Of a block: add() takes vector i of a step and the activations that it meets.
  struct Sum : Nibbles {
    void add(const Step& step, int i, B a) { i ? add_top(step.w[1], a) : add_low(step.w[0], a); }
  };
  static B pair(const uint8_t* p) { return b_load_pair(p); }
  static I dot(I acc, B w, B a) { return dot4(acc, w, a); }
  static constexpr int offset = 8;  // stored weight - true weight
  static I bias(I negative_sum) { return i_shift<3>(negative_sum); }
};
struct Q8 {
  static constexpr Type type = Type::Q8_0;
  static constexpr int loads = 8;
  struct Step {
    B w[2];
    Step(const uint8_t* p, int s) : w{b_load(p + 128 * s), b_load(p + 128 * s + 64)} {}
    static constexpr int act(int s, int i) { return 2 * s + i; }
  };
  struct Sum {
    I total = i_zero();
    void add(const Step& step, int i, B a) { total = dot4_wide(total, step.w[i], a); }
    I sum() const { return total; }
  };
  static B pair(const uint8_t* p) { return b_load(p); }
  static I dot(I acc, B w, B a) { return dot4_wide(acc, w, a); }
  static constexpr int offset = kWideOffset;
  static I bias(I negative_sum) { return offset ? i_shift<7>(negative_sum) : i_zero(); }
};
struct Single {
  static constexpr Type type = Type::F32;
  static F load(const uint8_t* p) { return f_load_f32(p); }
};
struct Half {
  static constexpr Type type = Type::F16;
  static F load(const uint8_t* p) { return f_load_f16(p); }
};
struct Brain {
  static constexpr Type type = Type::BF16;
  static F load(const uint8_t* p) { return f_load_bf16(p); }
};

// ---- activations
void rms_norm(const float* x, const float* weight, int n, float eps, float* y, Prefetches& prefetches) {
  F sum = f_zero();
  for (int i = 0; i < n / kLanes * kLanes; i += kLanes) {
    sum = f_fma(f_load(x + i), f_load(x + i), sum);
    if (i % (2 * kLanes) == 0) prefetches.feed(1);
  }
  float total = f_sum(sum);
  for (int i = n / kLanes * kLanes; i < n; ++i) total += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(total / float(n) + eps);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) f_store(y + i, f_mul(f_mul(f_load(x + i), f_set1(scale)), f_load(weight + i)));
  for (; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

void quantize(const Acts& acts, int t, int first, int last, Prefetches& prefetches) {
  const float* x = acts.f + size_t(t) * acts.width;
  int8_t* q = acts.q + size_t(t) * acts.width;
  float* d = acts.d + size_t(t) * acts.blocks();
  int32_t* negative_sum = acts.negative_sum + size_t(t) * acts.blocks();
  for (int b = first; b < last; ++b) {
    const F lo = f_load(x + b * kBlock), hi = f_load(x + b * kBlock + kLanes);
    const float max = f_hmax(f_max(f_abs(lo), f_abs(hi)));
    const F inverse = f_set1(max > 0 ? 127.0f / max : 0.0f);
    const I qlo = i_from_f(f_mul(lo, inverse)), qhi = i_from_f(f_mul(hi, inverse));
    i_store_i8(q + b * kBlock, qlo);
    i_store_i8(q + b * kBlock + kLanes, qhi);
    d[b] = max / 127.0f;
    negative_sum[b] = -i_sum(i_add(qlo, qhi));
    prefetches.feed(1);
  }
}

void arrange(const Acts& acts, int t, Prefetches& prefetches) {
  const int8_t* q = acts.q + size_t(t) * acts.width;
  const float* d = acts.d + size_t(t) * acts.blocks();
  const int32_t* negative_sum = acts.negative_sum + size_t(t) * acts.blocks();
  int8_t* lane_q = acts.lane_q + size_t(t) * acts.width;
  float* lane_d = acts.lane_d + size_t(t) * acts.lane_width();
  int32_t* lane_sum = acts.lane_sum + size_t(t) * acts.lane_width();
  const int grouped = acts.groups() * kLanes;
  for (int b = 0; b < grouped; ++b) {
    for (int s = 0; s < 8; ++s)
      std::memcpy(lane_q + b / kLanes * 512 + s * 64 + b % kLanes * 4, q + b * kBlock + 4 * s, 4);
    prefetches.feed(1);
  }
  std::memcpy(lane_d, d, grouped * sizeof(float));
  std::memcpy(lane_sum, negative_sum, grouped * sizeof(int32_t));
  std::memcpy(lane_q + grouped * kBlock, q + grouped * kBlock, acts.width - grouped * kBlock);
  for (int p = 0; p < acts.pairs(); ++p) {
    const int b = grouped + 2 * p, lane = grouped + p * kLanes;
    f_store(lane_d + lane, f_pair(d[b], d[b + 1]));
    std::fill_n(lane_sum + lane, kLanes, 0);
    lane_sum[lane] = negative_sum[b];
    lane_sum[lane + 8] = negative_sum[b + 1];
  }
}

// ---- panels
// A panel is one stream, but a core has only so many reads of its own under way: asked for early enough, it comes at the
// machine's full bandwidth (docs/performance.md): evenly, a line for each line that is read. For one token past the other
// caches, as it is read once; for several into all caches.
template <bool Once>
void prefetch_ahead(const uint8_t* p) {
  if constexpr (Once) prefetch_line_once(p + kAhead);
  else prefetch_line(p + kAhead);
}

template <class Q, int N, bool Once>
void panel_group(const uint8_t* p, int pairs, const Acts& acts, int t0, F acc[N]) {
  const int8_t* q = acts.q + size_t(t0) * acts.width;
  const float* d = acts.d + size_t(t0) * acts.blocks();
  const int32_t* negative_sum = acts.negative_sum + size_t(t0) * acts.blocks();
  for (int t = 0; t < N; ++t) acc[t] = f_zero();
  static_assert(!Once || N == 1);
  constexpr int quants = Q::loads * 64;  // bytes of 16 rows' block
  for (int pair = 0; pair < pairs; ++pair, p += 2 * quants + 64) {
    const uint8_t* scales = p + 2 * quants;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int b = 2 * pair + half;
      const uint8_t* here = p + half * quants;
      typename Q::Sum sums[N];
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        for (int i = 0; i < Q::loads / 4; ++i) prefetch_ahead<Once>(here + (s * Q::loads / 4 + i) * 64);
        if (half == 1 && s == 3) prefetch_ahead<Once>(scales);
        const typename Q::Step step(here, s);
        for (int t = 0; t < N; ++t)
          for (int j = 0; j < 2; ++j)
            sums[t].add(step, j, b_set1(q + t * acts.width + b * kBlock + 4 * step.act(s, j)));
      }
      const F scale = f_load_f16(scales + half * 32);
      for (int t = 0; t < N; ++t) {
        const I sum = i_add(Q::bias(i_set1(negative_sum[t * acts.blocks() + b])), sums[t].sum());
        acc[t] = f_fma(f_from_i(sum), f_mul(scale, f_set1(d[t * acts.blocks() + b])), acc[t]);
      }
    }
  }
}

template <class T, int N, bool Once>
void panel_group_float(const uint8_t* p, int cols, const Acts& acts, int t0, F acc[N]) {
  constexpr int kWays = N == 1 ? 8 : 2;  // independent sums hide the latency of the multiply-add
  const float* x = acts.f + size_t(t0) * acts.width;
  F sums[N][kWays];
  for (int t = 0; t < N; ++t)
    for (int u = 0; u < kWays; ++u) sums[t][u] = f_zero();
  constexpr int bytes = kLanes * float_size(T::type);
  int c = 0;
  for (; c + kWays <= cols; c += kWays) {
    for (int u = 0; u < kWays; ++u) {
      const uint8_t* here = p + size_t(c + u) * bytes;
      if (u * bytes % 64 == 0) prefetch_ahead<Once>(here);
      const F w = T::load(here);
      for (int t = 0; t < N; ++t) sums[t][u] = f_fma(w, f_set1(x[t * acts.width + c + u]), sums[t][u]);
    }
  }
  for (; c < cols; ++c)
    for (int t = 0; t < N; ++t)
      sums[t][0] = f_fma(T::load(p + size_t(c) * bytes), f_set1(x[t * acts.width + c]), sums[t][0]);
  for (int t = 0; t < N; ++t) {
    acc[t] = sums[t][0];
    for (int u = 1; u < kWays; ++u) acc[t] = f_add(acc[t], sums[t][u]);
  }
}

template <class T, int N, bool Once>
void panel_tile(const uint8_t* p, int cols, const Acts& acts, int t0, float* out, int stride) {
  F acc[N];
  if constexpr (is_quantized(T::type)) panel_group<T, N, Once>(p, acts.width / 64, acts, t0, acc);
  else panel_group_float<T, N, Once>(p, cols, acts, t0, acc);
  for (int t = 0; t < N; ++t) f_store(out + size_t(t0 + t) * stride, acc[t]);
}

template <class T>
void panel_of(const uint8_t* panel, int cols, int first, int last, const Acts& acts, int tokens, float* out, int stride) {
  const size_t bytes = panel_group_bytes(T::type, cols);
  for (int g = first; g < last; ++g) {
    const uint8_t* p = panel + g * bytes;
    if (tokens == 1) {
      panel_tile<T, 1, true>(p, cols, acts, 0, out + g * kLanes, stride);
      continue;
    }
    int t = 0;
    for (; t + kTokenTile <= tokens; t += kTokenTile) panel_tile<T, kTokenTile, false>(p, cols, acts, t, out + g * kLanes, stride);
    for (; t < tokens; ++t) panel_tile<T, 1, false>(p, cols, acts, t, out + g * kLanes, stride);
  }
}

void panel(Type type, const uint8_t* p, int cols, int first, int last, const Acts& acts, int tokens, float* out, int stride) {
  switch (type) {
    case Type::Q4_0: return panel_of<Q4>(p, cols, first, last, acts, tokens, out, stride);
    case Type::Q8_0: return panel_of<Q8>(p, cols, first, last, acts, tokens, out, stride);
    case Type::F32: return panel_of<Single>(p, cols, first, last, acts, tokens, out, stride);
    case Type::F16: return panel_of<Half>(p, cols, first, last, acts, tokens, out, stride);
    case Type::BF16: return panel_of<Brain>(p, cols, first, last, acts, tokens, out, stride);
  }
}

// ---- gate and up rows
// R rows times N tokens: rows share the loads of activations, tokens the decoding of weights.
template <class Q, int R, int N>
void row_dot_quantized(const uint8_t* const* rows, const Acts& acts, const int* tokens, F acc[R][N], Prefetches& prefetches) {
  const int blocks = acts.blocks(), grouped = acts.groups() * kLanes;
  const uint8_t* row[R];
  const int8_t* q[N];
  size_t lanes[N];
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  for (int i = 0; i < N; ++i) {
    q[i] = acts.lane_q + size_t(tokens[i]) * acts.width;
    lanes[i] = size_t(tokens[i]) * acts.lane_width();
  }
  for (int g = 0; g < acts.groups(); ++g) {
    const size_t scales = row_scale_at(Q::type, g * kLanes), quants = scales + kLanes * 2;
    typename Q::Sum sums[R][N];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const typename Q::Step step(row[r] + quants, s);
        for (int i = 0; i < N; ++i)
          for (int j = 0; j < 2; ++j)
            sums[r][i].add(step, j, b_load(q[i] + g * 512 + 64 * step.act(s, j)));
      }
      prefetches.feed(pace(R * Q::loads / 4, s));
    }
    for (int i = 0; i < N; ++i) {
      const F d = f_load(acts.lane_d + lanes[i] + g * kLanes);
      const I bias = Q::bias(i_load(acts.lane_sum + lanes[i] + g * kLanes));
      for (int r = 0; r < R; ++r) {
        const I sum = i_add(bias, sums[r][i].sum());
        acc[r][i] = f_fma(f_from_i(sum), f_mul(f_load_f16(row[r] + scales), d), acc[r][i]);
      }
    }
  }
  for (int p = 0; p < acts.pairs(); ++p)
    for (int r = 0; r < R; ++r) {
      const int b = grouped + 2 * p;
      const F scale = f_pair_f16(rows[r] + row_scale_at(Q::type, b));
      const B w = Q::pair(rows[r] + row_quants_at(Q::type, b, blocks));
      for (int i = 0; i < N; ++i) {
        const int8_t* a = acts.lane_q + size_t(tokens[i]) * acts.width + b * kBlock;
        const size_t lane = size_t(tokens[i]) * acts.lane_width() + grouped + p * kLanes;
        const I sum = Q::dot(Q::bias(i_load(acts.lane_sum + lane)), w, b_load(a));
        acc[r][i] = f_fma(f_from_i(sum), f_mul(scale, f_load(acts.lane_d + lane)), acc[r][i]);
      }
      if (r == 0) prefetches.feed(pace(R, p));
    }
}

template <class T, int R, int N>
void row_dot_float(const uint8_t* const* rows, const Acts& acts, const int* tokens, F acc[R][N], Prefetches& prefetches) {
  F odd[R][N];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) odd[r][i] = f_zero();
  const int n = round_up(acts.n, kLanes);
  for (int c = 0; c < n; c += 2 * kLanes)
    for (int r = 0; r < R; ++r) {
      const F w = T::load(rows[r] + size_t(c) * float_size(T::type));
      const F w_odd = c + kLanes < n ? T::load(rows[r] + size_t(c + kLanes) * float_size(T::type)) : f_zero();
      for (int i = 0; i < N; ++i) {
        const float* x = acts.f + size_t(tokens[i]) * acts.width + c;
        acc[r][i] = f_fma(w, f_load(x), acc[r][i]);
        odd[r][i] = f_fma(w_odd, f_load(x + kLanes), odd[r][i]);
      }
      if (r == R - 1) prefetches.feed(pace(R * 2 * kLanes * float_size(T::type) / 64, c / (2 * kLanes)));
    }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) acc[r][i] = f_add(acc[r][i], odd[r][i]);
}

template <class T, int R, int N>
void row_dot_tile(const uint8_t* const* rows, const Acts& acts, const int* tokens, float* out, int stride, Prefetches& prefetches) {
  F acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) acc[r][i] = f_zero();
  if constexpr (is_quantized(T::type)) row_dot_quantized<T, R, N>(rows, acts, tokens, acc, prefetches);
  else row_dot_float<T, R, N>(rows, acts, tokens, acc, prefetches);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) out[r * stride + i] = f_sum(acc[r][i]);
}

template <class T>
void row_dot_of(const uint8_t* const* rows, int n_rows, const Acts& acts, const int* tokens, int n_tokens, float* out,
                Prefetches& prefetches) {
  int r = 0;
  for (; n_tokens == 1 && r + kRowTile <= n_rows; r += kRowTile)
    row_dot_tile<T, kRowTile, 1>(rows + r, acts, tokens, out + r, 1, prefetches);
  for (; r < n_rows; ++r) {
    float* row_out = out + size_t(r) * n_tokens;
    int i = 0;
    for (; i + kTokenTile <= n_tokens; i += kTokenTile)
      row_dot_tile<T, 1, kTokenTile>(rows + r, acts, tokens + i, row_out + i, kTokenTile, prefetches);
    for (; i < n_tokens; ++i) row_dot_tile<T, 1, 1>(rows + r, acts, tokens + i, row_out + i, 1, prefetches);
  }
}

void row_dot(Type type, const uint8_t* const* rows, int n_rows, const Acts& acts, const int* tokens, int n_tokens,
             float* out, Prefetches& prefetches) {
  switch (type) {
    case Type::Q4_0: return row_dot_of<Q4>(rows, n_rows, acts, tokens, n_tokens, out, prefetches);
    case Type::Q8_0: return row_dot_of<Q8>(rows, n_rows, acts, tokens, n_tokens, out, prefetches);
    case Type::F32: return row_dot_of<Single>(rows, n_rows, acts, tokens, n_tokens, out, prefetches);
    case Type::F16: return row_dot_of<Half>(rows, n_rows, acts, tokens, n_tokens, out, prefetches);
    case Type::BF16: return row_dot_of<Brain>(rows, n_rows, acts, tokens, n_tokens, out, prefetches);
  }
}

// ---- down rows
// 16 neurons at a time: per 32-block of outputs the products a_i * scale_i share one int8 scale, so that four neurons
// meet in one dot4 and all sixteen in one int32 sum. Rows past `count` repeat row 0 with multiplier zero.
struct Multipliers {
  alignas(64) int32_t quads[4][kLanes];  // [four neurons][block]: four int8 multipliers
  int32_t bias[kLanes];                 // per block
  float step[kLanes];                   // per block
};

void multipliers(const uint8_t* const* scales, const float* a, int count, int offset, Multipliers& out) {
  F m[16], max = f_set1(1e-30f);
  for (int i = 0; i < count; ++i) {
    m[i] = f_mul(f_set1(a[i]), f_load_f16(scales[i]));
    max = f_max(max, f_abs(m[i]));
  }
  for (int i = count; i < 16; ++i) m[i] = f_zero();
  const F inverse = f_div(f_set1(127.0f), max);
  f_store(out.step, f_mul(max, f_set1(1.0f / 127.0f)));
  I sum = i_zero();
  for (int g = 0; 4 * g < count; ++g) {
    I v[4];
    for (int i = 0; i < 4; ++i) {
      v[i] = i_from_f(f_mul(m[4 * g + i], inverse));
      sum = i_add(sum, v[i]);
    }
    b_store(out.quads[g], b_join4(v[0], v[1], v[2], v[3]));
  }
  i_store(out.bias, i_mul(sum, i_set1(-offset)));
}

// One 64-byte chunk of 16 rows: 4 blocks of outputs for Q4_0, 2 for Q8_0, from block `b` of the multipliers on.
void down_chunk(Q4, const uint8_t* const* rows, size_t at, int quads, const Multipliers& m, int b, float* y,
                Prefetches& prefetches) {
  I acc[8];
  for (int r = 0; r < 8; ++r) acc[r] = r % 2 ? i_zero() : i_set1(m.bias[b + r / 2]);
  for (int g = 0; g < quads; ++g) {
    B u[4];
    b_interleave4(b_load(rows[4 * g] + at), b_load(rows[4 * g + 1] + at), b_load(rows[4 * g + 2] + at),
                  b_load(rows[4 * g + 3] + at), u);
    for (int r = 0; r < 4; ++r) {
      const B multiplier = b_set1(&m.quads[g][b + r]);
      acc[2 * r] = dot4(acc[2 * r], b_low(u[r]), multiplier);
      acc[2 * r + 1] = dot4(acc[2 * r + 1], b_top(u[r]), multiplier);
    }
    prefetches.feed(pace(4, g));
  }
  for (int r = 0; r < 8; ++r) {
    const I sum = r % 2 ? i_add(i_from_top(acc[r]), i_set1(m.bias[b + r / 2])) : acc[r];
    f_store(y + kLanes * r, f_fma(f_from_i(sum), f_set1(m.step[b + r / 2]), f_load(y + kLanes * r)));
  }
}

void down_chunk(Q8, const uint8_t* const* rows, size_t at, int quads, const Multipliers& m, int b, float* y,
                Prefetches& prefetches) {
  I acc[4];
  for (int r = 0; r < 4; ++r) acc[r] = i_set1(m.bias[b + r / 2]);
  for (int g = 0; g < quads; ++g) {
    B u[4];
    b_interleave4(b_load(rows[4 * g] + at), b_load(rows[4 * g + 1] + at), b_load(rows[4 * g + 2] + at),
                  b_load(rows[4 * g + 3] + at), u);
    for (int r = 0; r < 4; ++r) acc[r] = dot4_wide(acc[r], u[r], b_set1(&m.quads[g][b + r / 2]));
    prefetches.feed(pace(4, g));
  }
  for (int r = 0; r < 4; ++r)
    f_store(y + kLanes * r, f_fma(f_from_i(acc[r]), f_set1(m.step[b + r / 2]), f_load(y + kLanes * r)));
}

template <class Q>
void down_quantized(const uint8_t* const* rows, const float* a, int count, int n, float* y, Prefetches& prefetches) {
  const int width = round_up(n, 128), blocks = width / kBlock, chunk = Q::type == Type::Q4_0 ? 128 : 64;
  const uint8_t* all[16];
  for (int i = 0; i < 16; ++i) all[i] = rows[i < count ? i : 0];
  for (int b0 = 0; b0 < blocks; b0 += kLanes) {
    const uint8_t* scales[16];
    for (int i = 0; i < count; ++i) scales[i] = rows[i] + row_scale_at(Q::type, b0);
    Multipliers m;
    multipliers(scales, a, count, Q::offset, m);
    for (int b = 0; b < std::min(kLanes, blocks - b0); b += chunk / kBlock)
      down_chunk(Q{}, all, row_quants_at(Q::type, b0 + b, blocks), (count + 3) / 4, m, b, y + (b0 + b) * kBlock, prefetches);
  }
}

template <class T>
void down_float(const uint8_t* const* rows, const float* a, int count, int n, float* y, Prefetches& prefetches) {
  for (int c = 0; c < n; c += 64) {
    F acc[4];
    for (int u = 0; u < 4; ++u) acc[u] = f_load(y + c + u * kLanes);
    for (int i = 0; i < count; ++i) {
      const F scale = f_set1(a[i]);
      for (int u = 0; u < 4; ++u)
        acc[u] = f_fma(T::load(rows[i] + size_t(c + u * kLanes) * float_size(T::type)), scale, acc[u]);
      prefetches.feed(pace(kLanes * 4 * float_size(T::type) / 64, i));
    }
    for (int u = 0; u < 4; ++u) f_store(y + c + u * kLanes, acc[u]);
  }
}

void down(Type type, const uint8_t* const* rows, const float* a, int count, int n, float* y, Prefetches& prefetches) {
  switch (type) {
    case Type::Q4_0: return down_quantized<Q4>(rows, a, count, n, y, prefetches);
    case Type::Q8_0: return down_quantized<Q8>(rows, a, count, n, y, prefetches);
    case Type::F32: return down_float<Single>(rows, a, count, n, y, prefetches);
    case Type::F16: return down_float<Half>(rows, a, count, n, y, prefetches);
    case Type::BF16: return down_float<Brain>(rows, a, count, n, y, prefetches);
  }
}

// ---- element-wise and attention
template <Value V>
F value_of(F g, F threshold) {
  if constexpr (V == Value::Square) return f_mul(g, g);
  else if constexpr (V == Value::Shifted) return f_sub(g, threshold);
  else if constexpr (V == Value::Silu) return f_mul(g, f_div(f_set1(1.0f), f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), g)))));
  else if constexpr (V == Value::Gelu) {  // the exact GELU, one by one: there is no vector erf here
    float x[kLanes];
    f_store(x, g);
    for (float& each : x) each *= 0.5f * (1.0f + __builtin_erff(each * 0.70710678f));
    return f_load(x);
  } else return g;
}

// 16 gates: their values, and what decides whether they fire.
template <Value V, Score S>
struct Gates {
  F value, score, limit;
  Gates(const float* gate, const Thresholds& thresholds, int i) {
    const F g = f_load(gate + i);
    limit = thresholds.each ? f_load(thresholds.each + i) : f_set1(thresholds.all);
    value = value_of<V>(g, limit);
    score = S == Score::Magnitude ? f_abs(value) : g;
  }
  uint32_t fires() const { return S == Score::Always ? 0xFFFF : f_ge_mask(score, limit); }
  F kept(F x) const { return S == Score::Always ? x : f_keep(x, score, limit); }
};

template <Value V, Score S>
int activate_as(float* gate, const float* up, const Thresholds& thresholds, int n) {
  int fired = 0;
  for (int i = 0; i < n; i += kLanes) {
    const Gates<V, S> gates(gate, thresholds, i);
    const F u = f_load(up + i);
    const uint32_t valid = n - i >= kLanes ? 0xFFFF : (1u << (n - i)) - 1;
    fired += __builtin_popcount(gates.fires() & valid);
    f_store(gate + i, gates.kept(f_mul(gates.value, S == Score::GateAndUp ? f_max(u, f_zero()) : u)));
  }
  return fired;
}

template <Value V, Score S>
uint32_t fires_as(float* gate, const Thresholds& thresholds) {
  const Gates<V, S> gates(gate, thresholds, 0);
  if constexpr (V != Value::Gate) f_store(gate, gates.value);
  return gates.fires();
}

// Calls with<V, S>() of the rule.
template <Value V, class With>
auto with_score(Score score, const With& with) {
  switch (score) {
    case Score::Always: return with.template operator()<V, Score::Always>();
    case Score::Magnitude: return with.template operator()<V, Score::Magnitude>();
    case Score::GateAndUp: return with.template operator()<V, Score::GateAndUp>();
    default: return with.template operator()<V, Score::Gate>();
  }
}
template <class With>
auto with_rule(Rule rule, const With& with) {
  switch (rule.value) {
    case Value::Square: return with_score<Value::Square>(rule.score, with);
    case Value::Shifted: return with_score<Value::Shifted>(rule.score, with);
    case Value::Silu: return with_score<Value::Silu>(rule.score, with);
    case Value::Gelu: return with_score<Value::Gelu>(rule.score, with);
    default: return with_score<Value::Gate>(rule.score, with);
  }
}

int activate(Rule rule, float* gate, const float* up, const Thresholds& thresholds, int n) {
  return with_rule(rule, [&]<Value V, Score S>() { return activate_as<V, S>(gate, up, thresholds, n); });
}

uint32_t fires(Rule rule, float* gate, const Thresholds& thresholds) {
  return with_rule(rule, [&]<Value V, Score S>() { return fires_as<V, S>(gate, thresholds); });
}

// Prefetches `lines` lines of a run of keys or values as far ahead as a panel does and, where the run ends, for what
// will be read after it.
inline void prefetch_in_run(const uint16_t* here, int lines, const uint16_t* end, Prefetches& prefetches) {
  const uint8_t* ahead = reinterpret_cast<const uint8_t*>(here) + kAhead;
  if (ahead >= reinterpret_cast<const uint8_t*>(end)) return prefetches.feed((lines + 3) / 4);
  for (int i = 0; i < lines; ++i) prefetch_line(ahead + 64 * i);
}

template <int H>
void scores_of(const float* q, int dim, const uint16_t* keys, int first, int last, float* out, int stride, Prefetches& prefetches) {
  constexpr int kStep = 8;                        // dimensions at a time: four lines of keys
  constexpr int kWays = H >= 4 ? 1 : H > 1 ? 2 : 4;  // independent sums hide the latency of the multiply-add
  const uint16_t* end = keys + size_t(last) * dim * kLanes;
  for (int tile = first; tile < last; ++tile) {
    F acc[H][kWays];
    for (int h = 0; h < H; ++h)
      for (int u = 0; u < kWays; ++u) acc[h][u] = f_zero();
    const uint16_t* k = keys + size_t(tile) * dim * kLanes;
    for (int d = 0; d < dim; d += kStep) {
#pragma GCC unroll 8
      for (int u = 0; u < kStep; ++u) {
        const F key = f_load_f16(k + (d + u) * kLanes);
        for (int h = 0; h < H; ++h) acc[h][u % kWays] = f_fma(key, f_set1(q[h * dim + d + u]), acc[h][u % kWays]);
      }
      prefetch_in_run(k + d * kLanes, kStep / 2, end, prefetches);
    }
    for (int h = 0; h < H; ++h) {
      for (int u = 1; u < kWays; ++u) acc[h][0] = f_add(acc[h][0], acc[h][u]);
      f_store(out + h * stride + tile * kLanes, acc[h][0]);
    }
  }
}

void scores(const float* q, int heads, int dim, const uint16_t* keys, int first, int last, float* out, int stride, Prefetches& prefetches) {
  const auto step = [&](auto run, int h) { run(q + h * dim, dim, keys, first, last, out + h * stride, stride, prefetches); };
  int h = 0;
  for (; h + 4 <= heads; h += 4) step(scores_of<4>, h);
  if (heads - h == 3) step(scores_of<3>, h);
  if (heads - h == 2) step(scores_of<2>, h);
  if (heads - h == 1) step(scores_of<1>, h);
}

float softmax(float* s, int first, int last, float* max) {
  float m = -3e38f;
  int p = first;
  F vm = f_set1(m);
  for (; p + kLanes <= last; p += kLanes) vm = f_max(vm, f_load(s + p));
  m = f_hmax(vm);
  for (; p < last; ++p) m = std::max(m, s[p]);
  F sum = f_zero();
  for (p = first; p + kLanes <= last; p += kLanes) {
    const F e = f_exp(f_sub(f_load(s + p), f_set1(m)));
    f_store(s + p, e);
    sum = f_add(sum, e);
  }
  float total = f_sum(sum);
  if (p < last) {
    float e[kLanes];
    std::fill(e, e + kLanes, m);
    std::copy(s + p, s + last, e);
    f_store(e, f_exp(f_sub(f_load(e), f_set1(m))));
    std::copy(e, e + (last - p), s + p);
    for (int i = 0; i < last - p; ++i) total += e[i];
  }
  *max = m;
  return total;
}

template <int H, int V>
void values_of(const float* w, int stride, int dim, const uint16_t* values, int first, int last, float* out, Prefetches& prefetches) {
  F acc[H][V];
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) acc[h][v] = f_zero();
  const uint16_t* end = values + size_t(last) * dim;
  for (int p = first; p < last; ++p) {
    for (int v = 0; v < V; ++v) {
      const F value = f_load_f16(values + size_t(p) * dim + v * kLanes);
      for (int h = 0; h < H; ++h) acc[h][v] = f_fma(value, f_set1(w[h * stride + p]), acc[h][v]);
    }
    prefetch_in_run(values + size_t(p) * dim, (V + 1) / 2, end, prefetches);
  }
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) f_store(out + h * dim + v * kLanes, acc[h][v]);
}

template <int H>
void values_heads(const float* w, int stride, int dim, const uint16_t* values, int first, int last, float* out, Prefetches& prefetches) {
  constexpr int kWide = H == 1 ? 8 : 4;  // whole rows of values at a time, as far as registers go
  int d = 0;
  for (; d + kWide * kLanes <= dim; d += kWide * kLanes)
    values_of<H, kWide>(w, stride, dim, values + d, first, last, out + d, prefetches);
  for (; d < dim; d += kLanes) values_of<H, 1>(w, stride, dim, values + d, first, last, out + d, prefetches);
}

void values(const float* w, int stride, int heads, int dim, const uint16_t* v, int first, int last, float* out, Prefetches& prefetches) {
  const auto step = [&](auto run, int h) { run(w + h * stride, stride, dim, v, first, last, out + h * dim, prefetches); };
  int h = 0;
  for (; heads - h >= 3; h += 3) step(values_heads<3>, h);
  if (heads - h == 2) step(values_heads<2>, h);
  if (heads - h == 1) step(values_heads<1>, h);
}

void to_f16(const float* x, int n, uint16_t* y) {
  for (int i = 0; i < n; i += kLanes) f_store_f16(y + i, f_load(x + i));
}

void add(float* y, const float* x, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) f_store(y + i, f_add(f_load(y + i), f_load(x + i)));
  for (; i < n; ++i) y[i] += x[i];
}

uint32_t at_least(const float* x, float threshold) { return f_ge_mask(f_load(x), f_set1(threshold)); }

int count_at_least(const float* x, int n, float size) {
  int count = 0;
  for (int i = 0; i < n; i += kLanes) count += __builtin_popcount(f_ge_mask(f_abs(f_load(x + i)), f_set1(size)));
  return count;
}

void keep_at_least(float* x, int n, float size) {
  for (int i = 0; i < n; i += kLanes) f_store(x + i, f_keep(f_load(x + i), f_abs(f_load(x + i)), f_set1(size)));
}

}  // namespace

#define HOTCOLD_STRING_(x) #x
#define HOTCOLD_STRING(x) HOTCOLD_STRING_(x)

extern const Kernels table;
const Kernels table = {HOTCOLD_STRING(HOTCOLD_ISA), rms_norm, quantize, arrange, panel,  row_dot, down,
                       activate,                    scores,   softmax,  values,  to_f16, add,     fires, at_least,
                       count_at_least,              keep_at_least};

}  // namespace hotcold::HOTCOLD_ISA

// The table of kernels: one per ISA, all with the same meaning. Wrappers check, kernels trust.
#pragma once
#include <algorithm>
#include <cstdint>

#include "firing.h"
#include "prefetches.h"
#include "layout.h"

namespace hotcold {

// Activations of several tokens, each padded to `width = padded(n)` with zeros, in the forms that the kernels read.
// Quantized to int8 per 32-block with scale d; weights are stored unsigned, which -sum(q) corrects.
struct Acts {
  int n = 0, width = 0;
  float* f = nullptr;          // [tokens, width]
  int8_t* q = nullptr;         // [tokens, width], in order (panels)
  float* d = nullptr;          // [tokens, width / 32]
  int32_t* negative_sum = nullptr;  // [tokens, width / 32]
  int8_t* lane_q = nullptr;    // [tokens, width], in the order of gate and up rows
  float* lane_d = nullptr;     // [tokens, 16 * steps]
  int32_t* lane_sum = nullptr;

  int blocks() const { return width / kBlock; }
  int groups() const { return blocks() / kLanes; }
  int pairs() const { return blocks() % kLanes / 2; }
  int lane_width() const { return (groups() + pairs()) * kLanes; }
};

// How far ahead of its reading a long run (a panel, keys, values) is asked for, in bytes.
constexpr int kAhead = 6144;

struct Kernels {
  const char* name;
  // Those with `asks` ask for what is read next, line by line.

  // x [n] -> y = x / rms(x) * weight; y may be x.
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* y, Prefetches& prefetches);
  // Quantizes blocks [first, last) of token t of acts.f.
  void (*quantize)(const Acts& acts, int t, int first, int last, Prefetches& prefetches);
  // Brings the quantized token t into the order of gate and up rows.
  void (*arrange)(const Acts& acts, int t, Prefetches& prefetches);

  // out[t * stride + r] = panel row r . token t, for row groups [first, last) and all tokens.
  void (*panel)(Type type, const uint8_t* panel, int cols, int first, int last, const Acts& acts, int tokens,
                float* out, int stride);
  // out[r * n_tokens + i] = rows[r] . token tokens[i].
  void (*row_dot)(Type type, const uint8_t* const* rows, int n_rows, const Acts& acts, const int* tokens, int n_tokens,
                  float* out, Prefetches& prefetches);
  // y [round_up(n, 128)] += sum of a[i] * down row i, i < count <= 16.
  void (*down)(Type type, const uint8_t* const* rows, const float* a, int count, int n, float* y, Prefetches& prefetches);

  // gate[i] = its value * up[i] where it fires, else 0. Returns how many of [0, n) fire; what lies between n and the next
  // multiple of 16 is computed, and not counted.
  int (*activate)(Rule rule, float* gate, const float* up, const Thresholds& thresholds, int n);
  // Scores of `heads` queries [heads, dim] against key tiles [first, last); keys: [tile][dim][16] f16.
  // score[h * stride + position]
  void (*scores)(const float* q, int heads, int dim, const uint16_t* keys, int first, int last, float* scores, int stride,
                 Prefetches& prefetches);
  // In place over positions [first, last): score -> exp(score - max); returns the sum, sets *max.
  float (*softmax)(float* scores, int first, int last, float* max);
  // out [heads, dim] = sum over positions [first, last) of weight[h * stride + position] * values[position * dim].
  void (*values)(const float* weights, int stride, int heads, int dim, const uint16_t* values, int first, int last,
                 float* out, Prefetches& prefetches);
  void (*to_f16)(const float* x, int n, uint16_t* y);  // n a multiple of 16
  void (*add)(float* y, const float* x, int n);
  // Bits of lanes i that fire. All 16 gates become values.
  uint32_t (*fires)(Rule rule, float* gate, const Thresholds& thresholds);
  // Bits of lanes i with x[i] >= threshold.
  uint32_t (*at_least)(const float* x, float threshold);
  // How many of x [n] are `size` or greater, whatever their sign; n a multiple of 16.
  int (*count_at_least)(const float* x, int n, float size);
  // x[i] = 0 where it is smaller than `size`; n a multiple of 16.
  void (*keep_at_least)(float* x, int n, float size);
};

// The best table that this CPU runs, or the one named by HOTCOLD_CPU_ISA (avx512, avx2, neon, generic).
// Throws std::invalid_argument for an unknown name or one that this CPU lacks.
const Kernels& kernels(const char* name = nullptr);
// Names of the tables that this CPU runs, best first; ends with nullptr.
const char* const* available_isas();

}  // namespace hotcold

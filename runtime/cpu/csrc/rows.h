// The work on the rows of listed neurons: what exact and predicted mode do instead of whole matrices.
#pragma once
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>

#include "buffers.h"
#include "sequence.h"

namespace hotcold {

inline float value_of(Value value, float g, float threshold) {
  switch (value) {
    case Value::Square: return g * g;
    case Value::Shifted: return g - threshold;
    case Value::Silu: return g / (1.0f + std::exp(-g));
    case Value::Gelu: return 0.5f * g * (1.0f + std::erf(g * 0.70710678f));
    default: return g;
  }
}

// Whether a gate fires, which then becomes its value. One neuron; Kernels::fires does 16.
inline bool fire(Rule rule, float& gate, float threshold) {
  if (rule.score != Score::Magnitude) {
    if (rule.score != Score::Always && !(gate >= threshold)) return false;
    gate = value_of(rule.value, gate, threshold);
    return true;
  }
  gate = value_of(rule.value, gate, threshold);
  return std::fabs(gate) >= threshold;
}

inline int set_bits(uint64_t mask, int* out) {
  int n = 0;
  for (; mask; mask &= mask - 1) out[n++] = std::countr_zero(mask);
  return n;
}

// This thread's even share of the neurons that all threads listed, for the n tokens of `norm`, the first of which is at
// `position`, into its y. Returns how many were computed, and how many of them fired; `down` counts inputs of a rule there.
LayerStats work_rows(const Model& m, Model::Buffers& b, int thread, const Layer& layer, const Acts& norm, int n, int position,
                     InputStats& down);

}  // namespace hotcold

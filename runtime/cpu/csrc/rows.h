// The work on the rows of listed neurons: what exact and predicted mode do instead of whole matrices.
#pragma once
#include <algorithm>
#include <bit>
#include <cfloat>

#include "buffers.h"
#include "sequence.h"

namespace hotcold {

// ReLU passes what is positive, FATReLU what reaches its threshold.
inline float firing_threshold(const Layer& layer) { return std::max(layer.activation_threshold, FLT_MIN); }

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

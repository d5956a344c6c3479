// The rule by which neurons fire: what a gate becomes, and from where on. model/firing.py has the table of rules and
// gives both ids and the thresholds to compare with.
#pragma once
#include <cfloat>

namespace hotcold {

// What a neuron's gate g becomes before it meets up: g, g², g - threshold, silu(g), gelu(g).
enum class Value : int { Gate, Square, Shifted, Silu, Gelu };
// When it fires: always; where g reaches the threshold; where |value| does; where g does, and up, which is rectified, counts
// only where it is positive.
enum class Score : int { Always, Gate, Magnitude, GateAndUp };

struct Rule {
  Value value;
  Score score;
  constexpr bool can_be_zero() const { return score != Score::Always; }
  constexpr bool clips_up() const { return score == Score::GateAndUp; }
};

// Those of a layer's neurons: one for all, or one each.
struct Thresholds {
  const float* each = nullptr;
  float all = FLT_MIN;  // plain ReLU: all that is positive fires
  float operator[](int i) const { return each ? each[i] : all; }
  Thresholds from(int i) const { return {each ? each + i : nullptr, all}; }
};

}  // namespace hotcold

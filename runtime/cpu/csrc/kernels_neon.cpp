#include "simd_neon.h"

#define HOTCOLD_ISA neon
#include "kernels.inl"

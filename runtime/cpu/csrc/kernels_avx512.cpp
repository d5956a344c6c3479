#include "simd_avx512.h"

#define HOTCOLD_ISA avx512
#include "kernels.inl"

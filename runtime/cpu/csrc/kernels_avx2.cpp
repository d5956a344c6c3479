#include "simd_avx2.h"

#define HOTCOLD_ISA avx2
#include "kernels.inl"

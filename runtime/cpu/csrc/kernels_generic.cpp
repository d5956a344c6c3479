#include "simd_generic.h"

#define HOTCOLD_ISA generic
#include "kernels.inl"

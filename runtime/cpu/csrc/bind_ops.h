#pragma once
#include <nanobind/nanobind.h>

// Single kernels for the op tests: each call packs what it is given, so none of this is for speed.
void bind_ops(nanobind::module_& m);

#pragma once
#include <nanobind/nanobind.h>

void bind_sequence(nanobind::module_& m);

// The implementations that a build may have: for dispatch.cpp, and for the files that define them.

#pragma once

#include "kernels/kernels.h"

namespace edgevl {

extern const Kernels kAvx512Bf16;
extern const Kernels kAvx512;
extern const Kernels kAvxVnni;
extern const Kernels kAvx2;
extern const Kernels kNeonI8mm;
extern const Kernels kNeon;
extern const Kernels kPortable;

}  // namespace edgevl

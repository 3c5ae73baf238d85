// Kernels for what the compiler targets by default: SSE2 on x86-64, NEON on aarch64.
#include "kernels.h"

#define REWIRE_ISA portable
#define REWIRE_VECTOR_BYTES 16
#include "kernels.inc"

// The kernels for the oldest processor the compiler is told to serve (SSE2 on x86-64, NEON on AArch64).
#define PIIP_CAPABILITY portable
#define PIIP_TARGET
#define PIIP_WIDE_BYTES 16
#include "cpu/kernel_impl.h"

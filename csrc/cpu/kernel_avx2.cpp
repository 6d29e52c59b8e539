#if defined(__x86_64__)
#define PIIP_CAPABILITY avx2
#define PIIP_TARGET __attribute__((target("avx2,fma")))
#define PIIP_WIDE_BYTES 32
#include "cpu/kernel_impl.h"
#endif

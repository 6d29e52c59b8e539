#if defined(__x86_64__)
#define PIIP_CAPABILITY avx512
#define PIIP_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define PIIP_WIDE_BYTES 64
#include "cpu/kernel_impl.h"
#endif

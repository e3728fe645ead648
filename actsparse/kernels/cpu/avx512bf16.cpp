#if defined(__x86_64__)
#define LANES 16
#define TABLE avx512bf16_kernels
#define NAME "avx512bf16"
#include "kernels.inc"
#endif

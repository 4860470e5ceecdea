/* What exact.c and products.c share. */
#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DISPATCH
#define FAST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FAST
#endif
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Writes products of rows of features with rows of weights, multiples of 2**-24; returns 0 where memory is short. */
int multiply_exactly(const int16_t *integers_RD, long R, long D, const double *weight_KD, long K, double *outputs_RK);

/* total_KD += the sums over rows of parts, whole numbers, times features; returns 0 where memory is short. */
int add_exactly(const int16_t *integers_RD, const double *parts_RK, long R, long D, long K, int several,
                double *total_KD);

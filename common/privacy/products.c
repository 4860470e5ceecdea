/* Products of whole numbers that double precision would hold exactly, from products of 16-bit digits in 32 bits.

A feature is an integer of 16 bits, and a row of them has a norm below 2**15 (client/data/quantised.py). The other factor, a
weight or a part, is written in digits: so few bits that no sum of products leaves 32 bits. What the digits' sums are worth
together is added in double precision, as exactly as the specification adds it there; so the order does not matter.
*/
#include "products.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define UNROLL _Pragma("GCC unroll 32")
#define DIGITS 3 /* Of a part. */
#define MOST_DIGITS 24
#define ROWS 512    /* Rows whose parts' digits are kept at once, */
#define OUTPUTS 64  /* and outputs. */
#define CACHED (1 << 17) /* Features that stay in a core's second cache. */

typedef int32_t Quad __attribute__((vector_size(16)));
typedef double FourDoubles __attribute__((vector_size(32), aligned(8), may_alias));

/* --- for each width of vectors ----------------------------------------------------------------------------------- */

#define NAME(name) name##_128
#define WIDTH 16
#define TILE_ROWS 2
#define TILE_COLUMNS 4
#define TILE_OUTPUTS 1
#if defined(__SSE2__)
#include <immintrin.h>
#define MULTIPLY_PAIRS(a, b) ((Ints)_mm_madd_epi16((__m128i)(a), (__m128i)(b)))
#else
#define MULTIPLY_PAIRS(a, b) \
    (((Ints)(a) << 16 >> 16) * ((Ints)(b) << 16 >> 16) + ((Ints)(a) >> 16) * ((Ints)(b) >> 16))
#endif
#define INTERLEAVE(a, b, x)                                            \
    x[0] = __builtin_shuffle(a, b, (Shorts){0, 8, 1, 9, 2, 10, 3, 11}); \
    x[1] = __builtin_shuffle(a, b, (Shorts){4, 12, 5, 13, 6, 14, 7, 15})
#include "products_kernel.h"

#ifdef DISPATCH
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define NAME(name) name##_256
#define WIDTH 32
#define TILE_ROWS 2
#define TILE_COLUMNS 4
#define TILE_OUTPUTS 2
#define MULTIPLY_PAIRS(a, b) ((Ints)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#define INTERLEAVE(a, b, x)                                          \
    x[0] = (Shorts)_mm256_unpacklo_epi16((__m256i)(a), (__m256i)(b)); \
    x[1] = (Shorts)_mm256_unpackhi_epi16((__m256i)(a), (__m256i)(b))
#include "products_kernel.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define NAME(name) name##_512
#define WIDTH 64
#define TILE_ROWS 4
#define TILE_COLUMNS 5
#define TILE_OUTPUTS 4
#define MULTIPLY_PAIRS(a, b) ((Ints)_mm512_madd_epi16((__m512i)(a), (__m512i)(b)))
#define INTERLEAVE(a, b, x)                                          \
    x[0] = (Shorts)_mm512_unpacklo_epi16((__m512i)(a), (__m512i)(b)); \
    x[1] = (Shorts)_mm512_unpackhi_epi16((__m512i)(a), (__m512i)(b))
#include "products_kernel.h"
#pragma GCC pop_options
#endif

typedef struct {
    long lanes, tile_outputs;
    void (*multiply)(const int16_t *const rows[4], long D, const int16_t *columns_CD, long padded, long C,
                     int32_t *sums_C4);
    void (*add)(const int16_t *rows_RD, long R, long D, const int32_t *digits, long K, int digit_bits, long num_exact,
                double *total_KD, int16_t *room);
} Variant;

static const Variant variants[] = {
    {8, 1, multiply_128, add_128},
#ifdef DISPATCH
    {16, 2, multiply_256, add_256},
    {32, 4, multiply_512, add_512},
#endif
};

/* The widest that the processor has, at most that of `most`; tests compare all of them. */
static int widest = 2;

int limit_width(int most) {
    widest = most;
    return (int)(sizeof variants / sizeof *variants) - 1;
}

static const Variant *choose_variant(void) {
#ifdef DISPATCH
    if (widest > 1 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        return variants + 2;
    if (widest > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return variants + 1;
#endif
    return variants;
}

/* --- outputs ----------------------------------------------------------------------------------------------------- */

static int count_bits(long value) {
    int bits = 0;
    for (; value; value >>= 1) bits++;
    return bits;
}

/* Writes the digits of K rows of weights, multiples of 2**-24, as columns: an output's side by side, the least first. */
FAST static void split_weights(const double *weight_KD, long K, long D, int num_digits, int bits, long padded,
                               double *rest_D, int16_t *columns_CD) {
    double up = ldexp(1.0, bits), down = ldexp(1.0, -bits);
    memset(columns_CD, 0, 2 * K * num_digits * padded);
    for (long k = 0; k < K; k++) {
        const double *weight = weight_KD + k * D;
        for (long d = 0; d < D; d++) rest_D[d] = weight[d] * 0x1p24;
        for (int digit = 0; digit < num_digits - 1; digit++, columns_CD += padded)
            for (long d = 0; d < D; d++) {
                double higher = nearbyint(rest_D[d] * down);
                columns_CD[d] = (int16_t)(int32_t)(rest_D[d] - higher * up);
                rest_D[d] = higher;
            }
        for (long d = 0; d < D; d++) columns_CD[d] = (int16_t)(int32_t)rest_D[d];
        columns_CD += padded;
    }
}

/* The largest norm of a row. */
FAST static double measure_rows(const double *weight_KD, long K, long D) {
    double most = 0.0;
    for (long k = 0; k < K; k++) {
        double lanes[8] = {0}, square = 0.0;
        long d = 0;
        for (; d + 8 <= D; d += 8)
            UNROLL for (int i = 0; i < 8; i++) lanes[i] += weight_KD[k * D + d + i] * weight_KD[k * D + d + i];
        for (; d < D; d++) square += weight_KD[k * D + d] * weight_KD[k * D + d];
        UNROLL for (int i = 0; i < 8; i++) square += lanes[i];
        most = square > most ? square : most;
    }
    return sqrt(most);
}

int multiply_exactly(const int16_t *integers_RD, long R, long D, const double *weight_KD, long K, double *outputs_RK) {
    const Variant *variant = choose_variant();
    long padded = (D + variant->lanes - 1) / variant->lanes * variant->lanes;
    /* |sum| <= |q| |digits| < 2**15 2**(bits - 1) sqrt(D) <= 2**31; and of the first digits below 2**15 2**15. */
    int bits = MIN(14, 17 - (count_bits(D - 1) + 1) / 2), num_digits = 1;
    double norm = measure_rows(weight_KD, K, D) * 0x1p24, least = sqrt((double)D);
    while (num_digits < MOST_DIGITS && !(ldexp(norm, -bits * (num_digits - 1)) + least <= 32000.0)) num_digits++;
    long group = MAX(1, MIN(K, (1 << 13) / (num_digits * padded))), chunk = MAX(1, CACHED / padded / 4) * 4;
    long size = 2 * K * num_digits * padded, C = group * num_digits;
    char *room = malloc(8 * D + size + 16 * C);
    if (!room) return 0;
    double *rest_D = (double *)room;
    int16_t *columns_CD = (int16_t *)(room + 8 * D);
    int32_t *sums_C4 = (int32_t *)(room + 8 * D + size);
    split_weights(weight_KD, K, D, num_digits, bits, padded, rest_D, columns_CD);
    double worth[MOST_DIGITS];
    for (int digit = 0; digit < num_digits; digit++) worth[digit] = ldexp(1.0, bits * digit - 24);
    for (long first = 0; first < R; first += chunk)
        for (long k = 0; k < K; k += group) {
            long count = MIN(group, K - k);
            for (long r = first; r < MIN(R, first + chunk); r += 4) {
                const int16_t *rows[4];
                for (long n = 0; n < 4; n++) rows[n] = integers_RD + MIN(r + n, R - 1) * D;
                variant->multiply(rows, D, columns_CD + k * num_digits * padded, padded, count * num_digits, sums_C4);
                for (long n = 0; n < MIN(4, R - r); n++)
                    for (long i = 0; i < count; i++) {
                        double sum = 0.0;
                        for (int digit = 0; digit < num_digits; digit++)
                            sum += sums_C4[4 * (i * num_digits + digit) + n] * worth[digit];
                        outputs_RK[(r + n) * K + k + i] = sum;
                    }
            }
        }
    free(room);
    return 1;
}

/* Writes products of pairs of rows: with norms below 2**15 no sum leaves 32 bits. */
FAST void multiply_pairs(const int16_t *integers_RD, long D, const int64_t *first_Q, const int64_t *second_Q, long Q,
                         double *product_Q) {
    for (long q = 0; q < Q; q++) {
        const int16_t *first = integers_RD + first_Q[q] * D, *second = integers_RD + second_Q[q] * D;
        int32_t sum = 0;
        for (long d = 0; d < D; d++) sum += (int32_t)first[d] * second[d];
        product_Q[q] = sum;
    }
}

/* --- sums of parts ----------------------------------------------------------------------------------------------- */

/* Writes the digits of parts of two rows, of `count` outputs: the second row's in the higher half of a word. */
FAST static void split_parts(const double *first_K, const double *second_K, long count, int bits,
                             int32_t digits[DIGITS][OUTPUTS]) {
    double up = ldexp(1.0, bits), down = ldexp(1.0, -bits), most = ldexp(1.0, DIGITS * bits - 1) - ldexp(1.0, 2 * bits);
    for (long k = 0; k < count; k++) {
        double part[2] = {first_K[k], second_K ? second_K[k] : 0.0};
        int32_t digit[DIGITS][2];
        UNROLL for (int n = 0; n < 2; n++) {
            /* What a row of `QuantisedRows` is multiplied with is never as large: it would only become smaller. */
            double rest = part[n] > most ? most : part[n] < -most ? -most : part[n];
            UNROLL for (int i = 0; i < DIGITS - 1; i++) {
                double higher = nearbyint(rest * down);
                digit[i][n] = (int32_t)(rest - higher * up);
                rest = higher;
            }
            digit[DIGITS - 1][n] = (int32_t)rest;
        }
        UNROLL for (int i = 0; i < DIGITS; i++)
            digits[i][k] = (int32_t)((uint32_t)digit[i][1] << 16 | ((uint32_t)digit[i][0] & 0xffff));
    }
}

int add_exactly(const int16_t *integers_RD, const double *parts_RK, long R, long D, long K, int several,
                double *total_KD) {
    const Variant *variant = choose_variant();
    /* Of digits of at most 2**(bits - 1) so many rows add in 32 bits. A part is at most 2**28 or, of a unit of several
    records, 2**32 (closed_form.py, MOST_CANCELLATION): the norm of a row, if it is not zero, is about 2**14 at least. */
    int bits = several ? 12 : 10;
    long num_exact = 1 << (17 - bits), tile = variant->tile_outputs;
    long rows = MIN(R, ROWS), pairs = (rows + 1) / 2, outputs = MIN(K, OUTPUTS);
    int32_t *digits = malloc(4 * DIGITS * pairs * outputs + 2 * rows * variant->lanes), split[DIGITS][OUTPUTS];
    if (!digits) return 0;
    for (long first = 0; first < R; first += ROWS)
        for (long k = 0; k < K; k += OUTPUTS) {
            long count = MIN(ROWS, R - first), width = MIN(OUTPUTS, K - k);
            pairs = (count + 1) / 2;
            for (long p = 0; p < pairs; p++) {
                const double *parts = parts_RK + (first + 2 * p) * K + k;
                split_parts(parts, 2 * p + 1 < count ? parts + K : 0, width, bits, split);
                for (long start = 0; start < width; start += tile) {
                    long M = MIN(tile, width - start);
                    int32_t *into = digits + DIGITS * (start * pairs + p * M);
                    for (int i = 0; i < DIGITS; i++)
                        for (long m = 0; m < M; m++) into[i * M + m] = split[i][start + m];
                }
            }
            variant->add(integers_RD + first * D, count, D, digits, width, bits, num_exact, total_KD + k * D,
                         (int16_t *)(digits + DIGITS * pairs * outputs));
        }
    free(digits);
    return 1;
}

/* Exact products of 16-bit rows for one width of the processor's vectors; products.c includes this once for each.

WIDTH: bytes of a vector. MULTIPLY_PAIRS(a, b): the sums of the products of neighbouring 16-bit numbers, in 32 bits.
INTERLEAVE(a, b, x): writes the numbers of a and b in turns, of each 16 bytes the first four and the last four.
TILE_ROWS, TILE_COLUMNS, TILE_OUTPUTS: so many sums fit into registers. NAME(x): x with the variant's name.

Arrays are contiguous where nothing else is said. R rows, D features, K outputs, C columns: the digits of all outputs.
*/

typedef int32_t NAME(Ints) __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef int16_t NAME(Shorts) __attribute__((vector_size(WIDTH), aligned(2), may_alias));
#define Ints NAME(Ints)
#define Shorts NAME(Shorts)
#define LANES (WIDTH / 2)  /* Of 16 bits. */
#define QUADS (WIDTH / 16) /* Parts in which 16-bit numbers of two vectors are interleaved. */

/* --- outputs ----------------------------------------------------------------------------------------------------- */

INLINE Quad NAME(fold)(Ints sums) {
    Quad parts[QUADS], sum;
    memcpy(parts, &sums, WIDTH);
    sum = parts[0];
    UNROLL for (int part = 1; part < QUADS; part++) sum += parts[part];
    return sum;
}

/* Sums of rows times columns, each column's for four rows side by side. */
INLINE void NAME(multiply_tile)(const int16_t *const rows[4], const int16_t *const tails[4], long D, const int16_t *columns,
                                long padded, const int M, int32_t *sums_C4) {
    UNROLL for (int half = 0; half < 4; half += TILE_ROWS) {
        Ints sums[TILE_COLUMNS][TILE_ROWS] = {{{0}}};
        for (long d = 0; d < padded; d += LANES) {
            const int16_t *const *from = d + LANES <= D ? rows : tails;
            long at = d + LANES <= D ? d : 0;
            Shorts x[TILE_ROWS];
            UNROLL for (int n = 0; n < TILE_ROWS; n++) x[n] = *(const Shorts *)(from[half + n] + at);
            UNROLL for (int m = 0; m < M; m++) {
                Shorts w = *(const Shorts *)(columns + m * padded + d);
                UNROLL for (int n = 0; n < TILE_ROWS; n++) sums[m][n] += MULTIPLY_PAIRS(x[n], w);
            }
        }
        UNROLL for (int m = 0; m < M; m++) {
            Quad four[4];
            UNROLL for (int n = 0; n < TILE_ROWS; n++) four[n] = NAME(fold)(sums[m][n]);
            UNROLL for (int n = 0; n < TILE_ROWS; n += 2) {
                /* Even and odd places of two rows; their sums, again. */
                Quad two = __builtin_shuffle(four[n], four[n + 1], (Quad){0, 4, 2, 6}) +
                           __builtin_shuffle(four[n], four[n + 1], (Quad){1, 5, 3, 7});
                int32_t *into = sums_C4 + 4 * m + half + n;
                into[0] = two[0] + two[2];
                into[1] = two[1] + two[3];
            }
        }
    }
}

/* sums_C4: columns' products with four rows. padded: D in whole vectors; a row's last numbers are copied to `room`. */
static void NAME(multiply)(const int16_t *const rows[4], long D, const int16_t *columns_CD, long padded, long C,
                           int32_t *sums_C4) {
    int16_t room[4][LANES] = {{0}};
    const int16_t *tails[4];
    long whole = D - D % LANES;
    for (int n = 0; n < 4; n++) {
        memcpy(room[n], rows[n] + whole, 2 * (D - whole));
        tails[n] = room[n];
    }
    long c = 0;
    for (; c + TILE_COLUMNS <= C; c += TILE_COLUMNS)
        NAME(multiply_tile)(rows, tails, D, columns_CD + c * padded, padded, TILE_COLUMNS, sums_C4 + 4 * c);
    columns_CD += c * padded;
    sums_C4 += 4 * c;
    switch (C - c) {
        case 5: NAME(multiply_tile)(rows, tails, D, columns_CD, padded, MIN(5, TILE_COLUMNS), sums_C4); break;
        case 4: NAME(multiply_tile)(rows, tails, D, columns_CD, padded, MIN(4, TILE_COLUMNS), sums_C4); break;
        case 3: NAME(multiply_tile)(rows, tails, D, columns_CD, padded, 3, sums_C4); break;
        case 2: NAME(multiply_tile)(rows, tails, D, columns_CD, padded, 2, sums_C4); break;
        case 1: NAME(multiply_tile)(rows, tails, D, columns_CD, padded, 1, sums_C4); break;
    }
}

/* --- sums of parts ----------------------------------------------------------------------------------------------- */

/* Adds LANES features' sums of the digits of M outputs to their totals. */
INLINE void NAME(add_tile)(const int16_t *rows, long stride, long R, const int32_t *digits, const int M, int digit_bits,
                           long num_exact, double *total, long total_stride) {
    const double worth[DIGITS] = {1.0, (double)(1l << digit_bits), (double)(1l << 2 * digit_bits)};
    for (long first = 0; first < R; first += num_exact) {
        Ints sums[DIGITS * TILE_OUTPUTS][2] = {{{0}}};
        long last = MIN(R, first + num_exact);
        for (long r = first; r < last; r += 2) {
            const int16_t *row = rows + r * stride;
            /* Beside an odd last row stands that row again, with digits that are zero. */
            Shorts a = *(const Shorts *)row, b = *(const Shorts *)(r + 1 < R ? row + stride : row);
            Shorts x[2];
            INTERLEAVE(a, b, x);
            UNROLL for (int c = 0; c < DIGITS * M; c++) {
                Shorts t = (Shorts)(digits[c] + (Ints){0});
                UNROLL for (int half = 0; half < 2; half++) sums[c][half] += MULTIPLY_PAIRS(x[half], t);
            }
            digits += DIGITS * M;
        }
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int half = 0; half < 2; half++) UNROLL for (int q = 0; q < QUADS; q++) {
            FourDoubles *into = (FourDoubles *)(total + m * total_stride + 8 * q + 4 * half), sum = *into;
            UNROLL for (int digit = 0; digit < DIGITS; digit++) {
                Quad parts[QUADS];
                memcpy(parts, &sums[digit * M + m][half], WIDTH);
                sum += __builtin_convertvector(parts[q], FourDoubles) * worth[digit];
            }
            *into = sum;
        }
    }
}

INLINE void NAME(add_outputs)(const int16_t *rows, long stride, long R, const int32_t *digits, long M, int digit_bits,
                              long num_exact, double *total, long total_stride) {
    switch (M) {
        case 4: NAME(add_tile)(rows, stride, R, digits, MIN(4, TILE_OUTPUTS), digit_bits, num_exact, total, total_stride); break;
        case 3: NAME(add_tile)(rows, stride, R, digits, MIN(3, TILE_OUTPUTS), digit_bits, num_exact, total, total_stride); break;
        case 2: NAME(add_tile)(rows, stride, R, digits, MIN(2, TILE_OUTPUTS), digit_bits, num_exact, total, total_stride); break;
        case 1: NAME(add_tile)(rows, stride, R, digits, 1, digit_bits, num_exact, total, total_stride); break;
    }
}

/* total_KD += the sums over rows of parts times features; digits in tiles of TILE_OUTPUTS outputs, pairs of rows in each. */
static void NAME(add)(const int16_t *rows_RD, long R, long D, const int32_t *digits, long K, int digit_bits, long num_exact,
                      double *total_KD, int16_t *room) {
    long pairs = (R + 1) / 2, d = 0;
    for (; d + LANES <= D; d += LANES)
        for (long k = 0; k < K; k += TILE_OUTPUTS)
            NAME(add_outputs)(rows_RD + d, D, R, digits + DIGITS * k * pairs, MIN(TILE_OUTPUTS, K - k), digit_bits, num_exact,
                              total_KD + k * D + d, D);
    if (d == D) return;
    memset(room, 0, 2 * LANES * R);
    for (long r = 0; r < R; r++) memcpy(room + r * LANES, rows_RD + r * D + d, 2 * (D - d));
    for (long k = 0; k < K; k += TILE_OUTPUTS) {
        double sums[TILE_OUTPUTS][LANES] = {{0.0}};
        long M = MIN(TILE_OUTPUTS, K - k);
        NAME(add_outputs)(room, LANES, R, digits + DIGITS * k * pairs, M, digit_bits, num_exact, sums[0], LANES);
        for (long m = 0; m < M; m++)
            for (long i = 0; i < D - d; i++) total_KD[(k + m) * D + d + i] += sums[m][i];
    }
}

#undef Ints
#undef Shorts
#undef LANES
#undef QUADS
#undef WIDTH
#undef MULTIPLY_PAIRS
#undef INTERLEAVE
#undef TILE_ROWS
#undef TILE_COLUMNS
#undef TILE_OUTPUTS
#undef NAME

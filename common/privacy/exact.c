/* One private step of affine heads in few passes over 16-bit features, and its noise.

The specification is Python: client/data/quantised.py, client/solvers/parts/closed_form.py, common/privacy/lattice.py and
rounded_gaussian.py say what each function returns and why that is private. Here is the same, equal to the bit:
- Products and sums of whole numbers below 2**53 are exact in double precision, so they may be added in any order, and be
  computed from shorter integers (products.c).
- Everything else is done with the specification's own operations in its own order.
- No branch and no address depends on the value of a feature, a label or a slope.

Arrays are contiguous. R rows, U units, D features, K outputs, Q pairs of records of one unit, P rows of each unit.
*/
#include "products.h"

#include <math.h>
#include <string.h>

/* No product is joined with the sum that follows it: it would be rounded once instead of twice. */
#pragma GCC optimize("fp-contract=off")

#define UNROLL _Pragma("GCC unroll 32")
#define LANES 8

typedef double Doubles __attribute__((vector_size(8 * LANES), aligned(8), may_alias));
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

int version(void) { return 3; }

INLINE double add_lanes(Doubles values) {
    double sum = 0.0;
    UNROLL for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
}

/* The greater, or what is not a number, as torch's amax and maximum. */
INLINE double greater(double a, double b) { return a > b || a != a ? a : b; } /* Where b is not, it is returned. */

INLINE double finite_or_zero(double value) { return fabs(value) <= 1.7976931348623157e308 ? value : 0.0; }

/* The least power of two above a positive normal number. */
INLINE double power_above(double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    bits = ((bits >> 52) + 1) << 52;
    memcpy(&value, &bits, 8);
    return value;
}

/* --- QuantisedRows.of, and its bound_norms ----------------------------------------------------------------------- */

/* Whole numbers of `values` rounded away from zero; below 2**31. */
INLINE Doubles ceiling(Doubles values) {
    Doubles whole = __builtin_convertvector(__builtin_convertvector(values, Words), Doubles);
    return whole + __builtin_convertvector((whole < values) & 1, Doubles);
}

FAST void quantise(const float *values_RD, long R, long D, int16_t *integers_RD, double *scale_R, double *norm_R) {
    for (long r = 0; r < R; r++) {
        const float *row = values_RD + r * D;
        int16_t *integers = integers_RD + r * D;
        const uint32_t *bits = (const uint32_t *)row;
        /* Without their sign, floats are in the order of their bits; what is not finite is last. */
        uint32_t most = 0;
        for (long d = 0; d < D; d++) most = (bits[d] & 0x7fffffff) > most ? bits[d] & 0x7fffffff : most;
        float peak_float;
        memcpy(&peak_float, &most, 4);
        int finite = most < 0x7f800000, usable = finite & (peak_float > 0.0f);
        double peak = power_above(usable ? (double)peak_float : 1.0), to_whole = usable ? 65536.0 / peak : 0.0;
        double square = 0.0;
        Doubles squares = {0};
        long d = 0;
        for (; d + LANES <= D; d += LANES) {
            Doubles exact = __builtin_convertvector(*(const Floats *)(row + d), Doubles) * to_whole;
            Doubles whole = ceiling((Doubles)((Longs)exact & INT64_MAX));
            squares += whole * whole;
        }
        for (; d < D; d++) square += ceil(fabs(row[d] * to_whole)) * ceil(fabs(row[d] * to_whole));
        double scale = power_above(usable ? sqrt(square + add_lanes(squares)) : 1.0) * peak * 0x1p-31;
        /* What is not finite becomes -2**31 or 0, whose lower 16 bits are zeros. */
        double to_integer = usable ? 1.0 / scale : 0.0;
        square = 0.0;
        squares = (Doubles){0};
        for (d = 0; d + LANES <= D; d += LANES) {
            Doubles exact = __builtin_convertvector(*(const Floats *)(row + d), Doubles) * to_integer;
            Words words = __builtin_convertvector(exact, Words);
            *(Shorts *)(integers + d) = __builtin_convertvector(words, Shorts);
            Doubles whole = __builtin_convertvector(words, Doubles);
            squares += whole * whole;
        }
        for (; d < D; d++) {
            integers[d] = (int16_t)(int32_t)(row[d] * to_integer);
            square += (double)integers[d] * integers[d];
        }
        scale_R[r] = usable ? scale : finite ? 0.0 : NAN;
        norm_R[r] = (sqrt(usable ? square + add_lanes(squares) : 0.0) * (1.0 + 0x1p-50)) * scale_R[r];
    }
}

/* --- compute_outputs --------------------------------------------------------------------------------------------- */

INLINE int multiply(const int16_t *integers_RD, const double *scale_R, long R, long D, const double *weight_KD,
                    const double *bias_K, const double *offset_K, long K, double *outputs_RK) {
    if (!multiply_exactly(integers_RD, R, D, weight_KD, K, outputs_RK)) return 0;
    for (long r = 0; r < R; r++)
        for (long k = 0; k < K; k++) {
            double output = outputs_RK[r * K + k] * scale_R[r];
            if (bias_K) output += bias_K[k];
            outputs_RK[r * K + k] = offset_K ? output + offset_K[k] : output;
        }
    return 1;
}

/* --- _Gradients._bound_norms ------------------------------------------------------------------------------------- */

/* Writes slopes times their factors, whole_RK unless it is null, peak_R and square_R side by side, and norm_R. */
INLINE void weigh(const double *slopes_RK, const double *factor_R, const double *reach_R, long R, long K, double rounding,
                double *weighted_RK, double *whole_RK, double *sizes_2R, double *norm_R) {
    for (long r = 0; r < R; r++) {
        double *weighted = weighted_RK + r * K, peak = 0.0, square = 0.0;
        for (long k = 0; k < K; k++) {
            weighted[k] = slopes_RK[r * K + k] * factor_R[r];
            peak = greater(peak, fabs(weighted[k]));
        }
        double to_whole = 0x1p20 / greater(peak, 0x1p-1000);
        for (long k = 0; k < K; k++) {
            double whole = nearbyint((weighted[k] * to_whole));
            if (whole_RK) whole_RK[r * K + k] = whole;
            square += whole * whole;
        }
        square *= 0x1p-40;
        sizes_2R[r] = peak;
        sizes_2R[R + r] = square;
        norm_R[r] = (((sqrt(square)) + rounding) * (peak * reach_R[r])) * (1.0 + 0x1p-40);
    }
}

/* The rest for units of several records. Sums of what is not whole are in the specification's order. */
INLINE void bound_units(const double *whole_RK, const double *sizes_2R, const double *reach_R, const double *norm_R,
                      const int64_t *start_U, long U, long R, long K, const int64_t *pairs_3Q, long Q,
                      const double *product_Q, double rounding, double slack, double least, double *square_U,
                      double *norm_U, double *slack_U) {
    const double *peak_R = sizes_2R, *square_R = sizes_2R + R;
    for (long u = 0; u < U; u++) {
        double reach = 0.0, square = 0.0;
        for (long r = start_U[u]; r < start_U[u + 1]; r++) {
            double weight = (peak_R[r] * reach_R[r]);
            reach = (reach + norm_R[r]);
            square = (square + (square_R[r] * (weight * weight)));
        }
        norm_U[u] = reach;
        square_U[u] = square;
    }
    for (long q = 0; q < Q; q++) {
        long first = pairs_3Q[q], second = pairs_3Q[Q + q], unit = pairs_3Q[2 * Q + q];
        double dot = 0.0;
        for (long k = 0; k < K; k++) dot += whole_RK[first * K + k] * whole_RK[second * K + k];
        dot = (((dot * 0x1p-39) * peak_R[first]) * peak_R[second]);
        square_U[unit] = (square_U[unit] + (dot * product_Q[q]));
    }
    for (long u = 0; u < U; u++) {
        long count = start_U[u + 1] - start_U[u];
        double reach = norm_U[u], added = 0.0;
        double norm = (sqrt(greater(0.0, square_U[u]) + ((reach * reach) * 0x1p-40)));
        for (long r = start_U[u]; r < start_U[u + 1]; r++)
            added = (added + ((peak_R[r] * reach_R[r]) * rounding));
        norm = greater((norm + added), reach * least);
        norm_U[u] = count > 1 ? norm : reach;
        slack_U[u] = count > 1 ? (count * slack) : 0.0;
    }
}

/* --- _Gradients.add_clipped -------------------------------------------------------------------------------------- */

/* Replaces slopes by the integers that they are worth, and adds those of the bias to its total. */
INLINE void truncate_slopes(double *slopes_RK, const double *scale_R, const double *factor_U, const int64_t *unit_R,
                          long R, long K, double spacing, double *bias_K) {
    for (long r = 0; r < R; r++) {
        double factor = factor_U[unit_R[r]] / spacing, scaled = factor * scale_R[r];
        double *slopes = slopes_RK + r * K;
        for (long k = 0; k < K; k++) {
            double slope = finite_or_zero(slopes[k]);
            slopes[k] = trunc(slope * scaled);
            if (bias_K) bias_K[k] += trunc(slope * factor);
        }
    }
}

/* --- add_clipped_parts ------------------------------------------------------------------------------------------- */

/* One head's records of a block, and room to compute in; client/solvers/parts/compiled_step.py has the same fields. */
typedef struct {
    int64_t R, D, K, Q, P, padded, several;
    const int16_t *integers_RD;
    const double *scale_R, *factor_R, *reach_R;
    const int64_t *unit_R, *start_U, *pairs_3Q;
    const double *product_Q, *offset_K, *weight_KD, *bias_K, *slopes_RK;
    double *outputs_RK, *whole_RK, *weighted_RK, *sizes_2R, *norm_R, *total_KD, *total_K;
    double *gradient_UKD, *gradient_UK, *worth_2U;
    double rounding, slack;
} Head;


/* Writes outputs of whole lanes of rows: those added are the first row's. Returns 0 where memory is short. */
FAST int compute_block(const Head *heads, long num_heads) {
    for (const Head *head = heads; head < heads + num_heads; head++) {
        long values = head->P * head->K;
        if (!multiply(head->integers_RD, head->scale_R, head->R * head->P, head->D, head->weight_KD, head->bias_K,
                      head->offset_K, head->K, head->outputs_RK))
            return 0;
        for (long r = head->R; r < head->padded; r++)
            memcpy(head->outputs_RK + r * values, head->outputs_RK, 8 * values);
    }
    return 1;
}

/* bound_norms of common/privacy/lattice.py for one row. */
INLINE double bound_norm(const double *values, long N, int bits) {
    double peak = 0.0, square = 0.0, most = ldexp(1.0, bits);
    for (long n = 0; n < N; n++) peak = greater(peak, fabs(values[n]));
    double divisor = peak > 0.0 ? peak : 1.0;
    for (long n = 0; n < N; n++) {
        double whole = ceil((fabs(values[n]) / divisor) * most);
        square += whole * whole;
    }
    return ((sqrt(square)) * peak) * (ldexp(1.0, -bits) * (1.0 + 0x1p-40));
}

INLINE int count_bits(long value) {
    int bits = 0;
    for (; value; value >>= 1) bits++;
    return bits;
}

/* _Formed.of for every unit: gradients in integers, what one is worth, and bounds of their norms. */
INLINE int form_gradients(const Head *head, long U, double *norm_U) {
    long D = head->D, K = head->K, P = head->P;
    int weight_bits = (52 - count_bits(K * D - 1)) / 2 - 1, bias_bits = (52 - count_bits(K - 1)) / 2 - 1;
    for (long u = 0; u < U; u++) {
        long first = head->start_U[u] * P, rows = head->start_U[u + 1] * P - first;
        /* A unit's own number of rows decides how many bits of each product there are. */
        double most = ldexp(1.0, -(37 - count_bits(rows > 0 ? rows - 1 : 0)));
        double peak = 0.0, bias_peak = 0.0, *bias = head->gradient_UK + u * K, *weight = head->gradient_UKD + u * K * D;
        const double *slopes = head->slopes_RK + first * K;
        double *scaled = head->whole_RK, *weighted = head->weighted_RK;
        for (long r = 0; r < rows; r++) {
            double factor = head->factor_R[(first + r) / P], scale = head->scale_R[first + r];
            for (long k = 0; k < K; k++) {
                weighted[r * K + k] = (slopes[r * K + k] * factor);
                scaled[r * K + k] = weighted[r * K + k] * scale;
            }
        }
        for (long i = 0; i < rows * K; i++) bias_peak = greater(bias_peak, fabs(weighted[i]));
        for (long i = 0; i < rows * K; i++) peak = greater(peak, fabs(scaled[i]));
        double worth = peak * most, bias_worth = bias_peak * most;
        double divisor = worth > 0.0 ? worth : 1.0, bias_divisor = bias_worth > 0.0 ? bias_worth : 1.0;
        for (long i = 0; i < rows * K; i++) scaled[i] = trunc(scaled[i] / divisor);
        memset(weight, 0, 8 * K * D);
        const int16_t *integers_RD = head->integers_RD + first * D;
        if (rows > 4) { /* Below 2**35, as parts of units of several records. */
            if (!add_exactly(integers_RD, scaled, rows, D, K, 1, weight)) return 0;
        } else {
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < K * D; i++) weight[i] += scaled[r * K + i / D] * integers_RD[r * D + i % D];
        }
        double norm = (bound_norm(weight, K * D, weight_bits) * worth);
        if (head->total_K) {
            memset(bias, 0, 8 * K);
            for (long r = 0; r < rows; r++)
                for (long k = 0; k < K; k++) bias[k] += trunc(weighted[r * K + k] / bias_divisor);
            double bias_norm = (bound_norm(bias, K, bias_bits) * bias_worth);
            norm = (sqrt((norm * norm) + (bias_norm * bias_norm))) * (1.0 + 0x1p-40);
        }
        head->worth_2U[2 * u] = worth;
        head->worth_2U[2 * u + 1] = bias_worth;
        norm_U[u] = norm;
    }
    return 1;
}

/* _Formed.add_clipped. */
INLINE void add_formed(const Head *head, const double *factor_U, long U, double spacing) {
    long values = head->K * head->D;
    for (long u = 0; u < U; u++) {
        double factor = factor_U[u] / spacing;
        int any = factor_U[u] > 0.0;
        double weight = (head->worth_2U[2 * u] * factor), bias = (head->worth_2U[2 * u + 1] * factor);
        /* What is not a number has the factor 0. */
        weight = any ? weight : 0.0;
        bias = any ? bias : 0.0;
        for (long i = 0; i < values; i++)
            head->total_KD[i] += weight > 0.0 ? trunc((head->gradient_UKD[u * values + i] * weight)) : 0.0;
        if (head->total_K)
            for (long k = 0; k < head->K; k++)
                head->total_K[k] += bias > 0.0 ? trunc((head->gradient_UK[u * head->K + k] * bias)) : 0.0;
    }
}

/* Adds the clipped parts of units to the heads' totals. room_5U: five numbers for each unit. Returns 0 where memory is
short. */
FAST int add_block(const Head *heads, long num_heads, long U, double bound, double spacing, double least,
                   double *room_5U) {
    double *norm_U = room_5U, *slack_U = norm_U + U, *head_norm_U = slack_U + U, *head_slack_U = head_norm_U + U;
    double *square_U = head_slack_U + U;
    memset(slack_U, 0, 8 * U);
    for (const Head *head = heads; head < heads + num_heads; head++) {
        double *own_U = head == heads ? norm_U : head_norm_U;
        if (head->gradient_UKD) {
            if (!form_gradients(head, U, own_U)) return 0;
        } else {
            weigh(head->slopes_RK, head->factor_R, head->reach_R, head->R, head->K, head->rounding, head->weighted_RK,
                  head->several ? head->whole_RK : 0, head->sizes_2R, head->norm_R);
            memset(own_U, 0, 8 * U);
            for (long r = 0; r < head->R; r++) own_U[head->unit_R[r]] = head->norm_R[r];
            if (head->several)
                bound_units(head->whole_RK, head->sizes_2R, head->reach_R, head->norm_R, head->start_U, U, head->R,
                            head->K, head->pairs_3Q, head->Q, head->product_Q, head->rounding, head->slack, least,
                            square_U, own_U, head_slack_U);
            for (long u = 0; head->several && u < U; u++) slack_U[u] = (slack_U[u] + head_slack_U[u]);
        }
        if (head != heads)
            for (long u = 0; u < U; u++)
                norm_U[u] = sqrt((norm_U[u] * norm_U[u]) + (head_norm_U[u] * head_norm_U[u]));
    }
    /* Lattice.compute_factors. */
    double *factor_U = norm_U;
    for (long u = 0; u < U; u++) {
        double factor = ((bound - slack_U[u]) * spacing) / greater(norm_U[u], 0x1p-1000);
        factor = factor < 0.0 ? 0.0 : factor > 1.0 ? 1.0 : factor;
        factor_U[u] = factor == factor ? factor : 0.0;
    }
    for (const Head *head = heads; head < heads + num_heads; head++) {
        if (head->gradient_UKD) {
            add_formed(head, factor_U, U, spacing);
            continue;
        }
        truncate_slopes(head->weighted_RK, head->scale_R, factor_U, head->unit_R, head->R, head->K, spacing,
                        head->total_K);
        if (!add_exactly(head->integers_RD, head->weighted_RK, head->R, head->D, head->K, head->several, head->total_KD))
            return 0;
    }
    return 1;
}

/* --- the update of client/solvers/parts/descent.py --------------------------------------------------------------- */

INLINE double move(const double *restrict total_N, const int64_t *restrict noise_N, long N, double spacing,
                   const double *restrict divisor_N, const double *restrict decay_N, double momentum,
                   const double *restrict rate_N, const int each, double *restrict weight_N, double *restrict velocity_N,
                   double *restrict grid_N) {
    double divisor = divisor_N[0], rate = rate_N[0], decay = decay_N ? decay_N[0] : 0.0;
    for (long n = 0; n < N; n++) {
        double step = (double)(noise_N[n] + (int64_t)total_N[n]) * spacing / (each ? divisor_N[n] : divisor);
        if (decay_N) step += weight_N[n] * (each ? decay_N[n] : decay);
        if (momentum != 0.0) step = velocity_N[n] = velocity_N[n] * momentum + step;
        double moved = weight_N[n] - step * (each ? rate_N[n] : rate);
        weight_N[n] = moved;
        grid_N[n] = nearbyint(moved * 0x1p24) * 0x1p-24;
    }
    /* Without their sign, doubles are in the order of their bits; what is not a number is last. */
    uint64_t most = 0;
    for (long n = 0; n < N; n++) {
        uint64_t bits;
        memcpy(&bits, grid_N + n, 8);
        bits &= INT64_MAX;
        most = bits > most ? bits : most;
    }
    double peak;
    memcpy(&peak, &most, 8);
    return peak;
}

/* Moves weights by a total with noise, writes them on their grid, and returns the largest. Divisors, decays and rates are
one of each weight, or one alone of all; decay_N may be null. */
FAST double update(const double *restrict total_N, const int64_t *restrict noise_N, long N, double spacing,
                   const double *restrict divisor_N, const double *restrict decay_N, double momentum,
                   const double *restrict rate_N, int each, double *restrict weight_N, double *restrict velocity_N,
                   double *restrict grid_N) {
    if (each)
        return move(total_N, noise_N, N, spacing, divisor_N, decay_N, momentum, rate_N, 1, weight_N, velocity_N, grid_N);
    return move(total_N, noise_N, N, spacing, divisor_N, decay_N, momentum, rate_N, 0, weight_N, velocity_N, grid_N);
}

/* --- draw_rounded_gaussian --------------------------------------------------------------------------------------- */

#define POINT_BITS 42
#define LOT_BITS 22
#define GUIDE_SHIFT 19
#define TERMS 13

/* 1: accepted; 0: rejected; -1: more bits have to decide. */
INLINE int accept(uint64_t word, int cell) {
    double distance = ((double)(word & ((1ull << POINT_BITS) - 1)) + 0.5) * 0x1p-48, rejection = 1.0;
    double exponent = distance * ((distance * 0.5) + (cell * 0.015625));
    UNROLL for (int term = TERMS; term > 1; term--) rejection = 1.0 - ((exponent * (1.0 / term)) * rejection);
    rejection *= exponent * 0x1p22;
    double lot = (double)(word >> POINT_BITS);
    return lot >= (rejection) + 0x1p-20 ? 1 : lot + 1.0 > (rejection) - 0x1p-20 ? -1 : 0;
}

INLINE int64_t place_point(int64_t cell, uint64_t word, int log2_deviation) {
    return (cell << (log2_deviation - 6)) + (int64_t)(word << (64 - POINT_BITS) >> (64 + 48 - POINT_BITS - log2_deviation));
}

#define CHUNK 512

/* The boundary at or below a uniform number of 31 bits. */
INLINE long find_place(uint32_t uniform, const uint32_t *leading, const int16_t *guide) {
    long place = guide[uniform >> GUIDE_SHIFT];
    while (uniform >= leading[place + 1]) place++;
    return place;
}

/* Writes integers from n half words, n words and spare ones; returns 0 where these do not decide everything.

Most values need one number alone, `near`: in 32 bits the boundary above the guide's, in 10 the guide's place, and in 22 the
largest lot that has to be looked at. It is all ones where more than one boundary follows. */
FAST int draw_gaussian(const uint32_t *restrict heads, const uint64_t *restrict points, long n,
                       const uint64_t *restrict spare, long num_spare, const uint64_t *restrict near,
                       const uint32_t *restrict leading, const int16_t *restrict guide, const uint32_t *restrict sure,
                       int log2_deviation, int32_t *restrict waiting, int64_t *restrict samples) {
    long close = 0, left = 0;
    int doubt = 0;
    uint8_t looked_at[CHUNK];
    for (long first = 0; first < n; first += CHUNK) {
        long count = MIN(CHUNK, n - first);
        for (long i = 0; i < count; i++) {
            uint64_t head = heads[first + i], point = points[first + i], uniform = head >> 1;
            uint64_t entry = near[uniform >> GUIDE_SHIFT], boundary = entry >> 32;
            int64_t place = (int64_t)(entry >> LOT_BITS & 0x3ff) + (uniform >= boundary);
            samples[first + i] = place_point(799 - place, point, log2_deviation) ^ -(int64_t)(head & 1);
            looked_at[i] = (point >> POINT_BITS <= (entry & ((1 << LOT_BITS) - 1))) | (uniform == boundary) |
                           ((uniform & ((1 << GUIDE_SHIFT) - 1)) == 0);
        }
        for (long i = 0; i < count; i++) {
            waiting[close] = (int32_t)(first + i);
            close += looked_at[i];
        }
    }
    for (long j = 0; j < close; j++) {
        int32_t i = waiting[j];
        uint32_t uniform = heads[i] >> 1;
        long place = find_place(uniform, leading, guide);
        doubt |= uniform == leading[place];
        samples[i] = place_point(799 - place, points[i], log2_deviation) ^ -(int64_t)(heads[i] & 1);
        int accepted = points[i] >> POINT_BITS >= sure[place] ? 1 : accept(points[i], (int)(799 - place));
        doubt |= accepted < 0;
        waiting[left] = i;
        left += accepted == 0;
    }
    while (left && !doubt) {
        if (left > num_spare) return 0;
        long again = 0;
        for (long j = 0; j < left; j++) {
            int32_t i = waiting[j];
            int64_t cell = (samples[i] ^ samples[i] >> 63) >> (log2_deviation - 6);
            int accepted = spare[j] >> POINT_BITS >= sure[799 - cell] ? 1 : accept(spare[j], (int)cell);
            doubt |= accepted < 0;
            samples[i] = place_point(cell, spare[j], log2_deviation) ^ -(int64_t)(heads[i] & 1);
            waiting[again] = i;
            again += accepted == 0;
        }
        spare += left;
        num_spare -= left;
        left = again;
    }
    return !doubt;
}

/* Groups of 32 numbers as codes of two to four bits, a group of a row, or half of one, in each lane (lanes.h).
 * formats/int4.py and few_bits.py have the same in words of torch. */
#include "lanes.h"

/* Numbers of a table of sixteen by the lower four bits of each lane. */
TARGET INLINED V_F V_NAME(entry)(const float *table, V_I index) {
#if WIDE
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
#else
    return looked_up(table, index);
#endif
}

/* As many vectors as there are lanes, turned around: neighbours change places, then pairs of them, and so on. */
TARGET INLINED void V_NAME(turn)(V_F *v) {
    V_F t[V_LANES];
    for (int i = 0; i < V_LANES; i += 2) {
        t[i] = V_OP(unpacklo_ps)(v[i], v[i + 1]);
        t[i + 1] = V_OP(unpackhi_ps)(v[i], v[i + 1]);
    }
    for (int i = 0; i < V_LANES; i += 4)
        for (int k = 0; k < 2; k++) {
            v[i + 2 * k] = V_OP(shuffle_ps)(t[i + k], t[i + k + 2], 0x44);
            v[i + 2 * k + 1] = V_OP(shuffle_ps)(t[i + k], t[i + k + 2], 0xee);
        }
#if WIDE
    for (int i = 0; i < 8; i++) {
        const int from = i / 4 * 8 + i % 4;
        t[from] = _mm512_shuffle_f32x4(v[from], v[from + 4], 0x88);
        t[from + 4] = _mm512_shuffle_f32x4(v[from], v[from + 4], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
#else
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    }
    for (int i = 0; i < V_LANES; i++) v[i] = t[i];
#endif
}

/* What is known of numbers before a grid is tried. */
typedef struct {
    const V_F *v;
    const float *importance;
    V_F low, high, sum_a, sum_av;
} V_NAME(Numbers);

TARGET INLINED V_NAME(Numbers) V_NAME(numbers)(const V_F *v, const float *importance, const int count) {
    V_NAME(Numbers) n = {v, importance, v[0], v[0], V_OP(setzero_ps)(), V_OP(setzero_ps)()};
    for (int i = 0; i < count; i++) {
        const V_F a = V_OP(set1_ps)(importance[i]);
        n.low = V_OP(min_ps)(n.low, v[i]);
        n.high = V_OP(max_ps)(n.high, v[i]);
        n.sum_a = V_OP(add_ps)(n.sum_a, a);
        n.sum_av = V_OP(fmadd_ps)(a, v[i], n.sum_av);
    }
    return n;
}

/* A grid as it is stored, and what it is worth: numbers lie at value * (code + middle), codes `first` to `last`. */
typedef struct {
    V_I step, offset;
    V_F value, inverse, middle;
} V_NAME(Grid);

/* Where a number lies among the codes. Rounded behind the product, as torch does: 16-bit numbers often lie between two
 * levels, where the two ways would part. */
TARGET INLINED V_F V_NAME(place)(V_F number, const V_NAME(Grid) *grid) {
    return V_OP(sub_ps)(V_OP(mul_ps)(number, grid->inverse), grid->middle);
}

/* The nearest code, ties to even, as torch rounds. */
TARGET INLINED V_I V_NAME(code)(V_F place, const int first, const int last) {
    const V_I code = V_OP(cvtps_epi32)(place);
    return V_OP(min_epi32)(V_OP(max_epi32)(code, V_OP(set1_epi32)(first)), V_OP(set1_epi32)(last));
}

/* A grid that is tried: what it misses of the numbers, and step and place of code `centre` that fit its codes best. */
typedef struct {
    V_NAME(Grid) grid;
    V_F error, step, place;
} V_NAME(Trial);

/* Fill in what `trials` grids, side by side so that none waits for itself, miss; and what fits, if that is asked for. */
TARGET INLINED void V_NAME(try)(const V_NAME(Numbers) *n, const int count, V_NAME(Trial) *trial, const int trials,
                                const int first, const int last, const float centre, const int fitting) {
    V_F error[RANGES], sum_q[RANGES], sum_qq[RANGES], sum_qv[RANGES];
    for (int t = 0; t < trials; t++) error[t] = sum_q[t] = sum_qq[t] = sum_qv[t] = V_OP(setzero_ps)();
    for (int i = 0; i < count; i++) {
        const V_F a = V_OP(set1_ps)(n->importance[i]), v = n->v[i];
        for (int t = 0; t < trials; t++) {
            const V_F at = V_NAME(place)(v, &trial[t].grid);
            const V_F code = V_OP(cvtepi32_ps)(V_NAME(code)(at, first, last)), d = V_OP(sub_ps)(code, at);
            error[t] = V_OP(fmadd_ps)(V_OP(mul_ps)(d, d), a, error[t]);
            if (!fitting) continue;
            const V_F q = V_OP(sub_ps)(code, V_OP(set1_ps)(centre)), aq = V_OP(mul_ps)(a, q);
            sum_q[t] = V_OP(add_ps)(sum_q[t], aq);
            sum_qq[t] = V_OP(fmadd_ps)(aq, q, sum_qq[t]);
            sum_qv[t] = V_OP(fmadd_ps)(aq, v, sum_qv[t]);
        }
    }
    for (int t = 0; t < trials; t++) {
        const V_F value = trial[t].grid.value;
        trial[t].error = V_OP(mul_ps)(error[t], V_OP(mul_ps)(value, value));
        if (!fitting) continue;
        const V_F spread = V_OP(fmsub_ps)(n->sum_a, sum_qq[t], V_OP(mul_ps)(sum_q[t], sum_q[t]));
        const V_F more = V_OP(fmsub_ps)(n->sum_a, sum_qv[t], V_OP(mul_ps)(sum_q[t], n->sum_av));
        const V_F fitted = V_OP(div_ps)(more, spread);
        /* One code alone fits no step. */
        trial[t].step = v_pick(v_less(V_OP(setzero_ps)(), fitted), fitted, value);
        trial[t].place = V_OP(div_ps)(V_OP(fnmadd_ps)(trial[t].step, sum_q[t], n->sum_av), n->sum_a);
    }
}

TARGET INLINED void V_NAME(take)(V_NAME(Grid) *best, const V_NAME(Grid) *grid, V_M better) {
    best->value = v_pick(better, grid->value, best->value);
    best->inverse = v_pick(better, grid->inverse, best->inverse);
    best->middle = v_pick(better, grid->middle, best->middle);
    best->step = v_pick_i(better, grid->step, best->step);
    best->offset = v_pick_i(better, grid->offset, best->offset);
}

/* Int4. */

/* The nearest step and offset that can be stored. */
TARGET INLINED V_NAME(Grid) V_NAME(int4_grid)(V_F step, V_F offset) {
    const V_I none = V_OP(set1_epi32)(0), bias = V_OP(set1_epi32)(STEP_BIAS >> STEP_SHIFT);
    const V_I half = V_OP(set1_epi32)(1 << (STEP_SHIFT - 1));
    step = V_OP(max_ps)(step, V_OP(setzero_ps)()); /* and no NaN: of those the second is taken */
    V_NAME(Grid) grid;
    grid.step = V_OP(srli_epi32)(V_OP(add_epi32)(v_bits(step), half), STEP_SHIFT);
    grid.step = V_OP(max_epi32)(V_OP(sub_epi32)(grid.step, bias), none);
    grid.step = V_OP(min_epi32)(grid.step, V_OP(set1_epi32)(255));
    grid.value = v_floats(V_OP(slli_epi32)(V_OP(add_epi32)(grid.step, bias), STEP_SHIFT));
    grid.inverse = V_OP(div_ps)(V_OP(set1_ps)(1), grid.value);
    V_F eighths = V_OP(mul_ps)(V_OP(mul_ps)(offset, grid.inverse), V_OP(set1_ps)(1 / OFFSET_UNIT));
    eighths = V_OP(min_ps)(V_OP(max_ps)(eighths, V_OP(set1_ps)(-128)), V_OP(set1_ps)(127));
    grid.offset = V_OP(cvtps_epi32)(eighths);
    grid.middle = V_OP(mul_ps)(V_OP(cvtepi32_ps)(grid.offset), V_OP(set1_ps)(OFFSET_UNIT));
    return grid;
}

/* Of the ranges that are tried the grid that misses least; codes from -8 to 7. */
TARGET INLINED V_NAME(Grid) V_NAME(best_int4)(const V_F *v, const float *importance) {
    static const double shares[RANGES] = INT4_SHARES;
    const V_NAME(Numbers) n = V_NAME(numbers)(v, importance, GROUP);
    const V_F size = V_OP(max_ps)(n.high, V_OP(sub_ps)(V_OP(setzero_ps)(), n.low));
    const V_F far = V_OP(mul_ps)(size, V_OP(set1_ps)((float)(1 / REACH))), range = V_OP(sub_ps)(n.high, n.low);
    V_NAME(Trial) trial[RANGES];
    for (int i = 0; i < RANGES; i++) {
        trial[i].step = V_OP(max_ps)(V_OP(mul_ps)(range, V_OP(set1_ps)((float)(shares[i] / 15))), far);
        /* The middle of 16 levels lies half a step below level 8. */
        trial[i].place = V_OP(mul_ps)(V_OP(add_ps)(V_OP(add_ps)(n.low, n.high), trial[i].step), V_OP(set1_ps)(0.5f));
    }
    V_NAME(Grid) best;
    V_F least_missed = V_OP(set1_ps)(INFINITY);
    for (int fit = 0; fit < FITS; fit++) {
        for (int i = 0; i < RANGES; i++) trial[i].grid = V_NAME(int4_grid)(trial[i].step, trial[i].place);
        V_NAME(try)(&n, GROUP, trial, RANGES, -CENTRE, CENTRE - 1, 0, fit + 1 < FITS);
        for (int i = 0; i < RANGES; i++) {
            const V_M better = v_less(trial[i].error, least_missed);
            if (i + fit == 0) best = trial[i].grid;
            else V_NAME(take)(&best, &trial[i].grid, better);
            least_missed = v_pick(better, trial[i].error, least_missed);
        }
    }
    return best;
}

/* What codes of a grid miss of the numbers, in place of these. */
TARGET INLINED void V_NAME(leave_missed)(V_F *v, const int count, const V_NAME(Grid) *grid, const int first,
                                         const int last) {
    for (int i = 0; i < count; i++) {
        const V_F code = V_OP(cvtepi32_ps)(V_NAME(code)(V_NAME(place)(v[i], grid), first, last));
        v[i] = V_OP(fnmadd_ps)(V_OP(add_ps)(code, grid->middle), grid->value, v[i]);
    }
}

/* Codes and pairs of as many groups as there are lanes, of which `count` are wanted, a distance apart. If `leaving`, what
 * they miss takes the numbers' place. */
TARGET INLINED void V_NAME(int4_groups)(V_F *v, const float *importance, int64_t count, uint8_t *codes,
                                        int64_t codes_apart, uint8_t *pairs, int64_t pairs_apart, const int leaving) {
    const V_NAME(Grid) grid = V_NAME(best_int4)(v, importance);
    uint32_t fours[4][V_LANES], both[V_LANES];
    for (int four = 0; four < 4; four++) {
        V_I bytes = V_OP(set1_epi32)(0);
        for (int i = 3; i >= 0; i--) {
            const V_F *own = v + 4 * four + i;
            const V_I low = V_NAME(code)(V_NAME(place)(own[0], &grid), -CENTRE, CENTRE - 1);
            const V_I high = V_NAME(code)(V_NAME(place)(own[INT4_BYTES], &grid), -CENTRE, CENTRE - 1);
            const V_I centre = V_OP(set1_epi32)(CENTRE + 16 * CENTRE);
            const V_I byte = V_OP(add_epi32)(V_OP(add_epi32)(low, V_OP(slli_epi32)(high, 4)), centre);
            bytes = v_or(V_OP(slli_epi32)(bytes, 8), byte);
        }
        v_store_i(fours[four], bytes);
    }
    const V_I offset = V_OP(slli_epi32)(v_and(grid.offset, V_OP(set1_epi32)(255)), 8);
    v_store_i(both, v_or(grid.step, offset));
    for (int64_t lane = 0; lane < count; lane++) {
        for (int four = 0; four < 4; four++) memcpy(codes + lane * codes_apart + 4 * four, &fours[four][lane], 4);
        memcpy(pairs + lane * pairs_apart, &both[lane], PAIR_BYTES);
    }
    if (leaving) V_NAME(leave_missed)(v, GROUP, &grid, -CENTRE, CENTRE - 1);
}

/* Int3 and int2: halves of 16 numbers. */

/* How many of the points between the numbers of a table, of which there are `count`, lie at or below. */
TARGET INLINED V_I V_NAME(nearest)(const float *between, const int count, V_F number) {
    V_I found = V_OP(set1_epi32)(0);
    for (int step = count / 2; step; step /= 2) {
        const V_F point = V_NAME(entry)(between, V_OP(add_epi32)(found, V_OP(set1_epi32)(step - 1)));
        found = V_OP(add_epi32)(found, v_pick_i(v_at_least(number, point), V_OP(set1_epi32)(step), V_OP(set1_epi32)(0)));
    }
    return found;
}

/* The nearest step, and the nearest middle of all levels; `step` is the byte of both. */
TARGET INLINED V_NAME(Grid) V_NAME(few_grid)(V_F step, V_F middle, const int bits) {
    V_NAME(Grid) grid;
    const V_I own = V_NAME(nearest)(BETWEEN_STEPS(bits), STEPS, step);
    grid.value = V_NAME(entry)(STEPS_OF(bits), own);
    grid.inverse = V_OP(div_ps)(V_OP(set1_ps)(1), grid.value);
    const V_F share = V_OP(mul_ps)(middle, grid.inverse), opposite = V_OP(sub_ps)(V_OP(setzero_ps)(), share);
    V_I place = V_NAME(nearest)(BETWEEN_MIDDLES(bits), MIDDLES, V_OP(max_ps)(share, opposite));
    const V_M below = v_less(share, V_OP(setzero_ps)());
    place = V_OP(add_epi32)(place, v_pick_i(below, V_OP(set1_epi32)(MIDDLES), V_OP(set1_epi32)(0)));
    grid.middle = V_NAME(entry)(OFFSETS(bits), place);
    grid.step = v_or(own, V_OP(slli_epi32)(place, 4));
    grid.offset = grid.step;
    return grid;
}

/* Be what a start leads to where that misses less. */
TARGET INLINED void V_NAME(try_few)(const V_NAME(Numbers) *n, V_F step, V_F middle, V_NAME(Grid) *best,
                                    V_F *least_missed, const int bits) {
    V_NAME(Trial) trial = {.step = step, .place = middle};
    for (int fit = 0; fit < FEW_FITS; fit++) {
        trial.grid = V_NAME(few_grid)(trial.step, trial.place, bits);
        V_NAME(try)(n, HALF, &trial, 1, 0, HIGHEST(bits), HIGHEST(bits) / 2.0f, fit + 1 < FEW_FITS);
        const V_M better = v_less(trial.error, *least_missed);
        *least_missed = v_pick(better, trial.error, *least_missed);
        V_NAME(take)(best, &trial.grid, better);
    }
}

TARGET INLINED V_NAME(Grid) V_NAME(best_few)(const V_F *v, const float *importance, const int bits) {
    static const double shares[2][FEW_RANGES] = {INT2_SHARES, INT3_SHARES};
    const V_NAME(Numbers) n = V_NAME(numbers)(v, importance, HALF);
    const V_F zero = V_OP(setzero_ps)(), below = V_OP(sub_ps)(zero, n.low), half = V_OP(set1_ps)(0.5f);
    const V_F size = V_OP(max_ps)(n.high, below), range = V_OP(sub_ps)(n.high, n.low);
    const float reach = HIGHEST(bits) / 2.0f + OFFSETS(bits)[MIDDLES - 1] + HIGHEST(bits) / 2.0f;
    const V_F far = V_OP(div_ps)(size, V_OP(set1_ps)(reach)); /* no offset reaches beyond */
    const V_F middle = V_OP(mul_ps)(V_OP(add_ps)(n.low, n.high), half);
    V_NAME(Grid) best = V_NAME(few_grid)(far, middle, bits);
    V_F found = V_OP(set1_ps)(INFINITY);
    for (int i = 0; i < FEW_RANGES; i++) {
        const V_F share = V_OP(set1_ps)((float)(shares[bits - 2][i] / HIGHEST(bits)));
        V_NAME(try_few)(&n, V_OP(max_ps)(V_OP(mul_ps)(range, share), far), middle, &best, &found, bits);
    }
    /* Beside a far one all others are near zero, which had better be a level. */
    const V_M alone = v_less(V_OP(set1_ps)(FAR_RMS), size);
    if (v_any(alone)) {
        const V_F farthest = v_pick(v_less(below, n.high), n.high, n.low);
        const V_F step = V_OP(div_ps)(v_pick(alone, size, zero), V_OP(set1_ps)(HIGHEST(bits)));
        V_NAME(Grid) other = best;
        V_F most = v_pick(alone, found, zero); /* of which nothing is less */
        V_NAME(try_few)(&n, step, V_OP(mul_ps)(farthest, half), &other, &most, bits);
        V_NAME(take)(&best, &other, v_less(most, found));
    }
    return best;
}

/* Codes and bytes of as many halves as there are lanes, of which `count` are wanted, those of a group `half`; groups a
 * distance apart. */
TARGET INLINED void V_NAME(few_halves)(V_F *v, const float *importance, int64_t count, const int half,
                                       uint8_t *codes, int64_t codes_apart, uint8_t *pairs, int64_t pairs_apart,
                                       const int bits, const int leaving) {
    const V_NAME(Grid) grid = V_NAME(best_few)(v, importance, bits);
    V_I low = V_OP(set1_epi32)(0), high = low;
    for (int i = 0; i < HALF; i++) {
        const V_I code = V_NAME(code)(V_NAME(place)(v[i], &grid), 0, HIGHEST(bits));
        const V_I lower = v_and(code, V_OP(set1_epi32)(3));
        low = v_or(low, V_OP(slli_epi32)(lower, i % 4 * 8 + i / 4 * 2));
        high = v_or(high, V_OP(slli_epi32)(V_OP(srli_epi32)(code, 2), i % 4 * 4 + i / 4));
    }
    uint32_t lower[V_LANES], upper[V_LANES], index[V_LANES];
    v_store_i(lower, low);
    v_store_i(upper, high);
    v_store_i(index, grid.step);
    for (int64_t lane = 0; lane < count; lane++) {
        uint8_t *to = codes + lane * codes_apart;
        memcpy(to + 4 * half, &lower[lane], 4);
        if (bits == 3) memcpy(to + LOW_BYTES + 2 * half, &upper[lane], 2);
        pairs[lane * pairs_apart + half] = (uint8_t)index[lane];
    }
    if (leaving) V_NAME(leave_missed)(v, HALF, &grid, 0, HIGHEST(bits));
}

/* Of any of them. */

TARGET INLINED void V_NAME(groups)(V_F *v, const float *importance, int64_t count, uint8_t *codes, int64_t codes_apart,
                                   uint8_t *pairs, int64_t pairs_apart, const int bits, const int leaving) {
    if (bits == 4) V_NAME(int4_groups)(v, importance, count, codes, codes_apart, pairs, pairs_apart, leaving);
    else
        for (int half = 0; half < 2; half++)
            V_NAME(few_halves)(v + half * HALF, importance + half * HALF, count, half, codes, codes_apart, pairs,
                               pairs_apart, bits, leaving);
}

/* Numbers [lanes, 32] turned around, by squares of as many columns as there are lanes. */
TARGET INLINED void V_NAME(turned)(float numbers[V_LANES][GROUP], V_F v[GROUP]) {
    for (int k = 0; k < GROUP; k += V_LANES) {
        for (int i = 0; i < V_LANES; i++) v[k + i] = V_OP(loadu_ps)(numbers[i] + k);
        V_NAME(turn)(v + k);
    }
}

/* Rows `first` to `end`, a lane each: groups run along them. */
TARGET INLINED void V_NAME(rows_of)(const void *quantizing, int64_t first, int64_t end, const int bits, const int stored) {
    const Quantizing *q = quantizing;
    const int64_t groups = q->columns / GROUP;
    for (int64_t row = first; row < end; row += V_LANES) {
        const int64_t count = least(V_LANES, end - row);
        V_F carried = V_OP(setzero_ps)();
        for (int64_t place = 0; place < groups; place++) {
            const int64_t group = q->order ? q->order[place] : place;
            _Alignas(64) float numbers[V_LANES][GROUP];
            V_F v[GROUP];
            if (count < V_LANES) memset(numbers, 0, sizeof numbers);
            for (int64_t i = 0; i < count; i++) {
                if (stored == 4) {
                    int4_numbers(q, (row + i) * groups + group, numbers[i]);
                    continue;
                }
                const __m256 inverse = _mm256_set1_ps(1 / q->scale[row + i]);
                ask_for(q, row + i, (group + AHEAD) * GROUP);
                run_of(q, row + i, group * GROUP, GROUP, numbers[i]);
                for (int k = 0; k < GROUP; k += LANES)
                    _mm256_storeu_ps(numbers[i] + k, _mm256_mul_ps(_mm256_loadu_ps(numbers[i] + k), inverse));
            }
            V_NAME(turned)(numbers, v);
            const float *takes = q->feedback + group * GROUP, *gives = takes + q->columns;
            if (q->feedback)
                for (int i = 0; i < GROUP; i++) v[i] = V_OP(fmadd_ps)(carried, V_OP(set1_ps)(takes[i]), v[i]);
            const int64_t at = row * groups + group;
            V_NAME(groups)(v, importance_of(q, group * GROUP), count,
                           (uint8_t *)q->out + at * CODE_BYTES(bits), groups * CODE_BYTES(bits),
                           q->out_groups + at * PAIR_BYTES, groups * PAIR_BYTES, bits, q->feedback != 0);
            if (q->feedback)
                for (int i = 0; i < GROUP; i++) carried = V_OP(fmadd_ps)(v[i], V_OP(set1_ps)(gives[i]), carried);
        }
    }
}

/* Outputs `first` to `end`, whole groups, up to LINE, of all neurons, which are columns: a lane each. */
TARGET INLINED void V_NAME(neurons_of)(const void *quantizing, int64_t first, int64_t end, const int bits) {
    const Quantizing *q = quantizing;
    const int64_t groups = q->rows / GROUP;
    float carried[LINE] = {0};
    if (q->carried) memcpy(carried, q->carried + first, (size_t)(end - first) * sizeof *carried);
    for (int64_t place = 0; place * GROUP < q->columns; place++) {
        const int64_t start = GROUP * (q->order ? q->order[place] : place);
        const int64_t neurons = least(GROUP, q->columns - start);
        float inverse[GROUP] = {0}, takes[GROUP] = {0}, gives[GROUP] = {0};
        for (int64_t i = 0; i < neurons; i++) inverse[i] = 1 / q->scale[start + i];
        if (q->feedback) {
            memcpy(takes, q->feedback + start, (size_t)neurons * sizeof *takes);
            memcpy(gives, q->feedback + q->columns + start, (size_t)neurons * sizeof *gives);
        }
        for (int64_t output = first; output < end; output += GROUP) {
            float numbers[GROUP][GROUP], *own = carried + (output - first);
            for (int64_t i = 0; i < GROUP; i++) {
                if (output + GROUP < end) ask_for(q, output + GROUP + i, start);
                else ask_for(q, first + i, start + GROUP);
                run_of(q, output + i, start, neurons, numbers[i]);
            }
            for (int64_t k = 0; k < neurons; k += V_LANES) {
                V_F v[GROUP];
                for (int i = 0; i < GROUP; i++)
                    v[i] = V_OP(mul_ps)(V_OP(loadu_ps)(numbers[i] + k), V_OP(loadu_ps)(inverse + k));
                if (q->feedback)
                    for (int i = 0; i < GROUP; i++)
                        v[i] = V_OP(fmadd_ps)(V_OP(set1_ps)(own[i]), V_OP(loadu_ps)(takes + k), v[i]);
                const int64_t at = (start + k) * groups + output / GROUP;
                V_NAME(groups)(v, importance_of(q, output), least(V_LANES, neurons - k),
                               (uint8_t *)q->out + at * CODE_BYTES(bits), groups * CODE_BYTES(bits),
                               q->out_groups + at * PAIR_BYTES, groups * PAIR_BYTES, bits, q->feedback != 0);
                if (q->feedback)
                    for (int i = 0; i < GROUP; i++) V_OP(storeu_ps)(numbers[i] + k, v[i]);
            }
            if (q->feedback) add_missed(numbers, gives, (neurons + LANES - 1) / LANES * LANES, own);
        }
    }
    if (q->carried) memcpy(q->carried + first, carried, (size_t)(end - first) * sizeof *carried);
}

#define OF_BITS(bits)                                                                                               \
    TARGET static void V_NAME(int##bits##_rows)(const void *q, int64_t first, int64_t end) {                        \
        V_NAME(rows_of)(q, first, end, bits, 0);                                                                    \
    }                                                                                                               \
    TARGET static void V_NAME(int##bits##_neurons)(const void *q, int64_t first, int64_t end) {                     \
        V_NAME(neurons_of)(q, first, end, bits);                                                                    \
    }

OF_BITS(4)
OF_BITS(3)
OF_BITS(2)

#define OF_INT4(bits)                                                                                               \
    TARGET static void V_NAME(int##bits##_of_int4)(const void *q, int64_t first, int64_t end) {                     \
        V_NAME(rows_of)(q, first, end, bits, 4);                                                                    \
    }

OF_INT4(3)
OF_INT4(2)

#undef OF_BITS
#undef OF_INT4

// Codes of one span of columns of codebook types, row by row: entries of the grid, signs or shift, and the level.
//
//     minimise  f(q) = q H q^T - 2 q b^T,   q = d * factor(level) * sign * entry   (or * (entry + sign / 8))
//
// of each row, by what solve_span() in mobe_gguf/quant/rounding/codebook.py does for all rows at once in torch, for any device.  What
// this adds: all entries of a grid are tried in registers, so that nothing but the best one is ever written.

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define UNIT     8
#define SPAN     32     // columns of the longest span
#define LANES    16
#define SHIFT    0.125f

enum codebook_signs { SIGNS_FREE, SIGNS_EVEN, SIGNS_SHIFT, SIGNS_COMMON_SHIFT };

struct codebook_span {
    int64_t rows;
    int32_t span, width, entries, signs, levels, reach, flips;
    const float * h;           // [span, span], symmetric
    const float * inverse;     // [span / 8, 8, 8]: of h's blocks on the diagonal
    const float * grid;        // [width, entries]; entries is a multiple of LANES
    const float * factors;     // [levels]
    const float * b;           // [rows, span]
    const float * d;           // [rows]
    int64_t * level;           // [rows]
    int64_t * index;           // [rows, span / width]
    float * sign, * unit;      // [rows, span]
    int64_t ldb, ldd, ldlevel, ldindex, ldsign, ldunit;
};

typedef float   lanes_f __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes_i __attribute__((vector_size(4 * LANES)));
typedef float   loaded  __attribute__((vector_size(4 * LANES), aligned(4)));

struct codes { int32_t index[SPAN / 4]; float sign[SPAN], unit[SPAN]; };

// Where `less` is all ones x, else y.  (GCC has no ?: of vectors in C.)
static inline lanes_i pick(lanes_i less, lanes_i x, lanes_i y) {
    return (less & x) | (~less & y);
}

static inline int32_t lowest(lanes_f best, lanes_i at) {
    float value = best[0];
    int32_t index = at[0];
    for (int32_t lane = 1; lane < LANES; lane++) {
        const int32_t here = at[lane] + lane;
        if (best[lane] < value || (best[lane] == value && here < index)) {
            value = best[lane];
            index = here;
        }
    }
    return index;
}

// The entry e of least  sum_i e_i (linear_i + sum_{j >= i} quadratic_ij e_j).
static inline __attribute__((always_inline)) int32_t best_entry(
        const struct codebook_span * a, int32_t width, const float * linear, const float (*quadratic)[UNIT]) {
    lanes_f best = {0};
    lanes_i at = {0};
    for (int32_t base = 0; base < a->entries; base += LANES) {
        lanes_f e[UNIT], sum = {0};
        #pragma GCC unroll 8
        for (int32_t i = 0; i < width; i++) {
            e[i] = *(const loaded *)(a->grid + (int64_t)i * a->entries + base);
        }
        #pragma GCC unroll 8
        for (int32_t i = 0; i < width; i++) {
            lanes_f inner = quadratic[i][i] * e[i] + linear[i];
            #pragma GCC unroll 8
            for (int32_t j = i + 1; j < width; j++) {
                inner += quadratic[i][j] * e[j];
            }
            sum += inner * e[i];
        }
        const lanes_i less = base == 0 ? ~(lanes_i){0} : sum < best;
        best = (lanes_f)pick(less, (lanes_i)sum, (lanes_i)best);
        at = pick(less, (lanes_i){0} + base, at);
    }
    return lowest(best, at);
}

// For given signs; h has rows of ldh, the first column of the entries is its first.
static int32_t best_for_signs(const struct codebook_span * a, const float * h, int64_t ldh, const float * b, float s, const float * sign) {
    float linear[UNIT], quadratic[UNIT][UNIT];
    const float size = s < 0.0f ? -s : s, turn = s < 0.0f ? 2.0f : -2.0f;  // f is divided by the scale's size
    for (int32_t i = 0; i < a->width; i++) {
        linear[i] = turn * sign[i] * b[i];
        for (int32_t j = i; j < a->width; j++) {
            quadratic[i][j] = (i == j ? size : 2.0f * size) * sign[i] * sign[j] * h[i * ldh + j];
        }
    }
    return a->width == UNIT ? best_entry(a, UNIT, linear, quadratic) : best_entry(a, 4, linear, quadratic);
}

static inline void take_entry(const struct codebook_span * a, int32_t entry, const float * sign, float * unit) {
    for (int32_t i = 0; i < a->width; i++) {
        unit[i] = sign[i] * a->grid[(int64_t)i * a->entries + entry];
    }
}

// h: 8 columns of the span's metric.
static inline float objective(const float * h, int64_t ldh, const float * b, float s, const float * unit) {
    float sum = 0.0f;
    for (int32_t i = 0; i < UNIT; i++) {
        float row = 0.0f;
        for (int32_t j = 0; j < UNIT; j++) {
            row += h[i * ldh + j] * unit[j];
        }
        sum += s * unit[i] * (s * row - 2.0f * b[i]);
    }
    return sum;
}

struct eight { int32_t index[2]; float sign[UNIT], unit[UNIT]; };

// Entries for the signs of `found`, whose unit is where halves begin.
static void entries_for_signs(const struct codebook_span * a, const float * h, int64_t ldh, const float * b, float s, struct eight * found) {
    if (a->width == UNIT) {
        found->index[0] = best_for_signs(a, h, ldh, b, s, found->sign);
        take_entry(a, found->index[0], found->sign, found->unit);
        return;
    }
    for (int32_t turn = 0; turn < 3; turn++) {
        const int32_t mine = turn == 1 ? 4 : 0, other = 4 - mine;
        float pull[4];
        for (int32_t i = 0; i < 4; i++) {
            pull[i] = b[mine + i];
            for (int32_t j = 0; j < 4; j++) {
                pull[i] -= s * found->unit[other + j] * h[(other + j) * ldh + mine + i];
            }
        }
        const int32_t entry = best_for_signs(a, h + mine * ldh + mine, ldh, pull, s, found->sign + mine);
        found->index[mine / 4] = entry;
        take_entry(a, entry, found->sign + mine, found->unit + mine);
    }
}

static void wanted_signs(const struct codebook_span * a, const float * h, int64_t ldh, const float * target, float s, float * sign) {
    int32_t weakest = 0;
    float least = 0.0f, product = 1.0f;
    for (int32_t i = 0; i < UNIT; i++) {
        sign[i] = target[i] * s < 0.0f ? -1.0f : 1.0f;
        product *= sign[i];
        const float cost = target[i] * target[i] * h[i * ldh + i];
        if (i == 0 || cost < least) {
            least = cost;
            weakest = i;
        }
    }
    if (a->signs == SIGNS_EVEN && product < 0.0f) {
        sign[weakest] = -sign[weakest];
    }
}

// Turns the sign, or the two, that gain most; false if none do.
static bool flip(const struct codebook_span * a, const float * h, int64_t ldh, const float * b, float s, struct eight * now) {
    float q[UNIT], cost[UNIT], least = 0.0f;
    int32_t first = -1, second = -1;
    for (int32_t i = 0; i < UNIT; i++) {
        q[i] = s * now->unit[i];
    }
    for (int32_t i = 0; i < UNIT; i++) {
        float rest = b[i] + q[i] * h[i * ldh + i];
        for (int32_t j = 0; j < UNIT; j++) {
            rest -= q[j] * h[j * ldh + i];
        }
        cost[i] = 4.0f * q[i] * rest;
        if (a->signs == SIGNS_FREE && cost[i] < least) {
            least = cost[i];
            first = i;
        }
    }
    if (a->signs == SIGNS_EVEN) {
        for (int32_t i = 0; i < UNIT; i++) {
            for (int32_t j = i + 1; j < UNIT; j++) {
                const float both = cost[i] + cost[j] + 8.0f * q[i] * q[j] * h[i * ldh + j];
                if (both < least) {
                    least = both;
                    first = i;
                    second = j;
                }
            }
        }
    }
    if (first < 0) {
        return false;
    }
    now->sign[first] = -now->sign[first];
    now->unit[first] = -now->unit[first];
    if (second >= 0) {
        now->sign[second] = -now->sign[second];
        now->unit[second] = -now->unit[second];
    }
    return true;
}

static void choose_signed(const struct codebook_span * a, const float * h, int64_t ldh, const float * inverse, const float * b, float s,
                          struct eight * now) {
    struct eight other;
    float target[UNIT], best = objective(h, ldh, b, s, now->unit);
    for (int32_t i = 0; i < UNIT; i++) {
        target[i] = 0.0f;
        for (int32_t j = 0; j < UNIT; j++) {
            target[i] += b[j] * inverse[j * UNIT + i];
        }
    }
    wanted_signs(a, h, ldh, target, s, other.sign);
    for (int32_t i = 0; i < UNIT; i++) {
        const float size = target[i] / (s == 0.0f ? 1.0f : s) * other.sign[i];
        other.unit[i] = (size < 0.0f ? 0.0f : size) * other.sign[i];
    }
    const struct eight before = *now;
    entries_for_signs(a, h, ldh, b, s, &other);
    float f = objective(h, ldh, b, s, other.unit);
    if (f < best) {
        best = f;
        *now = other;
    }
    if (a->width < UNIT || memcmp(before.sign, other.sign, sizeof before.sign) != 0) {
        other = before;
        entries_for_signs(a, h, ldh, b, s, &other);
        if (objective(h, ldh, b, s, other.unit) < best) {
            *now = other;
        }
    }
    for (int32_t i = 0; i < a->flips && flip(a, h, ldh, b, s, now); i++) {
    }
}

struct shifted { float value; int32_t entry; };

// The entry of least s^2 (own + shift * moved) + linear e + shift * up; own and moved as entries_products() makes them.
static inline __attribute__((always_inline)) void best_shifted(const struct codebook_span * a, const float * own, const float * linear,
                                                               float s2, float up, bool down, bool raise, struct shifted * out) {
    lanes_f best[2] = {{0}};
    lanes_i at[2] = {{0}};
    for (int32_t base = 0; base < a->entries; base += LANES) {
        lanes_f plain = s2 * *(const loaded *)(own + base);
        const lanes_f moved = s2 * *(const loaded *)(own + a->entries + base) + up;
        #pragma GCC unroll 8
        for (int32_t i = 0; i < UNIT; i++) {
            plain += linear[i] * *(const loaded *)(a->grid + (int64_t)i * a->entries + base);
        }
        #pragma GCC unroll 2
        for (int32_t k = 0; k < 2; k++) {
            if (k ? raise : down) {
                const lanes_f sum = k ? plain + moved : plain - moved;
                const lanes_i less = base == 0 ? ~(lanes_i){0} : sum < best[k];
                best[k] = (lanes_f)pick(less, (lanes_i)sum, (lanes_i)best[k]);
                at[k] = pick(less, (lanes_i){0} + base, at[k]);
            }
        }
    }
    for (int32_t k = 0; k < 2; k++) {
        out[k].entry = lowest(best[k], at[k]);
        out[k].value = best[k][out[k].entry % LANES];
    }
}

// shift: the one to take, 0 for the better of the two.  (What the shift adds by itself is the same for both.)
static void choose_shifted(const struct codebook_span * a, const float * own, const float * b, float s, float shift, struct eight * now) {
    float linear[UNIT], sums = 0.0f;
    for (int32_t i = 0; i < UNIT; i++) {
        linear[i] = -2.0f * s * b[i];
        sums += b[i];
    }
    const float up = -2.0f * s * SHIFT * sums;
    struct shifted found[2];
    if (shift == 0.0f) {
        best_shifted(a, own, linear, s * s, up, true, true, found);
    } else if (shift > 0.0f) {
        best_shifted(a, own, linear, s * s, up, false, true, found);
    } else {
        best_shifted(a, own, linear, s * s, up, true, false, found);
    }
    const int32_t k = shift == 0.0f ? found[1].value < found[0].value : shift > 0.0f;
    now->index[0] = found[k].entry;
    for (int32_t i = 0; i < UNIT; i++) {
        now->sign[i] = k ? 1.0f : -1.0f;
        now->unit[i] = a->grid[(int64_t)i * a->entries + found[k].entry] + SHIFT * now->sign[i];
    }
}

// One row at one scale: its eights one after the other, in place; the objective of the whole span.
static float solve_eights(const struct codebook_span * a, const float * own, const float * b, float s, float shift, struct codes * row) {
    const int32_t span = a->span, per = UNIT / a->width;
    float pull[SPAN], f = 0.0f;
    memcpy(pull, b, sizeof(float) * (size_t)span);
    for (int32_t j = 0; j < span; j++) {
        for (int32_t i = 0; i < span; i++) {
            pull[i] -= s * row->unit[j] * a->h[(int64_t)j * span + i];
        }
    }
    for (int32_t k = 0; k < span / UNIT; k++) {
        const int32_t at = k * UNIT;
        const float * h = a->h + (int64_t)at * span + at;
        struct eight now;
        float to[UNIT], step[UNIT];
        memcpy(now.index, row->index + k * per, sizeof(int32_t) * (size_t)per);
        memcpy(now.sign, row->sign + at, sizeof now.sign);
        memcpy(now.unit, row->unit + at, sizeof now.unit);
        for (int32_t i = 0; i < UNIT; i++) {
            to[i] = pull[at + i];
            for (int32_t j = 0; j < UNIT; j++) {
                to[i] += s * now.unit[j] * h[(int64_t)j * span + i];
            }
        }
        if (a->signs == SIGNS_FREE || a->signs == SIGNS_EVEN) {
            choose_signed(a, h, span, a->inverse + k * UNIT * UNIT, to, s, &now);
        } else {
            choose_shifted(a, own + (int64_t)k * 2 * a->entries, to, s, shift, &now);
        }
        for (int32_t i = 0; i < UNIT; i++) {
            step[i] = s * (now.unit[i] - row->unit[at + i]);
        }
        memcpy(row->index + k * per, now.index, sizeof(int32_t) * (size_t)per);
        memcpy(row->sign + at, now.sign, sizeof now.sign);
        memcpy(row->unit + at, now.unit, sizeof now.unit);
        for (int32_t j = 0; j < UNIT; j++) {
            for (int32_t i = 0; i < span; i++) {
                pull[i] -= step[j] * a->h[(int64_t)(at + j) * span + i];
            }
        }
    }
    for (int32_t i = 0; i < span; i++) {
        f -= s * row->unit[i] * (b[i] + pull[i]);
    }
    return f;
}

static float objective_of_span(const struct codebook_span * a, const float * b, float s, const float * unit) {
    float f = 0.0f;
    for (int32_t i = 0; i < a->span; i++) {
        float sum = 0.0f;
        for (int32_t j = 0; j < a->span; j++) {
            sum += a->h[(int64_t)i * a->span + j] * unit[j];
        }
        f += s * unit[i] * (s * sum - 2.0f * b[i]);
    }
    return f;
}

// own [span / 8, 2, entries]: of each eight columns, e H e for every entry e, and twice e H (1/8, ..., 1/8).
static void entries_products(const struct codebook_span * a, float * own) {
    for (int32_t k = 0; k < a->span / UNIT; k++) {
        const float * h = a->h + (int64_t)k * UNIT * (a->span + 1);
        float * squares = own + (int64_t)k * 2 * a->entries, * moved = squares + a->entries;
        memset(squares, 0, sizeof(float) * 2 * (size_t)a->entries);
        for (int32_t i = 0; i < UNIT; i++) {
            const float * e = a->grid + (int64_t)i * a->entries;
            float sum = 0.0f;
            for (int32_t j = 0; j < UNIT; j++) {
                const float * other = a->grid + (int64_t)j * a->entries, x = h[(int64_t)i * a->span + j];
                sum += x;
                for (int32_t n = 0; n < a->entries && j >= i; n++) {
                    squares[n] += (i == j ? x : 2.0f * x) * e[n] * other[n];
                }
            }
            for (int32_t n = 0; n < a->entries; n++) {
                moved[n] += 2.0f * SHIFT * sum * e[n];
            }
        }
    }
}

// 0, or -1 without memory.
int32_t codebook_span(const struct codebook_span * a) {
    const int32_t groups = a->span / a->width;
    float * own = NULL;
    if (a->signs == SIGNS_SHIFT || a->signs == SIGNS_COMMON_SHIFT) {
        own = malloc(sizeof(float) * 2 * (size_t)a->entries * (size_t)(a->span / UNIT));
        if (!own) {
            return -1;
        }
        entries_products(a, own);
    }
    for (int64_t r = 0; r < a->rows; r++) {
        const float * b = a->b + r * a->ldb, d = a->d[r * a->ldd];
        const int32_t level = (int32_t)a->level[r * a->ldlevel];
        struct codes now, best, tried;
        for (int32_t i = 0; i < groups; i++) {
            now.index[i] = (int32_t)a->index[r * a->ldindex + i];
        }
        memcpy(now.sign, a->sign + r * a->ldsign, sizeof(float) * (size_t)a->span);
        memcpy(now.unit, a->unit + r * a->ldunit, sizeof(float) * (size_t)a->span);
        best = now;
        int32_t best_level = level;
        float least = objective_of_span(a, b, d * a->factors[level], now.unit);
        const float shift = a->signs == SIGNS_COMMON_SHIFT ? now.sign[0] : 0.0f;
        for (int32_t step = -a->reach; step <= a->reach + (shift != 0.0f); step++) {
            const bool other = step > a->reach;  // the other shift, at the same level
            const int32_t at = level + (other ? 0 : step);
            if (at < 0 || at >= a->levels) {
                continue;
            }
            tried = now;
            const float f = solve_eights(a, own, b, d * a->factors[at], other ? -shift : shift, &tried);
            if (f < least) {
                least = f;
                best = tried;
                best_level = at;
            }
        }
        a->level[r * a->ldlevel] = best_level;
        for (int32_t i = 0; i < groups; i++) {
            a->index[r * a->ldindex + i] = best.index[i];
        }
        memcpy(a->sign + r * a->ldsign, best.sign, sizeof(float) * (size_t)a->span);
        memcpy(a->unit + r * a->ldunit, best.unit, sizeof(float) * (size_t)a->span);
    }
    free(own);
    return 0;
}

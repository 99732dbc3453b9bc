// Codes and scales of one block of columns; rows are independent of each other, some go side by side.
//
//   rounding_sweep     coordinate descent:  cost (w - q) S (w - q)^T of each row, gradient g = (w - q) S kept up to date
//   rounding_feedback  GPTQ with the scales held:  S = L L^T, columns from the last to the first
//
// Both see the block's own columns alone; the caller brings the block's changes to all others by one product of matrices.
// The same in torch, for any device: mobe_gguf/quant/rounding/engine.py, which also says what the fields are.

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>

#define LARGEST_BLOCK 256

struct rounding_levels {
    const float *   ladder;   // [n] levels in rising order
    const uint8_t * order;    // [n] their codes
    const float *   units;    // [codes] level of each code
    int32_t         n;
    int32_t         even;     // whether all steps are alike
};

struct rounding_sweep {
    int64_t rows, columns;          // of the block; columns <= LARGEST_BLOCK
    int64_t group, block;           // columns that share a scale, and a d
    const float * s; int64_t lds;   // [columns, columns]
    float * g;                      // [rows, columns] gradients
    float * q;                      // [rows, columns] values
    int64_t ld;                     // of g and q
    uint8_t * codes; int64_t ldc;   // [rows, columns]
    float * d, * dmin; int64_t ldd; // [rows, columns / block], NULL where the type has none
    uint8_t * k, * m; int64_t ldk;  // [rows, columns / group], NULL where the type has none
    const float * multipliers, * minima;
    int32_t n_multipliers, n_minima;
    int32_t solve;                  // whether scales are set, too
    struct rounding_levels levels;
};

struct rounding_feedback {
    int64_t rows, columns, group;
    const float * l; int64_t ldl;      // [columns, columns], lower triangle
    const float * w; float * error;    // [rows, columns]
    int64_t ld;                        // of w and error
    float * left; int64_t ldleft;      // [rows, columns]: what columns behind the block leave over; overwritten
    uint8_t * codes; int64_t ldc;
    const float * scale, * offset;     // [rows, columns / group]; offset may be NULL
    int64_t lds;
    struct rounding_levels levels;
};

static inline float half(float x) {
    return (float)(_Float16)fminf(fmaxf(x, -65504.0f), 65504.0f);
}

static inline int32_t nearest(const float * ladder, int32_t n, bool even, float inverse_step, float x) {
    if (even) {
        return (int32_t)fminf(fmaxf(rintf((x - ladder[0]) * inverse_step), 0.0f), (float)(n - 1));
    }
    int32_t place = 0;
    for (int32_t i = 0; i + 1 < n; i++) {
        place += x > 0.5f * (ladder[i] + ladder[i + 1]);
    }
    return place;
}

static inline void add_row(float * restrict y, const float * restrict x, float a, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        y[i] += a * x[i];
    }
}

static inline float dot(const float * restrict x, const float * restrict y, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        sum += x[i] * y[i];
    }
    return sum;
}

struct place { float step; int32_t at; };

// Storable scales near table[k] * d + change: the nearest and its neighbours; false where d says nothing of the table.
static int32_t near_places(const float * table, int32_t n, int32_t k, float d, float change, int32_t reach, struct place * out) {
    const float now = table[k];
    const float wanted = d == 0.0f ? now : now + change / d;
    const bool rising = table[n - 1] > table[0];
    int32_t low = 0, high = n - 1;  // first place whose middle with the next is not passed
    while (low < high) {
        const int32_t mid = (low + high) / 2;
        const float middle = 0.5f * (table[mid] + table[mid + 1]);
        if (rising ? wanted > middle : wanted < middle) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    int32_t count = 0;
    for (int32_t step = -reach; step <= reach; step++) {
        const int32_t at = low + step;
        if (at >= 0 && at < n) {
            out[count].at = at;
            out[count++].step = (table[at] - now) * d;
        }
    }
    return count;
}

struct row_scales { float * d, * dmin; uint8_t * k, * m; };

// Rows that go through a block side by side: S is larger than the first-level cache, and each of its rows is read once for all of them.
#define SIDE 8

struct row {
    float * g, * q;
    uint8_t * codes;
    struct row_scales at;
    float first[LARGEST_BLOCK], second[LARGEST_BLOCK];      // what the scale and the offset in question multiply
    float s_first[LARGEST_BLOCK], s_second[LARGEST_BLOCK];  // S times that
    float before[LARGEST_BLOCK];                            // q of a group before anything in it changed
};

// S times `first` (and `second`, which lie in `width` columns from `from` on) of `n` rows: columns `low` to `high` of that.
static void products(const struct rounding_sweep * a, struct row * rows, int64_t n, int64_t from, int64_t width, int64_t low,
                     int64_t high, bool second) {
    for (int64_t i = low; i < high; i++) {
        const float * s = a->s + i * a->lds + from;
        for (int64_t r = 0; r < n; r++) {
            rows[r].s_first[i] = dot(s, rows[r].first, width);
            if (second) {
                rows[r].s_second[i] = dot(s, rows[r].second, width);
            }
        }
    }
}

// Sets d and dmin (halves) or k and m of one row to the best that can be stored near the least squares; q follows, and
// g from column `low` to `high`.
static void improve(const struct rounding_sweep * a, struct row * row, int64_t from, int64_t width, int64_t low, int64_t high,
                    bool second, bool halves) {
    const struct row_scales at = row->at;
    const float * g = row->g + from, * s_first = row->s_first + from, * s_second = row->s_second + from;
    double a11 = 0, a12 = 0, a22 = 0, b1 = 0, b2 = 0;
    for (int64_t i = 0; i < width; i++) {
        a11 += (double)s_first[i] * row->first[i];
        b1 += (double)g[i] * row->first[i];
        if (second) {
            a12 += (double)s_first[i] * row->second[i];
            a22 += (double)s_second[i] * row->second[i];
            b2 += (double)g[i] * row->second[i];
        }
    }
    double ds = 0;
    if (!second) {
        ds = b1 / fmax(a11, 1e-30);
    } else {
        const double det = a11 * a22 - a12 * a12;
        if (det > 1e-6 * a11 * a22) {
            ds = (a22 * b1 - a12 * b2) / det;
        }
    }
    struct place places[3];
    int32_t n_places;
    if (halves) {
        places[0] = (struct place){0.0f, 0};
        places[1] = (struct place){half(*at.d + (float)ds) - *at.d, 0};
        n_places = 2;
    } else {
        n_places = near_places(a->multipliers, a->n_multipliers, *at.k, at.d ? *at.d : 1.0f, (float)ds, 1, places);
    }
    double best = 0;
    struct place scale = {0}, offset = {0};
    for (int32_t i = 0; i < n_places; i++) {
        struct place other = {0};
        if (second) {
            const float change = (float)((b2 - a12 * places[i].step) / fmax(a22, 1e-30));
            if (halves || !at.m) {
                other.step = half(*at.dmin + change) - *at.dmin;
            } else {
                near_places(a->minima, a->n_minima, *at.m, *at.dmin, change, 0, &other);
            }
        }
        const double s = places[i].step, o = other.step;
        const double gain = 2 * (s * b1 + o * b2) - s * s * a11 - 2 * s * o * a12 - o * o * a22;
        if (gain > best) {
            best = gain;
            scale = places[i];
            offset = other;
        }
    }
    if (!(best > 0)) {
        return;
    }
    if (halves) {
        *at.d += scale.step;
    } else {
        *at.k = (uint8_t)scale.at;
    }
    add_row(row->q + from, row->first, scale.step, width);
    add_row(row->g + low, row->s_first + low, -scale.step, high - low);
    if (second) {
        if (halves || !at.m) {
            *at.dmin += offset.step;
        } else {
            *at.m = (uint8_t)offset.at;
        }
        add_row(row->q + from, row->second, offset.step, width);
        add_row(row->g + low, row->s_second + low, -offset.step, high - low);
    }
}

static void improve_all(const struct rounding_sweep * a, struct row * rows, int64_t n, int64_t from, int64_t width, bool whole,
                        bool second, bool halves) {
    const int64_t low = whole ? 0 : from, high = whole ? a->columns : from + width;
    products(a, rows, n, from, width, low, high, second);
    for (int64_t r = 0; r < n; r++) {
        improve(a, rows + r, from, width, low, high, second, halves);
    }
}

// Brings g to what q has changed by since `before` in a group of columns, outside of the group, where that is done already.
static void spread(const struct rounding_sweep * a, struct row * rows, int64_t n, int64_t start) {
    for (int64_t i = 0; i < a->group; i++) {
        const float * s = a->s + (start + i) * a->lds;
        const int64_t end = start + a->group;
        for (int64_t r = 0; r < n; r++) {
            const float change = rows[r].q[start + i] - rows[r].before[i];
            if (change != 0.0f) {
                add_row(rows[r].g, s, -change, start);
                add_row(rows[r].g + end, s + end, -change, a->columns - end);
            }
        }
    }
}

// Number of columns whose code changed.
int64_t rounding_sweep(const struct rounding_sweep * a) {
    const struct rounding_levels lv = a->levels;
    const float inverse_step = 1.0f / (lv.ladder[1] - lv.ladder[0]);
    struct row rows[SIDE];
    int64_t changed = 0;
    for (int64_t begin = 0; begin < a->rows; begin += SIDE) {
        const int64_t n = begin + SIDE < a->rows ? SIDE : a->rows - begin;
        for (int64_t r = 0; r < n; r++) {
            rows[r].g = a->g + (begin + r) * a->ld;
            rows[r].q = a->q + (begin + r) * a->ld;
            rows[r].codes = a->codes + (begin + r) * a->ldc;
        }
        for (int64_t start = 0; start < a->columns; start += a->group) {
            const int64_t gi = start / a->group, bi = start / a->block;
            float scale[SIDE], offset[SIDE], inverse[SIDE];
            for (int64_t r = 0; r < n; r++) {
                struct row * row = rows + r;
                row->at = (struct row_scales){
                    a->d ? a->d + (begin + r) * a->ldd + bi : NULL,
                    a->dmin ? a->dmin + (begin + r) * a->ldd + bi : NULL,
                    a->k ? a->k + (begin + r) * a->ldk + gi : NULL,
                    a->m ? a->m + (begin + r) * a->ldk + gi : NULL,
                };
                for (int64_t i = 0; i < a->group; i++) {
                    row->first[i] = lv.units[row->codes[start + i]];
                    row->second[i] = 1.0f;
                    row->before[i] = row->q[start + i];
                }
            }
            if (a->solve) {
                improve_all(a, rows, n, start, a->group, false, a->dmin != NULL, !a->k);
            }
            for (int64_t r = 0; r < n; r++) {
                const struct row_scales at = rows[r].at;
                scale[r] = (at.d ? *at.d : 1.0f) * (at.k ? a->multipliers[*at.k] : 1.0f);
                offset[r] = at.dmin ? *at.dmin * (at.m ? a->minima[*at.m] : 1.0f) : 0.0f;
                inverse[r] = scale[r] == 0.0f ? 0.0f : 1.0f / scale[r];
            }
            for (int64_t j = start; j < start + a->group; j++) {
                const float * column = a->s + j * a->lds;
                for (int64_t r = 0; r < n; r++) {
                    struct row * row = rows + r;
                    const float target = row->q[j] + row->g[j] / column[j];
                    const int32_t place = nearest(lv.ladder, lv.n, lv.even, inverse_step, (target - offset[r]) * inverse[r]);
                    const float value = lv.ladder[place] * scale[r] + offset[r];
                    const float change = value - row->q[j];
                    if (change != 0.0f) {
                        changed += row->codes[j] != lv.order[place];
                        row->codes[j] = lv.order[place];
                        row->q[j] = value;
                        add_row(row->g + start, column + start, -change, a->group);
                    }
                }
            }
            spread(a, rows, n, start);
            const int64_t end = start + a->group;
            if (a->solve && a->k && a->d && end % a->block == 0) {
                const int64_t from = end - a->block;
                for (int64_t r = 0; r < n; r++) {
                    struct row * row = rows + r;
                    for (int64_t i = 0; i < a->block; i++) {
                        const int64_t group = (begin + r) * a->ldk + (from + i) / a->group;
                        row->first[i] = lv.units[row->codes[from + i]] * a->multipliers[a->k[group]];
                        row->second[i] = a->m ? a->minima[a->m[group]] : 1.0f;
                    }
                }
                improve_all(a, rows, n, from, a->block, true, a->dmin != NULL, true);
            }
        }
    }
    return changed;
}

void rounding_feedback(const struct rounding_feedback * a) {
    const struct rounding_levels lv = a->levels;
    const float inverse_step = 1.0f / (lv.ladder[1] - lv.ladder[0]);
    for (int64_t begin = 0; begin < a->rows; begin += SIDE) {
        const int64_t end = begin + SIDE < a->rows ? begin + SIDE : a->rows;
        for (int64_t j = a->columns - 1; j >= 0; j--) {
            const float * column = a->l + j * a->ldl;
            for (int64_t row = begin; row < end; row++) {
                const int64_t group = row * a->lds + j / a->group;
                const float scale = a->scale[group], offset = a->offset ? a->offset[group] : 0.0f;
                const float w = a->w[row * a->ld + j];
                float * left = a->left + row * a->ldleft;
                const float target = w + left[j] / column[j];
                const float unit = scale == 0.0f ? 0.0f : (target - offset) / scale;
                const int32_t place = nearest(lv.ladder, lv.n, lv.even, inverse_step, unit);
                const float error = w - (lv.ladder[place] * scale + offset);
                a->codes[row * a->ldc + j] = lv.order[place];
                a->error[row * a->ld + j] = error;
                add_row(left, column, error, j);
            }
        }
    }
}

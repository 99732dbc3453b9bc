// Codes and scales of one block of columns, row by row, with everything that a row needs in the first-level cache.
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

// Sets d and dmin (halves) or k and m to the best that can be stored near the least squares; first and second are what they multiply, over
// `width` columns from `from` on.  Returns whether anything changed; then q and g are brought up to date.
static bool improve(const struct rounding_sweep * a, struct row_scales at, float * g, float * q, int64_t from, int64_t width,
                    const float * first, const float * second, bool halves) {
    double a11 = 0, a12 = 0, a22 = 0, b1 = 0, b2 = 0;
    for (int64_t i = 0; i < width; i++) {
        const float * row = a->s + (from + i) * a->lds + from;
        if (first[i] != 0.0f || second) {
            const double f = dot(row, first, width);
            a11 += f * first[i];
            if (second) {
                a12 += f * second[i];
                a22 += (double)dot(row, second, width) * second[i];
            }
        }
        b1 += (double)g[from + i] * first[i];
        if (second) {
            b2 += (double)g[from + i] * second[i];
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
        return false;
    }
    if (halves) {
        *at.d += scale.step;
    } else {
        *at.k = (uint8_t)scale.at;
    }
    if (second) {
        if (halves || !at.m) {
            *at.dmin += offset.step;
        } else {
            *at.m = (uint8_t)offset.at;
        }
    }
    for (int64_t i = 0; i < width; i++) {
        const float change = first[i] * scale.step + (second ? second[i] * offset.step : 0.0f);
        if (change != 0.0f) {
            q[from + i] += change;
            add_row(g, a->s + (from + i) * a->lds, -change, a->columns);
        }
    }
    return true;
}

// Number of columns whose code changed.
int64_t rounding_sweep(const struct rounding_sweep * a) {
    const struct rounding_levels lv = a->levels;
    const float inverse_step = 1.0f / (lv.ladder[1] - lv.ladder[0]);
    float ones[LARGEST_BLOCK], first[LARGEST_BLOCK], second[LARGEST_BLOCK];
    int64_t changed = 0;
    for (int64_t i = 0; i < LARGEST_BLOCK; i++) {
        ones[i] = 1.0f;
    }
    for (int64_t row = 0; row < a->rows; row++) {
        float * g = a->g + row * a->ld;
        float * q = a->q + row * a->ld;
        uint8_t * codes = a->codes + row * a->ldc;
        for (int64_t start = 0; start < a->columns; start += a->group) {
            const int64_t gi = start / a->group, bi = start / a->block;
            struct row_scales at = {
                a->d ? a->d + row * a->ldd + bi : NULL,
                a->dmin ? a->dmin + row * a->ldd + bi : NULL,
                a->k ? a->k + row * a->ldk + gi : NULL,
                a->m ? a->m + row * a->ldk + gi : NULL,
            };
            if (a->solve) {
                for (int64_t i = 0; i < a->group; i++) {
                    first[i] = lv.units[codes[start + i]];
                }
                improve(a, at, g, q, start, a->group, first, at.dmin ? ones : NULL, !at.k);
            }
            const float scale = (at.d ? *at.d : 1.0f) * (at.k ? a->multipliers[*at.k] : 1.0f);
            const float offset = at.dmin ? *at.dmin * (at.m ? a->minima[*at.m] : 1.0f) : 0.0f;
            const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
            for (int64_t j = start; j < start + a->group; j++) {
                const float * column = a->s + j * a->lds;
                const float target = q[j] + g[j] / column[j];
                const int32_t place = nearest(lv.ladder, lv.n, lv.even, inverse_step, (target - offset) * inverse);
                const float value = lv.ladder[place] * scale + offset;
                const float change = value - q[j];
                if (change != 0.0f) {
                    changed += codes[j] != lv.order[place];
                    codes[j] = lv.order[place];
                    q[j] = value;
                    add_row(g, column, -change, a->columns);
                }
            }
            const int64_t end = start + a->group;
            if (a->solve && at.k && at.d && end % a->block == 0) {
                const int64_t from = end - a->block;
                for (int64_t i = 0; i < a->block; i++) {
                    const int64_t group = (from + i) / a->group;
                    first[i] = lv.units[codes[from + i]] * a->multipliers[a->k[row * a->ldk + group]];
                    if (at.m) {
                        second[i] = a->minima[a->m[row * a->ldk + group]];
                    }
                }
                improve(a, at, g, q, from, a->block, first, at.dmin ? (at.m ? second : ones) : NULL, true);
            }
        }
    }
    return changed;
}

void rounding_feedback(const struct rounding_feedback * a) {
    const struct rounding_levels lv = a->levels;
    const float inverse_step = 1.0f / (lv.ladder[1] - lv.ladder[0]);
    for (int64_t row = 0; row < a->rows; row++) {
        const float * w = a->w + row * a->ld;
        float * error = a->error + row * a->ld;
        float * left = a->left + row * a->ldleft;
        for (int64_t j = a->columns - 1; j >= 0; j--) {
            const int64_t group = row * a->lds + j / a->group;
            const float scale = a->scale[group], offset = a->offset ? a->offset[group] : 0.0f;
            const float * column = a->l + j * a->ldl;
            const float target = w[j] + left[j] / column[j];
            const float unit = scale == 0.0f ? 0.0f : (target - offset) / scale;
            const int32_t place = nearest(lv.ladder, lv.n, lv.even, inverse_step, unit);
            a->codes[row * a->ldc + j] = lv.order[place];
            error[j] = w[j] - (lv.ladder[place] * scale + offset);
            add_row(left, column, error[j], j);
        }
    }
}

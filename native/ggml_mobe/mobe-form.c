#include "mobe-form.h"
#include "mobe-layout.h"
#include "mobe-quad-decode.h"
#include "mobe-quad.h"

#include "ggml-impl.h"

#include <string.h>

// bases of a group at most, for sums not to overflow: of bytes' shifts, and with coefficients of 16 bits
enum { MOBE_BYTES = 512, MOBE_TWICE = 256 };

static int64_t mobe_groups(const struct mobe_former * former) { return former->shape.m/former->shape.m_group; }

static int64_t mobe_group_of(const struct mobe_former * former, int64_t expert) { return expert/(former->shape.n/mobe_groups(former)); }

void mobe_former_init(
        struct mobe_former * former, const struct ggml_tensor * basis, const struct ggml_tensor * mix,
        struct ggml_mobe_shape shape, enum ggml_mobe_activation activation) {
    former->basis      = basis;
    former->mix        = (const float *) mix->data;
    former->shape      = shape;
    former->activation = activation;
    former->format     = mobe_format_of(basis->type);
#if defined(MOBE_QUAD)
    former->bytes = ggml_is_quantized(basis->type) && shape.m_group <= MOBE_BYTES;
#else
    former->bytes = false;
#endif
    former->twice  = former->bytes && former->format && former->format->twice && shape.m_group <= MOBE_TWICE;
#if defined(MOBE_QUAD)
    former->zero = mobe_zero(former->format);
#else
    former->zero = 0.0f;
#endif
    former->stretch = ggml_row_size(basis->type, MOBE_COLS);
    former->n_part = former->bytes ? (shape.m_group + 3)/4 : shape.m_group;
    former->n_pad  = (shape.m_group + 31)/32*32;
}

// ---- layouts

size_t mobe_list_place(const struct mobe_former * former, struct mobe_list * list, char * memory) {
    size_t used = 0;
    MOBE_TAKE(memory, used, list->n,     mobe_groups(former));
    MOBE_TAKE(memory, used, list->basis, former->shape.m);
    MOBE_TAKE(memory, used, list->place, former->shape.m);
    return used;
}

size_t mobe_terms_place(const struct mobe_former * former, struct mobe_terms * terms, char * memory) {
    size_t used = 0;
    MOBE_TAKE(memory, used, terms->part, former->n_part);
    MOBE_TAKE(memory, used, terms->coef, former->n_pad);
    return used;
}

size_t mobe_tile_place(const struct mobe_former * former, struct mobe_tile * tile, char * memory) {
    const int64_t n = mobe_groups(former);
    size_t used = 0;
    MOBE_TAKE(memory, used, tile->data, n*former->n_part*MOBE_COLS*4);
    if (former->bytes) {
        MOBE_TAKE(memory, used, tile->scale, n*former->n_part*MOBE_RUNS*4);
        MOBE_TAKE(memory, used, tile->shift, n*former->n_part*MOBE_RUNS*4);
        MOBE_TAKE(memory, used, tile->most,  n*former->n_pad);
        MOBE_TAKE(memory, used, tile->shares, MOBE_MANY*former->n_pad);
        MOBE_TAKE(memory, used, tile->coefs, MOBE_MANY*former->n_part*MOBE_RUNS*4*(former->twice ? 2 : 1));
    }
    return used;
}

size_t mobe_row_place(const struct mobe_former * former, struct mobe_row * row, int64_t n_expert, char * memory) {
    size_t used = 0;
    MOBE_TAKE(memory, used, row->terms, n_expert);
    used += mobe_list_place(former, memory ? &row->list : NULL, memory ? memory + used : NULL);
    for (int64_t i = 0; i < n_expert; i++) {
        used += mobe_terms_place(former, memory ? &row->terms[i] : NULL, memory ? memory + used : NULL);
    }
    used += mobe_tile_place(former, memory ? &row->tile : NULL, memory ? memory + used : NULL);
    return used;
}

// ---- what is mixed

// of an expert in row rho; the next basis' coefficient is *stride further on
static const float * mobe_coefs_of(const struct mobe_former * former, int64_t expert, int64_t rho, int64_t * stride) {
    const struct ggml_mobe_shape * s = &former->shape;
    *stride = s->row_mix ? s->r : 1;
    return former->mix + expert*s->m_group**stride + (s->row_mix ? rho : 0);
}

static void mobe_list_clear(const struct mobe_former * former, struct mobe_list * list) {
    memset(list->place, 0xff, former->shape.m*sizeof(int32_t));
}

static void mobe_list_add(const struct mobe_former * former, struct mobe_list * list, int64_t expert, int64_t rho) {
    int64_t stride;
    const float * mix = mobe_coefs_of(former, expert, rho, &stride);
    int32_t * place = list->place + mobe_group_of(former, expert)*former->shape.m_group;
    for (int64_t j = 0; j < former->shape.m_group; j++) {
        if (mix[j*stride] != 0.0f) {
            place[j] = 0;
        }
    }
}

static void mobe_list_close(const struct mobe_former * former, struct mobe_list * list) {
    const int64_t m = former->shape.m_group;
    for (int64_t g = 0; g < mobe_groups(former); g++) {
        int32_t n = 0;
        for (int64_t j = 0; j < m; j++) {
            if (list->place[g*m + j] >= 0) {
                list->basis[g*m + n] = (int32_t) j;
                list->place[g*m + j] = n++;
            }
        }
        list->n[g] = n;
    }
}

static void mobe_terms_gather(
        const struct mobe_former * former, struct mobe_terms * terms, const struct mobe_list * list, int64_t expert, int64_t rho) {
    int64_t stride;
    const float * mix = mobe_coefs_of(former, expert, rho, &stride);
    const int each = former->bytes ? 4 : 1;

    terms->group = mobe_group_of(former, expert);
    terms->n     = 0;
    memset(terms->coef, 0, former->n_pad*sizeof(float));
    const int32_t * basis = list->basis + terms->group*former->shape.m_group;
    for (int32_t i = 0; i < list->n[terms->group]; i++) {
        const float a = mix[basis[i]*stride];
        if (a == 0.0f) {
            continue;
        }
        terms->coef[i] = a;
        if (terms->n == 0 || terms->part[terms->n - 1] != i/each) {
            terms->part[terms->n++] = i/each;
        }
    }
}

void mobe_mix_gather(
        const struct mobe_former * former, struct mobe_list * list, struct mobe_terms * terms, const int32_t * experts, const int32_t * index,
        int64_t n_expert, int64_t rho, int64_t n_rows) {
    mobe_list_clear(former, list);
    for (int64_t i = 0; i < n_rows*n_expert; i++) {
        mobe_list_add(former, list, experts[index ? index[i%n_expert] : i%n_expert], rho + i/n_expert);
    }
    mobe_list_close(former, list);
    for (int64_t i = 0; i < n_rows*n_expert; i++) {
        mobe_terms_gather(former, &terms[i], list, experts[index ? index[i%n_expert] : i%n_expert], rho + i/n_expert);
    }
}

// ---- tiles

// What is taken apart next follows in memory: the next stretch, or the next row; it is fetched ahead. There are more streams than
// a processor watches by itself.
void mobe_tile_decode(
        const struct mobe_former * former, struct mobe_tile * tile, const struct mobe_list * list, int64_t rho, int64_t c0, int64_t n_cols) {
    const struct ggml_tensor * basis = former->basis;
    const int64_t m   = former->shape.m_group;
    const size_t  all = former->stretch;
    const char  * row = (const char *) basis->data + rho*basis->nb[1] + c0/MOBE_COLS*all;

    tile->list = list;
    for (int64_t g = 0; g < mobe_groups(former); g++) {
        const int64_t n = list->n[g];
        if (!former->bytes) {
            for (int64_t i = 0; i < n; i++) {
                const char * src = row + (g*m + list->basis[g*m + i])*basis->nb[2];
                float      * dst = (float *) tile->data + (g*former->n_part + i)*MOBE_COLS;
                mobe_prefetch(src + all, all, true);
                mobe_decode(basis->type, src, dst, (int) n_cols);
                for (int64_t c = n_cols; c % MOBE_VEC != 0; c++) {
                    dst[c] = 0.0f;
                }
            }
            continue;
        }
#if defined(MOBE_QUAD)
        const int32_t * bases = list->basis + g*m;
        const char    * first = row + g*m*basis->nb[2];
        for (int64_t i = 0; i < n; i += 4) {
            const int64_t part = g*former->n_part + i/4;
            const char * src[4] = { NULL, NULL, NULL, NULL };
            for (int64_t p = 0; p < 4 && i + p < n; p++) {
                src[p] = first + bases[i + p]*basis->nb[2];
                mobe_prefetch(src[p] + all, all, true);
            }
            const struct mobe_four four = {
                (uint8_t *) tile->data + part*MOBE_COLS*4, tile->scale + part*MOBE_RUNS*4,
                tile->shift + part*MOBE_RUNS*4, tile->most + g*former->n_pad + i,
            };
            mobe_quad_decode(basis->type, former->format, former->twice, src, (int) n_cols, &four);
        }
        for (int64_t i = (n + 3)/4*4; i % 16 != 0; i++) {
            tile->most[g*former->n_pad + i] = 0.0f; // read with whole vectors
        }
#endif
    }
}

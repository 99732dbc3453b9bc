// Arrays one after the other in memory that somebody else owns.

#pragma once

#include <stddef.h>

static inline size_t mobe_align(size_t n) { return (n + 63) & ~(size_t) 63; }

// The pointer lies `used` bytes behind base, if there is one, and `used` grows by what count of its things take, a multiple of 64: run
// with base NULL, a layout only counts.
#define MOBE_TAKE(base, used, pointer, count) \
    do { \
        if (base) { (pointer) = (void *) ((char *) (base) + (used)); } \
        (used) += mobe_align((count)*sizeof(*(pointer))); \
    } while (0)

// Rows of the common quantized types to float, compiled with the CPU variant's instructions: libggml's own decoders live in
// ggml-base, which is compiled for the oldest processor. Bit for bit the same numbers.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// the decoder for a type, libggml's own where there is no faster one, NULL for F32 (nothing to do) and what cannot be decoded
ggml_to_float_t mobe_dequantizer(enum ggml_type type);

#ifdef __cplusplus
}
#endif

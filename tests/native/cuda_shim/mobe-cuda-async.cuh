// Stands in for native/ggml_mobe/mobe-cuda-async.cuh: a copy spoils its target at once and arrives when it is waited for, so what
// is read too early, or written while it is still read, comes out as NaN.

#pragma once

#include "common.cuh"

void mobe_copy_async(char * to, const char * from);
void mobe_copy_commit();
void mobe_copy_wait(int newest);

// Blocks of the bases on their way from memory to shared memory while others are combined: what a warp is to do next is known,
// so it need not wait for memory each time.

#pragma once

#include "mobe-cuda-async.cuh"
#include "mobe-cuda-mix.cuh"
#include "mobe-cuda-read.cuh"

// The order in which a warp takes the pieces of a block's rows: every MOBE_WARPS-th.
struct mobe_place {
    int row, piece;
    __device__ __forceinline__ void advance(int by, int n_piece) {
        piece += by;
        while (piece >= n_piece) {
            piece -= n_piece;
            row++;
        }
    }
};

// A warp's own ring of slots in shared memory. A slot takes a block of q4_k of 16 bases; a.depth - 1 slots are on their way while
// one is combined.
struct mobe_ring {
    static constexpr int BYTES = sizeof(block_q4_K);
    static constexpr int QUAD  = 4*BYTES + 32; // 4 bases: the lanes' reads at q*QUAD, q = 0..3, fall into different banks
    static constexpr int SLOT  = 4*QUAD;
    static_assert(BYTES == 128 + 16 && QUAD % 64 == 32, "copied by 8 lanes, 16 bytes each, and one more; banks");

    char * slots;
    int    slot; // the offset of the slot that is written next
    int    t;    // the next 16 of the list, of stretch next
    mobe_place next;
    const char * from; // where the lane reads of that stretch of basis 0

    __device__ __forceinline__ void find(const mobe_args & a, int row0) {
        from = a.basis + (row0 + next.row)*a.row_bytes + next.piece*BYTES + threadIdx.x%8*16;
    }
    __device__ __forceinline__ void copy(const uint32_t * list) {
        const int lane = threadIdx.x%32;
        char * to = slots + slot;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            mobe_copy_async(to + i*QUAD + lane/8*BYTES + lane%8*16, from + (uint64_t) list[4*i + lane/8]*16);
        }
        if (lane < 16) {
            mobe_copy_async(to + lane/4*QUAD + lane%4*BYTES + 128, from + 128 - lane%8*16 + (uint64_t) list[lane]*16);
        }
    }
    // the next of the warp's blocks on its way, if there is one
    __device__ __forceinline__ void issue(const mobe_args & a, const uint32_t * list, int n_term, int row0, int n_row) {
        if (next.row < n_row && t < n_term) {
            copy(list + t);
            t += 16;
            if (t >= n_term) {
                t = 0;
                next.advance(MOBE_WARPS, a.d/MOBE_STRETCH);
                find(a, row0);
            }
        }
        mobe_copy_commit();
        slot = slot + SLOT == a.depth*SLOT ? 0 : slot + SLOT;
    }
    // the first `ahead` blocks; more() adds those that are missing to a.depth - 1
    __device__ __forceinline__ void start(const mobe_args & a, const uint32_t * list, int n_term, int row0, int n_row, int ahead) {
        mobe_copy_wait(0); // nothing else is on its way into these slots
        __syncwarp();
        slot = t = 0;
        next = { 0, 0 };
        next.advance(threadIdx.x/32, a.d/MOBE_STRETCH);
        find(a, row0);
        more(a, list, n_term, row0, n_row, 0, ahead);
    }
    __device__ __forceinline__ void more(const mobe_args & a, const uint32_t * list, int n_term, int row0, int n_row, int from, int to) {
        for (int i = from; i < to; i++) {
            issue(a, list, n_term, row0, n_row);
        }
    }
    // waits for the oldest block and returns its slot; then issue() may write the one that was returned the time before
    __device__ __forceinline__ const char * take(const mobe_args & a) {
        mobe_copy_wait(a.depth - 2);
        __syncwarp(); // all lanes' copies are there, and all have read the slot that is written next
        return slots + (slot + SLOT == a.depth*SLOT ? 0 : slot + SLOT);
    }
};

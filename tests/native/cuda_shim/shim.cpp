// Fibers and warp instructions of common.cuh, and the door for the test.

#include "mobe-cuda.cu"
#include "mobe-cuda-prompt.cu"

#include <ucontext.h>
#include <deque>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;
alignas(16) char shim_shared[227*1024];

static const size_t STACK = 256*1024;

struct meeting {
    int expected = 0, arrived = 0, round = 0;
};
struct warp_memory {
    meeting  all;
    float    value[32];
    bool     predicate[32];
    half2    a[32][4];
    uint2    b[32];
};

struct copy {
    char       * to;
    const char * from;
    char         read[16]; // what is there when it is asked for
};
struct thread_copies {
    std::vector<copy> open;               // not yet a group
    std::deque<std::vector<copy>> groups; // oldest first
};

// what a kernel in front writes: a block that reads it before ggml_cuda_pdl_sync() finds NaNs and experts that do not exist
struct in_front {
    char            * at;
    std::vector<char> data;
};
static std::vector<in_front> written;

static void shim_in_front(const void * at, size_t size) {
    written.push_back({ (char *) at, std::vector<char>((const char *) at, (const char *) at + size) });
}

static void spoil_what_is_written() {
    for (in_front & w : written) {
        memset(w.at, 0xff, w.data.size());
    }
}

void ggml_cuda_pdl_sync() {
    for (in_front & w : written) {
        memcpy(w.at, w.data.data(), w.data.size());
    }
}

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<char> running;
static meeting block;
static std::vector<warp_memory> warps;
static std::vector<thread_copies> copies;
static const std::function<void()> * work;
static int current;
static bool progress; // a thread ended, or the last one reached a barrier

static void meet(meeting & m) {
    const int round = m.round;
    if (++m.arrived == m.expected) {
        m.arrived = 0;
        m.round++;
        progress = true;
    }
    while (m.round == round) {
        swapcontext(&fibers[current], &scheduler);
    }
}

static void enter() {
    (*work)();
    mobe_copy_wait(0);
    running[current] = false;
    progress = true;
    swapcontext(&fibers[current], &scheduler);
}

void shim_launch(dim3 grid, int threads, const std::function<void()> & kernel) {
    static std::vector<char> stacks;
    stacks.resize(threads*STACK);
    work = &kernel;
    gridDim  = grid;
    blockDim = dim3(threads);
    for (unsigned y = 0; y < grid.y; y++) {
        for (unsigned x = 0; x < grid.x; x++) {
            memset(shim_shared, 0xff, sizeof(shim_shared)); // NaNs: nothing may rely on what lies there
            spoil_what_is_written();
            blockIdx = dim3(x, y);
            fibers.assign(threads, ucontext_t());
            running.assign(threads, true);
            warps.assign(threads/32, warp_memory());
            copies.assign(threads, thread_copies());
            block = meeting{ threads };
            for (warp_memory & w : warps) {
                w.all.expected = 32;
            }
            for (int i = 0; i < threads; i++) {
                getcontext(&fibers[i]);
                fibers[i].uc_stack.ss_sp   = stacks.data() + i*STACK;
                fibers[i].uc_stack.ss_size = STACK;
                makecontext(&fibers[i], enter, 0);
            }
            // Results must not depend on who comes first: every other block, threads run to the next barrier in turn, in another
            // order each time; in the others warps do, each as far as it comes, which shows more of missing barriers.
            static bool by_warps;
            by_warps = !by_warps;
            const int together = by_warps ? 32 : threads, n_group = threads/together;
            GGML_ASSERT((threads & (threads - 1)) == 0);
            static unsigned order = 1;
            const auto shuffled = [&](int i, int n) { return (int) (((order >> 8) + i*(order >> 16 | 1)) % n); };
            const auto next     = [&] { order = order*1664525 + 1013904223; };
            for (bool moved = true; moved;) {
                moved = false;
                next();
                const unsigned of_groups = order;
                for (int i = 0; i < n_group; i++) {
                    order = of_groups;
                    const int group = shuffled(i, n_group);
                    do {
                        progress = false;
                        next();
                        for (int j = 0; j < together; j++) {
                            current = group*together + shuffled(j, together);
                            if (running[current]) {
                                threadIdx = dim3(current, 0, 0);
                                swapcontext(&scheduler, &fibers[current]);
                            }
                        }
                        moved |= progress;
                    } while (progress && by_warps);
                }
            }
            GGML_ASSERT(std::count(running.begin(), running.end(), true) == 0 && "threads wait at a barrier that not all reach");
        }
    }
}

void __syncthreads() { meet(block); }
void __syncwarp()    { meet(warps[current/32].all); }

uint32_t atomicOr(uint32_t * to, uint32_t v) {
    const uint32_t old = *to;
    *to |= v;
    return old;
}

void mobe_copy_async(char * to, const char * from) {
    GGML_ASSERT((uintptr_t) to % 16 == 0 && (uintptr_t) from % 16 == 0);
    GGML_ASSERT(to >= shim_shared && to + 16 <= shim_shared + sizeof(shim_shared));
    memset(to, 0xff, 16);
    copy c = { to, from, {} };
    memcpy(c.read, from, 16);
    copies[current].open.push_back(c);
}

void mobe_copy_commit() {
    copies[current].groups.push_back(std::move(copies[current].open));
    copies[current].open.clear();
}

void mobe_copy_wait(int newest) {
    for (auto & groups = copies[current].groups; (int) groups.size() > newest; groups.pop_front()) {
        for (const copy & c : groups.front()) {
            if (memcmp(c.read, c.from, 16) == 0) { // else it depends on when it is read
                memcpy(c.to, c.from, 16);
            }
        }
    }
}

float __shfl_xor_sync(uint32_t, float v, int offset) {
    warp_memory & w = warps[current/32];
    w.value[current%32] = v;
    __syncwarp();
    const float got = w.value[(current%32) ^ offset];
    __syncwarp();
    return got;
}

uint32_t __ballot_sync(uint32_t, bool predicate) {
    warp_memory & w = warps[current/32];
    w.predicate[current%32] = predicate;
    __syncwarp();
    uint32_t mask = 0;
    for (int i = 0; i < 32; i++) {
        mask |= (uint32_t) w.predicate[i] << i;
    }
    __syncwarp();
    return mask;
}

void shim_mma(float * d, const half2 * a, uint2 b) {
    warp_memory & w = warps[current/32];
    const int lane = current%32;
    std::copy(a, a + 4, w.a[lane]);
    w.b[lane] = b;
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        const int row = lane/4 + i/2*8;
        const int col = lane%4*2 + i%2;
        for (int k = 0; k < 16; k++) {
            const half2    pa = w.a[row%8*4 + k%8/2][row/8 + k/8*2];
            const uint2    ub = w.b[col*4 + k%8/2];
            const uint32_t wb = k < 8 ? ub.x : ub.y;
            half2 pb;
            memcpy(&pb, &wb, sizeof(pb));
            d[i] += k%2 ? __high2float(pa)*__high2float(pb) : __low2float(pa)*__low2float(pb);
        }
    }
    __syncwarp();
}

// c[m x n] = a[k x m]^T . b[k x n], columns one after the other, f16 in and f32 out
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const void *, const void * a, cudaDataType,
        int lda, const void * b, cudaDataType, int ldb, const void *, void * c, cudaDataType, int ldc, cublasComputeType_t, cublasGemmAlgo_t) {
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < m; i++) {
            float sum = 0.0f;
            for (int l = 0; l < k; l++) {
                sum += __half2float(((const half *) a)[(int64_t) i*lda + l])*__half2float(((const half *) b)[(int64_t) j*ldb + l]);
            }
            ((float *) c)[(int64_t) j*ldc + i] = sum;
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void * alpha,
        const void * a, cudaDataType at, int lda, long long sa, const void * b, cudaDataType bt, int ldb, long long sb, const void * beta,
        void * c, cudaDataType ct, int ldc, long long sc, int count, cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    for (int i = 0; i < count; i++) {
        cublasGemmEx(h, ta, tb, m, n, k, alpha, (const half *) a + i*sa, at, lda, (const half *) b + i*sb, bt, ldb, beta, (float *) c + i*sc, ct, ldc,
            compute, algo);
    }
    return CUBLAS_STATUS_SUCCESS;
}

static ggml_cuda_device_info device_info;
const ggml_cuda_device_info & ggml_cuda_info() { return device_info; }
const char * shim_way;

// what GGML_CUDA_MOBE is, compute capability (900), shared memory of a block; dst: a node whose operands lie in memory. Returns what computed it: a
// mobe_path, or -1, and nothing is computed, where the device does not take it.
extern "C" int mobe_shim(ggml_tensor * dst, const char * way, int cc, int64_t shared) {
    shim_way = way;
    device_info.devices[0] = { cc, 1, (size_t) shared };
    if (!ggml_cuda_mobe_proj_supports(0, dst)) {
        return -1;
    }
    const mobe_path path = mobe_choose(0, dst);
    GGML_ASSERT(ggml_cuda_mobe_proj_needs_sync(0, dst) == (path == MOBE_PATH_PROMPT));
    if (path == MOBE_PATH_DECODE) { // the other kernels start when the one in front has ended
        for (int i = 0; i < 4; i++) {
            const ggml_tensor * src = dst->src[i];
            if (src->op != GGML_OP_NONE) {
                shim_in_front(src->data, ggml_nbytes(src));
            }
        }
    }
    ggml_backend_cuda_context ctx;
    ggml_cuda_op_mobe_proj(ctx, dst);
    ggml_cuda_pdl_sync(); // spoiled as well where a kernel does not read it
    written.clear();
    return path;
}

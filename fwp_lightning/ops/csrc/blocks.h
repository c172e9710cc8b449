// A grid of thread blocks: on a GPU, or on any host block after block and thread after thread.
//
// A kernel is a class whose objects are threads. What its threads do between two barriers is a phase: `block.phase(f)` runs
// f(thread) in all of them, then waits. nvcc makes that a call and a barrier. A C++ compiler makes it a loop over the
// threads of a block: the same source then computes the same numbers without a GPU, so that indices and arithmetic are
// tested there. `fwp_thread_order` has the loop run backward: results that change were read before a barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "memory_columns.h"

#ifndef __CUDACC__
#include <cmath>
#include <vector>

extern "C" {
// -1: from the last thread of a block to the first
inline int fwp_thread_order = 1;
void fwp_set_thread_order(int order) { fwp_thread_order = order; }
}
#endif

#ifdef __CUDACC__
#define FWP_IN_BLOCK __device__ __forceinline__
#else
#define FWP_IN_BLOCK
#endif

// A loop that is not unrolled: its body is long enough.
#ifdef __CUDACC__
#define FWP_LOOP _Pragma("unroll 1")
#else
#define FWP_LOOP
#endif

// What was read from memory is read again: a compiler that keeps it instead runs out of registers.
#define FWP_FORGET() asm volatile("" ::: "memory")

namespace {

constexpr int WARP = 32;

// Upper half of a float, rounded to nearest even; a NaN stays one.
struct bfloat16 {
    uint16_t bits;
};
FWP_EITHER float to_float(float x) { return x; }
FWP_EITHER float to_float(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
template <class To> FWP_EITHER To from_float(float x);
template <> FWP_EITHER float from_float<float>(float x) { return x; }
template <> FWP_EITHER bfloat16 from_float<bfloat16>(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};
    return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// Where a thread stands.
struct Place {
    int64_t block;
    int thread;
};

#ifdef __CUDACC__

template <class Thread> struct Block {
    Thread &me;
    template <class F> FWP_IN_BLOCK void phase(F f) {
        f(me);
        __syncthreads();
    }
};

template <class Thread> __global__ void __launch_bounds__(Thread::MAX_THREADS) run(const typename Thread::Task task) {
    extern __shared__ uint4 shared[];
    Thread me(task, Place{blockIdx.x, int(threadIdx.x)}, shared);
    Block<Thread> block{me};
    Thread::program(task, block);
}

inline const char *words_of(int code) { return cudaGetErrorString(cudaError_t(code)); }
// This library has a CUDA runtime of its own, which does not know the device that the caller's runtime is set to.
inline int use_device(int64_t number) { return cudaSetDevice(int(number)); }
inline int probe() {
    int devices;
    return cudaGetDeviceCount(&devices);
}

// Queues a grid on a stream of the current device; returns CUDA's error code, 0 if there is none.
template <class Thread>
int launch(const typename Thread::Task &task, int64_t blocks, int threads, size_t shared_bytes, void *stream) {
    if (blocks == 0) return cudaSuccess;
    if (shared_bytes > 48 * 1024) {
        const cudaError_t refused =
            cudaFuncSetAttribute(run<Thread>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (refused) return refused;
    }
    run<Thread><<<unsigned(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(task);
    return cudaGetLastError();
}

#else

inline const char *words_of(int) { return "no error"; }
inline int use_device(int64_t) { return 0; }
inline int probe() { return 0; }

template <class Thread> struct Block {
    std::vector<Thread> threads;
    template <class F> void phase(F f) {
        const int n = int(threads.size());
        for (int i = 0; i < n; ++i) f(threads[fwp_thread_order < 0 ? n - 1 - i : i]);
    }
};

template <class Thread>
int launch(const typename Thread::Task &task, int64_t blocks, int threads, size_t shared_bytes, void *) {
    struct alignas(16) Quad {
        float x[4];
    };
    for (int64_t b = 0; b < blocks; ++b) {
        // shared memory starts with anything in it
        std::vector<Quad> shared((shared_bytes + sizeof(Quad) - 1) / sizeof(Quad), Quad{{NAN, NAN, NAN, NAN}});
        Block<Thread> block;
        block.threads.reserve(threads);
        for (int i = 0; i < threads; ++i) block.threads.emplace_back(task, Place{b, i}, shared.data());
        Thread::program(task, block);
    }
    return 0;
}

#endif

}  // namespace

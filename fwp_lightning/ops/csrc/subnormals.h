// Numbers below the smallest normal one count as 0 while an object of this class lives: arithmetic on them can be a hundred
// times slower, and what decays geometrically ends among them.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

class FlushedSubnormals {
  public:
#if defined(__SSE__)
    FlushedSubnormals() : saved(_mm_getcsr()) { _mm_setcsr(saved | 0x8040); }  // flush results, take operands as 0
    ~FlushedSubnormals() { _mm_setcsr(saved); }
    FlushedSubnormals(const FlushedSubnormals &) = delete;

  private:
    const unsigned saved;
#elif defined(__aarch64__)
    FlushedSubnormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
        __asm__ volatile("msr fpcr, %0" : : "r"(saved | (uint64_t(1) << 24)));
    }
    ~FlushedSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved)); }
    FlushedSubnormals(const FlushedSubnormals &) = delete;

  private:
    uint64_t saved;
#else
    ~FlushedSubnormals() {}
#endif
};

}  // namespace

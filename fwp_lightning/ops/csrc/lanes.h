// Sixteen numbers side by side: what every kernel here computes with.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// as many numbers as a register holds: a wider vector would live in memory
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

template <class Real> struct Lanes;
template <> struct Lanes<float> {
    typedef float type __attribute__((vector_size(LANES * sizeof(float))));
    typedef int32_t bits __attribute__((vector_size(LANES * sizeof(int32_t))));
};
template <> struct Lanes<double> {
    typedef double type __attribute__((vector_size(LANES * sizeof(double))));
    typedef int64_t bits __attribute__((vector_size(LANES * sizeof(int64_t))));
};

// Rows that end within a vector. With masks where there are any: a call would have the usual case keep its registers in
// memory.
#if defined(__AVX512F__)
[[maybe_unused]] inline Lanes<float>::type load_some(const float *from, int64_t n) {
    return (Lanes<float>::type)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), from);
}
[[maybe_unused]] inline void store_some(float *to, Lanes<float>::type x, int64_t n) {
    _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), (__m512)x);
}
#endif
// Otherwise out of line and through memory.
template <class Real> [[maybe_unused, gnu::noinline]] typename Lanes<Real>::type load_some(const Real *from, int64_t n) {
    typename Lanes<Real>::type out{};
    std::memcpy(&out, from, n * sizeof(Real));
    return out;
}
template <class Real>
[[maybe_unused, gnu::noinline]] void store_some(Real *to, typename Lanes<Real>::type x, int64_t n) {
    std::memcpy(to, &x, n * sizeof(Real));
}
// The first n numbers of a row, the rest zero; nothing after them is touched. All of a vector's if n is LANES or more.
template <class Real> [[maybe_unused]] inline typename Lanes<Real>::type load(const Real *from, int64_t n) {
    if (__builtin_expect(n < LANES, 0)) return load_some(from, n);
    typename Lanes<Real>::type out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
template <class Real> [[maybe_unused]] inline void store(Real *to, typename Lanes<Real>::type x, int64_t n) {
    if (__builtin_expect(n < LANES, 0)) return store_some(to, x, n);
    std::memcpy(to, &x, sizeof x);
}

template <class Real, int N> struct Vector {
    typedef Real type __attribute__((vector_size(N * sizeof(Real))));
};
// Pairwise: few additions wait for each other, and rounding errors grow with the logarithm.
template <class Real, int N = LANES> [[maybe_unused]] inline Real sum_lanes(typename Vector<Real, N>::type x) {
    if constexpr (N == 2) {
        return x[0] + x[1];
    } else {
        typename Vector<Real, N / 2>::type low, high;
        std::memcpy(&low, &x, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char *>(&x) + sizeof low, sizeof high);
        return sum_lanes<Real, N / 2>(low + high);
    }
}

// exp for -87 <= x <= 88 to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]
[[maybe_unused, gnu::always_inline]] inline Lanes<float>::type exp_in_range(Lanes<float>::type x) {
    using V = Lanes<float>::type;
    using I = Lanes<float>::bits;
    const V shifter = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (x * 1.44269504088896341f + shifter) - shifter;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I power = (__builtin_convertvector(n, I) + 127) << 23;
    V scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

}  // namespace

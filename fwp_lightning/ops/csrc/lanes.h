// Sixteen numbers side by side: what every kernel here computes with.
#pragma once

#include <cstdint>
#include <cstring>

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

// exp for -87 <= x <= 88 to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]
[[maybe_unused]] inline Lanes<float>::type exp_in_range(Lanes<float>::type x) {
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

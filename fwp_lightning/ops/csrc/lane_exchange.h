// Numbers that change lanes: the sums of many vectors' lanes at once.
//
// Adding up the lanes of one vector takes as many exchanges as for a pair of them, and each waits for the one before.
#pragma once

#include <cstddef>
#include <utility>

#include "lanes.h"

namespace {

// Elements of two vectors: lane l comes from place of(l) among a's and then b's.
template <class From, class V, size_t... L> inline V picked(V a, V b, std::index_sequence<L...>) {
    return __builtin_shufflevector(a, b, From::of(L)...);
}
template <class From, class V> inline V pick(V a, V b) { return picked<From>(a, b, std::make_index_sequence<LANES>()); }

// In each four of lanes two from a and two from b, its lower or upper ones: a, b, a, b (SPAN 1) or a, a, b, b (SPAN 2).
template <int SPAN, int UPPER> struct Woven {
    static constexpr int of(int l) {
        const int place = l % 4, first = l - place + 2 * UPPER;
        return SPAN == 1 ? first + place / 2 + place % 2 * LANES : first + place % 2 + place / 2 * LANES;
    }
};
// Of every pair of fours the first or the second: a's, then b's.
template <int SECOND> struct Fours {
    static constexpr int of(int l) {
        const int four = l / 4, half = LANES / 8;
        return (four < half ? 0 : LANES) + (four % (half ? half : 1) * 2 + SECOND) * 4 + l % 4;
    }
};

template <int LEVEL, class V> inline V folded(V a, V b) {
    if constexpr (LEVEL == 0) return pick<Woven<1, 0>>(a, b) + pick<Woven<1, 1>>(a, b);
    if constexpr (LEVEL == 1) return pick<Woven<2, 0>>(a, b) + pick<Woven<2, 1>>(a, b);
    if constexpr (LEVEL > 1) return pick<Fours<0>>(a, b) + pick<Fours<1>>(a, b);
}
template <int LEVEL, int N, class V> inline __attribute__((always_inline)) V fold(const V *x) {
    if constexpr ((1 << LEVEL) == LANES) {
        return x[0];
    } else {
        V y[(N + 1) / 2];
#pragma GCC unroll 16
        for (int i = 0; i < (N + 1) / 2; ++i) y[i] = folded<LEVEL>(x[2 * i], 2 * i + 1 < N ? x[2 * i + 1] : V{});
        return fold<LEVEL + 1, (N + 1) / 2>(y);
    }
}
// The sums of the lanes of each of N vectors, added up pairwise.
template <class Real, int N> class LaneSums {
    using Num = typename Lanes<Real>::type;
    static constexpr int VECTORS = (N + LANES - 1) / LANES;
    Num sums[VECTORS];

  public:
    inline __attribute__((always_inline)) explicit LaneSums(const Num *x) {
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) {
            constexpr int AT_ONCE = N < LANES ? N : LANES;
            Num some[AT_ONCE];
#pragma GCC unroll 16
            for (int j = 0; j < AT_ONCE; ++j) some[j] = v * LANES + j < N ? x[v * LANES + j] : Num{};
            sums[v] = fold<0, AT_ONCE>(some);
        }
    }
    Num vector(int v) const { return sums[v]; }
    Real operator[](int n) const { return reinterpret_cast<const Real *>(sums)[n]; }
};

}  // namespace

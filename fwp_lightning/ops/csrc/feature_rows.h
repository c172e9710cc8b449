// phi of the keys or queries of one head: rows of the tensor as they are, or computed a few steps at a time.
//
// Features of the paper's maps are wider than what they are computed from (DPFP-3: six times), so they are computed where
// they are needed, again in the backward pass, and live in a ring of RING rows padded with zeros. Only inputs and their
// gradients exist in memory for all steps.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "lanes.h"

namespace {

enum Map { IDENTITY = 0, ELU = 1, DPFP = 2 };

// the steps of one pass over a memory and of the next
constexpr int64_t RING = 8;

inline int64_t blocks_of(int64_t n) { return (n + LANES - 1) / LANES; }
inline int64_t padded(int64_t n) { return blocks_of(n) * LANES; }

// Zeros on a boundary of whole vectors.
template <class Real> class Buffer {
    std::unique_ptr<Real, decltype(&std::free)> memory{nullptr, &std::free};

  public:
    using Num = typename Lanes<Real>::type;
    explicit Buffer(int64_t n) {
        const int64_t bytes = std::max<int64_t>(padded(n), LANES) * sizeof(Real);
        memory.reset(static_cast<Real *>(std::aligned_alloc(sizeof(Num), bytes)));
        std::memset(memory.get(), 0, bytes);
    }
    Real *numbers() const { return memory.get(); }
    Num *vectors() const { return reinterpret_cast<Num *>(memory.get()); }
};

// Rows of consecutive steps: [s] is the row of step s.
template <class Real> struct Steps {
    Real *first;
    int64_t stride;

    inline __attribute__((always_inline)) Real *operator[](int s) const { return first + s * stride; }
    operator Steps<const Real>() const { return {first, stride}; }
};

// The rows of one head in a [B, T, H, size] tensor, or the ring of them that is at hand (mask = RING - 1).
template <class Real> struct Rows {
    Real *first;
    int64_t stride, size, mask;

    Real *operator()(int64_t t) const { return first + (t & mask) * stride; }
    operator Rows<const Real>() const { return {first, stride, size, mask}; }
    // from step t on, as far as the next multiple of the ring
    Steps<Real> from(int64_t t) const { return {(*this)(t), stride}; }
    // To the second cache: the first one lets too few lines be on their way. Inlined by force: GCC takes a call that only
    // fetches for one without effect.
    template <int N> inline __attribute__((always_inline)) void fetch(int64_t t) const {
        constexpr int64_t line = 64 / sizeof(Real);
        const Real *row = (*this)(t);
        for (int64_t i = 0; i < size; i += line)
            for (int s = 0; s < N; ++s) __builtin_prefetch(row + s * stride + i, 0, 2);
    }
};

template <class Real> inline typename Lanes<Real>::type exp_of_negative(typename Lanes<Real>::type x);
// below -87 the result would be no normal number: it stays at 1.6e-38
template <> inline Lanes<float>::type exp_of_negative<float>(Lanes<float>::type x) {
    return exp_in_range(x < -87.0f ? Lanes<float>::type{} - 87.0f : x);
}
template <> inline Lanes<double>::type exp_of_negative<double>(Lanes<double>::type x) {
    for (int l = 0; l < LANES; ++l) x[l] = std::exp(x[l]);
    return x;
}

// What phi is: K features of `size` inputs, divided by their sum + eps if `normalise`.
struct FeatureMap {
    int64_t map, nu, size, n_features;
    bool normalise;
    double eps;

    bool computes() const { return map != IDENTITY || normalise; }
};

template <class Real> class FeatureRows {
    using Num = typename Lanes<Real>::type;
    FeatureMap phi;
    Rows<const Real> input{}, features{};
    Buffer<Real> ring, halves, change;
    Real inverse[RING] = {};

    int64_t ring_size() const { return phi.map == DPFP ? 2 * phi.size : 0; }
    // u = [relu(x), relu(-x)] of a step, its first nu entries repeated at the end
    Real *u(int64_t t) const { return halves.numbers() + (t & (RING - 1)) * padded(ring_size() + phi.nu); }

  public:
    explicit FeatureRows(const FeatureMap &map)
        : phi(map), ring(map.computes() ? RING * padded(map.n_features) : 0), halves(RING * padded(ring_size() + map.nu)),
          change(2 * padded(ring_size() + map.nu)) {}

    void attach(Rows<const Real> rows) {
        input = rows;
        features = phi.computes() ? Rows<const Real>{ring.numbers(), padded(phi.n_features), phi.n_features, RING - 1} : rows;
        for (Real &x : inverse) x = 1;
    }
    const Real *operator()(int64_t t) const { return features(t); }
    Steps<const Real> from(int64_t t) const { return features.from(t); }
    template <int N> inline __attribute__((always_inline)) void fetch(int64_t t) const { input.template fetch<N>(t); }

    // First half of a row's computation: what would be read too soon after it was written if the second followed at once.
    void prepare(int64_t t) {
        if (phi.map != DPFP) return;
        const Real *x = input(t);
        Real *row = u(t);
        for (int64_t i = 0; i < phi.size; ++i) {
            // NaN stays
            row[i] = x[i] < 0 ? Real(0) : x[i];
            row[phi.size + i] = x[i] > 0 ? Real(0) : -x[i];
        }
        for (int64_t i = 0; i < phi.nu; ++i) row[ring_size() + i] = row[i];
    }
    void compute(int64_t t) {
        if (!phi.computes()) return;
        Real *row = const_cast<Real *>(features(t));
        if (phi.map == DPFP)
            multiply_neighbours(u(t), row);
        else
            for (int64_t i = 0; i < phi.n_features; i += LANES) {
                Num x = load<Real>(input(t) + i, phi.n_features - i);
                if (phi.map == ELU) x = exp_of_negative<Real>(x > 0 ? Num{} : x) + (x < 0 ? Num{} : x);
                store<Real>(row + i, x, phi.n_features - i);
            }
        if (!phi.normalise) return;
        Num sum{};
        for (int64_t i = 0; i < phi.n_features; i += LANES) sum += load<Real>(row + i, LANES);
        const Real scale = inverse[t & (RING - 1)] = 1 / (sum_lanes<Real>(sum) + Real(phi.eps));
        for (int64_t i = 0; i < phi.n_features; i += LANES) store<Real>(row + i, load<Real>(row + i, LANES) * scale, LANES);
    }

    // The gradient of a step's input from that of its features, padded with zeros; `gradient` is overwritten.
    template <bool ADD> void pull_back(int64_t t, Num *gradient, Real *to) {
        const int64_t K = phi.n_features;
        const Real *f = features(t), scale = inverse[t & (RING - 1)];
        if (phi.normalise) {
            Num along{};
            for (int64_t c = 0; c < blocks_of(K); ++c) along += gradient[c] * load<Real>(f + c * LANES, LANES);
            const Real mean = sum_lanes<Real>(along);
            for (int64_t c = 0; c < blocks_of(K); ++c) gradient[c] = gradient[c] - mean;
        }
        if (phi.map == DPFP) return pull_back_neighbours<ADD>(t, reinterpret_cast<Real *>(gradient), scale, to);
        for (int64_t c = 0; c < blocks_of(K); ++c) {
            const Num one = Num{} + scale, feature = load<Real>(f + c * LANES, K - c * LANES);
            // elu(x) + 1 is its own derivative below 1, and 1 above; both are divided by the sum
            const Num slope = phi.map == ELU ? (one < feature ? one : feature) : one;
            Num x = gradient[c] * slope;
            if (ADD) x += load<Real>(to + c * LANES, K - c * LANES);
            store<Real>(to + c * LANES, x, K - c * LANES);
        }
    }

  private:
    void multiply_neighbours(const Real *row, Real *to) const {
        const int64_t n = ring_size();
        for (int64_t j = 1; j <= phi.nu; ++j, to += n)
            for (int64_t i = 0; i < n; ++i) to[i] = row[i] * row[i + j];
    }
    template <bool ADD> void pull_back_neighbours(int64_t t, const Real *g, Real scale, Real *to) {
        const int64_t n = ring_size();
        const Real *row = u(t);
        Real *left = change.numbers(), *right = left + padded(n + phi.nu);
        std::fill(left, left + n, Real(0));
        std::fill(right, right + n + phi.nu, Real(0));
        for (int64_t j = 1; j <= phi.nu; ++j, g += n)
            for (int64_t i = 0; i < n; ++i) {
                left[i] += g[i] * row[i + j];
                right[i + j] += g[i] * row[i];
            }
        for (int64_t i = 0; i < phi.nu; ++i) right[i] += right[n + i];
        for (int64_t i = 0; i < phi.size; ++i) {
            const Real positive = row[i] > 0 ? left[i] + right[i] : Real(0);
            const Real negative = row[phi.size + i] > 0 ? left[phi.size + i] + right[phi.size + i] : Real(0);
            const Real x = (positive - negative) * scale;
            to[i] = ADD ? to[i] + x : x;
        }
    }
};

}  // namespace

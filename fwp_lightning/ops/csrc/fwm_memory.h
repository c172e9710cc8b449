// The fwm rule for one sequence of one head, forward and backward: W <- W + k (x) beta (v - W^T k), then
// W <- W / max(1, |W|_F) (Schlag et al. 2021). ../README.md derives what is computed.
//
// Use: forward() with a `kept` buffer of fwm_kept_numbers(), then backward() with that buffer as it was left; it may run
// any number of times. `scratch` of fwm_scratch_numbers() is only used during a call: one for each thread will do. Buffers
// need no alignment and no initial value; nothing is allocated here, and equal inputs give equal bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

// Row t of a matrix, `stride` numbers after row t - 1; data may be null where a member says so.
template <class T> struct Rows {
    T *data;
    int64_t stride;
    T *operator[](int64_t t) const { return data + t * stride; }
    explicit operator bool() const { return data != nullptr; }
};

template <class Real> struct FwmSequence {
    int64_t steps, keys, values;  // T >= 0, K >= 1, V >= 1
    Rows<const Real> k;           // [T, K]
    Rows<const Real> v;           // [T, V]; null: values are one-hot
    Rows<const int64_t> ids;      // [T, 1], where values are one-hot: the component that is 1, in 0 .. V - 1
    Rows<const Real> beta;        // [T, 1]
    Rows<const Real> q;           // [T, K]; null: write only
    const Real *state;            // [K, V] before the first step; null: an empty memory, whose first write is not rescaled
};

// What backward() reads and writes. Where an output is null it is not wanted.
template <class Real> struct FwmGradients {
    const Real *last;            // [K, V], of the last memory; null: zero
    Rows<const Real> o;          // [T, V]; ignored without q
    Rows<Real> k, v, beta, q;    // outputs: [T, K], [T, V], [T, 1], [T, K]; q is ignored without q
    Real *state;                 // output: [K, V]
};

// How many numbers `kept` holds.
template <class Real> int64_t fwm_kept_numbers(const FwmSequence<Real> &s) {
    return (s.steps + 1) * s.keys * s.values + s.steps;
}

// How many numbers `scratch` holds, for either direction.
template <class Real> int64_t fwm_scratch_numbers(const FwmSequence<Real> &s) {
    return 2 * s.keys * s.values + 3 * s.values;
}

// Fills o [T, V] (with q only) and last [K, V]; either may be null. `kept` is null where no gradient will be asked for.
template <class Real>
void fwm_forward(const FwmSequence<Real> &s, Rows<Real> o, Real *last, Real *kept, Real *scratch) {
    const int64_t K = s.keys, V = s.values, cells = K * V;
    Real *W = scratch, *u = W + 2 * cells, *scales = kept ? kept + (s.steps + 1) * cells : nullptr;
    for (int64_t i = 0; i < cells; ++i) W[i] = s.state ? s.state[i] : Real(0);
    if (kept) std::copy(W, W + cells, kept);
    for (int64_t t = 0; t < s.steps; ++t) {
        const Real *key = s.k[t];
        for (int64_t j = 0; j < V; ++j) u[j] = s.v ? s.v[t][j] : Real(j == *s.ids[t]);
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < V; ++j) u[j] -= key[i] * W[i * V + j];
        Real squared_norm = 0;
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < V; ++j) {
                const Real w = W[i * V + j] += key[i] * *s.beta[t] * u[j];
                squared_norm += w * w;
            }
        // written so that a NaN is not lost
        const Real scale = (t == 0 && !s.state) || squared_norm <= 1 ? Real(1) : 1 / std::sqrt(squared_norm);
        for (int64_t i = 0; i < cells; ++i) W[i] *= scale;
        if (kept) {
            std::copy(W, W + cells, kept + (t + 1) * cells);
            scales[t] = scale;
        }
        if (s.q && o)
            for (int64_t j = 0; j < V; ++j) {
                Real read = 0;
                for (int64_t i = 0; i < K; ++i) read += s.q[t][i] * W[i * V + j];
                o[t][j] = read;
            }
    }
    if (last) std::copy(W, W + cells, last);
}

template <class Real>
void fwm_backward(const FwmSequence<Real> &s, const Real *kept, const FwmGradients<Real> &grad, Real *scratch) {
    const int64_t K = s.keys, V = s.values, cells = K * V;
    const Real *scales = kept + (s.steps + 1) * cells;
    Real *G = scratch, *error = G + 2 * cells, *grad_u = error + V, *grad_error = grad_u + V;
    for (int64_t i = 0; i < cells; ++i) G[i] = grad.last ? grad.last[i] : Real(0);
    for (int64_t t = s.steps - 1; t >= 0; --t) {
        const Real *before = kept + t * cells, *after = before + cells, *key = s.k[t];
        const Real beta = *s.beta[t], scale = scales[t];
        if (s.q)
            for (int64_t i = 0; i < K; ++i) {
                Real read = 0;
                for (int64_t j = 0; j < V; ++j) {
                    read += after[i * V + j] * grad.o[t][j];
                    G[i * V + j] += s.q[t][i] * grad.o[t][j];
                }
                if (grad.q) grad.q[t][i] = read;
            }
        // where the memory was rescaled, the part of the gradient along it vanishes
        Real along = 0;
        for (int64_t i = 0; i < cells && scale != 1; ++i) along += G[i] * after[i];
        for (int64_t i = 0; i < cells; ++i) G[i] = (G[i] - along * after[i]) * scale;
        for (int64_t j = 0; j < V; ++j) {
            error[j] = s.v ? s.v[t][j] : Real(j == *s.ids[t]);
            grad_u[j] = 0;
        }
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < V; ++j) {
                error[j] -= key[i] * before[i * V + j];
                grad_u[j] += key[i] * G[i * V + j];
            }
        Real grad_beta = 0;
        for (int64_t j = 0; j < V; ++j) {
            grad_beta += grad_u[j] * error[j];
            grad_error[j] = beta * grad_u[j];
            if (grad.v) grad.v[t][j] = grad_error[j];
        }
        if (grad.beta) *grad.beta[t] = grad_beta;
        for (int64_t i = 0; i < K; ++i) {
            Real grad_key = 0;
            for (int64_t j = 0; j < V; ++j) {
                grad_key += G[i * V + j] * beta * error[j] - before[i * V + j] * grad_error[j];
                G[i * V + j] -= key[i] * grad_error[j];
            }
            if (grad.k) grad.k[t][i] = grad_key;
        }
    }
    if (grad.state) std::copy(G, G + cells, grad.state);
}

}  // namespace

// The fwm rule over [B, T, H, D] tensors, forward and backward, with a state in and out: fwm_memory.h for every head.

#include "fwm_memory.h"

namespace {

template <class Real> struct Problem {
    int64_t batch, steps, heads, keys, values;  // B, T, H, K, V
    int64_t threads;
    const Real *q, *k, *v, *beta, *state;       // q null: write only; state null: empty memories

    int64_t row(int64_t i) const { return i / heads * steps * heads + i % heads; }
    int64_t cells() const { return keys * values; }
    // rows of head i of a [B, T, H, size] tensor
    template <class T> Rows<T> rows(T *data, int64_t i, int64_t size) const {
        return {data ? data + row(i) * size : nullptr, heads * size};
    }
    FwmSequence<Real> sequence(int64_t i) const {
        return {steps, keys, values, rows(k, i, keys), rows(v, i, values), {nullptr, 0}, rows(beta, i, 1), rows(q, i, keys),
                state ? state + i * cells() : nullptr};
    }
};

// f(head, scratch of its thread) for all heads; heads are independent, so any number of threads gives the same numbers
template <class Real, class F> void for_each_head(const Problem<Real> &p, Real *scratch, F f) {
    const int64_t heads = p.batch * p.heads, own = fwm_scratch_numbers(p.sequence(0));
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t thread = 0; thread < p.threads; ++thread)
        for (int64_t i = heads * thread / p.threads; i < heads * (thread + 1) / p.threads; ++i) f(i, scratch + thread * own);
}

// o [B, T, H, V] (null without q), last [B, H, K, V], kept [B, H, n] (null where no gradient will be asked for)
template <class Real> void forward(const Problem<Real> &p, Real *o, Real *last, Real *kept, Real *scratch) {
    const int64_t per_head = fwm_kept_numbers(p.sequence(0));
    for_each_head(p, scratch, [&](int64_t i, Real *own) {
        const FwmOutputs<Real> out = {p.rows(o, i, p.values), last + i * p.cells()};
        fwm_forward(p.sequence(i), out, kept ? kept + i * per_head : nullptr, own);
    });
}

// grad_last null: zero
template <class Real>
void backward(const Problem<Real> &p, const Real *kept, const Real *grad_o, const Real *grad_last, Real *grad_q, Real *grad_k,
              Real *grad_v, Real *grad_beta, Real *grad_state, Real *scratch) {
    const int64_t per_head = fwm_kept_numbers(p.sequence(0));
    for_each_head(p, scratch, [&](int64_t i, Real *own) {
        const FwmGradients<Real> grad = {grad_last ? grad_last + i * p.cells() : nullptr,
                                         p.rows(grad_o, i, p.values),
                                         p.rows(grad_k, i, p.keys),
                                         p.rows(grad_v, i, p.values),
                                         p.rows(grad_beta, i, 1),
                                         p.rows(grad_q, i, p.keys),
                                         grad_state ? grad_state + i * p.cells() : nullptr};
        fwm_backward(p.sequence(i), kept + i * per_head, grad, own);
    });
}

}  // namespace

#define FWP_FWM(REAL, SUFFIX)                                                                                            \
    extern "C" void fwp_fwm_forward_##SUFFIX(const Problem<REAL> *p, REAL *o, REAL *last, REAL *kept, REAL *scratch) {   \
        forward<REAL>(*p, o, last, kept, scratch);                                                                       \
    }                                                                                                                    \
    extern "C" void fwp_fwm_backward_##SUFFIX(const Problem<REAL> *p, const REAL *kept, const REAL *grad_o,              \
                                              const REAL *grad_last, REAL *grad_q, REAL *grad_k, REAL *grad_v,           \
                                              REAL *grad_beta, REAL *grad_state, REAL *scratch) {                        \
        backward<REAL>(*p, kept, grad_o, grad_last, grad_q, grad_k, grad_v, grad_beta, grad_state, scratch);             \
    }                                                                                                                    \
    extern "C" int64_t fwp_fwm_kept_##SUFFIX(const Problem<REAL> *p) { return fwm_kept_numbers(p->sequence(0)); }        \
    extern "C" int64_t fwp_fwm_scratch_##SUFFIX(const Problem<REAL> *p) {                                                \
        return p->threads * fwm_scratch_numbers(p->sequence(0));                                                         \
    }

FWP_FWM(float, float32)
FWP_FWM(double, float64)

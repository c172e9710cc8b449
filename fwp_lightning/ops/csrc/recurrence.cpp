// The sum and delta rules over [B, T, H, D] tensors, forward and backward, with a state in and out.
//
// A memory W [K, V] is cut into blocks of sixteen columns, one in each lane: columns of W never meet, since a write is
// k (x) u and u_v needs column v alone. So the time loop is broadcasts and multiply-adds, W stays in registers or L1, and
// nothing is summed across lanes. The backward pass goes through time twice: once with values in the lanes (gradients of
// v and beta), once with keys in the lanes (gradients of q and k). The memories of an interval are written again from a
// checkpoint; undoing writes instead would lose all digits where a memory grows. ../README.md has the equations.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;

template <class Real> struct Lanes { typedef Real type __attribute__((vector_size(LANES * sizeof(Real)))); };

template <class Real> struct Problem {
    int64_t batch, steps, heads, keys, values;  // B, T, H, K, V
    int64_t delta;                              // 0: sum rule, 1: delta rule
    int64_t interval;                           // steps between checkpoints
    int64_t threads;
    const Real *q, *k, *v, *beta, *state;       // q may be null: write only; beta is null for the sum rule

    int64_t checkpoints() const { return (steps + interval - 1) / interval; }
    int64_t cells() const { return keys * values; }
};

// One block of up to sixteen numbers of a row, the rest zero.
template <class Real> inline typename Lanes<Real>::type load(const Real *from, int64_t n) {
    typename Lanes<Real>::type out{};
    if (n >= LANES)
        std::memcpy(&out, from, sizeof out);
    else
        std::memcpy(&out, from, n * sizeof(Real));
    return out;
}
template <class Real> inline void store(Real *to, typename Lanes<Real>::type x, int64_t n) {
    std::memcpy(to, &x, std::min<int64_t>(n, LANES) * sizeof(Real));
}
template <class Real> inline Real sum_lanes(typename Lanes<Real>::type x) {
    Real total = 0;
    for (int l = 0; l < LANES; ++l) total += x[l];
    return total;
}

// sum_i scale[i] * rows[i], in four chains to hide the latency of a multiply-add
template <class Real> inline typename Lanes<Real>::type combine(const typename Lanes<Real>::type *rows, const Real *scale, int64_t n) {
    typename Lanes<Real>::type a{}, b{}, c{}, d{};
    int64_t i = 0;
    for (; i + 3 < n; i += 4) {
        a += rows[i] * scale[i];
        b += rows[i + 1] * scale[i + 1];
        c += rows[i + 2] * scale[i + 2];
        d += rows[i + 3] * scale[i + 3];
    }
    for (; i < n; ++i) a += rows[i] * scale[i];
    return (a + b) + (c + d);
}
template <class Real> inline void add_outer(typename Lanes<Real>::type *rows, const Real *scale, typename Lanes<Real>::type x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) rows[i] += scale[i] * x;
}

template <class Real> struct Head {
    using V = typename Lanes<Real>::type;
    const Problem<Real> &p;
    int64_t index, b, h;

    Head(const Problem<Real> &problem, int64_t i) : p(problem), index(i), b(i / problem.heads), h(i % problem.heads) {}

    int64_t row(int64_t t) const { return (b * p.steps + t) * p.heads + h; }
    const Real *q(int64_t t) const { return p.q + row(t) * p.keys; }
    const Real *k(int64_t t) const { return p.k + row(t) * p.keys; }
    const Real *v(int64_t t) const { return p.v + row(t) * p.values; }
    Real beta(int64_t t) const { return p.beta[row(t)]; }

    // errors [B, T, H, V]: v - W^T k before each write; checkpoints [B, H, N, K, V]: W after each interval
    void forward(Real *o, Real *errors, Real *last, Real *checkpoints, V *W) const {
        for (int64_t c = 0; c < p.values; c += LANES) {
            const int64_t n = p.values - c;
            for (int64_t i = 0; i < p.keys; ++i)
                W[i] = p.state ? load<Real>(p.state + index * p.cells() + i * p.values + c, n) : V{};
            for (int64_t t = 0; t < p.steps; ++t) {
                const Real *key = k(t);
                V u = load<Real>(v(t) + c, n);
                if (p.delta) {
                    u -= combine<Real>(W, key, p.keys);
                    store<Real>(errors + row(t) * p.values + c, u, n);
                    u *= beta(t);
                }
                add_outer<Real>(W, key, u, p.keys);
                if (p.q) store<Real>(o + row(t) * p.values + c, combine<Real>(W, q(t), p.keys), n);
                if ((t + 1) % p.interval == 0 || t + 1 == p.steps) {
                    Real *kept = checkpoints + (index * p.checkpoints() + t / p.interval) * p.cells();
                    for (int64_t i = 0; i < p.keys; ++i) store<Real>(kept + i * p.values + c, W[i], n);
                }
            }
            for (int64_t i = 0; i < p.keys; ++i) store<Real>(last + index * p.cells() + i * p.values + c, W[i], n);
        }
    }

    // values in the lanes: grad_v, grad_beta, and for the second pass removed = beta r [B, T, H, V]; the last G is dL/dW_0
    void backward_values(const Real *errors, const Real *grad_o, const Real *grad_last, Real *grad_v, Real *grad_beta,
                         Real *removed, Real *grad_state, V *G) const {
        for (int64_t c = 0; c < p.values; c += LANES) {
            const int64_t n = p.values - c;
            for (int64_t i = 0; i < p.keys; ++i) G[i] = load<Real>(grad_last + index * p.cells() + i * p.values + c, n);
            for (int64_t t = p.steps - 1; t >= 0; --t) {
                const Real *key = k(t);
                if (p.q) add_outer<Real>(G, q(t), load<Real>(grad_o + row(t) * p.values + c, n), p.keys);
                const V r = combine<Real>(G, key, p.keys);
                if (!p.delta) {
                    store<Real>(grad_v + row(t) * p.values + c, r, n);
                    continue;
                }
                const V scaled = beta(t) * r;
                store<Real>(grad_v + row(t) * p.values + c, scaled, n);
                store<Real>(removed + row(t) * p.values + c, scaled, n);
                grad_beta[row(t)] += sum_lanes<Real>(load<Real>(errors + row(t) * p.values + c, n) * r);
                add_outer<Real>(G, key, -scaled, p.keys);
            }
            for (int64_t i = 0; i < p.keys; ++i) store<Real>(grad_state + index * p.cells() + i * p.values + c, G[i], n);
        }
    }
    // keys in the lanes: grad_q and grad_k of one block of sixteen keys; G [V] rows, memories [interval + 1, V] rows
    void backward_keys(const Real *errors, const Real *removed, const Real *grad_o, const Real *grad_last,
                       const Real *checkpoints, Real *grad_q, Real *grad_k, V *G, V *memories) const {
        for (int64_t c = 0; c < p.keys; c += LANES) {
            const int64_t n = p.keys - c;
            load_columns(grad_last + index * p.cells(), c, n, G);
            for (int64_t end = p.steps; end > 0;) {
                const int64_t begin = (end - 1) / p.interval * p.interval;
                write_again(errors, checkpoints, c, begin, end, memories);
                for (int64_t t = end - 1; t >= begin; --t) {
                    const V *before = memories + (t - begin) * p.values, *after = before + p.values;
                    const V key = load<Real>(k(t) + c, n);
                    if (p.q) {
                        const Real *g = grad_o + row(t) * p.values;
                        store<Real>(grad_q + row(t) * p.keys + c, combine<Real>(after, g, p.values), n);
                        add_outer<Real>(G, g, load<Real>(q(t) + c, n), p.values);
                    }
                    if (!p.delta) {
                        store<Real>(grad_k + row(t) * p.keys + c, combine<Real>(G, v(t), p.values), n);
                        continue;
                    }
                    const Real *e = errors + row(t) * p.values, *lost = removed + row(t) * p.values;
                    const V gain = beta(t) * combine<Real>(G, e, p.values);
                    store<Real>(grad_k + row(t) * p.keys + c, gain - combine<Real>(before, lost, p.values), n);
                    add_outer<Real>(G, lost, -key, p.values);
                }
                end = begin;
            }
        }
    }
    // the memories before `begin` and after each step of an interval, written again from what was kept
    void write_again(const Real *errors, const Real *checkpoints, int64_t c, int64_t begin, int64_t end, V *memories) const {
        const int64_t n = p.keys - c;
        const int64_t interval = begin / p.interval;
        if (interval > 0)
            load_columns(checkpoints + (index * p.checkpoints() + interval - 1) * p.cells(), c, n, memories);
        else if (p.state)
            load_columns(p.state + index * p.cells(), c, n, memories);
        else
            std::fill(memories, memories + p.values, V{});
        for (int64_t t = begin; t < end; ++t) {
            const V *before = memories + (t - begin) * p.values;
            V *after = memories + (t - begin + 1) * p.values;
            const V key = load<Real>(k(t) + c, n) * (p.delta ? beta(t) : Real(1));
            const Real *u = p.delta ? errors + row(t) * p.values : v(t);
            for (int64_t j = 0; j < p.values; ++j) after[j] = before[j] + u[j] * key;
        }
    }
    // rows[v] = sixteen entries of column v of a [K, V] matrix
    void load_columns(const Real *matrix, int64_t c, int64_t n, V *rows) const {
        for (int64_t j = 0; j < p.values; ++j) {
            rows[j] = V{};
            for (int64_t l = 0; l < std::min<int64_t>(n, LANES); ++l) rows[j][l] = matrix[(c + l) * p.values + j];
        }
    }
};

template <class Real> struct Buffers {
    using V = typename Lanes<Real>::type;
    V *at(Real *scratch, const Problem<Real> &p, int64_t thread) const {
        return reinterpret_cast<V *>(scratch) + thread * vectors(p);
    }
    static int64_t vectors(const Problem<Real> &p) {
        return std::max(p.keys, p.values) + (p.interval + 1) * p.values;
    }
};

template <class Real> void forward(const Problem<Real> &p, Real *o, Real *errors, Real *last, Real *checkpoints, Real *scratch) {
    const int64_t heads = p.batch * p.heads, per_thread = (heads + p.threads - 1) / p.threads;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t thread = 0; thread < p.threads; ++thread) {
        auto *W = Buffers<Real>().at(scratch, p, thread);
        for (int64_t i = thread * per_thread; i < std::min(heads, (thread + 1) * per_thread); ++i)
            Head<Real>(p, i).forward(o, errors, last, checkpoints, W);
    }
}

template <class Real>
void backward(const Problem<Real> &p, const Real *errors, const Real *checkpoints, const Real *grad_o, const Real *grad_last,
              Real *removed, Real *grad_q, Real *grad_k, Real *grad_v, Real *grad_beta, Real *grad_state, Real *scratch) {
    const int64_t heads = p.batch * p.heads, per_thread = (heads + p.threads - 1) / p.threads;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t thread = 0; thread < p.threads; ++thread) {
        auto *first = Buffers<Real>().at(scratch, p, thread);
        auto *second = first + std::max(p.keys, p.values);
        for (int64_t i = thread * per_thread; i < std::min(heads, (thread + 1) * per_thread); ++i) {
            const Head<Real> head(p, i);
            head.backward_values(errors, grad_o, grad_last, grad_v, grad_beta, removed, grad_state, first);
            head.backward_keys(errors, removed, grad_o, grad_last, checkpoints, grad_q, grad_k, first, second);
        }
    }
}

}  // namespace

#define FWP_RECURRENCE(REAL, SUFFIX)                                                                                    \
    extern "C" void fwp_recurrence_forward_##SUFFIX(const Problem<REAL> *p, REAL *o, REAL *errors, REAL *last,          \
                                                    REAL *checkpoints, REAL *scratch) {                                 \
        forward<REAL>(*p, o, errors, last, checkpoints, scratch);                                                       \
    }                                                                                                                   \
    extern "C" void fwp_recurrence_backward_##SUFFIX(                                                                   \
        const Problem<REAL> *p, const REAL *errors, const REAL *checkpoints, const REAL *grad_o, const REAL *grad_last, \
        REAL *removed, REAL *grad_q, REAL *grad_k, REAL *grad_v, REAL *grad_beta, REAL *grad_state, REAL *scratch) {    \
        backward<REAL>(*p, errors, checkpoints, grad_o, grad_last, removed, grad_q, grad_k, grad_v, grad_beta,          \
                       grad_state, scratch);                                                                            \
    }                                                                                                                   \
    extern "C" int64_t fwp_recurrence_scratch_##SUFFIX(const Problem<REAL> *p) {                                        \
        return p->threads * Buffers<REAL>::vectors(*p) * LANES;                                                         \
    }

FWP_RECURRENCE(float, float32)
FWP_RECURRENCE(double, float64)

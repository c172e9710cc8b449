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

#include "lanes.h"

namespace {

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

// N blocks of lanes: columns c .. c + 16 N of a row, so that a broadcast number serves N multiply-adds.
template <class Real, int N> struct Block {
    using V = typename Lanes<Real>::type;
    V lanes[N];

    static Block zero() {
        Block out;
        for (int i = 0; i < N; ++i) out.lanes[i] = V{};
        return out;
    }
    static Block from(const Real *row, int64_t c, int64_t size) {
        Block out = zero();
        for (int i = 0; i < N; ++i)
            if (c + i * LANES < size) out.lanes[i] = load<Real>(row + c + i * LANES, size - c - i * LANES);
        return out;
    }
    void to(Real *row, int64_t c, int64_t size) const {
        for (int i = 0; i < N; ++i)
            if (c + i * LANES < size) store<Real>(row + c + i * LANES, lanes[i], size - c - i * LANES);
    }
    inline void add(Real scale, const Block &x) {
        for (int i = 0; i < N; ++i) lanes[i] += scale * x.lanes[i];
    }
    Block operator*(Real scale) const {
        Block out;
        for (int i = 0; i < N; ++i) out.lanes[i] = scale * lanes[i];
        return out;
    }
    Block operator-(const Block &x) const {
        Block out;
        for (int i = 0; i < N; ++i) out.lanes[i] = lanes[i] - x.lanes[i];
        return out;
    }
    Real dot(const Block &x) const {
        V total{};
        for (int i = 0; i < N; ++i) total += lanes[i] * x.lanes[i];
        return sum_lanes<Real>(total);
    }
};

// One head, N blocks of lanes at a time. Every step is one pass over the rows of the memory.
template <class Real, int N> struct Head {
    using B = Block<Real, N>;
    const Problem<Real> &p;
    int64_t index, b, h;

    Head(const Problem<Real> &problem, int64_t i) : p(problem), index(i), b(i / problem.heads), h(i % problem.heads) {}

    int64_t row(int64_t t) const { return (b * p.steps + t) * p.heads + h; }
    const Real *q(int64_t t) const { return p.q + row(t) * p.keys; }
    const Real *k(int64_t t) const { return p.k + row(t) * p.keys; }
    const Real *v(int64_t t) const { return p.v + row(t) * p.values; }
    Real beta(int64_t t) const { return p.delta ? p.beta[row(t)] : Real(1); }

    // errors [B, T, H, V]: v - W^T k before each write; checkpoints [B, H, n, K, V]: W after each interval
    void forward(Real *o, Real *errors, Real *last, Real *checkpoints, B *W) const {
        // constants of their own: the compiler cannot know that stores leave p alone
        const int64_t K = p.keys;
        const bool delta = p.delta, reads = p.q != nullptr;
        for (int64_t c = 0; c < p.values; c += N * LANES) {
            B retrieved = B::zero();
            for (int64_t i = 0; i < K; ++i) {
                W[i] = p.state ? B::from(p.state + index * p.cells() + i * p.values, c, p.values) : B::zero();
                if (delta && p.steps > 0) retrieved.add(k(0)[i], W[i]);
            }
            for (int64_t t = 0; t < p.steps; ++t) {
                B u = B::from(v(t), c, p.values);
                if (delta) {
                    u = u - retrieved;
                    u.to(errors + row(t) * p.values, c, p.values);
                    u = u * beta(t);
                }
                // this write, this read and what the next write will retrieve, in one pass
                const Real *key = k(t), *query = reads ? q(t) : key, *next = t + 1 < p.steps ? k(t + 1) : key;
                B read = B::zero();
                retrieved = B::zero();
                for (int64_t i = 0; i < K; ++i) {
                    B w = W[i];
                    w.add(key[i], u);
                    read.add(query[i], w);
                    if (delta) retrieved.add(next[i], w);
                    W[i] = w;
                }
                if (reads) read.to(o + row(t) * p.values, c, p.values);
                if ((t + 1) % p.interval == 0) {
                    Real *kept = checkpoints + (index * p.checkpoints() + t / p.interval) * p.cells();
                    for (int64_t i = 0; i < K; ++i) W[i].to(kept + i * p.values, c, p.values);
                }
            }
            for (int64_t i = 0; i < K; ++i) W[i].to(last + index * p.cells() + i * p.values, c, p.values);
        }
    }

    // values in the lanes: grad_v, grad_beta, and for the second pass removed = beta r [B, T, H, V]; the last G is dL/dW_0
    void backward_values(const Real *errors, const Real *grad_o, const Real *grad_last, Real *grad_v, Real *grad_beta,
                         Real *removed, Real *grad_state, B *G) const {
        const int64_t K = p.keys;
        const bool delta = p.delta, reads = p.q != nullptr;
        for (int64_t c = 0; c < p.values; c += N * LANES) {
            for (int64_t i = 0; i < K; ++i) G[i] = B::from(grad_last + index * p.cells() + i * p.values, c, p.values);
            B lost = B::zero();
            for (int64_t t = p.steps - 1; t >= 0; --t) {
                // what the write after this one removed, this read and what this write receives, in one pass
                const Real *key = k(t), *query = reads ? q(t) : key, *after = t + 1 < p.steps ? k(t + 1) : key;
                const B g = reads ? B::from(grad_o + row(t) * p.values, c, p.values) : B::zero();
                B r = B::zero();
                for (int64_t i = 0; i < K; ++i) {
                    B x = G[i];
                    if (delta) x.add(-after[i], lost);
                    x.add(query[i], g);
                    r.add(key[i], x);
                    G[i] = x;
                }
                if (delta) {
                    grad_beta[row(t)] += B::from(errors + row(t) * p.values, c, p.values).dot(r);
                    lost = r * beta(t);
                    lost.to(removed + row(t) * p.values, c, p.values);
                    r = lost;
                }
                r.to(grad_v + row(t) * p.values, c, p.values);
            }
            for (int64_t i = 0; i < K; ++i) {
                if (delta && p.steps > 0) G[i].add(-k(0)[i], lost);
                G[i].to(grad_state + index * p.cells() + i * p.values, c, p.values);
            }
        }
    }

    // keys in the lanes: grad_q and grad_k; G [V] rows, memories [interval + 1, V] rows
    void backward_keys(const Real *errors, const Real *removed, const Real *grad_o, const Real *grad_last,
                       const Real *checkpoints, Real *grad_q, Real *grad_k, B *G, B *memories) const {
        const int64_t V = p.values;
        const bool delta = p.delta, reads = p.q != nullptr;
        for (int64_t c = 0; c < p.keys; c += N * LANES) {
            load_columns(grad_last + index * p.cells(), c, G);
            for (int64_t end = p.steps; end > 0;) {
                const int64_t begin = (end - 1) / p.interval * p.interval;
                write_again(errors, checkpoints, c, begin, end, memories);
                for (int64_t t = end - 1; t >= begin; --t) {
                    const B *before = memories + (t - begin) * V, *after = before + V;
                    const B key = B::from(k(t), c, p.keys), query = reads ? B::from(q(t), c, p.keys) : B::zero();
                    const Real *e = (delta ? errors : p.v) + row(t) * V;
                    const Real *g = reads ? grad_o + row(t) * V : e, *lost = delta ? removed + row(t) * V : e;
                    B read = B::zero(), gain = B::zero(), loss = B::zero();
                    for (int64_t j = 0; j < V; ++j) {
                        B x = G[j];
                        x.add(g[j], query);
                        gain.add(e[j], x);
                        if (reads) read.add(g[j], after[j]);
                        if (delta) {
                            loss.add(lost[j], before[j]);
                            x.add(-lost[j], key);
                        }
                        G[j] = x;
                    }
                    if (reads) read.to(grad_q + row(t) * p.keys, c, p.keys);
                    (gain * beta(t) - loss).to(grad_k + row(t) * p.keys, c, p.keys);
                }
                end = begin;
            }
        }
    }
    // the memories before `begin` and after each step of an interval, written again from what was kept
    void write_again(const Real *errors, const Real *checkpoints, int64_t c, int64_t begin, int64_t end, B *memories) const {
        const int64_t V = p.values, interval = begin / p.interval;
        if (interval > 0)
            load_columns(checkpoints + (index * p.checkpoints() + interval - 1) * p.cells(), c, memories);
        else if (p.state)
            load_columns(p.state + index * p.cells(), c, memories);
        else
            std::fill(memories, memories + V, B::zero());
        for (int64_t t = begin; t < end; ++t) {
            const B *before = memories + (t - begin) * V;
            B *after = memories + (t - begin + 1) * V;
            const B key = B::from(k(t), c, p.keys) * beta(t);
            const Real *u = (p.delta ? errors : p.v) + row(t) * V;
            for (int64_t j = 0; j < V; ++j) {
                B w = before[j];
                w.add(u[j], key);
                after[j] = w;
            }
        }
    }
    // rows[v] = a block of entries of column v of a [K, V] matrix
    void load_columns(const Real *matrix, int64_t c, B *rows) const {
        const int64_t n = std::min<int64_t>(N * LANES, p.keys - c);
        for (int64_t j = 0; j < p.values; ++j) {
            rows[j] = B::zero();
            for (int64_t l = 0; l < n; ++l) rows[j].lanes[l / LANES][l % LANES] = matrix[(c + l) * p.values + j];
        }
    }
};

constexpr int WIDE = 2;

template <class Real> int64_t scratch_vectors(const Problem<Real> &p) {
    return WIDE * (std::max(p.keys, p.values) + (p.interval + 1) * p.values);
}

// f(head, scratch of its thread) for all heads; heads are independent, so any number of threads gives the same numbers
template <class Real, class F> void for_each_head(const Problem<Real> &p, Real *scratch, F f) {
    using V = typename Lanes<Real>::type;
    const int64_t heads = p.batch * p.heads, per_thread = (heads + p.threads - 1) / p.threads;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t thread = 0; thread < p.threads; ++thread)
        for (int64_t i = thread * per_thread; i < std::min(heads, (thread + 1) * per_thread); ++i)
            f(i, reinterpret_cast<V *>(scratch) + thread * scratch_vectors(p));
}

template <class Real> void forward(const Problem<Real> &p, Real *o, Real *errors, Real *last, Real *checkpoints, Real *scratch) {
    using V = typename Lanes<Real>::type;
    for_each_head(p, scratch, [&](int64_t i, V *own) {
        if (p.values > LANES)
            Head<Real, WIDE>(p, i).forward(o, errors, last, checkpoints, reinterpret_cast<Block<Real, WIDE> *>(own));
        else
            Head<Real, 1>(p, i).forward(o, errors, last, checkpoints, reinterpret_cast<Block<Real, 1> *>(own));
    });
}

template <class Real>
void backward(const Problem<Real> &p, const Real *errors, const Real *checkpoints, const Real *grad_o, const Real *grad_last,
              Real *removed, Real *grad_q, Real *grad_k, Real *grad_v, Real *grad_beta, Real *grad_state, Real *scratch) {
    using V = typename Lanes<Real>::type;
    using Narrow = Block<Real, 1>;
    using Wide = Block<Real, WIDE>;
    for_each_head(p, scratch, [&](int64_t i, V *own) {
        if (p.values > LANES)
            Head<Real, WIDE>(p, i).backward_values(errors, grad_o, grad_last, grad_v, grad_beta, removed, grad_state,
                                                   reinterpret_cast<Wide *>(own));
        else
            Head<Real, 1>(p, i).backward_values(errors, grad_o, grad_last, grad_v, grad_beta, removed, grad_state,
                                                reinterpret_cast<Narrow *>(own));
        if (p.keys > LANES)
            Head<Real, WIDE>(p, i).backward_keys(errors, removed, grad_o, grad_last, checkpoints, grad_q, grad_k,
                                                 reinterpret_cast<Wide *>(own), reinterpret_cast<Wide *>(own) + p.values);
        else
            Head<Real, 1>(p, i).backward_keys(errors, removed, grad_o, grad_last, checkpoints, grad_q, grad_k,
                                              reinterpret_cast<Narrow *>(own), reinterpret_cast<Narrow *>(own) + p.values);
    });
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
        return p->threads * scratch_vectors(*p) * LANES;                                                                \
    }

FWP_RECURRENCE(float, float32)
FWP_RECURRENCE(double, float64)

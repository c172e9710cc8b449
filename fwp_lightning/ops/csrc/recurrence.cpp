// The sum and delta rules over [B, T, H, D] tensors, forward and backward, with a state in and out.
//
// The arithmetic is memory_columns.h with as many columns side by side as a register holds; here are the loops over time
// and what is kept. The backward pass goes through time twice: backward for what later steps want (Receiving), then forward
// for what earlier steps left (Rewriting), which writes the memory again from its first state. So no memory is kept, and
// none is recovered by undoing writes, which would lose all digits where a memory grows.
//
// All heads of a sequence take a step before any takes the next one: [B, T, H, D] is then read and written from front to
// back, and the chain of one head's steps waits while others work. ../README.md has the equations.

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "feature_rows.h"
#include "lanes.h"
#include "memory_columns.h"

namespace {

// steps of one pass over a memory: fewer would load and store it more often, more would need more registers
constexpr int STEPS = 2;
// rows are fetched so many steps before they are needed
constexpr int64_t AHEAD = 8;
// memories of the heads that go together: they should stay in the second cache
constexpr int64_t GROUP_BYTES = 512 * 1024;

struct Problem {
    int64_t batch, steps, heads, keys, values;  // B, T, H, K (features), V
    int64_t delta, threads;
    int64_t map, nu, size;  // phi, and the size of what it is computed from
    int64_t normalise_features, normalise_readout;
    double key_eps, query_eps, readout_eps;

    FeatureMap phi(double eps) const { return {map, nu, size, keys, normalise_features != 0, eps}; }
    int64_t cells() const { return keys * values; }
};

// A large output is mostly memory that the system has yet to give: in few large pages rather than in thousands of small ones,
// which take as long to come as a tenth of the computation. Only whole large pages within it are asked for.
template <class Real> void expect_large_pages(const Real *output, int64_t n) {
#if defined(__linux__)
    constexpr uintptr_t page = 2 * 1024 * 1024;
    if (!output || n * sizeof(Real) < 2 * page) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(output) + page - 1) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(output + n) / page * page;
    // a refusal changes nothing
    if (end > first) madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);
#endif
}

// What is absent is null: q (write only), beta (sum rule), errors (and where no gradient will be asked for), state (empty),
// z and scale (no normalised read-out), incoming gradients that are 0, gradients of what is absent.
template <class Real> struct Tensors {
    const Real *q, *k, *v, *beta, *state, *z;  // [B, T, H, size], same, [B, T, H, V], [B, T, H], [B, H, K, V], [B, H, K]
    Real *o, *errors, *scale;                  // [B, T, H, V]: outputs, v - W^T k before each write; [B, T, H]: z . q + eps
    Real *last, *last_z;
    const Real *grad_o, *grad_last, *grad_last_z;
    Real *grad_q, *grad_k, *grad_v, *grad_beta, *grad_state, *grad_z;
};

// One head on its way through time: the rows that every sweep reads.
template <class Real, bool DELTA, bool READS> struct Head {
    using Num = typename Lanes<Real>::type;
    const Problem &p;
    const Tensors<Real> &x;
    const int64_t T, K, V, key_blocks, value_blocks;
    int64_t index = 0;
    FeatureRows<Real> key, query;
    Rows<const Real> value{}, beta{};
    Buffer<Real> z;

    Head(const Problem &problem, const Tensors<Real> &tensors)
        : p(problem), x(tensors), T(p.steps), K(p.keys), V(p.values), key_blocks(blocks_of(K)), value_blocks(blocks_of(V)),
          key(p.phi(p.key_eps)), query(p.phi(p.query_eps)), z(p.normalise_readout ? K : 0) {}

    template <class R> Rows<R> rows(R *tensor, int64_t size) const {
        const int64_t b = index / p.heads, h = index % p.heads;
        return {tensor + (b * T * p.heads + h) * size, p.heads * size, size, -1};
    }
    void attach(int64_t i) {
        index = i;
        key.attach(rows(x.k, p.size));
        query.attach(rows(x.q, p.size));
        value = rows(x.v, V);
        beta = rows(x.beta, 1);
    }
    Real strength(int64_t t) const { return DELTA ? *beta(t) : Real(1); }

    // a [K, V] matrix of this head, values in the lanes: block c of row i at [c K + i]
    void load_columns(const Real *matrices, Num *columns) const {
        for (int64_t c = 0; c < value_blocks; ++c)
            for (int64_t i = 0; i < K; ++i)
                columns[c * K + i] = matrices ? load<Real>(entry(matrices, i, c), V - c * LANES) : Num{};
    }
    void store_columns(const Num *columns, Real *matrices) const {
        for (int64_t c = 0; c < value_blocks; ++c)
            for (int64_t i = 0; i < K; ++i) store<Real>(entry(matrices, i, c), columns[c * K + i], V - c * LANES);
    }
    template <class R> R *entry(R *matrices, int64_t i, int64_t c) const {
        return matrices + index * p.cells() + i * V + c * LANES;
    }
    // the same with keys in the lanes: block c of column j at [c V + j]
    void load_rows(const Real *matrices, Num *rows) const {
        std::fill(rows, rows + key_blocks * V, Num{});
        if (!matrices) return;
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < V; ++j)
                rows[i / LANES * V + j][i % LANES] = matrices[index * p.cells() + i * V + j];
    }
    void load_normaliser(const Real *vectors) const {
        if (!p.normalise_readout) return;
        std::fill(z.numbers(), z.numbers() + K, Real(0));
        if (vectors) std::copy(vectors + index * K, vectors + (index + 1) * K, z.numbers());
    }
    void store_normaliser(Real *vectors) const {
        if (p.normalise_readout) std::copy(z.numbers(), z.numbers() + K, vectors + index * K);
    }
    // two steps before a pass compute the rows it needs, all heads the first half before any the second
    void prepare_features(int64_t t, FeatureRows<Real> &rows) const {
        for (int64_t s = t; s < std::min(t + STEPS, T); ++s) rows.prepare(s);
    }
    void compute_features(int64_t t, FeatureRows<Real> &rows) const {
        for (int64_t s = t; s < std::min(t + STEPS, T); ++s) rows.compute(s);
    }
    template <class... R> inline __attribute__((always_inline)) void fetch(int64_t t, const R &...rows) const {
        // the few steps at either end are not worth a test of each
        if (t >= 0 && t + STEPS <= T) (rows.template fetch<STEPS>(t), ...);
    }
};

// The forward pass.
template <class Real, bool DELTA, bool READS> struct Writing : Head<Real, DELTA, READS> {
    using Base = Head<Real, DELTA, READS>;
    using Num = typename Base::Num;
    using Base::key, Base::query, Base::value, Base::p, Base::x, Base::K, Base::V, Base::T, Base::z;
    Rows<Real> output{}, error{}, scale{};
    Buffer<Real> memory, retrieved;

    static int64_t bytes(const Problem &p) { return blocks_of(p.values) * p.keys * sizeof(Num); }
    Writing(const Problem &problem, const Tensors<Real> &tensors)
        : Base(problem, tensors), memory(this->value_blocks * K * LANES), retrieved(this->value_blocks * STEPS * LANES) {}

    void attach(int64_t i) {
        Base::attach(i);
        output = this->rows(x.o, V);
        error = this->rows(x.errors, V);
        scale = this->rows(x.scale, 1);
        this->load_columns(x.state, memory.vectors());
        this->load_normaliser(x.z);
        this->prepare_features(0, key);
        this->compute_features(0, key);
        std::fill(retrieved.vectors(), retrieved.vectors() + this->value_blocks * STEPS, Num{});
        if (!DELTA || T == 0) return;
        // from an empty memory too: 0 times NaN is NaN
        const Real *next[STEPS] = {key(0), key(T > 1)};
        for (int64_t c = 0; c < this->value_blocks; ++c) {
            Num *r = retrieved.vectors() + c * STEPS;
            write_and_read<0, STEPS, false>(memory.vectors() + c * K, K, next, next, next, r, r, r);
        }
    }
    void prepare(int64_t t) {
        this->prepare_features(t + STEPS, key);
        if (READS) this->prepare_features(t, query);
    }
    void compute(int64_t t) {
        this->compute_features(t + STEPS, key);
        if (READS) this->compute_features(t, query);
    }
    void step(int64_t t) {
        fetch_rows(t + AHEAD);
        const int64_t left = T - t;
        if (left >= 4)
            write<2, 2>(t);
        else if (left == 3)
            write<2, 1>(t);
        else if (left == 2)
            write<2, 0>(t);
        else
            write<1, 0>(t);
    }
    inline __attribute__((always_inline)) void fetch_rows(int64_t t) const {
        this->fetch(t, key, value);
        if (READS) this->fetch(t, query, output);
        if (DELTA && x.errors) this->fetch(t, error);
    }
    template <int N, int NEXT> void write(int64_t t) {
        // all in variables of its own: the compiler cannot know that what is stored below changes nothing else
        const int64_t n_keys = K, n_values = V, blocks = this->value_blocks;
        const bool keeps = x.errors;
        const Real *k[N], *q[N], *next[STEPS], *v[N];
        Real *o[N], *errors[N], overlap[N][N] = {}, strength[N], share[N];
        key.template find<N>(t, k);
        key.template find<NEXT>(t + N, next);
        (READS ? query : key).template find<N>(t, q);
        value.template find<N>(t, v);
        output.template find<N>(t, o);
        error.template find<N>(t, errors);
        for (int s = 0; s < N; ++s) {
            strength[s] = this->strength(t + s);
            share[s] = p.normalise_readout ? 1 / accumulate(t + s) : Real(1);
        }
        if (DELTA && N > 1) overlap[N - 1][0] = dot(k[0], k[N - 1], n_keys);
        Num *W = memory.vectors(), *ahead = retrieved.vectors();
        for (int64_t c = 0; c < blocks; ++c, W += n_keys, ahead += STEPS) {
            const int64_t from = c * LANES, left = n_values - from;
            Num values[N], e[N], u[N], read[N];
            for (int s = 0; s < N; ++s) {
                u[s] = values[s] = load<Real>(v[s] + from, left);
                read[s] = Num{};
            }
            if (DELTA) {
                corrected_values<N>(values, ahead, strength, overlap, e, u);
                if (keeps)
                    for (int s = 0; s < N; ++s) store<Real>(errors[s] + from, e[s], left);
            }
            Num after[STEPS] = {};
            write_and_read<N, DELTA ? NEXT : 0, READS>(W, n_keys, k, q, next, u, read, after);
            for (int s = 0; s < NEXT; ++s) ahead[s] = after[s];
            for (int s = 0; s < N; ++s)
                if (READS) store<Real>(o[s] + from, read[s] * share[s], left);
        }
    }
    // z of one step, and what its read-out is divided by
    Real accumulate(int64_t t) {
        Num *sums = z.vectors();
        Num total{};
        for (int64_t c = 0; c < this->key_blocks; ++c) {
            sums[c] += load<Real>(key(t) + c * LANES, K - c * LANES);
            if (READS) total += sums[c] * load<Real>(query(t) + c * LANES, K - c * LANES);
        }
        return READS ? *scale(t) = sum_lanes<Real>(total) + Real(p.readout_eps) : Real(1);
    }
    void finish() const {
        this->store_columns(memory.vectors(), x.last);
        this->store_normaliser(x.last_z);
    }
};

// What both sweeps of the backward pass read: the gradient of the unnormalised read-out and of what it was divided by.
template <class Real, bool DELTA, bool READS> struct Backward : Head<Real, DELTA, READS> {
    using Base = Head<Real, DELTA, READS>;
    using Num = typename Base::Num;
    using Base::key, Base::query, Base::value, Base::p, Base::x, Base::K, Base::V, Base::T;
    Rows<Real> grad_k{}, grad_v{};
    Rows<const Real> grad_o{}, grad{}, output{}, scale{}, error{};
    Buffer<Real> ring, features;
    Real grad_scale[RING] = {};

    Backward(const Problem &problem, const Tensors<Real> &tensors)
        : Base(problem, tensors), ring(p.normalise_readout ? RING * padded(V) : 0), features(padded(K) * 2 * STEPS) {}
    void attach(int64_t i) {
        Base::attach(i);
        grad_k = this->rows(x.grad_k, p.size);
        grad_v = this->rows(x.grad_v, V);
        grad_o = grad = this->rows(x.grad_o, V);
        output = this->rows(static_cast<const Real *>(x.o), V);
        scale = this->rows(static_cast<const Real *>(x.scale), 1);
        error = DELTA ? this->rows(static_cast<const Real *>(x.errors), V) : value;
        if (p.normalise_readout) grad = {ring.numbers(), padded(V), V, RING - 1};
    }
    void prepare(int64_t t) {
        this->prepare_features(t, key);
        if (READS) this->prepare_features(t, query);
    }
    void compute(int64_t t) {
        this->compute_features(t, key);
        if (!READS) return;
        this->compute_features(t, query);
        if (p.normalise_readout)
            for (int64_t s = t; s < std::min(t + STEPS, T); ++s) divide(s);
    }
    // o = read / scale: the gradients of both
    void divide(int64_t t) {
        const Real share = 1 / *scale(t);
        Num total{};
        for (int64_t c = 0; c < V; c += LANES) {
            const Num g = load<Real>(grad_o(t) + c, V - c) * share;
            total += g * load<Real>(output(t) + c, V - c);
            store<Real>(const_cast<Real *>(grad(t)) + c, g, LANES);
        }
        grad_scale[t & (RING - 1)] = -sum_lanes<Real>(total);
    }
    // A block of the gradient of a step's features: kept in a slot until all are there, or written at once where there is
    // no map.
    template <bool ADD> void give_features(int64_t t, int slot, int64_t c, Num x, const Rows<Real> &to) {
        if (p.phi(0).computes()) {
            features.vectors()[slot * this->key_blocks + c] = x;
            return;
        }
        const int64_t from = c * LANES, left = K - from;
        if (ADD) x += load<Real>(to(t) + from, left);
        store<Real>(to(t) + from, x, left);
    }
    template <bool ADD> void give_inputs(int64_t t, int slot, FeatureRows<Real> &rows, const Rows<Real> &to) {
        if (p.phi(0).computes()) rows.template pull_back<ADD>(t, features.vectors() + slot * this->key_blocks, to(t));
    }
    Num block(const Real *row, int64_t c) const { return load<Real>(row + c * LANES, K - c * LANES); }
};

// Backward in time: D = dL/dW. Gradients of v and beta with values in the lanes, then, with keys in the lanes, what the
// writes give their keys.
template <class Real, bool DELTA, bool READS> struct Receiving : Backward<Real, DELTA, READS> {
    using Base = Backward<Real, DELTA, READS>;
    using Num = typename Base::Num;
    using Base::key, Base::query, Base::p, Base::x, Base::K, Base::V, Base::T, Base::z;
    using Base::grad, Base::grad_k, Base::grad_v, Base::error;
    Rows<Real> grad_beta{};
    Buffer<Real> columns, by_keys, lost;

    static int64_t bytes(const Problem &p) {
        return (blocks_of(p.values) * p.keys + blocks_of(p.keys) * p.values) * sizeof(Num);
    }
    Receiving(const Problem &problem, const Tensors<Real> &tensors)
        : Base(problem, tensors), columns(this->value_blocks * K * LANES), by_keys(this->key_blocks * V * LANES),
          lost(this->value_blocks * STEPS * LANES) {}
    void attach(int64_t i) {
        Base::attach(i);
        grad_beta = this->rows(x.grad_beta, 1);
        this->load_columns(x.grad_last, columns.vectors());
        this->load_rows(x.grad_last, by_keys.vectors());
        this->load_normaliser(x.grad_last_z);
    }
    void step(int64_t t) {
        fetch_rows(t - AHEAD);
        const int64_t left = T - t;
        if (left >= 4)
            receive<2, 2>(t);
        else if (left == 3)
            receive<1, 2>(t);
        else if (left == 2)
            receive<0, 2>(t);
        else
            receive<0, 1>(t);
    }
    inline __attribute__((always_inline)) void fetch_rows(int64_t t) const {
        this->fetch(t, key, error, grad_k, grad_v);
        if (READS) this->fetch(t, query, this->grad_o);
    }
    template <int PENDING, int N> void receive(int64_t t) {
        // as in the forward pass: variables of its own
        const int64_t n_values = V, blocks = this->key_blocks;
        const Real *k[N], *q[N], *later[STEPS], *e[N], *g[N], *r[N];
        Real strength[N];
        key.template find<N>(t, k);
        key.template find<PENDING>(t + N, later);
        (READS ? query : key).template find<N>(t, q);
        error.template find<N>(t, e);
        (READS ? grad : error).template find<N>(t, g);
        Rows<const Real>(grad_v).template find<N>(t, r);
        for (int s = 0; s < N; ++s) strength[s] = this->strength(t + s);
        receive_by_value<PENDING, N>(t, k, q, later, e, g, strength);
        Num *D = by_keys.vectors();
        for (int64_t c = 0; c < blocks; ++c, D += n_values) {
            Num keys[N], queries[N], gain[N] = {};
            for (int s = 0; s < N; ++s) {
                keys[s] = this->block(k[s], c);
                queries[s] = this->block(q[s], c);
            }
            receive_keys<N, DELTA, READS>(D, n_values, e, r, g, keys, queries, gain);
            for (int s = N - 1; s >= 0; --s) {
                gain[s] = gain[s] * strength[s];
                if (p.normalise_readout) gain[s] += accumulate(t + s, c, queries[s]);
                this->template give_features<false>(t + s, s, c, gain[s], grad_k);
            }
        }
        for (int s = 0; s < N; ++s) this->template give_inputs<false>(t + s, s, key, grad_k);
    }
    template <int PENDING, int N>
    inline __attribute__((always_inline)) void receive_by_value(int64_t t, const Real **k, const Real **q, const Real **later,
                                                                const Real **e, const Real **g, const Real *strength) {
        const int64_t n_keys = K, n_values = V, blocks = this->value_blocks;
        Real overlap[N][N] = {}, *r[N];
        Num along[N] = {}, *D = columns.vectors(), *removed = lost.vectors();
        grad_v.template find<N>(t, r);
        if (DELTA && N > 1) overlap[N - 1][0] = dot(k[0], k[N - 1], n_keys);
        for (int64_t c = 0; c < blocks; ++c, D += n_keys, removed += STEPS) {
            const int64_t from = c * LANES, left = n_values - from;
            Num grads[N], received[N] = {}, loses[STEPS];
            for (int s = 0; s < PENDING; ++s) loses[s] = removed[s];
            for (int s = 0; s < N; ++s) grads[s] = load<Real>(g[s] + from, left);
            receive_values<DELTA ? PENDING : 0, N, READS>(D, n_keys, later, loses, k, q, grads, received);
            if (DELTA) removed_values<N>(strength, overlap, received, loses);
            for (int s = 0; s < N; ++s) {
                if (DELTA) along[s] += received[s] * load<Real>(e[s] + from, left);
                if (DELTA) removed[s] = loses[s];
                store<Real>(r[s] + from, DELTA ? loses[s] : received[s], left);
            }
        }
        for (int s = 0; s < N; ++s)
            if (DELTA) *grad_beta(t + s) = sum_lanes<Real>(along[s]);
    }
    // dL/dz, a block of it, which this read adds to and this write's key then receives
    Num accumulate(int64_t t, int64_t c, Num query) const {
        Num *sums = z.vectors() + c;
        if (READS) *sums += query * this->grad_scale[t & (RING - 1)];
        return *sums;
    }
    void finish() {
        if (x.grad_z) this->store_normaliser(x.grad_z);
        if (!x.grad_state) return;
        if (DELTA && T > 0) {
            const Real *later[STEPS] = {key(0), key(T > 1)};
            for (int64_t c = 0; c < this->value_blocks; ++c) {
                Num *removed = lost.vectors() + c * STEPS;
                if (T > 1)
                    receive_values<2, 0, false>(columns.vectors() + c * K, K, later, removed, later, later, removed, removed);
                else
                    receive_values<1, 0, false>(columns.vectors() + c * K, K, later, removed, later, later, removed, removed);
            }
        }
        this->store_columns(columns.vectors(), x.grad_state);
    }
};

// Forward in time with keys in the lanes: the memory is written again. Gradients of queries, and what the delta rule's
// removals cost the keys. grad_v holds what each write removed.
template <class Real, bool DELTA, bool READS> struct Rewriting : Backward<Real, DELTA, READS> {
    using Base = Backward<Real, DELTA, READS>;
    using Num = typename Base::Num;
    using Base::key, Base::query, Base::p, Base::x, Base::K, Base::V, Base::T, Base::z;
    using Base::grad, Base::grad_k, Base::grad_v, Base::error;
    Rows<Real> grad_q{};
    Buffer<Real> memory;

    static int64_t bytes(const Problem &p) { return blocks_of(p.keys) * p.values * sizeof(Num); }
    Rewriting(const Problem &problem, const Tensors<Real> &tensors)
        : Base(problem, tensors), memory(this->key_blocks * V * LANES) {}
    void attach(int64_t i) {
        Base::attach(i);
        grad_q = this->rows(x.grad_q, p.size);
        this->load_rows(x.state, memory.vectors());
        this->load_normaliser(x.z);
    }
    void step(int64_t t) {
        fetch_rows(t + AHEAD);
        T - t >= 2 ? write<2>(t) : write<1>(t);
    }
    inline __attribute__((always_inline)) void fetch_rows(int64_t t) const {
        this->fetch(t, key, error);
        if (READS) this->fetch(t, this->grad_o, grad_q);
        if (DELTA) this->fetch(t, grad_k, grad_v);
    }
    template <int N> void write(int64_t t) {
        const Real *k[N], *e[N], *g[N], *r[N];
        Real strength[N];
        key.template find<N>(t, k);
        error.template find<N>(t, e);
        (READS ? grad : error).template find<N>(t, g);
        Rows<const Real>(grad_v).template find<N>(t, r);
        for (int s = 0; s < N; ++s) strength[s] = this->strength(t + s);
        const int64_t n_values = V, blocks = this->key_blocks;
        Num *W = memory.vectors();
        for (int64_t c = 0; c < blocks; ++c, W += n_values) {
            Num writes[N], loss[N] = {}, queries[N] = {};
            for (int s = 0; s < N; ++s) writes[s] = this->block(k[s], c) * strength[s];
            read_keys<N, DELTA, READS>(W, n_values, e, r, g, writes, loss, queries);
            for (int s = 0; s < N; ++s) {
                if (READS && p.normalise_readout) queries[s] += accumulate(t + s, c);
                if (READS) this->template give_features<false>(t + s, s, c, queries[s], grad_q);
                if (DELTA) this->template give_features<true>(t + s, STEPS + s, c, -loss[s], grad_k);
            }
        }
        for (int s = 0; s < N; ++s) {
            if (READS) this->template give_inputs<false>(t + s, s, query, grad_q);
            if (DELTA) this->template give_inputs<true>(t + s, STEPS + s, key, grad_k);
        }
    }
    // a block of z, which this write's key is added to, times the gradient of z . q
    Num accumulate(int64_t t, int64_t c) const {
        Num *sums = z.vectors() + c;
        *sums += this->block(key(t), c);
        return *sums * this->grad_scale[t & (RING - 1)];
    }
    void finish() const {}
};

// Take the heads first .. last of a sequence through time, forward or backward.
template <class Sweep>
void pass_through_time(const Problem &p, std::vector<Sweep> &heads, int64_t first, int64_t last, bool forward) {
    const int64_t n = last - first, passes = (p.steps + STEPS - 1) / STEPS;
    for (int64_t i = 0; i < n; ++i) heads[i].attach(first + i);
    const bool computes = p.phi(0).computes() || p.normalise_readout;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t t = (forward ? pass : passes - 1 - pass) * STEPS;
        if (computes) {
            for (int64_t i = 0; i < n; ++i) heads[i].prepare(t);
            for (int64_t i = 0; i < n; ++i) heads[i].compute(t);
        }
        for (int64_t i = 0; i < n; ++i) heads[i].step(t);
    }
    for (int64_t i = 0; i < n; ++i) heads[i].finish();
}

template <class Sweep, class Real> std::vector<Sweep> heads_of(const Problem &p, const Tensors<Real> &x, int64_t n) {
    std::vector<Sweep> heads;
    heads.reserve(n);
    for (int64_t i = 0; i < n; ++i) heads.emplace_back(p, x);
    return heads;
}

// make(n) gives a thread what it needs for n heads, a function of the first and the last. As many heads of a sequence go
// together as stay in the cache, but no more than leave every thread some. Heads are independent: any number of threads
// gives the same numbers.
template <class F> void for_each_group(const Problem &p, int64_t bytes_per_head, F make) {
    const int64_t fitting = GROUP_BYTES / std::max<int64_t>(bytes_per_head, 1);
    const int64_t share = (p.batch * p.heads + p.threads - 1) / p.threads;
    const int64_t group = std::max<int64_t>(1, std::min({fitting, share, p.heads}));
    const int64_t per_sequence = (p.heads + group - 1) / group;
#pragma omp parallel num_threads(p.threads)
    {
        auto take = make(group);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.batch * per_sequence; ++i) {
            const int64_t start = i / per_sequence * p.heads, first = i % per_sequence * group;
            take(start + first, start + std::min(first + group, p.heads));
        }
    }
}

template <class Real, bool DELTA, bool READS> void forward(const Problem &p, const Tensors<Real> &x) {
    using Sweep = Writing<Real, DELTA, READS>;
    for_each_group(p, Sweep::bytes(p), [&](int64_t n) {
        return [&p, heads = heads_of<Sweep>(p, x, n)](int64_t first, int64_t last) mutable {
            pass_through_time(p, heads, first, last, true);
        };
    });
}

template <class Real, bool DELTA, bool READS> void backward(const Problem &p, const Tensors<Real> &x) {
    using Back = Receiving<Real, DELTA, READS>;
    using Forth = Rewriting<Real, DELTA, READS>;
    for_each_group(p, Back::bytes(p), [&](int64_t n) {
        return [&p, back = heads_of<Back>(p, x, n), forth = heads_of<Forth>(p, x, n)](int64_t first, int64_t last) mutable {
            pass_through_time(p, back, first, last, false);
            // a sum rule that only writes gives its keys nothing else
            if (DELTA || READS) pass_through_time(p, forth, first, last, true);
        };
    });
}

template <class Real> void forward(const Problem &p, const Tensors<Real> &x) {
    const int64_t rows = p.batch * p.steps * p.heads;
    for (const Real *output : {x.o, x.errors}) expect_large_pages(output, rows * p.values);
    if (p.delta)
        x.q ? forward<Real, true, true>(p, x) : forward<Real, true, false>(p, x);
    else
        x.q ? forward<Real, false, true>(p, x) : forward<Real, false, false>(p, x);
}

template <class Real> void backward(const Problem &p, const Tensors<Real> &x) {
    const int64_t rows = p.batch * p.steps * p.heads;
    for (const Real *output : {x.grad_q, x.grad_k}) expect_large_pages(output, rows * p.size);
    expect_large_pages(x.grad_v, rows * p.values);
    if (p.delta)
        x.q ? backward<Real, true, true>(p, x) : backward<Real, true, false>(p, x);
    else
        x.q ? backward<Real, false, true>(p, x) : backward<Real, false, false>(p, x);
}

}  // namespace

#define FWP_RECURRENCE(REAL, SUFFIX)                                                                                      \
    extern "C" void fwp_recurrence_forward_##SUFFIX(const Problem *p, const REAL *q, const REAL *k, const REAL *v,        \
                                                    const REAL *beta, const REAL *state, const REAL *z, REAL *o,          \
                                                    REAL *errors, REAL *scale, REAL *last, REAL *last_z) {                \
        Tensors<REAL> x{};                                                                                                \
        x.q = q, x.k = k, x.v = v, x.beta = beta, x.state = state, x.z = z;                                               \
        x.o = o, x.errors = errors, x.scale = scale, x.last = last, x.last_z = last_z;                                    \
        forward<REAL>(*p, x);                                                                                             \
    }                                                                                                                     \
    extern "C" void fwp_recurrence_backward_##SUFFIX(                                                                     \
        const Problem *p, const REAL *q, const REAL *k, const REAL *v, const REAL *beta, const REAL *state,               \
        const REAL *z, REAL *o, REAL *errors, REAL *scale, const REAL *grad_o, const REAL *grad_last,                     \
        const REAL *grad_last_z, REAL *grad_q, REAL *grad_k, REAL *grad_v, REAL *grad_beta, REAL *grad_state,             \
        REAL *grad_z) {                                                                                                   \
        Tensors<REAL> x{q,       k,      v,         beta,        state,  z,      o,      errors,    scale,      nullptr,  \
                        nullptr, grad_o, grad_last, grad_last_z, grad_q, grad_k, grad_v, grad_beta, grad_state, grad_z};  \
        backward<REAL>(*p, x);                                                                                            \
    }

FWP_RECURRENCE(float, float32)
FWP_RECURRENCE(double, float64)

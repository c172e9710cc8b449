// The sum and delta rules over [B, T, H, D] tensors, forward and backward, with a state in and out.
//
// The arithmetic is memory_columns.h with as many columns side by side as a register holds; here are the loops over time
// and what is kept. The backward pass goes through time twice: backward for what later steps want (Receiving), then forward
// for what earlier steps left (Rewriting), which writes the memory again from its first state. So no memory is kept, and
// none is recovered by undoing writes, which would lose all digits where a memory grows.
//
// Heads whose memories fit the first cache together take a pass before any takes the next one: the chain of one head's
// steps waits while others work. ../README.md has the equations.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// more at a time are no faster
#define FWP_UNROLL_FIXED _Pragma("GCC unroll 2")
#include "feature_rows.h"
#include "lane_exchange.h"
#include "lanes.h"
#include "memory_columns.h"

namespace {

// Steps of one pass over a memory: fewer would load and store it more often, more would need more registers. A Num of
// float64 is two.
template <class Real> constexpr int STEPS_OF = sizeof(Real) == 4 ? 4 : 2;
// Rows are fetched so many steps before they are needed, some here and some there in a pass: only so many lines can be on
// their way at once, and loads of the pass itself would wait behind them.
constexpr int64_t AHEAD = 4;
// Heads that go together: their memories should stay in the second cache, and so should all their rows, which the backward
// pass reads twice, unless those of one head alone are too many.
constexpr int64_t GROUP_BYTES = 512 * 1024, ROW_BYTES = 640 * 1024;
// of these some take a few passes before the next do: their memories should stay in the first cache
constexpr int64_t STRIP_BYTES = 16 * 1024, STRIP_PASSES = 32;

struct Problem {
    int64_t batch, steps, heads, keys, values;  // B, T, H, K (features), V
    int64_t delta, threads;
    int64_t map, nu, size;  // phi, and the size of what it is computed from
    int64_t normalise_features, normalise_readout;
    double key_eps, query_eps, readout_eps;

    FeatureMap phi(double eps) const { return {map, nu, size, keys, normalise_features != 0, eps}; }
    int64_t cells() const { return keys * values; }
    // of a step of a head: inputs, outputs, errors and gradients
    int64_t row_numbers() const { return 4 * size + 5 * values; }
    // whether they are too many for the second cache even of one head
    bool far_rows(int64_t bytes) const { return steps * row_numbers() * bytes > ROW_BYTES; }
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

// Two blocks of columns side by side: a scalar that they share is loaded once for both, and a loop with a load for each
// multiply-add could not keep both units at work that multiply and add.
template <class Num> struct Two {
    Num a, b;
};
#define FWP_TWO template <class Num> inline __attribute__((always_inline))
FWP_TWO Two<Num> operator+(const Two<Num> &x, const Two<Num> &y) { return {x.a + y.a, x.b + y.b}; }
FWP_TWO Two<Num> operator-(const Two<Num> &x, const Two<Num> &y) { return {x.a - y.a, x.b - y.b}; }
FWP_TWO Two<Num> operator-(const Two<Num> &x) { return {-x.a, -x.b}; }
template <class Real, class Num> inline __attribute__((always_inline)) Two<Num> operator*(Real scalar, const Two<Num> &x) {
    return {scalar * x.a, scalar * x.b};
}
FWP_TWO void operator+=(Two<Num> &x, const Two<Num> &y) { x.a += y.a, x.b += y.b; }
FWP_TWO void operator-=(Two<Num> &x, const Two<Num> &y) { x.a -= y.a, x.b -= y.b; }
#undef FWP_TWO

// as many blocks as the registers are enough for
constexpr int WIDTH = LANES == 16 ? 2 : 1;
template <class Real, int N> struct BlocksOf {
    using type = typename Lanes<Real>::type;
};
template <class Real> struct BlocksOf<Real, 2> {
    using type = Two<typename Lanes<Real>::type>;
};
// rows from block c on, of which `left` numbers are left
template <class Real, int N>
inline __attribute__((always_inline)) typename BlocksOf<Real, N>::type load_blocks(const Real *from, int64_t left) {
    if constexpr (N == 2)
        return {load<Real>(from, LANES), load<Real>(from + LANES, left - LANES)};
    else
        return load<Real>(from, left);
}
template <class Real, int N>
inline __attribute__((always_inline)) void store_blocks(Real *to, const typename BlocksOf<Real, N>::type &x, int64_t left) {
    if constexpr (N == 2) {
        store<Real>(to, x.a, LANES);
        store<Real>(to + LANES, x.b, left - LANES);
    } else {
        store<Real>(to, x, left);
    }
}
// f(how many, the first) for all blocks
template <class F> inline __attribute__((always_inline)) void for_blocks(int64_t blocks, F f) {
    int64_t c = 0;
    if constexpr (WIDTH == 2)
        for (; c + 2 <= blocks; c += 2) f(std::integral_constant<int, 2>(), c);
    for (; c < blocks; ++c) f(std::integral_constant<int, 1>(), c);
}
// where number i of block c is among blocks of n numbers
inline int64_t place(int64_t c, int64_t i, int64_t blocks, int64_t n) {
    return WIDTH == 2 && (c | 1) < blocks ? (c & ~int64_t(1)) * n + 2 * i + (c & 1) : c * n + i;
}

// f(integral constant n), n one of 0 .. MOST
template <int MOST, class F> inline void with_constant(int64_t n, F f) {
    if (n == MOST) return f(std::integral_constant<int, MOST>());
    if constexpr (MOST > 0) with_constant<MOST - 1>(n, f);
}

// Dot products between the rows of N steps: of every two, a later row with an earlier one, and of another kind of later row
// with the earlier one and with that of its own step.
template <class Real, int N, bool STRICT, bool LOOSE> class Pairs {
    using Num = typename Lanes<Real>::type;
    static constexpr int N_STRICT = STRICT ? N * (N - 1) / 2 : 0, COUNT = N_STRICT + (LOOSE ? N * (N + 1) / 2 : 0);
    static constexpr int strict_at(int late, int early) { return late * (late - 1) / 2 + early; }
    static constexpr int loose_at(int late, int early) { return N_STRICT + late * (late + 1) / 2 + early; }
    Num totals[at_least_one(COUNT)] = {};

  public:
    // a block of the rows
    inline __attribute__((always_inline)) void add(const Num *early, const Num *strict, const Num *loose) {
#pragma GCC unroll 8
        for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
            for (int s = 0; s <= r; ++s) {
                if (STRICT && s < r) totals[strict_at(r, s)] += strict[r] * early[s];
                if (LOOSE) totals[loose_at(r, s)] += loose[r] * early[s];
            }
    }
    class Sums {
        LaneSums<Real, at_least_one(COUNT)> sums;

      public:
        inline __attribute__((always_inline)) explicit Sums(const Pairs &pairs) : sums(pairs.totals) {}
        Real strict(int late, int early) const { return sums[strict_at(late, early)]; }
        Real loose(int late, int early) const { return sums[loose_at(late, early)]; }
        // as a matrix
        struct Row {
            const Sums &sums;
            int late;
            Real operator[](int early) const { return sums.strict(late, early); }
        };
        Row operator[](int late) const { return {*this, late}; }
    };
};

// One pointer that moves along all rows, and their distance: a pointer for each would be more than there are registers. The
// compiler, which would make them of it again, must not know where it moves to.
template <class Real> struct Cursor<Steps<Real>> {
    const char *at;
    int64_t stride, three;
    inline __attribute__((always_inline)) explicit Cursor(const Steps<Real> &from)
        : at(reinterpret_cast<const char *>(from.first)), stride(from.stride * sizeof(Real)), three(3 * stride) {
        asm("" : "+r"(three));
    }
    inline __attribute__((always_inline)) Real operator[](int s) const {
        // an address is a sum of two registers, one of them times 1, 2 or 4
        return *reinterpret_cast<const Real *>(s == 3 ? at + three : at + s * stride);
    }
    inline __attribute__((always_inline)) void advance() {
        at += sizeof(Real);
        asm("" : "+r"(at));
    }
};

// One head on its way through time: the rows that every sweep reads.
template <class Real, bool DELTA, bool READS> struct Head {
    using Num = typename Lanes<Real>::type;
    static constexpr int STEPS = STEPS_OF<Real>;
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

    // blocks of a memory from its vector i on
    template <int WIDE> static auto *at(const Buffer<Real> &buffer, int64_t i) {
        return reinterpret_cast<typename BlocksOf<Real, WIDE>::type *>(buffer.vectors() + i);
    }
    // a [K, V] matrix of this head, values in the lanes
    void load_columns(const Real *matrices, Num *columns) const {
        for (int64_t c = 0; c < value_blocks; ++c)
            for (int64_t i = 0; i < K; ++i)
                columns[place(c, i, value_blocks, K)] = matrices ? load<Real>(entry(matrices, i, c), V - c * LANES) : Num{};
    }
    void store_columns(const Num *columns, Real *matrices) const {
        for (int64_t c = 0; c < value_blocks; ++c)
            for (int64_t i = 0; i < K; ++i)
                store<Real>(entry(matrices, i, c), columns[place(c, i, value_blocks, K)], V - c * LANES);
    }
    template <class R> R *entry(R *matrices, int64_t i, int64_t c) const {
        return matrices + index * p.cells() + i * V + c * LANES;
    }
    // the same with keys in the lanes
    int64_t row_of_blocks() const { return padded(V); }
    void load_rows(const Real *matrices, Num *rows) const {
        std::fill(rows, rows + key_blocks * row_of_blocks(), Num{});
        if (!matrices) return;
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < V; ++j)
                rows[place(i / LANES, j, key_blocks, row_of_blocks())][i % LANES] = matrices[index * p.cells() + i * V + j];
    }
    void store_rows(const Num *rows, Real *matrices) const {
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < V; ++j)
                matrices[index * p.cells() + i * V + j] = rows[place(i / LANES, j, key_blocks, row_of_blocks())][i % LANES];
    }
    void load_normaliser(const Real *vectors) const {
        if (!p.normalise_readout) return;
        std::fill(z.numbers(), z.numbers() + K, Real(0));
        if (vectors) std::copy(vectors + index * K, vectors + (index + 1) * K, z.numbers());
    }
    void store_normaliser(Real *vectors) const {
        if (p.normalise_readout) std::copy(z.numbers(), z.numbers() + K, vectors + index * K);
    }
    // ahead of a pass compute the rows it needs, all heads the first half before any the second
    void prepare_features(int64_t t, FeatureRows<Real> &rows) const {
        for (int64_t s = t; s < std::min(t + STEPS, T); ++s) rows.prepare(s);
    }
    void compute_features(int64_t t, FeatureRows<Real> &rows) const {
        for (int64_t s = t; s < std::min(t + STEPS, T); ++s) rows.compute(s);
    }
    // products of keys with earlier keys, and of queries with keys up to their own step
    template <int N, bool STRICT, bool LOOSE>
    inline __attribute__((always_inline)) typename Pairs<Real, N, STRICT, LOOSE>::Sums
    overlaps(Steps<const Real> keys, Steps<const Real> queries, int64_t n_keys) const {
        Pairs<Real, N, STRICT, LOOSE> pairs;
        if ((STRICT && N > 1) || LOOSE)
            for (int64_t i = 0; i < n_keys; i += LANES) {
                Num k[N], q[N];
#pragma GCC unroll 8
                for (int s = 0; s < N; ++s) {
                    k[s] = load<Real>(keys[s] + i, n_keys - i);
                    q[s] = LOOSE ? load<Real>(queries[s] + i, n_keys - i) : Num{};
                }
                pairs.add(k, k, q);
            }
        return typename Pairs<Real, N, STRICT, LOOSE>::Sums(pairs);
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
    static constexpr int STEPS = Base::STEPS;
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
        with_constant<STEPS>(std::min<int64_t>(STEPS, T), [&](auto n) {
            const auto next = key.from(0);
            for_blocks(this->value_blocks, [&](auto width, int64_t c) {
                auto *r = this->template at<width>(retrieved, c * STEPS);
                write_and_read<0, n, false>(this->template at<width>(memory, c * K), K, next, next, next, r, r, r);
            });
        });
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
        this->fetch(t + AHEAD, key, value);
        if (READS) this->fetch(t + AHEAD, query);
        const int64_t left = T - t;
        if (left >= 2 * STEPS) return write<STEPS, STEPS>(t);
        if (left >= STEPS) return with_constant<STEPS - 1>(left - STEPS, [&](auto n) { write<STEPS, n>(t); });
        with_constant<STEPS - 1>(left, [&](auto n) { write<at_least_one(n), 0>(t); });
    }
    template <int N, int NEXT> void write(int64_t t) {
        // all in variables of its own: the compiler cannot know that what is stored below changes nothing else
        const int64_t n_keys = K, n_values = V, blocks = this->value_blocks;
        const bool keeps = x.errors;
        const Steps<const Real> k = key.from(t), next = key.from(t + N), q = (READS ? query : key).from(t), v = value.from(t);
        const Steps<Real> o = output.from(t), errors = error.from(t);
        Real strength[N], share[N];
        for (int s = 0; s < N; ++s) {
            strength[s] = this->strength(t + s);
            share[s] = p.normalise_readout ? 1 / accumulate(t + s) : Real(1);
        }
        const auto overlap = this->template overlaps<N, DELTA, false>(k, k, n_keys);
        if (READS) this->fetch(t + AHEAD, output);
        if (DELTA && keeps) this->fetch(t + AHEAD, error);
        for_blocks(blocks, [&](auto width, int64_t c) __attribute__((always_inline)) {
            using Columns = typename BlocksOf<Real, width>::type;
            Columns *W = this->template at<width>(memory, c * n_keys);
            Columns *ahead = this->template at<width>(retrieved, c * STEPS);
            const int64_t from = c * LANES, left = n_values - from;
            Columns values[N], e[N], u[N], read[N];
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s) {
                u[s] = values[s] = load_blocks<Real, width>(v[s] + from, left);
                read[s] = Columns{};
            }
            if (DELTA) {
                corrected_values<N>(values, ahead, strength, overlap, e, u);
                if (keeps)
#pragma GCC unroll 8
                    for (int s = 0; s < N; ++s) store_blocks<Real, width>(errors[s] + from, e[s], left);
            }
            Columns after[STEPS] = {};
            write_and_read<N, DELTA ? NEXT : 0, READS>(W, n_keys, k, q, next, u, read, after);
#pragma GCC unroll 8
            for (int s = 0; s < NEXT; ++s) ahead[s] = after[s];
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s)
                if (READS) store_blocks<Real, width>(o[s] + from, share[s] * read[s], left);
        });
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
    static constexpr int STEPS = Base::STEPS;
    using Base::key, Base::query, Base::value, Base::p, Base::x, Base::K, Base::V, Base::T;
    Rows<Real> grad_k{}, grad_v{};
    Rows<const Real> grad_o{}, grad{}, output{}, scale{}, error{};
    Buffer<Real> ring, features;
    Real grad_scale[RING] = {};
    const bool maps = p.phi(0).computes();

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
    // Blocks of the gradients of N steps' features, from block c on: kept in slots until all are there, or written at once
    // where there is no map, with ADD to what is there already. All is read before anything is written: rows of tensors lie at
    // the same places of pages, and a processor takes a read for one of what it has just written at that place of another page.
    template <bool ADD, int WIDE, int N>
    inline __attribute__((always_inline)) void give_features(Steps<Real> to, int slot, int64_t c, int64_t n_keys,
                                                             typename BlocksOf<Real, WIDE>::type (&x)[N]) {
        const int64_t from = c * LANES, left = n_keys - from;
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s)
            if (ADD && !maps) x[s] += load_blocks<Real, WIDE>(to[s] + from, left);
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s)
            if (__builtin_expect(maps, 0))
                store_blocks<Real, WIDE>(features.numbers() + (slot + s) * this->key_blocks * LANES + from, x[s], WIDE * LANES);
            else
                store_blocks<Real, WIDE>(to[s] + from, x[s], left);
    }
    template <bool ADD> void give_inputs(int64_t t, int slot, FeatureRows<Real> &rows, const Rows<Real> &to) {
        if (maps) rows.template pull_back<ADD>(t, features.vectors() + slot * this->key_blocks, to(t));
    }
    Num block(const Real *row, int64_t c) const { return load<Real>(row + c * LANES, K - c * LANES); }
    // as many from block c on
    template <int WIDE> auto blocks(const Real *row, int64_t c) const {
        return load_blocks<Real, WIDE>(row + c * LANES, K - c * LANES);
    }
};

// Backward in time: D = dL/dW, keys in the lanes. Gradients of v and beta, and what the writes give their keys. A pass
// first asks D what it was before its own steps and adds what they do to each other; then each step in its turn reads its
// gain and changes D: no gradient has anything of what came before it in time.
template <class Real, bool DELTA, bool READS> struct Receiving : Backward<Real, DELTA, READS> {
    using Base = Backward<Real, DELTA, READS>;
    using Num = typename Base::Num;
    static constexpr int STEPS = Base::STEPS;
    using Base::key, Base::query, Base::p, Base::x, Base::K, Base::V, Base::T, Base::z;
    using Base::grad, Base::grad_k, Base::grad_v, Base::error;
    Rows<Real> grad_beta{};
    Buffer<Real> memory;

    static int64_t bytes(const Problem &p) { return blocks_of(p.keys) * p.values * sizeof(Num); }
    Receiving(const Problem &problem, const Tensors<Real> &tensors)
        : Base(problem, tensors), memory(this->key_blocks * this->row_of_blocks() * LANES) {}
    void attach(int64_t i) {
        Base::attach(i);
        grad_beta = this->rows(x.grad_beta, 1);
        this->load_rows(x.grad_last, memory.vectors());
        this->load_normaliser(x.grad_last_z);
    }
    void step(int64_t t) {
        this->fetch(t - AHEAD, key, error);
        const int64_t left = T - t;
        if (left >= STEPS) return receive<STEPS>(t);
        with_constant<STEPS - 1>(left, [&](auto n) { receive<at_least_one(n)>(t); });
    }
    template <int N> void receive(int64_t t) {
        const Steps<const Real> k = key.from(t), q = (READS ? query : key).from(t), e = error.from(t);
        const Steps<const Real> g = (READS ? grad : error).from(t);
        Real strength[N];
        for (int s = 0; s < N; ++s) strength[s] = this->strength(t + s);
        receive_values<N>(t, k, q, e, g, strength);
        this->fetch(t - AHEAD, grad_k, grad_v);
        receive_keys<N>(t, k, q, e, g, strength);
    }
    // D^T k of the memory before the pass, a block of it
    inline __attribute__((always_inline)) static Num ask(const Num *D, int64_t row, int64_t blocks, const Real *k,
                                                         int64_t n_keys, int64_t from) {
        Num totals[LANES] = {};
        for_blocks(blocks, [&](auto width, int64_t b) __attribute__((always_inline)) {
            const auto keys = load_blocks<Real, width>(k + b * LANES, n_keys - b * LANES);
            const auto *d = reinterpret_cast<const typename BlocksOf<Real, width>::type *>(D + b * row) + from;
            // one address and sixteen distances: the compiler would keep sixteen addresses, more than there are registers
            asm("" : "+r"(d));
#pragma GCC unroll 16
            for (int j = 0; j < LANES; ++j)
                if constexpr (width == 2) {
                    totals[j] += keys.a * d[j].a;
                    totals[j] += keys.b * d[j].b;
                } else {
                    totals[j] += keys * d[j];
                }
        });
        return LaneSums<Real, LANES>(totals).vector(0);
    }
    // what the writes receive, dL/dv and dL/dbeta
    template <int N>
    inline __attribute__((always_inline)) void receive_values(int64_t t, Steps<const Real> k, Steps<const Real> q,
                                                              Steps<const Real> e, Steps<const Real> g, const Real *strength) {
        const int64_t n_keys = K, n_values = V, blocks = this->key_blocks, row = this->row_of_blocks();
        const Num *D = memory.vectors();
        const Steps<Real> to = grad_v.from(t);
        const auto overlap = this->template overlaps<N, DELTA, READS>(k, q, n_keys);
        if (READS) this->fetch(t - AHEAD, query, this->grad_o);
        Num along[N] = {};
        for (int64_t from = 0; from < n_values; from += LANES) {
            const int64_t left = n_values - from;
            Num grads[N], errors[N], received[N], loses[N];
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s) {
                grads[s] = READS ? load<Real>(g[s] + from, left) : Num{};
                errors[s] = DELTA ? load<Real>(e[s] + from, left) : Num{};
                received[s] = ask(D, row, blocks, k[s], n_keys, from);
            }
#pragma GCC unroll 8
            for (int s = N - 1; s >= 0; --s) {
                // what was computed last comes last: the others need not wait for it
#pragma GCC unroll 8
                for (int r = N - 1; r >= s; --r)
                    if (READS) received[s] += overlap.loose(r, s) * grads[r];
#pragma GCC unroll 8
                for (int r = N - 1; r > s; --r)
                    if (DELTA) received[s] -= overlap.strict(r, s) * loses[r];
                loses[s] = DELTA ? strength[s] * received[s] : received[s];
                if (DELTA) along[s] += received[s] * errors[s];
            }
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s) store<Real>(to[s] + from, loses[s], left);
        }
        if (DELTA) {
            const LaneSums<Real, N> sums(along);
            for (int s = 0; s < N; ++s) *grad_beta(t + s) = sums[s];
        }
    }
    // dL/dk but for what removals cost, block after block
    template <int N>
    inline __attribute__((always_inline)) void receive_keys(int64_t t, Steps<const Real> k, Steps<const Real> q,
                                                            Steps<const Real> e, Steps<const Real> g, const Real *strength) {
        const Steps<const Real> lost = grad_v.from(t);
        const Steps<Real> to = grad_k.from(t);
        const int64_t n_keys = K, n_values = V, blocks = this->key_blocks, row = this->row_of_blocks();
        for_blocks(blocks, [&](auto width, int64_t b) __attribute__((always_inline)) {
            using Rows = typename BlocksOf<Real, width>::type;
            Rows keys[N], queries[N], gain[N] = {};
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s) {
                keys[s] = this->template blocks<width>(k[s], b);
                queries[s] = this->template blocks<width>(q[s], b);
            }
            auto *D = this->template at<width>(memory, b * row);
            ::receive_keys<N, DELTA, READS>(D, n_values, e, lost, g, keys, queries, gain);
#pragma GCC unroll 8
            for (int s = N - 1; s >= 0; --s) {
                gain[s] = strength[s] * gain[s];
                if (p.normalise_readout) gain[s] += accumulate(t + s, b, queries[s]);
            }
            this->template give_features<false, width>(to, 0, b, n_keys, gain);
        });
        for (int s = 0; s < N; ++s) this->template give_inputs<false>(t + s, s, key, grad_k);
    }
    // dL/dz, a block of it, which this read adds to and this write's key then receives
    Two<Num> accumulate(int64_t t, int64_t c, const Two<Num> &query) const {
        return {accumulate(t, c, query.a), accumulate(t, c + 1, query.b)};
    }
    Num accumulate(int64_t t, int64_t c, Num query) const {
        Num *sums = z.vectors() + c;
        if (READS) *sums += query * this->grad_scale[t & (RING - 1)];
        return *sums;
    }
    void finish() {
        if (x.grad_z) this->store_normaliser(x.grad_z);
        if (x.grad_state) this->store_rows(memory.vectors(), x.grad_state);
    }
};

// Forward in time with keys in the lanes: the memory is written again. Gradients of queries, and what the delta rule's
// removals cost the keys. grad_v holds what each write removed.
template <class Real, bool DELTA, bool READS> struct Rewriting : Backward<Real, DELTA, READS> {
    using Base = Backward<Real, DELTA, READS>;
    using Num = typename Base::Num;
    static constexpr int STEPS = Base::STEPS;
    using Base::key, Base::query, Base::p, Base::x, Base::K, Base::V, Base::T, Base::z;
    using Base::grad, Base::grad_k, Base::grad_v, Base::error;
    Rows<Real> grad_q{};
    Buffer<Real> memory;
    // else the pass before this one has left all but grad_q in the second cache
    const bool far = p.far_rows(sizeof(Real));

    static int64_t bytes(const Problem &p) { return blocks_of(p.keys) * p.values * sizeof(Num); }
    Rewriting(const Problem &problem, const Tensors<Real> &tensors)
        : Base(problem, tensors), memory(this->key_blocks * this->row_of_blocks() * LANES) {}
    void attach(int64_t i) {
        Base::attach(i);
        grad_q = this->rows(x.grad_q, p.size);
        this->load_rows(x.state, memory.vectors());
        this->load_normaliser(x.z);
    }
    void step(int64_t t) {
        if (far) {
            this->fetch(t + AHEAD, key, error);
            if (READS) this->fetch(t + AHEAD, this->grad_o);
        }
        const int64_t left = T - t;
        if (left >= STEPS) return write<STEPS>(t);
        with_constant<STEPS - 1>(left, [&](auto n) { write<at_least_one(n)>(t); });
    }
    template <int N> void write(int64_t t) {
        const Steps<const Real> k = key.from(t), e = error.from(t), g = (READS ? grad : error).from(t), r = grad_v.from(t);
        Real strength[N];
        for (int s = 0; s < N; ++s) strength[s] = this->strength(t + s);
        const Steps<Real> to_query = grad_q.from(t), to_key = grad_k.from(t);
        const int64_t n_keys = K, n_values = V, blocks = this->key_blocks, row = this->row_of_blocks();
        const int64_t later = blocks > WIDTH ? WIDTH : 0;  // the second of what goes side by side, if there is one
        for_blocks(blocks, [&](auto width, int64_t c) __attribute__((always_inline)) {
            using Rows = typename BlocksOf<Real, width>::type;
            Rows writes[N], loss[N] = {}, queries[N] = {};
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s) writes[s] = strength[s] * this->template blocks<width>(k[s], c);
            read_keys<N, DELTA, READS>(this->template at<width>(memory, c * row), n_values, e, r, g, writes, loss, queries);
            if (READS && c == 0) this->fetch(t + AHEAD, grad_q);
            if (DELTA && c == later && far) this->fetch(t + AHEAD, grad_k, grad_v);
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s) {
                loss[s] = -loss[s];
                if (READS && p.normalise_readout) queries[s] += accumulate<width>(t + s, c);
            }
            if (DELTA) this->template give_features<true, width>(to_key, STEPS, c, n_keys, loss);
            if (READS) this->template give_features<false, width>(to_query, 0, c, n_keys, queries);
        });
        for (int s = 0; s < N; ++s) {
            if (READS) this->template give_inputs<false>(t + s, s, query, grad_q);
            if (DELTA) this->template give_inputs<true>(t + s, STEPS + s, key, grad_k);
        }
    }
    // a block of z, which this write's key is added to, times the gradient of z . q
    template <int WIDE> typename BlocksOf<Real, WIDE>::type accumulate(int64_t t, int64_t c) const {
        if constexpr (WIDE == 2) {
            return {accumulate<1>(t, c), accumulate<1>(t, c + 1)};
        } else {
            Num *sums = z.vectors() + c;
            *sums += this->block(key(t), c);
            return *sums * this->grad_scale[t & (RING - 1)];
        }
    }
    void finish() const {}
};

// Take the heads first .. last of a sequence through time, forward or backward.
template <class Sweep>
void pass_through_time(const Problem &p, std::vector<Sweep> &heads, int64_t first, int64_t last, bool forward) {
    constexpr int STEPS = Sweep::STEPS;
    const int64_t n = last - first, passes = (p.steps + STEPS - 1) / STEPS;
    for (int64_t i = 0; i < n; ++i) heads[i].attach(first + i);
    const bool computes = p.phi(0).computes() || p.normalise_readout;
    const int64_t strip = std::max<int64_t>(1, STRIP_BYTES / std::max<int64_t>(Sweep::bytes(p), 1));
    for (int64_t start = 0; start < passes; start += STRIP_PASSES)
        for (int64_t from = 0; from < n; from += strip)
            for (int64_t pass = start; pass < std::min(start + STRIP_PASSES, passes); ++pass) {
                const int64_t t = (forward ? pass : passes - 1 - pass) * STEPS, to = std::min(from + strip, n);
                if (computes) {
                    for (int64_t i = from; i < to; ++i) heads[i].prepare(t);
                    for (int64_t i = from; i < to; ++i) heads[i].compute(t);
                }
                for (int64_t i = from; i < to; ++i) heads[i].step(t);
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
template <class F> void for_each_group(const Problem &p, int64_t bytes_per_head, int64_t row_bytes, F make) {
    const int64_t memories = GROUP_BYTES / std::max<int64_t>(bytes_per_head, 1);
    const int64_t rows = ROW_BYTES / std::max<int64_t>(p.steps * row_bytes, 1);
    const int64_t fitting = rows ? std::min(rows, memories) : memories;
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
    for_each_group(p, Sweep::bytes(p), p.row_numbers() * sizeof(Real), [&](int64_t n) {
        return [&p, heads = heads_of<Sweep>(p, x, n)](int64_t first, int64_t last) mutable {
            pass_through_time(p, heads, first, last, true);
        };
    });
}

template <class Real, bool DELTA, bool READS> void backward(const Problem &p, const Tensors<Real> &x) {
    using Back = Receiving<Real, DELTA, READS>;
    using Forth = Rewriting<Real, DELTA, READS>;
    for_each_group(p, Back::bytes(p) + Forth::bytes(p), p.row_numbers() * sizeof(Real), [&](int64_t n) {
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

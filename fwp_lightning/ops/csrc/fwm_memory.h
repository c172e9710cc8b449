// The fwm rule for one sequence of one head, forward and backward: W <- W + k (x) beta (v - W^T k), then
// W <- W / max(1, |W|_F) (Schlag et al. 2021), sixteen steps at a time as products of small matrices. ../README.md derives
// the equations and names what is computed.
//
// Use: fwm_forward() with a `kept` buffer of fwm_kept_numbers(), then fwm_backward() with that buffer as it was left; it may
// run any number of times. `scratch` of fwm_scratch_numbers() is only used during a call: one for each thread will do.
// Buffers need no alignment and no initial value; nothing is allocated here, and equal inputs give equal bits. Numbers
// below the smallest normal one count as 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "small_matmul.h"
#include "subnormals.h"

namespace {

// Row t of a matrix, `stride` numbers after row t - 1; data may be null where a member says so.
template <class T> struct Rows {
    T *data;
    int64_t stride;
    T *operator[](int64_t t) const { return data + t * stride; }
    explicit operator bool() const { return data != nullptr; }
};

template <class Real> struct FwmSequence {
    int64_t steps, keys, values;     // T >= 0, K >= 1, V >= 1
    Rows<const Real> k;              // [T, K]
    Rows<const Real> v;              // [T, V]; null: values are one-hot
    Rows<const int64_t> ids;         // [T, 1], where values are one-hot: the component that is 1, in 0 .. V - 1
    Rows<const Real> beta;           // [T, 1]
    Rows<const Real> q;              // [T, K], one read after every write; null: write only
    const Real *state;               // [K, V] before the first step; null: an empty memory, whose first write is not rescaled
    const Real *last_q = nullptr;    // [K], one read from the last memory; null: none
};

// What fwm_forward() fills. Where an output is null it is not wanted.
template <class Real> struct FwmOutputs {
    Rows<Real> o;                    // [T, V]; ignored without q
    Real *last = nullptr;            // [K, V], the memory after the last step
    Real *last_o = nullptr;          // [V]; ignored without last_q
};

// What fwm_backward() reads and writes. Where an output is null it is not wanted.
template <class Real> struct FwmGradients {
    const Real *last;                // [K, V], of the last memory; null: zero
    Rows<const Real> o;              // [T, V]; ignored without q
    Rows<Real> k, v, beta, q;        // outputs: [T, K], [T, V], [T, 1], [T, K]; v is ignored for one-hot values, q without q
    Real *state;                     // output: [K, V]; ignored without state
    const Real *last_o = nullptr;    // [V]; ignored without last_q
    Real *last_q = nullptr;          // output: [K]; ignored without last_q
};

constexpr int64_t FWM_CHUNK = 16;
// chunks from one kept memory to the next: K V / 32 numbers a step are kept, and the one between is computed again
constexpr int64_t FWM_INTERVAL = 2;

// Everything of one sequence, in the buffers that the caller gives.
//
// Where values are one-hot and the memory starts empty, columns are taken in the order in which values are first written:
// those that come later are zero until then, and products leave them out.
template <class Real> class FwmMemory {
  public:
    FwmMemory(const FwmSequence<Real> &sequence, Real *kept, Real *scratch) : s(sequence), K(s.keys), V(s.values) {
        chunks = (s.steps + FWM_CHUNK - 1) / FWM_CHUNK;
        pitch = whole_vectors<Real>(V);
        // rows a multiple of 4096 bytes apart would fall into the same lines of the first cache
        if (pitch * sizeof(Real) % 4096 == 0) pitch += FULL<Real>;
        place(kept, scratch);
    }
    int64_t kept_numbers() const { return n_kept; }
    int64_t scratch_numbers() const { return n_scratch; }

    void forward(const FwmOutputs<Real> &out, bool keep) {
        const FlushedSubnormals flushed;
        begin();
        load(W, s.state);
        squared_norm = s.state ? total(products(W, W, K * pitch)) : Real(0);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            if (keep && chunk > 0 && chunk % FWM_INTERVAL == 0)
                std::copy(W, W + K * pitch, memories + (chunk / FWM_INTERVAL - 1) * K * pitch);
            forward_chunk(chunk, s.q ? out.o : Rows<Real>{nullptr, 0}, keep);
        }
        if (sorted && squared_norm != squared_norm) std::fill_n(W, K * pitch, squared_norm);
        if (keep && s.last_q) std::copy(W, W + K * pitch, last_memory);
        if (out.last) store(W, out.last);
        if (!s.last_q || !out.last_o) return;
        multiply<false>(Z, pitch, Real(0), Factor<Real>{s.last_q, K, 1}, W, pitch, 1, pitch, K);
        store_row(Z, out.last_o);
    }

    // returns the first step that any gradient reaches
    int64_t backward(const FwmGradients<Real> &grad) {
        const FlushedSubnormals flushed;
        begin();
        if (grad.last || !s.last_q) load(W, grad.last);
        if (s.last_q) backward_last_read(grad, grad.last != nullptr);
        if (sorted && chunks > 0) spread_nan();
        int64_t chunk = chunks - 1;
        first_is_known = false;
        for (; chunk >= 0; --chunk) {
            if (chunk == chunks - 1 || chunk % FWM_INTERVAL == FWM_INTERVAL - 1) compute_again(chunk);
            if (backward_chunk(chunk, grad)) break;
        }
        const int64_t reached = std::max<int64_t>(chunk, 0) * C;
        for (int64_t t = 0; t < reached; ++t) {
            if (grad.k) std::fill_n(grad.k[t], K, Real(0));
            if (grad.v && s.v) std::fill_n(grad.v[t], V, Real(0));
            if (grad.beta) *grad.beta[t] = 0;
        }
        if (grad.state && s.state) store(W, grad.state);
        return reached;
    }

  private:
    static constexpr int64_t C = FWM_CHUNK;
    // a number for each step of a chunk
    using Steps = typename VectorOf<Real, C * sizeof(Real)>::type;
    using Vector = Full<Real>;
    static constexpr int L = FULL<Real>;

    // ---- buffers ----

    Real *take(Real *from, int64_t &used, int64_t n) {
        Real *at = from ? from + used : nullptr;
        used += (n + L - 1) / L * L;
        return at;
    }
    void place(Real *kept, Real *scratch) {
        errors = take(kept, n_kept, s.steps * pitch);
        first_reads = take(kept, n_kept, s.steps * pitch);
        key_products = take(kept, n_kept, s.steps * C);
        scales = take(kept, n_kept, s.steps);
        // those before each interval but the first
        memories = take(kept, n_kept, std::max<int64_t>(0, (chunks - 1) / FWM_INTERVAL) * K * pitch);
        last_memory = take(kept, n_kept, K * pitch);
        // scratch rounded down to a register: the buffers start behind what that may take
        n_scratch = L;
        if (scratch) scratch -= reinterpret_cast<uintptr_t>(scratch) % REGISTER_BYTES / sizeof(Real);
        W = take(scratch, n_scratch, K * pitch);
        for (Real *&memory : between) memory = take(scratch, n_scratch, K * pitch);
        for (Real **rows : {&Z, &U, &Y, &O, &unkept_errors}) *rows = take(scratch, n_scratch, C * pitch);
        for (Real **columns : {&E_T, &Y_T, &O_T}) *columns = take(scratch, n_scratch, pitch * C);
        for (Real **columns : {&k_T, &grad_k_T, &grad_q_T}) *columns = take(scratch, n_scratch, K * C);
        value = take(scratch, n_scratch, pitch);
        rank = reinterpret_cast<int32_t *>(take(scratch, n_scratch, V));
        n_written = reinterpret_cast<int32_t *>(take(scratch, n_scratch, chunks));
    }
    void begin() {
        std::fill_n(value, pitch, Real(0));
        for (int64_t t = 0; t < C; ++t)
            for (int64_t i = 0; i < C; ++i) unit[t][i] = i == t;
        sorted = !s.v && !s.state;
        if (!sorted) return;
        std::fill_n(rank, V, -1);
        int32_t next = 0;
        for (int64_t t = 0; t < s.steps; ++t) {
            int32_t &r = rank[*s.ids[t]];
            if (r < 0) r = next++;
            n_written[t / C] = next;
        }
        for (int64_t j = 0; j < V; ++j)
            if (rank[j] < 0) rank[j] = next++;
    }
    int64_t column(int64_t j) const { return sorted ? rank[j] : j; }
    // columns that may be other than zero after a chunk
    int64_t width(int64_t chunk) const { return whole_vectors<Real>(sorted ? n_written[chunk] : V); }
    int64_t length(int64_t chunk) const { return std::min(C, s.steps - chunk * C); }

    void load_row(Real *to, const Real *from) const {
        if (sorted)
            for (int64_t j = 0; j < V; ++j) to[rank[j]] = from[j];
        else
            std::copy(from, from + V, to);
        std::fill(to + V, to + pitch, Real(0));
    }
    void store_row(const Real *from, Real *to) const {
        if (sorted)
            for (int64_t j = 0; j < V; ++j) to[j] = from[rank[j]];
        else
            std::copy(from, from + V, to);
    }
    void load(Real *memory, const Real *from) const {
        if (!from) std::fill_n(memory, K * pitch, Real(0));
        for (int64_t i = 0; from && i < K; ++i) load_row(memory + i * pitch, from + i * V);
    }
    void store(const Real *memory, Real *to) const {
        for (int64_t i = 0; i < K; ++i) store_row(memory + i * pitch, to + i * V);
    }
    // a NaN in columns that are left out would spread by 0 * NaN if they were not
    void spread_nan() {
        const int64_t columns = width(chunks - 1);
        Vector poison{};
        for (int64_t i = 0; i < K; ++i)
            for_blocks<Real, 1>(pitch - columns, [&](auto block, int64_t j) {
                add(poison, 0 * load_vector<typename decltype(block)::Vector>(W + i * pitch + columns + j));
            });
        if (total(poison) != 0) std::fill_n(W, K * pitch, total(poison));
    }

    Factor<Real> keys_of(int64_t t) const { return {s.k[t], s.k.stride, 1}; }
    Factor<Real> keys_T_of(int64_t t) const { return {s.k[t], 1, s.k.stride}; }
    Factor<Real> queries_of(int64_t t) const { return {s.q[t], s.q.stride, 1}; }
    Factor<Real> queries_T_of(int64_t t) const { return {s.q[t], 1, s.q.stride}; }
    static Real *numbers(Steps *matrix) { return reinterpret_cast<Real *>(matrix); }

    // the value of step t in `value`, whose other components are 0; forget_value() after use
    void recall_value(int64_t t) {
        if (s.v)
            std::copy(s.v[t], s.v[t] + V, value);
        else
            value[column(*s.ids[t])] = 1;
    }
    void forget_value(int64_t t) {
        if (!s.v) value[column(*s.ids[t])] = 0;
    }

    // ---- sums ----

    template <class X> static void add(Vector &sum, X x) {
        sum += widened<Real>(x);
    }
    static Real total(Vector x) { return sum_vector<Real, REGISTER_BYTES>(x); }
    static Real total_steps(Steps x) { return sum_vector<Real, sizeof(Steps)>(x); }
    // a . b, not yet added up; n numbers in whole narrow vectors
    static Vector products(const Real *a, const Real *b, int64_t n) {
        Vector sums[SLOTS] = {};
        for_blocks<Real, SLOTS>(n, [&](auto block, int64_t j) {
            using X = typename decltype(block)::Vector;
            for (int i = 0; i < block.COUNT; ++i) add(sums[i], load_vector<X>(a + j + i * L) * load_vector<X>(b + j + i * L));
        });
        return sum_of(sums);
    }
    static Real dot(const Real *a, const Real *b, int64_t n) {
        const int64_t whole = n / NARROW<Real> * NARROW<Real>;
        Real sum = total(products(a, b, whole));
        for (int64_t i = whole; i < n; ++i) sum += a[i] * b[i];
        return sum;
    }
    // sum_j row[j] columns[j]
    static Steps combine_columns(const Real *row, const Real *columns, int64_t n) {
        Steps sums[4] = {};
        int64_t j = 0;
        for (; j + 4 <= n; j += 4)
            for (int i = 0; i < 4; ++i) sums[i] += row[j + i] * load_vector<Steps>(columns + (j + i) * C);
        for (; j < n; ++j) sums[0] += row[j] * load_vector<Steps>(columns + j * C);
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    // adds a block of columns of n weighted rows; the next row and weight are after (1) or before (-1) the last
    template <class Block>
    void combine_rows(typename Block::Vector *sum, const Real *weight, const Real *row, int64_t n, int64_t direction) const {
        for (int64_t m = 0; m < n; ++m, weight += direction, row += direction * pitch)
            for (int i = 0; i < Block::COUNT; ++i) sum[i] += *weight * load_vector<typename Block::Vector>(row + i * L);
    }
    static void scale_row(Real *row, Real scale, int64_t columns) {
        for_blocks<Real, 1>(columns, [&](auto block, int64_t j) {
            using X = typename decltype(block)::Vector;
            store_vector(row + j, scale * load_vector<X>(row + j));
        });
    }

    // ---- forward ----

    void forward_chunk(int64_t chunk, Rows<Real> o, bool keep) {
        const int64_t t0 = chunk * C, n = length(chunk), columns = width(chunk);
        Real *E = keep ? errors + t0 * pitch : unkept_errors, *R = keep ? first_reads + t0 * pitch : Z;
        Real *A = keep ? key_products + t0 * C : numbers(unkept_products);
        multiply<false>(R, pitch, Real(0), keys_of(t0), W, pitch, n, columns, K);
        transpose(k_T, C, C, s.k[t0], s.k.stride, n, K);
        multiply<false>(A, C, Real(0), keys_of(t0), k_T, C, n, C, K);
        // D[t-1] = scale * open, p_{t-1} = scale * past: the newest scale is multiplied last, since it is known last
        Steps open{};
        Real past = 1, scale = 1;
        for (int64_t t = 0; t < n; ++t) {
            write(t0 + t, t, columns, scale, past, open, R + t * pitch, A + t * C, E + t * pitch);
            open = scale * open + unit[t];
            past *= scale;
            scale = new_scale(t0 + t);
            D[t] = scale * open;
            if (keep) scales[t0 + t] = scale;
        }
        if (o) forward_reads(t0, n, columns, o);
        for (int64_t t = 0; t < n; ++t) scale_row(U + t * pitch, D[n - 1][t], columns);
        SquaredNorm norm;
        multiply<true>(W, pitch, past * scale, keys_T_of(t0), U, pitch, K, columns, n, norm);
        squared_norm = total(sum_of(norm.squares));
    }

    // the error and U of step t of a chunk, and |W'|^2
    void write(int64_t now, int64_t t, int64_t columns, Real scale, Real past, Steps open, const Real *R, const Real *A,
               Real *E) {
        Real weight[C];
        store_vector(weight, open * load_vector<Steps>(A));
        const Real beta = *s.beta[now], key_square = A[t];
        Vector growth{};
        recall_value(now);
        for_blocks<Real, 4>(columns, [&](auto block, int64_t j) {
            using X = typename decltype(block)::Vector;
            X r[block.COUNT];
            for (int i = 0; i < block.COUNT; ++i) r[i] = past * load_vector<X>(R + j + i * L);
            combine_rows<decltype(block)>(r, weight, U + j, t, 1);
            for (int i = 0; i < block.COUNT; ++i) {
                r[i] *= scale;
                const X e = load_vector<X>(value + j + i * L) - r[i], u = beta * e;
                store_vector(E + j + i * L, e);
                store_vector(U + t * pitch + j + i * L, u);
                add(growth, u * (2 * r[i] + key_square * u));
            }
        });
        forget_value(now);
        squared_norm += total(growth);
    }
    // by how much the memory is scaled down after step t
    Real new_scale(int64_t t) {
        // written so that a NaN is not lost
        if ((t == 0 && !s.state) || squared_norm <= 1) return 1;
        const Real scale = 1 / std::sqrt(squared_norm);
        squared_norm *= scale * scale;
        return scale;
    }
    void forward_reads(int64_t t0, int64_t n, int64_t columns, Rows<Real> o) {
        Steps weight[C];
        multiply<false>(O, pitch, Real(0), queries_of(t0), W, pitch, n, columns, K);
        multiply<false>(numbers(weight), C, Real(0), queries_of(t0), k_T, C, n, C, K);
        for (int64_t t = 0; t < n; ++t) {
            weight[t] *= D[t];
            scale_row(O + t * pitch, D[t][0], columns);
            // what is to come has the weight 0, but may be NaN
            const Factor<Real> weights{numbers(weight + t), C, 1};
            multiply<false>(O + t * pitch, pitch, Real(1), weights, U, pitch, 1, columns, t + 1);
            std::fill(O + t * pitch + columns, O + (t + 1) * pitch, Real(0));
            store_row(O + t * pitch, o[t0 + t]);
        }
    }

    struct SquaredNorm {
        Vector squares[SLOTS] = {};
        template <class X> X operator()(X x, int64_t, int64_t, int slot) {
            add(squares[slot], x * x);
            return x;
        }
    };
    static Vector sum_of(const Vector *slots) { return (slots[0] + slots[1]) + (slots[2] + slots[3]); }

    // ---- backward ----

    // W = q (x) grad_o, added to what is there if asked
    void backward_last_read(const FwmGradients<Real> &grad, bool add_to) {
        load_row(Z, grad.last_o);
        for (int64_t i = 0; i < K; ++i) {
            if (grad.last_q) grad.last_q[i] = total(products(last_memory + i * pitch, Z, pitch));
            for_blocks<Real, 1>(pitch, [&](auto block, int64_t j) {
                using X = typename decltype(block)::Vector;
                const X x = s.last_q[i] * load_vector<X>(Z + j);
                store_vector(W + i * pitch + j, add_to ? load_vector<X>(W + i * pitch + j) + x : x);
            });
        }
    }

    // the memories before each chunk of an interval whose last chunk is given
    void compute_again(int64_t last_chunk) {
        const int64_t interval = last_chunk / FWM_INTERVAL, first = interval * FWM_INTERVAL;
        before[0] = between[0];
        if (interval > 0)
            before[0] = memories + (interval - 1) * K * pitch;
        else
            load(between[0], s.state);
        for (int64_t chunk = first; chunk < last_chunk; ++chunk) {
            const int64_t t0 = chunk * C, columns = width(chunk);
            Real past = 1;
            for (int64_t t = C - 1; t >= 0; --t) {
                past *= scales[t0 + t];
                const Real scale = past * *s.beta[t0 + t];
                for_blocks<Real, 1>(columns, [&](auto block, int64_t j) {
                    using X = typename decltype(block)::Vector;
                    store_vector(U + t * pitch + j, scale * load_vector<X>(errors + (t0 + t) * pitch + j));
                });
            }
            Real *after = between[chunk - first + 1];
            Plus plus{before[chunk - first], pitch, past};
            multiply<true>(after, pitch, Real(0), keys_T_of(t0), U, pitch, K, columns, C, plus);
            for (int64_t i = 0; i < K; ++i) std::fill(after + i * pitch + columns, after + (i + 1) * pitch, Real(0));
            before[chunk - first + 1] = after;
        }
    }
    struct Plus {
        const Real *other;
        int64_t row;
        Real scale;
        template <class X> X operator()(X x, int64_t i, int64_t j, int) {
            return x + scale * load_vector<X>(other + i * row + j);
        }
    };

    // W holds the gradient of the memory after the chunk, without the chunk's own reads, and then of that before it.
    // True: it has become zero, and so is everything earlier.
    bool backward_chunk(int64_t chunk, const FwmGradients<Real> &grad) {
        const int64_t t0 = chunk * C, n = length(chunk), columns = width(chunk), at = chunk % FWM_INTERVAL;
        const Real *E = errors + t0 * pitch, *A = key_products + t0 * C;
        transpose(E_T, C, C, E, pitch, n, columns);
        scales_and_strengths(t0, n);
        multiply<false>(Z, pitch, Real(0), keys_of(t0), W, pitch, n, columns, K);
        for (int64_t t = 0; t < n; ++t)
            with_written[t] = strength[t] * total(products(Z + t * pitch, E + t * pitch, columns));
        if (!first_is_known) with_first = products(W, before[at], K * pitch);
        // weight[t][i] = D[i-1][t] A[t][i] for i > t
        transpose(numbers(weight), C, C, numbers(D_before), C, n, C);
        for (int64_t t = 0; t < n; ++t) {
            weight[t] *= load_vector<Steps>(A + t * C);
            scale_row(Z + t * pitch, D_before[n][t], columns);
        }
        if (s.q) backward_reads(t0, n, columns, before[at], grad);
        const Real lambda = backward_writes(t0, n, columns, grad);
        if (grad.k) backward_keys(t0, n, columns, before[at], grad.k);
        return backward_memory(t0, n, columns, lambda, before[at], at > 0 ? before[at - 1] : nullptr);
    }

    // D_before[t] = D[t-1], p_before[t] = p_{t-1}
    void scales_and_strengths(int64_t t0, int64_t n) {
        strength = p_before = with_written = Steps{};
        D_before[0] = Steps{};
        Real past = 1;
        for (int64_t t = 0; t < n; ++t) {
            D_before[t + 1] = scales[t0 + t] * (D_before[t] + unit[t]);
            p_before[t] = past;
            past *= scales[t0 + t];
            strength[t] = *s.beta[t0 + t];
        }
    }

    // gradients of the queries; what the reads add to Z, to <F, W_0> and to Z . u
    void backward_reads(int64_t t0, int64_t n, int64_t columns, const Real *W_0, const FwmGradients<Real> &grad) {
        Steps B[C], D_B[C], D_B_T[C];
        for (int64_t t = 0; t < n; ++t) load_row(O + t * pitch, grad.o[t0 + t]);
        transpose(O_T, C, C, O, pitch, n, columns);
        multiply<false>(grad_q_T, C, Real(0), Factor<Real>{W_0, pitch, 1}, O_T, C, K, C, columns);
        multiply<false>(numbers(reads), C, Real(0), Factor<Real>{O, pitch, 1}, E_T, C, n, C, columns);
        transpose(k_T, C, C, s.q[t0], s.q.stride, n, K);
        read_first = Steps{};
        for (int64_t i = 0; i < K; ++i) read_first += load_vector<Steps>(k_T + i * C) * load_vector<Steps>(grad_q_T + i * C);
        transpose(k_T, C, C, s.k[t0], s.k.stride, n, K);
        multiply<false>(numbers(B), C, Real(0), queries_of(t0), k_T, C, n, C, K);
        Steps since_start{};
        for (int64_t t = 0; t < n; ++t) {
            since_start[t] = D_before[t + 1][0];
            reads[t] *= strength;
            read_written[t] = B[t] * reads[t];
            reads[t] *= D_before[t + 1];
            D_B[t] = B[t] * D_before[t + 1];
        }
        transpose(numbers(D_B_T), C, C, numbers(D_B), C, n, n);
        multiply<false>(Z, pitch, Real(1), Factor<Real>{numbers(D_B_T), C, 1}, O, pitch, n, columns, n);
        if (!grad.q) return;
        Steps transposed[C];
        transpose(numbers(transposed), C, C, numbers(reads), C, n, n);
        for (int64_t i = 0; i < K; ++i) store_vector(grad_q_T + i * C, since_start * load_vector<Steps>(grad_q_T + i * C));
        multiply<true>(grad_q_T, C, Real(1), keys_T_of(t0), numbers(transposed), C, K, C, n);
        transpose(grad.q[t0], grad.q.stride, K, grad_q_T, C, K, n);
    }

    // Y, S, gradients of values and strengths; returns lambda before the chunk
    Real backward_writes(int64_t t0, int64_t n, int64_t columns, const FwmGradients<Real> &grad) {
        Real lambda = 0, read_along = 0;
        for (int64_t t = n - 1; t >= 0; --t) {
            const Real scale = scales[t0 + t], beta = *s.beta[t0 + t], key_square = key_products[(t0 + t) * C + t];
            const Real *E = errors + (t0 + t) * pitch, *R = first_reads + (t0 + t) * pitch, *weights = numbers(weight + t);
            Real *z = Z + t * pitch, *y = Y + t * pitch;
            if (s.q) {
                read_along += read_first[t];
                with_written += read_written[t];
            }
            if (scale != 1) {
                const Steps &D = D_before[t + 1];
                lambda = -scale * scale * (D[0] * (total(with_first) + read_along) + total_steps(D * with_written));
            }
            Vector he{}, uu{}, yr{};
            recall_value(t0 + t);
            for_blocks<Real, 4>(columns, [&](auto block, int64_t j) {
                using X = typename decltype(block)::Vector;
                X x[block.COUNT];
                for (int i = 0; i < block.COUNT; ++i) x[i] = load_vector<X>(z + j + i * L);
                // the newest row last
                combine_rows<decltype(block)>(x, weights + n - 1, Y + (n - 1) * pitch + j, n - 1 - t, -1);
                for (int i = 0; i < block.COUNT; ++i) {
                    const int64_t at = j + i * L;
                    const X e = load_vector<X>(E + at), u = beta * e;
                    const X h = x[i] + lambda * (load_vector<X>(value + at) - e + key_square * u), g = beta * h;
                    store_vector(z + at, g);
                    store_vector(y + at, lambda * u - g);
                    add(he, h * e);
                    add(uu, u * u);
                    add(yr, (lambda * u - g) * load_vector<X>(R + at));
                }
            });
            forget_value(t0 + t);
            if (grad.v && s.v) std::copy(z, z + V, grad.v[t0 + t]);
            if (grad.beta) *grad.beta[t0 + t] = total(he);
            const Steps yu = strength * combine_columns(y, E_T, columns);
            with_written = scale * with_written + load_vector<Steps>(key_products + (t0 + t) * C) * yu;
            with_first = scale * with_first + yr;
            read_along *= scale;
            S[t] = D_before[t] * yu;
            S_diagonal[t] = lambda * total(uu);
        }
        return lambda;
    }

    void backward_keys(int64_t t0, int64_t n, int64_t columns, const Real *W_0, Rows<Real> grad_k) {
        const int64_t steps = whole_vectors<Real>(n);
        transpose(Y_T, C, C, Y, pitch, n, columns);
        const Steps since = strength * D_before[n];
        Weighted first{reinterpret_cast<const Real *>(&since), nullptr, C};
        multiply<false>(grad_k_T, C, Real(0), Factor<Real>{W, pitch, 1}, E_T, C, K, steps, columns, first);
        Weighted second{reinterpret_cast<const Real *>(&p_before), grad_k_T, C};
        multiply<false>(grad_k_T, C, Real(0), Factor<Real>{W_0, pitch, 1}, Y_T, C, K, steps, columns, second);
        Steps whole[C];
        transpose(numbers(whole), C, C, numbers(S), C, n, n);
        for (int64_t t = 0; t < n; ++t) whole[t] += S[t] + S_diagonal[t] * unit[t];
        multiply<true>(grad_k_T, C, Real(1), keys_T_of(t0), numbers(whole), C, K, steps, n);
        if (s.q) multiply<true>(grad_k_T, C, Real(1), queries_T_of(t0), numbers(reads), C, K, steps, n);
        transpose(grad_k[t0], grad_k.stride, K, grad_k_T, C, K, n);
    }
    // each column times a number, plus what there was
    struct Weighted {
        const Real *weight, *other;
        int64_t row;
        template <class X> X operator()(X x, int64_t i, int64_t j, int) {
            x *= load_vector<X>(weight + j);
            return other ? x + load_vector<X>(other + i * row + j) : x;
        }
    };

    // true: the gradient has become zero
    bool backward_memory(int64_t t0, int64_t n, int64_t columns, Real lambda, const Real *W_0, const Real *earlier) {
        Real keep = D_before[n][0];
        if (s.q) {
            for (int64_t t = 0; t < n; ++t) scale_row(O + t * pitch, D_before[t + 1][0], columns);
            multiply<true>(W, pitch, keep, queries_T_of(t0), O, pitch, K, columns, n);
            keep = 1;
        }
        for (int64_t t = 0; t < n; ++t) scale_row(Y + t * pitch, p_before[t], columns);
        first_is_known = earlier != nullptr;
        Vector squares;
        if (earlier) {
            PlusAndDot plus{W_0, earlier, pitch, lambda};
            multiply<true>(W, pitch, keep, keys_T_of(t0), Y, pitch, K, columns, n, plus);
            with_first = sum_of(plus.products), squares = sum_of(plus.squares);
        } else {
            PlusAndSquare plus{W_0, pitch, lambda};
            multiply<true>(W, pitch, keep, keys_T_of(t0), Y, pitch, K, columns, n, plus);
            squares = sum_of(plus.squares);
        }
        // squares of small numbers are zero before the numbers are
        if (s.q || total(squares) != 0) return false;
        for (int64_t i = 0; i < K; ++i)
            if (std::any_of(W + i * pitch, W + i * pitch + columns, [](Real x) { return x != 0; })) return false;
        return true;
    }
    struct PlusAndSquare {
        const Real *other;
        int64_t row;
        Real scale;
        Vector squares[SLOTS] = {};
        template <class X> X operator()(X x, int64_t i, int64_t j, int slot) {
            x += scale * load_vector<X>(other + i * row + j);
            add(squares[slot], x * x);
            return x;
        }
    };
    struct PlusAndDot {
        const Real *other, *third;
        int64_t row;
        Real scale;
        Vector products[SLOTS] = {}, squares[SLOTS] = {};
        template <class X> X operator()(X x, int64_t i, int64_t j, int slot) {
            x += scale * load_vector<X>(other + i * row + j);
            add(products[slot], x * load_vector<X>(third + i * row + j));
            add(squares[slot], x * x);
            return x;
        }
    };

    const FwmSequence<Real> &s;
    const int64_t K, V;
    int64_t chunks, pitch, n_kept = 0, n_scratch = 0;
    bool sorted = false, first_is_known = false;
    Real squared_norm = 0;
    // kept: [T, pitch] twice, [T, C], [T], [n, K, pitch], [K, pitch]
    Real *errors, *first_reads, *key_products, *scales, *memories, *last_memory;
    // scratch: [K, pitch]; [C, pitch]; [pitch, C]; [K, C]; [pitch]
    Real *W, *between[FWM_INTERVAL], *Z, *U, *Y, *O, *unkept_errors, *E_T, *Y_T, *O_T, *k_T, *grad_k_T, *grad_q_T, *value;
    int32_t *rank, *n_written;
    const Real *before[FWM_INTERVAL];
    Steps unit[C], D[C], unkept_products[C];
    Steps D_before[C + 1], p_before, strength, with_written, weight[C], S[C], reads[C], read_written[C], read_first;
    Vector with_first;
    Real S_diagonal[C];
};

// How many numbers `kept` holds.
template <class Real> int64_t fwm_kept_numbers(const FwmSequence<Real> &s) {
    return FwmMemory<Real>(s, nullptr, nullptr).kept_numbers();
}

// How many numbers `scratch` holds, for either direction.
template <class Real> int64_t fwm_scratch_numbers(const FwmSequence<Real> &s) {
    return FwmMemory<Real>(s, nullptr, nullptr).scratch_numbers();
}

// `kept` is null where no gradient will be asked for.
template <class Real> void fwm_forward(const FwmSequence<Real> &s, const FwmOutputs<Real> &out, Real *kept, Real *scratch) {
    FwmMemory<Real>(s, kept, scratch).forward(out, kept != nullptr);
}

// Returns the first step that any gradient reaches: those of the steps before it are zero.
template <class Real>
int64_t fwm_backward(const FwmSequence<Real> &s, const Real *kept, const FwmGradients<Real> &grad, Real *scratch) {
    // backward() only reads it
    return FwmMemory<Real>(s, const_cast<Real *>(kept), scratch).backward(grad);
}

}  // namespace

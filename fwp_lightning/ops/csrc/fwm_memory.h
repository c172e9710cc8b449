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
    int64_t steps, keys, values;  // T >= 0, K >= 1, V >= 1
    Rows<const Real> k;           // [T, K]
    Rows<const Real> v;           // [T, V]; null: values are one-hot
    Rows<const int64_t> ids;      // [T, 1], where values are one-hot: the component that is 1, in 0 .. V - 1
    Rows<const Real> beta;        // [T, 1]
    Rows<const Real> q;           // [T, K]; null: write only
    const Real *state;            // [K, V] before the first step; null: an empty memory, whose first write is not rescaled
};

// What fwm_backward() reads and writes. Where an output is null it is not wanted.
template <class Real> struct FwmGradients {
    const Real *last;          // [K, V], of the last memory; null: zero
    Rows<const Real> o;        // [T, V]; ignored without q
    Rows<Real> k, v, beta, q;  // outputs: [T, K], [T, V], [T, 1], [T, K]; v is ignored for one-hot values, q without q
    Real *state;               // output: [K, V]; ignored without state
};

constexpr int64_t FWM_CHUNK = 16;
// chunks from one kept memory to the next: K V / 64 numbers a step are kept, and those between are computed again
constexpr int64_t FWM_INTERVAL = 4;

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

    void forward(Rows<Real> o, Real *last, bool keep) {
        const FlushedSubnormals flushed;
        begin();
        load(W, s.state);
        squared_norm = s.state ? dot(W, W, K * pitch) : Real(0);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            if (keep && chunk > 0 && chunk % FWM_INTERVAL == 0) std::copy(W, W + K * pitch, memories + (chunk / FWM_INTERVAL) * K * pitch);
            forward_chunk(chunk, o, keep);
        }
        if (sorted && squared_norm != squared_norm) std::fill_n(W, K * pitch, squared_norm);
        if (keep) std::copy(W, W + K * pitch, memories);
        if (last) store(W, last);
    }

    void backward(const FwmGradients<Real> &grad) {
        const FlushedSubnormals flushed;
        begin();
        load(W, grad.last);
        if (sorted && chunks > 0) spread_nan();
        int64_t chunk = chunks - 1;
        for (; chunk >= 0; --chunk) {
            if (chunk == chunks - 1 || chunk % FWM_INTERVAL == FWM_INTERVAL - 1) compute_again(chunk);
            if (backward_chunk(chunk, grad)) break;
        }
        // nothing depends on the steps that are left
        for (int64_t t = 0; t < chunk * FWM_CHUNK; ++t) {
            if (grad.k) std::fill_n(grad.k[t], K, Real(0));
            if (grad.v && s.v) std::fill_n(grad.v[t], V, Real(0));
            if (grad.beta) *grad.beta[t] = 0;
        }
        if (grad.state && s.state) store(W, grad.state);
    }

  private:
    static constexpr int64_t C = FWM_CHUNK;
    using Lanes = Real[C];  // one number for each step of a chunk

    // ---- buffers ----

    Real *take(Real *from, int64_t &used, int64_t n) {
        Real *at = from ? from + used : nullptr;
        used += (n + FULL<Real> - 1) / FULL<Real> * FULL<Real>;
        return at;
    }
    void place(Real *kept, Real *scratch) {
        const int64_t intervals = std::max<int64_t>(1, (chunks + FWM_INTERVAL - 1) / FWM_INTERVAL);
        errors = take(kept, n_kept, s.steps * pitch);
        first_reads = take(kept, n_kept, s.steps * pitch);
        products = take(kept, n_kept, s.steps * C);
        scales = take(kept, n_kept, s.steps);
        memories = take(kept, n_kept, intervals * K * pitch);  // the last one; then those before each interval but the first
        n_scratch = FULL<Real>;
        // rounded down to a register: n_scratch starts with what that may take
        if (scratch) scratch -= reinterpret_cast<uintptr_t>(scratch) % REGISTER_BYTES / sizeof(Real);
        for (Real **buffer : {&W, &between[0], &between[1], &between[2], &between[3]})
            *buffer = take(scratch, n_scratch, K * pitch);
        for (Real **buffer : {&Z, &U, &Y, &O, &E}) *buffer = take(scratch, n_scratch, C * pitch);
        for (Real **buffer : {&U_T, &Y_T, &O_T}) *buffer = take(scratch, n_scratch, pitch * C);
        for (Real **buffer : {&k_T, &grad_k_T, &grad_q_T}) *buffer = take(scratch, n_scratch, K * C);
        value = take(scratch, n_scratch, pitch);
        rank = reinterpret_cast<int32_t *>(take(scratch, n_scratch, V));
        n_written = reinterpret_cast<int32_t *>(take(scratch, n_scratch, chunks));
    }
    void begin() {
        std::fill_n(value, pitch, Real(0));
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
    // columns that are not zero after a chunk
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
        Real poison = 0;
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = width(chunks - 1); j < V; ++j) poison += 0 * W[i * pitch + j];
        if (poison != 0) std::fill_n(W, K * pitch, poison);
    }

    template <class X> static void add(Full<Real> &sum, X x) {
        Full<Real> wide{};
        std::memcpy(&wide, &x, sizeof x);
        sum += wide;
    }
    static Real total(Full<Real> x) { return sum_vector<Real, REGISTER_BYTES>(x); }
    static Real dot(const Real *a, const Real *b, int64_t n) {
        Full<Real> sum{};
        Real rest = 0;
        int64_t i = 0;
        for (; i + FULL<Real> <= n; i += FULL<Real>) sum += load_vector<Full<Real>>(a + i) * load_vector<Full<Real>>(b + i);
        for (; i < n; ++i) rest += a[i] * b[i];
        return total(sum) + rest;
    }
    Factor<Real> keys_of(int64_t t) const { return {s.k[t], s.k.stride, 1}; }
    Factor<Real> keys_T_of(int64_t t) const { return {s.k[t], 1, s.k.stride}; }
    Factor<Real> queries_of(int64_t t) const { return {s.q[t], s.q.stride, 1}; }
    Factor<Real> queries_T_of(int64_t t) const { return {s.q[t], 1, s.q.stride}; }
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

    // ---- forward ----

    void forward_chunk(int64_t chunk, Rows<Real> o, bool keep) {
        const int64_t t0 = chunk * C, n = length(chunk), columns = width(chunk), steps = whole_vectors<Real>(n);
        Real *error = keep ? errors + t0 * pitch : E, *R = keep ? first_reads + t0 * pitch : Z, *A = keep ? products + t0 * C : &A_of_chunk[0][0];
        multiply<false>(R, pitch, Real(0), keys_of(t0), W, pitch, n, columns, K);
        transpose(k_T, C, steps, s.k[t0], s.k.stride, n, K);
        multiply<false>(A, C, Real(0), keys_of(t0), k_T, C, n, steps, K);
        if (s.q && o) {
            multiply<false>(O, pitch, Real(0), queries_of(t0), W, pitch, n, columns, K);
            multiply<false>(&B[0][0], C, Real(0), queries_of(t0), k_T, C, n, steps, K);
        }
        Lanes decay = {};
        Real past = 1;
        for (int64_t t = 0; t < n; ++t) {
            const Real scale = write(t0 + t, t, columns, R + t * pitch, A + t * C, decay, past, error + t * pitch);
            for (int64_t i = 0; i < t; ++i) decay[i] *= scale;
            decay[t] = scale;
            past *= scale;
            if (keep) scales[t0 + t] = scale;
            if (s.q && o) {
                combine(O + t * pitch, past, U, decay, B[t], t + 1, columns);
                std::fill(O + t * pitch + columns, O + (t + 1) * pitch, Real(0));
                store_row(O + t * pitch, o[t0 + t]);
            }
        }
        for (int64_t t = 0; t < n; ++t) scale_row(U + t * pitch, decay[t], columns);
        SquaredNorm norm;
        multiply<true>(W, pitch, past, keys_T_of(t0), U, pitch, K, columns, n, norm);
        squared_norm = total(norm.sum);
    }

    struct SquaredNorm {
        Full<Real> sum{};
        template <class X> X operator()(X x, int64_t, int64_t) {
            add(sum, x * x);
            return x;
        }
    };

    // row = keep * row + sum_i decay[i] weight[i] rows[i]
    void combine(Real *row, Real keep, const Real *rows, const Real *decay, const Real *weight, int64_t n, int64_t columns) const {
        Lanes factor;
        for (int64_t i = 0; i < n; ++i) factor[i] = decay[i] * weight[i];
        for_blocks<Real, 4>(columns, [&](auto block, int64_t j) {
            using Vectors = decltype(block);
            using X = typename Vectors::Vector;
            X sum[Vectors::COUNT];
            gather_rows<Vectors>(sum, row + j, keep, rows + j, factor, n);
            for (int i = 0; i < Vectors::COUNT; ++i) store_vector(row + j + i * int(sizeof(X) / sizeof(Real)), sum[i]);
        });
    }
    // sum = keep * row + sum_i factor[i] rows[i], a block of columns
    template <class B> inline void gather_rows(typename B::Vector *sum, const Real *row, Real keep, const Real *rows, const Real *factor, int64_t n) const {
        using X = typename B::Vector;
        constexpr int L = sizeof(X) / sizeof(Real);
        for (int i = 0; i < B::COUNT; ++i) sum[i] = keep * load_vector<X>(row + i * L);
        for (int64_t m = 0; m < n; ++m, rows += pitch)
            for (int i = 0; i < B::COUNT; ++i) sum[i] += factor[m] * load_vector<X>(rows + i * L);
    }
    void scale_row(Real *row, Real scale, int64_t columns) const {
        for_blocks<Real, 1>(columns, [&](auto block, int64_t j) {
            using X = typename decltype(block)::Vector;
            store_vector(row + j, scale * load_vector<X>(row + j));
        });
    }

    // Step t of a chunk: its error and U; returns by how much the memory is scaled down.
    Real write(int64_t now, int64_t t, int64_t columns, const Real *R, const Real *A, const Lanes &decay, Real past, Real *error) {
        Lanes factor;
        for (int64_t i = 0; i < t; ++i) factor[i] = decay[i] * A[i];
        const Real beta = *s.beta[now];
        Full<Real> uu{}, ur{};
        recall_value(now);
        for_blocks<Real, 4>(columns, [&](auto block, int64_t j) {
            using Vectors = decltype(block);
            using X = typename Vectors::Vector;
            X r[Vectors::COUNT];
            gather_rows<Vectors>(r, R + j, past, U + j, factor, t);
            for (int i = 0; i < Vectors::COUNT; ++i) {
                const int64_t at = j + i * int(sizeof(X) / sizeof(Real));
                const X e = load_vector<X>(value + at) - r[i], u = beta * e;
                store_vector(error + at, e);
                store_vector(U + t * pitch + at, u);
                add(uu, u * u);
                add(ur, u * r[i]);
            }
        });
        forget_value(now);
        squared_norm += 2 * total(ur) + total(uu) * A[t];
        // written so that a NaN is not lost
        if ((now == 0 && !s.state) || squared_norm <= 1) return 1;
        const Real scale = 1 / std::sqrt(squared_norm);
        squared_norm *= scale * scale;
        return scale;
    }

    // ---- backward ----

    // the memories before each chunk of an interval whose last chunk is given
    void compute_again(int64_t last_chunk) {
        const int64_t interval = last_chunk / FWM_INTERVAL, first = interval * FWM_INTERVAL;
        before[0] = between[0];
        if (interval > 0)
            before[0] = memories + interval * K * pitch;
        else
            load(between[0], s.state);
        for (int64_t chunk = first; chunk < last_chunk; ++chunk) {
            const int64_t t0 = chunk * C, columns = width(chunk);
            Real past = 1;
            for (int64_t t = C - 1; t >= 0; --t) {
                past *= scales[t0 + t];
                written_row(U + t * pitch, t0 + t, past, columns);
            }
            Real *after = between[chunk - first + 1];
            before[chunk - first + 1] = after;
            Shifted shifted{before[chunk - first], pitch, past};
            multiply<true>(after, pitch, Real(0), keys_T_of(t0), U, pitch, K, columns, C, shifted);
            for (int64_t i = 0; i < K; ++i) std::fill(after + i * pitch + columns, after + (i + 1) * pitch, Real(0));
        }
    }
    void written_row(Real *row, int64_t t, Real scale, int64_t columns) const {
        scale *= *s.beta[t];
        for_blocks<Real, 1>(columns, [&](auto block, int64_t j) {
            using X = typename decltype(block)::Vector;
            store_vector(row + j, scale * load_vector<X>(errors + t * pitch + j));
        });
    }

    // W holds the gradient of the memory after the chunk, without the chunk's own reads, and then of that before it.
    // True: it has become zero, and so is everything earlier.
    bool backward_chunk(int64_t chunk, const FwmGradients<Real> &grad) {
        const int64_t t0 = chunk * C, n = length(chunk), columns = width(chunk), steps = whole_vectors<Real>(n);
        const Real *W_0 = before[chunk % FWM_INTERVAL];
        for (int64_t t = 0; t < n; ++t) written_row(U + t * pitch, t0 + t, Real(1), columns);
        transpose(U_T, C, steps, U, pitch, n, columns);
        decays(t0, n);
        Lanes past = {1};
        for (int64_t t = 1; t < n; ++t) past[t] = D[t - 1][0];
        if (s.q) backward_reads(t0, n, columns, W_0, grad);
        multiply<false>(Z, pitch, Real(0), keys_of(t0), W, pitch, n, columns, K);
        const Real lambda = backward_writes(t0, n, columns, W_0, grad);
        if (grad.k) backward_keys(t0, n, columns, W_0, past, grad.k);
        for (int64_t t = 0; t < n; ++t) scale_row(Y + t * pitch, past[t], columns);
        return backward_memory(t0, n, columns, W_0, lambda, D[n - 1][0]);
    }

    // D[t][i]: by how much what step i wrote is scaled down until after step t
    void decays(int64_t t0, int64_t n) {
        for (int64_t t = 0; t < n; ++t) {
            for (int64_t i = 0; i < C; ++i) D[t][i] = i < t ? D[t - 1][i] * scales[t0 + t] : Real(0);
            D[t][t] = scales[t0 + t];
        }
    }
    // columns of a [rows, C] matrix, one for each step, times a number each
    static void scale_lanes(Real *matrix, const Real *scale, int64_t rows) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t t = 0; t < C; ++t) matrix[i * C + t] *= scale[t];
    }

    // gradients of the queries; the gradients of the reads in O, and their products with what was read
    void backward_reads(int64_t t0, int64_t n, int64_t columns, const Real *W_0, const FwmGradients<Real> &grad) {
        const int64_t steps = whole_vectors<Real>(n);
        for (int64_t t = 0; t < n; ++t) load_row(O + t * pitch, grad.o[t0 + t]);
        transpose(O_T, C, steps, O, pitch, n, columns);
        multiply<false>(grad_q_T, C, Real(0), Factor<Real>{W_0, pitch, 1}, O_T, C, K, steps, columns);
        multiply<false>(&reads[0][0], C, Real(0), Factor<Real>{O, pitch, 1}, U_T, C, n, steps, columns);
        transpose(k_T, C, steps, s.q[t0], s.q.stride, n, K);
        std::fill_n(read_first, C, Real(0));
        for (int64_t i = 0; i < K; ++i)
            for (int64_t t = 0; t < steps; ++t) read_first[t] += k_T[i * C + t] * grad_q_T[i * C + t];
        transpose(k_T, C, steps, s.k[t0], s.k.stride, n, K);
        multiply<false>(&B[0][0], C, Real(0), queries_of(t0), k_T, C, n, steps, K);
        Lanes since_start = {}, transposed[C] = {};
        for (int64_t t = 0; t < n; ++t) {
            since_start[t] = D[t][0];
            for (int64_t i = 0; i < steps; ++i) {
                read_written[t][i] = i <= t ? B[t][i] * reads[t][i] : Real(0);
                reads[t][i] = i <= t ? D[t][i] * reads[t][i] : Real(0);
            }
            for (int64_t i = 0; i <= t; ++i) transposed[i][t] = reads[t][i];
        }
        if (!grad.q) return;
        scale_lanes(grad_q_T, since_start, K);
        multiply<true>(grad_q_T, C, Real(1), keys_T_of(t0), &transposed[0][0], C, K, steps, n);
        transpose(grad.q[t0], grad.q.stride, K, grad_q_T, C, K, n);
    }

    // Y, S, gradients of values and betas; expects G^T k in Z; returns lambda before the chunk
    Real backward_writes(int64_t t0, int64_t n, int64_t columns, const Real *W_0, const FwmGradients<Real> &grad) {
        Lanes decay = {}, read_decay = {};
        // <G_t, W_t>, without lambda_t W_t, is D[t] . with_written + D[t][0] with_first
        Lanes with_written = {};
        for (int64_t t = 0; t < n; ++t) with_written[t] = dot(Z + t * pitch, U + t * pitch, columns);
        Real with_first = dot(W, W_0, K * pitch), lambda = 0, remaining = 1;
        for (int64_t t = n - 1; t >= 0; --t) {
            const Real scale = scales[t0 + t], beta = *s.beta[t0 + t], *A = products + (t0 + t) * C;
            Real *z = Z + t * pitch, *y = Y + t * pitch;
            if (s.q) {
                read_decay[t] = 1;
                with_first += read_first[t];
                Lanes weight;
                for (int64_t i = t; i < n; ++i) weight[i] = B[i][t];
                for (int64_t i = 0; i <= t; ++i) with_written[i] += read_written[t][i];
                combine(z, remaining, O + t * pitch, read_decay + t, weight + t, n - t, columns);
            }
            if (scale != 1) {
                Real along = D[t][0] * with_first;
                for (int64_t i = 0; i <= t; ++i) along += D[t][i] * with_written[i];
                lambda = -scale * scale * along;
            }
            Lanes factor;
            for (int64_t i = t + 1; i < n; ++i) factor[i] = scale * decay[i] * A[i];
            Full<Real> he{}, uu{}, yr{};
            recall_value(t0 + t);
            for_blocks<Real, 4>(columns, [&](auto block, int64_t j) {
                using Vectors = decltype(block);
                using X = typename Vectors::Vector;
                X x[Vectors::COUNT];
                gather_rows<Vectors>(x, z + j, s.q ? scale : scale * remaining, Y + (t + 1) * pitch + j, factor + t + 1, n - t - 1);
                for (int i = 0; i < Vectors::COUNT; ++i) {
                    const int64_t at = j + i * int(sizeof(X) / sizeof(Real)), row = (t0 + t) * pitch + at;
                    const X e = load_vector<X>(errors + row), u = beta * e;
                    const X h = x[i] + lambda * (load_vector<X>(value + at) - e + A[t] * u), g = beta * h, new_y = lambda * u - g;
                    store_vector(z + at, g);
                    store_vector(y + at, new_y);
                    add(he, h * e);
                    add(uu, u * u);
                    add(yr, new_y * load_vector<X>(first_reads + row));
                }
            });
            forget_value(t0 + t);
            if (grad.v && s.v) std::copy(z, z + V, grad.v[t0 + t]);
            if (grad.beta) *grad.beta[t0 + t] = total(he);
            with_first = scale * with_first + total(yr);
            // row t of Y U^T
            Lanes yu;
            multiply<false>(yu, C, Real(0), Factor<Real>{y, pitch, 1}, U_T, C, 1, whole_vectors<Real>(n), columns);
            for (int64_t i = 0; i < t; ++i) {
                with_written[i] = scale * with_written[i] + A[i] * yu[i];
                S[t][i] = S[i][t] = D[t - 1][i] * yu[i];
            }
            S[t][t] = lambda * total(uu);
            for (int64_t i = t; i < n; ++i) {
                decay[i] *= scale;
                read_decay[i] *= scale;
            }
            decay[t] = 1;
            remaining *= scale;
        }
        return lambda;
    }

    void backward_keys(int64_t t0, int64_t n, int64_t columns, const Real *W_0, const Lanes &past, Rows<Real> grad_k) {
        const int64_t steps = whole_vectors<Real>(n);
        transpose(Y_T, C, steps, Y, pitch, n, columns);
        for (int64_t t = 0; t < n; ++t) std::fill(S[t] + n, S[t] + C, Real(0));
        scale_lanes(U_T, D[n - 1], columns);
        scale_lanes(Y_T, past, columns);
        multiply<false>(grad_k_T, C, Real(0), Factor<Real>{W, pitch, 1}, U_T, C, K, steps, columns);
        multiply<false>(grad_k_T, C, Real(1), Factor<Real>{W_0, pitch, 1}, Y_T, C, K, steps, columns);
        multiply<true>(grad_k_T, C, Real(1), keys_T_of(t0), &S[0][0], C, K, steps, n);
        if (s.q) multiply<true>(grad_k_T, C, Real(1), queries_T_of(t0), &reads[0][0], C, K, steps, n);
        transpose(grad_k[t0], grad_k.stride, K, grad_k_T, C, K, n);
    }

    // true: the gradient has become zero
    bool backward_memory(int64_t t0, int64_t n, int64_t columns, const Real *W_0, Real lambda, Real keep) {
        if (s.q) {
            for (int64_t t = 0; t < n; ++t) scale_row(O + t * pitch, D[t][0], columns);
            multiply<true>(W, pitch, keep, queries_T_of(t0), O, pitch, K, columns, n);
            keep = 1;
        }
        Shifted sums{W_0, pitch, lambda};
        multiply<true>(W, pitch, keep, keys_T_of(t0), Y, pitch, K, columns, n, sums);
        if (s.q || total(sums.square) != 0) return false;
        for (int64_t i = 0; i < K; ++i)
            if (std::any_of(W + i * pitch, W + i * pitch + columns, [](Real x) { return x != 0; })) return false;
        return true;
    }
    struct Shifted {
        const Real *memory;
        int64_t row;
        Real scale;
        Full<Real> square{};
        template <class X> X operator()(X x, int64_t i, int64_t j) {
            x += scale * load_vector<X>(memory + i * row + j);
            add(square, x * x);
            return x;
        }
    };

    const FwmSequence<Real> &s;
    const int64_t K, V;
    int64_t chunks, pitch, n_kept = 0, n_scratch = 0;
    bool sorted = false;
    Real squared_norm = 0;
    // kept: [T, pitch], [T, pitch], [T, C], [T], [n, K, pitch]
    Real *errors, *first_reads, *products, *scales, *memories;
    // scratch: [K, pitch]; [C, pitch]; [pitch, C]; [K, C]; [pitch]
    Real *W, *between[FWM_INTERVAL], *Z, *U, *Y, *O, *E, *U_T, *Y_T, *O_T, *k_T, *grad_k_T, *grad_q_T, *value;
    int32_t *rank, *n_written;
    const Real *before[FWM_INTERVAL];
    Lanes A_of_chunk[C], B[C], D[C], S[C], reads[C], read_written[C], read_first;
};

// How many numbers `kept` holds.
template <class Real> int64_t fwm_kept_numbers(const FwmSequence<Real> &s) { return FwmMemory<Real>(s, nullptr, nullptr).kept_numbers(); }

// How many numbers `scratch` holds, for either direction.
template <class Real> int64_t fwm_scratch_numbers(const FwmSequence<Real> &s) {
    return FwmMemory<Real>(s, nullptr, nullptr).scratch_numbers();
}

// Fills o [T, V] (with q only) and last [K, V]; either may be null. `kept` is null where no gradient will be asked for.
template <class Real> void fwm_forward(const FwmSequence<Real> &s, Rows<Real> o, Real *last, Real *kept, Real *scratch) {
    FwmMemory<Real>(s, kept, scratch).forward(o, last, kept != nullptr);
}

template <class Real> void fwm_backward(const FwmSequence<Real> &s, const Real *kept, const FwmGradients<Real> &grad, Real *scratch) {
    // backward() only reads it
    FwmMemory<Real>(s, const_cast<Real *>(kept), scratch).backward(grad);
}

}  // namespace

// The arithmetic of the sum and delta rules as passes over a memory: a C++ compiler gives `Num` sixteen numbers side by
// side, nvcc one number a thread. The host reads and writes in passes of its own order (recurrence.cpp) with these parts.
//
// Columns of a memory W [K, V] never meet: a write is k (x) u, a read W^T q, and both need column v of W and u_v alone.
// The gradient of keys and queries is the same over rows. So a `Num` is one column (or several, one in each lane), memory
// is an array of them, and what all columns share (a key, a query; for the gradients an error, an output's gradient) comes
// as a row of scalars. Each function here is one pass over the memory for STEPS time steps: a number of the memory is
// loaded and stored once for all of them. ../README.md has the equations.
//
//   Num     += scalar * Num, - and * by a scalar; a default-constructed-with-{} Num is 0
//   Rows    anything that gives a scalar for [s][i], step s: an array of const float *, Steps<float>
//   Size    the number of passed-over entries: int64_t, or Fixed<n> to keep an array of Num in registers
//
// Outputs named `..._sum` are added to; the caller starts them at 0. A memory may thus be passed over in pieces.
#pragma once

#ifdef __CUDACC__
#define FWP_EITHER __host__ __device__ __forceinline__
#define FWP_UNROLL _Pragma("unroll")
#define FWP_UNROLL_FIXED FWP_UNROLL
#else
#define FWP_EITHER inline __attribute__((always_inline))
#define FWP_UNROLL _Pragma("GCC unroll 16")
#endif
// loops over a memory, which nvcc unrolls where it knows their length
#ifndef FWP_UNROLL_FIXED
#define FWP_UNROLL_FIXED
#endif

namespace {

// A size that the compiler knows.
template <int N> struct Fixed {
    FWP_EITHER constexpr operator int() const { return N; }
};

// Arrays of no elements do not exist.
FWP_EITHER constexpr int at_least_one(int n) { return n > 0 ? n : 1; }

// Where a pass over a memory is in its rows of scalars: [s] is that of step s. The host has one of its own for Steps.
template <class Rows> struct Cursor {
    const Rows &rows;
    int i;
    FWP_EITHER explicit Cursor(const Rows &from) : rows(from), i(0) {}
    FWP_EITHER auto operator[](int s) const { return rows[s][i]; }
    FWP_EITHER void advance() { ++i; }
};

// --- values in the Nums: W[i] are columns at key feature i -------------------------------------------------------------

// Going forward in time: STEPS writes W += key_s (x) u_s, each followed by its read, and what the NEXT writes after them
// will retrieve from what is left (NEXT = 0 for the sum rule). READS = false: `query` and `read_sum` are not touched.
template <int STEPS, int NEXT, bool READS, class Num, class Rows, class Size>
FWP_EITHER void write_and_read(Num *W, Size n_keys, const Rows &key, const Rows &query, const Rows &next, const Num *u,
                               Num *read_sum, Num *retrieved_sum) {
    Num write[at_least_one(STEPS)], read[at_least_one(STEPS)], retrieved[at_least_one(NEXT)];
    FWP_UNROLL
    for (int s = 0; s < STEPS; ++s) {
        write[s] = u[s];
        if (READS) read[s] = read_sum[s];
    }
    FWP_UNROLL
    for (int s = 0; s < NEXT; ++s) retrieved[s] = retrieved_sum[s];
    Cursor<Rows> k(key), q(query), n(next);
    FWP_UNROLL_FIXED
    for (int i = 0; i < n_keys; ++i) {
        Num w = W[i];
        FWP_UNROLL
        for (int s = 0; s < STEPS; ++s) {
            w += k[s] * write[s];
            if (READS) read[s] += q[s] * w;
        }
        FWP_UNROLL
        for (int s = 0; s < NEXT; ++s) retrieved[s] += n[s] * w;
        if (STEPS > 0) W[i] = w;
        k.advance(), q.advance(), n.advance();
    }
    FWP_UNROLL
    for (int s = 0; s < STEPS; ++s)
        if (READS) read_sum[s] = read[s];
    FWP_UNROLL
    for (int s = 0; s < NEXT; ++s) retrieved_sum[s] = retrieved[s];
}

// What STEPS writes of the delta rule put in: `retrieved` is from the memory before all of them, so what the earlier ones
// among them add to it is subtracted here. overlap[s][r] = k_s . k_r for r < s; error = v - W^T k; u = beta error.
template <int STEPS, class Num, class Real, class Overlap>
FWP_EITHER void corrected_values(const Num *v, const Num *retrieved, const Real *beta, const Overlap &overlap, Num *error,
                                 Num *u) {
    FWP_UNROLL
    for (int s = 0; s < STEPS; ++s) {
        Num e = v[s] - retrieved[s];
        FWP_UNROLL
        for (int r = 0; r < s; ++r) e = e - overlap[s][r] * u[r];
        error[s] = e;
        u[s] = beta[s] * e;
    }
}

// Going backward in time over D = dL/dW [K, V]: first what the PENDING later writes removed (D -= later_s (x) lost_s, the
// latest first; none for the sum rule), then for each of STEPS steps, the latest first, the read (D += query_s (x) grad_s)
// and what the write receives, received_s = D^T key_s. Steps count forward in time: s = STEPS - 1 is passed first.
template <int PENDING, int STEPS, bool READS, class Num, class Rows, class Size>
FWP_EITHER void receive_values(Num *D, Size n_keys, const Rows &later, const Num *lost, const Rows &key, const Rows &query,
                               const Num *grad, Num *received_sum) {
    Num removed[at_least_one(PENDING)], g[at_least_one(STEPS)], received[at_least_one(STEPS)];
    FWP_UNROLL
    for (int s = 0; s < PENDING; ++s) removed[s] = lost[s];
    FWP_UNROLL
    for (int s = 0; s < STEPS; ++s) {
        if (READS) g[s] = grad[s];
        received[s] = received_sum[s];
    }
    FWP_UNROLL_FIXED
    for (int i = 0; i < n_keys; ++i) {
        Num x = D[i];
        FWP_UNROLL
        for (int s = PENDING - 1; s >= 0; --s) x -= later[s][i] * removed[s];
        FWP_UNROLL
        for (int s = STEPS - 1; s >= 0; --s) {
            if (READS) x += query[s][i] * g[s];
            received[s] += key[s][i] * x;
        }
        D[i] = x;
    }
    FWP_UNROLL
    for (int s = 0; s < STEPS; ++s) received_sum[s] = received[s];
}

// What STEPS writes of the delta rule receive and remove: `received` leaves out what the later ones among them remove,
// which is taken off here. lost = beta received, which is also the gradient of v; error . received that of beta.
template <int STEPS, class Num, class Real>
FWP_EITHER void removed_values(const Real *beta, const Real (*overlap)[STEPS], Num *received, Num *lost) {
    FWP_UNROLL
    for (int s = STEPS - 1; s >= 0; --s) {
        FWP_UNROLL
        for (int r = s + 1; r < STEPS; ++r) received[s] = received[s] - overlap[r][s] * lost[r];
        lost[s] = beta[s] * received[s];
    }
}

// --- key features in the Nums: W[j] are rows at value j ----------------------------------------------------------------

// Going forward in time: before each of STEPS writes W += write_s (x) error_s what its removal costs the key, loss_s =
// W lost_s (DELTA only), after it the query's gradient W grad_s (READS only). write = beta key; error is v for the sum rule.
template <int STEPS, bool DELTA, bool READS, class Num, class Rows, class Size>
FWP_EITHER void read_keys(Num *W, Size n_values, const Rows &error, const Rows &lost, const Rows &grad, const Num *write,
                          Num *loss_sum, Num *grad_query_sum) {
    Num k[STEPS], loss[STEPS], grad_query[STEPS];
    FWP_UNROLL
    for (int s = 0; s < STEPS; ++s) {
        k[s] = write[s];
        if (DELTA) loss[s] = loss_sum[s];
        if (READS) grad_query[s] = grad_query_sum[s];
    }
    Cursor<Rows> e(error), l(lost), g(grad);
    FWP_UNROLL_FIXED
    for (int j = 0; j < n_values; ++j) {
        Num w = W[j];
        FWP_UNROLL
        for (int s = 0; s < STEPS; ++s) {
            if (DELTA) loss[s] += l[s] * w;
            w += e[s] * k[s];
            if (READS) grad_query[s] += g[s] * w;
        }
        W[j] = w;
        e.advance(), l.advance(), g.advance();
    }
    FWP_UNROLL
    for (int s = 0; s < STEPS; ++s) {
        if (DELTA) loss_sum[s] = loss[s];
        if (READS) grad_query_sum[s] = grad_query[s];
    }
}

// Going backward in time over D = dL/dW, the latest of STEPS steps first: the read (D += query_s (x) grad_s), what the
// write gives its key, gain_s = D error_s, and what it removed (D -= key_s (x) lost_s, DELTA only). The gradient of the
// key is beta gain - loss.
template <int STEPS, bool DELTA, bool READS, class Num, class Rows, class Size>
FWP_EITHER void receive_keys(Num *D, Size n_values, const Rows &error, const Rows &lost, const Rows &grad, const Num *key,
                             const Num *query, Num *gain_sum) {
    Num k[STEPS], q[STEPS], gain[STEPS];
    FWP_UNROLL
    for (int s = 0; s < STEPS; ++s) {
        if (DELTA) k[s] = key[s];
        if (READS) q[s] = query[s];
        gain[s] = gain_sum[s];
    }
    Cursor<Rows> e(error), l(lost), g(grad);
    FWP_UNROLL_FIXED
    for (int j = 0; j < n_values; ++j) {
        Num x = D[j];
        FWP_UNROLL
        for (int s = STEPS - 1; s >= 0; --s) {
            if (READS) x += g[s] * q[s];
            gain[s] += e[s] * x;
            if (DELTA) x -= l[s] * k[s];
        }
        D[j] = x;
        e.advance(), l.advance(), g.advance();
    }
    FWP_UNROLL
    for (int s = 0; s < STEPS; ++s) gain_sum[s] = gain[s];
}

}  // namespace

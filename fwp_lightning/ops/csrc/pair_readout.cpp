// Read-out of a fast weight memory that was written by key-value pairs taken from tables, for one query a sequence.
//
// A pair (i, j) has the key x = key_table[i] + value_table[j] and the value onehot(j); phi, the rule and the read-out follow.
// Sixteen sequences are computed side by side, one in each lane of a vector: every operation is then a plain vector
// operation, without shifts or horizontal sums, at any instruction set that the compiler knows. README.md in the folder
// above derives the recurrences. Nothing here allocates: buffers come from the caller.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace {

enum Rule { SUM = 0, DELTA = 1, FWM = 2 };
enum Map { ELU = 0, DPFP = 1, TANH = 2 };

// NaN < 0 is false: a NaN stays a NaN
template <class V> inline V positive_part(V x) { return x < 0 ? V{} : x; }
template <class V> inline V negative_part(V x) { return x > 0 ? V{} : x; }

// exp for x <= 0; results below e^-87 become e^-87, which is 0 beside the features that ELU+1 adds up
inline Lanes<float>::type exp_negative(Lanes<float>::type x) {
    return exp_in_range(x < -87.0f ? Lanes<float>::type{} - 87.0f : x);
}

inline Lanes<double>::type exp_negative(Lanes<double>::type x) {
    for (int l = 0; l < LANES; ++l) x[l] = std::exp(x[l]);
    return x;
}

inline Lanes<float>::type tanh_of(Lanes<float>::type x) {
    using V = Lanes<float>::type;
    const V x2 = x * x;
    // 1 - exp loses digits near 0; the series is exact to rounding for |x| < 0.3
    const V series = x * (1.0f + x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315 + x2 * (62.0f / 2835)))));
    const V size = x < 0 ? -x : x;
    const V e = exp_negative(-2 * size);
    const V far = (1 - e) / (1 + e);
    return size < 0.3f ? series : (x < 0 ? -far : far);
}

inline Lanes<double>::type tanh_of(Lanes<double>::type x) {
    for (int l = 0; l < LANES; ++l) x[l] = std::tanh(x[l]);
    return x;
}

inline Lanes<float>::type root(Lanes<float>::type x) {
    for (int l = 0; l < LANES; ++l) x[l] = std::sqrt(x[l]);
    return x;
}
inline Lanes<double>::type root(Lanes<double>::type x) {
    for (int l = 0; l < LANES; ++l) x[l] = std::sqrt(x[l]);
    return x;
}

template <class Real> struct Problem {
    int64_t batch, steps, size, n_values;  // B, T, D, S
    int64_t rule, map, nu, normalise_keys, normalise_readout;
    double key_eps, query_eps, readout_eps;
    const Real *key_table, *value_table, *query, *beta;  // [S, D], [S, D], [B, D], [B, T]
    const int64_t *keys, *values;                        // [B, T]

    int64_t n_features() const { return map == DPFP ? 2 * size * nu : size; }
    int64_t groups() const { return (batch + LANES - 1) / LANES; }
};

// One group of sixteen sequences; lanes past the batch repeat sequence 0 and are never written out.
template <class Real> class Group {
  public:
    using V = typename Lanes<Real>::type;

    Group(const Problem<Real> &problem, int64_t group, V *scratch) : p(problem), first(group * LANES) {
        n_features = p.n_features();
        x = take(scratch, p.size);
        u = take(scratch, 2 * p.size);
        phi = take(scratch, n_features);
        slope = take(scratch, p.size);
        grad_phi = take(scratch, n_features);
        grad_u = take(scratch, 2 * p.size);
        query_phi = take(scratch, n_features);
        accumulator = take(scratch, n_features);
        value_rows = take(scratch, 6 * p.n_values);
        rest = scratch;
    }
    static int64_t scratch_vectors(const Problem<Real> &p) {
        return 6 * p.size + 4 * p.n_features() + 6 * p.n_values + 8;
    }

    bool active(int l) const { return first + l < p.batch; }
    int64_t sequence(int l) const { return active(l) ? first + l : 0; }
    int64_t at(int l, int64_t t) const { return sequence(l) * p.steps + t; }

    void load_pair(int64_t t) {
        for (int l = 0; l < LANES; ++l) {
            const Real *k = p.key_table + p.keys[at(l, t)] * p.size;
            const Real *v = p.value_table + p.values[at(l, t)] * p.size;
            Real *out = reinterpret_cast<Real *>(x) + l;
            for (int64_t d = 0; d < p.size; ++d) out[d * LANES] = k[d] + v[d];
        }
    }
    void load_query() {
        for (int l = 0; l < LANES; ++l) {
            const Real *q = p.query + sequence(l) * p.size;
            for (int64_t d = 0; d < p.size; ++d) x[d][l] = q[d];
        }
    }
    V load_beta(int64_t t) const {
        V beta{};
        for (int l = 0; l < LANES; ++l) beta[l] = active(l) ? p.beta[at(l, t)] : Real(0);
        return beta;
    }

    // phi(x) into `phi`; returns the sum of its features
    V features() {
        V total{};
        const int64_t D = p.size;
        if (p.map == ELU) {
            for (int64_t d = 0; d < D; ++d) {
                slope[d] = exp_negative(negative_part(x[d]));
                phi[d] = slope[d] + positive_part(x[d]);
                total += phi[d];
            }
        } else if (p.map == TANH) {
            for (int64_t d = 0; d < D; ++d) {
                phi[d] = tanh_of(x[d]);
                slope[d] = 1 - phi[d] * phi[d];
                total += phi[d];
            }
        } else {
            for (int64_t d = 0; d < D; ++d) {
                u[d] = positive_part(x[d]);
                u[D + d] = positive_part(-x[d]);
            }
            for (int64_t j = 1; j <= p.nu; ++j) {
                V *block = phi + (j - 1) * 2 * D;
                for (int64_t i = 0; i < 2 * D - j; ++i) total += block[i] = u[i] * u[i + j];
                for (int64_t i = 2 * D - j; i < 2 * D; ++i) total += block[i] = u[i] * u[i + j - 2 * D];
            }
        }
        return total;
    }

    // `grad_phi` into the gradient of x, in place of x
    void features_backward() {
        const int64_t D = p.size;
        if (p.map != DPFP) {
            for (int64_t d = 0; d < D; ++d) x[d] = grad_phi[d] * slope[d];
            return;
        }
        for (int64_t i = 0; i < 2 * D; ++i) grad_u[i] = V{};
        for (int64_t j = 1; j <= p.nu; ++j) {
            const V *block = grad_phi + (j - 1) * 2 * D;
            for (int64_t i = 0; i < 2 * D; ++i) {
                const int64_t other = i + j < 2 * D ? i + j : i + j - 2 * D;
                grad_u[i] += block[i] * u[other];
                grad_u[other] += block[i] * u[i];
            }
        }
        for (int64_t d = 0; d < D; ++d) x[d] = (x[d] > 0 ? grad_u[d] : V{}) - (x[d] < 0 ? grad_u[D + d] : V{});
    }

    // through phi / (sum + eps): the gradient of the normalised features, in `grad_phi`, becomes that of phi
    void normalise_backward(V total, Real eps) {
        const V scale = 1 / (total + eps);
        V along{};
        for (int64_t e = 0; e < n_features; ++e) along += grad_phi[e] * phi[e];
        along *= scale;
        for (int64_t e = 0; e < n_features; ++e) grad_phi[e] = (grad_phi[e] - along) * scale;
    }

    void add_pair_gradient(int64_t t, Real *grad_key_table, Real *grad_value_table) const {
        for (int l = 0; l < LANES && active(l); ++l) {
            Real *k = grad_key_table + p.keys[at(l, t)] * p.size;
            Real *v = grad_value_table + p.values[at(l, t)] * p.size;
            const Real *g = reinterpret_cast<const Real *>(x) + l;
            for (int64_t d = 0; d < p.size; ++d) {
                k[d] += g[d * LANES];
                v[d] += g[d * LANES];
            }
        }
    }
    void store_query_gradient(Real *grad_query) const {
        for (int l = 0; l < LANES && active(l); ++l)
            for (int64_t d = 0; d < p.size; ++d) grad_query[(first + l) * p.size + d] = x[d][l];
    }

    V dot(const V *a, const V *b) const {
        V even{}, odd{};
        int64_t e = 0;
        for (; e + 1 < n_features; e += 2) {
            even += a[e] * b[e];
            odd += a[e + 1] * b[e + 1];
        }
        if (e < n_features) even += a[e] * b[e];
        return even + odd;
    }

    // query features, normalised if asked for, into `query_phi`; returns their sum
    V prepare_query() {
        load_query();
        const V total = features();
        const V scale = p.normalise_keys ? 1 / (total + Real(p.query_eps)) : V{} + 1;
        for (int64_t e = 0; e < n_features; ++e) query_phi[e] = phi[e] * scale;
        return total;
    }
    // the gradient of the (normalised) query features, in `accumulator`, into grad_query
    void query_backward(Real *grad_query) {
        load_query();
        const V total = features();
        for (int64_t e = 0; e < n_features; ++e) grad_phi[e] = accumulator[e];
        if (p.normalise_keys) normalise_backward(total, Real(p.query_eps));
        features_backward();
        store_query_gradient(grad_query);
    }

    // ---- sum ----
    // weights [B, T], y [B, S], totals [B]
    void sum_forward(Real *weights, Real *y, Real *totals) {
        prepare_query();
        V total{};
        for (int64_t t = 0; t < p.steps; ++t) {
            load_pair(t);
            features();
            const V kernel = dot(phi, query_phi);
            total += kernel;
            for (int l = 0; l < LANES && active(l); ++l) weights[at(l, t)] = kernel[l];
        }
        total = p.normalise_readout ? total + Real(p.readout_eps) : V{} + 1;
        for (int l = 0; l < LANES && active(l); ++l) {
            totals[first + l] = total[l];
            Real *row = y + (first + l) * p.n_values;
            for (int64_t t = 0; t < p.steps; ++t) row[p.values[at(l, t)]] += weights[at(l, t)] /= total[l];
        }
    }
    void sum_backward(const Real *weights, const Real *totals, const Real *grad_y, Real *grad_key_table,
                      Real *grad_value_table, Real *grad_query) {
        prepare_query();
        V mean{}, total{};
        for (int l = 0; l < LANES; ++l) total[l] = totals[sequence(l)];
        if (p.normalise_readout)
            for (int64_t t = 0; t < p.steps; ++t) mean += load(weights, t) * gather(grad_y, t);
        for (int64_t e = 0; e < n_features; ++e) accumulator[e] = V{};
        for (int64_t t = 0; t < p.steps; ++t) {
            const V grad_kernel = (gather(grad_y, t) - mean) / total;
            load_pair(t);
            features();
            for (int64_t e = 0; e < n_features; ++e) {
                accumulator[e] += grad_kernel * phi[e];
                grad_phi[e] = grad_kernel * query_phi[e];
            }
            features_backward();
            add_pair_gradient(t, grad_key_table, grad_value_table);
        }
        query_backward(grad_query);
    }

    // ---- delta: the adjoint recurrence, backwards in time; `residual` [E] is left as it is before the first step ----
    void delta_forward(Real *weights, Real *y, V *residual) {
        prepare_query();
        for (int64_t e = 0; e < n_features; ++e) residual[e] = query_phi[e];
        for (int64_t t = p.steps - 1; t >= 0; --t) {
            load_pair(t);
            const V total = features();
            const V scale = p.normalise_keys ? 1 / (total + Real(p.key_eps)) : V{} + 1;
            const V a = load_beta(t) * (dot(phi, residual) * scale);
            const V step = a * scale;
            for (int64_t e = 0; e < n_features; ++e) residual[e] -= step * phi[e];
            for (int l = 0; l < LANES && active(l); ++l) {
                weights[at(l, t)] = a[l];
                y[(first + l) * p.n_values + p.values[at(l, t)]] += a[l];
            }
        }
    }
    void delta_backward(const Real *weights, V *residual, const Real *grad_y, Real *grad_key_table,
                        Real *grad_value_table, Real *grad_query, Real *grad_beta) {
        V *sum = accumulator;
        for (int64_t e = 0; e < n_features; ++e) sum[e] = V{};
        for (int64_t t = 0; t < p.steps; ++t) {
            load_pair(t);
            const V total = features();
            const V scale = p.normalise_keys ? 1 / (total + Real(p.key_eps)) : V{} + 1;
            const V a = load(weights, t), beta = load_beta(t);
            const V lambda = gather(grad_y, t) - dot(phi, sum) * scale;
            const V mu = beta * lambda;
            const V undo = a * scale, add = mu * scale;
            V retrieved{};
            for (int64_t e = 0; e < n_features; ++e) {
                residual[e] += undo * phi[e];
                retrieved += phi[e] * residual[e];
                grad_phi[e] = mu * residual[e] - a * sum[e];
                sum[e] += add * phi[e];
            }
            const V grad_beta_t = lambda * retrieved * scale;
            for (int l = 0; l < LANES && active(l); ++l) grad_beta[at(l, t)] = grad_beta_t[l];
            if (p.normalise_keys) normalise_backward(total, Real(p.key_eps));
            features_backward();
            add_pair_gradient(t, grad_key_table, grad_value_table);
        }
        query_backward(grad_query);
    }

    // ---- fwm: memories [T+1, S, E] of this group, kept for the backward pass; scales [T] ----
    void fwm_forward(Real *y, V *memories, V *scales) {
        const int64_t S = p.n_values, E = n_features, cells = S * E;
        V *retrieved = value_rows, *written = value_rows + S;
        for (int64_t i = 0; i < cells; ++i) memories[i] = V{};
        V squared_norm{};
        for (int64_t t = 0; t < p.steps; ++t) {
            const V *W = memories + t * cells;
            V *next = memories + (t + 1) * cells;
            load_pair(t);
            features();
            const V key_squared = dot(phi, phi);
            fwm_errors(t, W, retrieved, written);
            const V beta = load_beta(t);
            for (int64_t v = 0; v < S; ++v) {
                written[v] *= beta;
                squared_norm += written[v] * (2 * retrieved[v] + written[v] * key_squared);
            }
            V scale = V{} + 1;
            // the first write into an empty memory is not rescaled
            if (t > 0) scale = squared_norm > 1 ? 1 / root(squared_norm) : scale;
            squared_norm *= scale * scale;
            scales[t] = scale;
            for (int64_t v = 0; v < S; ++v) {
                const V u = written[v] * scale;
                for (int64_t e = 0; e < E; ++e) next[v * E + e] = W[v * E + e] * scale + u * phi[e];
            }
        }
        load_query();
        features();
        const V *W = memories + p.steps * cells;
        for (int64_t v = 0; v < S; ++v) {
            const V read = dot(W + v * E, phi);
            for (int l = 0; l < LANES && active(l); ++l) y[(first + l) * S + v] = read[l];
        }
    }
    // G [S, E] is scratch of this group
    void fwm_backward(const V *memories, const V *scales, V *G, const Real *grad_y, Real *grad_key_table,
                      Real *grad_value_table, Real *grad_query, Real *grad_beta) {
        const int64_t S = p.n_values, E = n_features, cells = S * E;
        V *retrieved = value_rows, *error = value_rows + S;
        load_query();
        features();
        for (int64_t e = 0; e < E; ++e) grad_phi[e] = V{};
        for (int64_t v = 0; v < S; ++v) {
            V g{};
            for (int l = 0; l < LANES; ++l) g[l] = active(l) ? grad_y[(first + l) * S + v] : Real(0);
            const V *row = memories + p.steps * cells + v * E;
            for (int64_t e = 0; e < E; ++e) {
                G[v * E + e] = g * phi[e];
                grad_phi[e] += g * row[e];
            }
        }
        features_backward();
        store_query_gradient(grad_query);
        for (int64_t t = p.steps - 1; t >= 0; --t) {
            const V *W = memories + t * cells, *next = memories + (t + 1) * cells;
            load_pair(t);
            features();
            fwm_errors(t, W, retrieved, error);
            const V beta = load_beta(t), scale = scales[t];
            // where the memory was rescaled, the part of the gradient along it vanishes
            V along{};
            for (int64_t i = 0; i < cells; ++i) along += G[i] * next[i];
            along = scale < 1 ? along : V{};
            V grad_beta_t{};
            for (int64_t e = 0; e < E; ++e) grad_phi[e] = V{};
            for (int64_t v = 0; v < S; ++v) {
                V *g = G + v * E;
                const V *w = W + v * E, *n = next + v * E;
                V grad_u{};
                for (int64_t e = 0; e < E; ++e) {
                    g[e] = (g[e] - along * n[e]) * scale;
                    grad_u += g[e] * phi[e];
                }
                const V grad_error = beta * grad_u, u = beta * error[v];
                grad_beta_t += grad_u * error[v];
                for (int64_t e = 0; e < E; ++e) {
                    grad_phi[e] += g[e] * u - w[e] * grad_error;
                    g[e] -= phi[e] * grad_error;
                }
            }
            for (int l = 0; l < LANES && active(l); ++l) grad_beta[at(l, t)] = grad_beta_t[l];
            features_backward();
            add_pair_gradient(t, grad_key_table, grad_value_table);
        }
    }

    V *query_features() { return query_phi; }
    int64_t n_features;

  private:
    static V *take(V *&from, int64_t n) {
        V *taken = from;
        from += n;
        return taken;
    }
    V load(const Real *rows, int64_t t) const {
        V out{};
        for (int l = 0; l < LANES; ++l) out[l] = active(l) ? rows[at(l, t)] : Real(0);
        return out;
    }
    // the gradient that the value of step t receives: its component of grad_y
    V gather(const Real *grad_y, int64_t t) const {
        V out{};
        for (int l = 0; l < LANES; ++l)
            out[l] = active(l) ? grad_y[(first + l) * p.n_values + p.values[at(l, t)]] : Real(0);
        return out;
    }
    // error = onehot(value) - W phi(k)
    void fwm_errors(int64_t t, const V *W, V *retrieved, V *error) const {
        for (int64_t v = 0; v < p.n_values; ++v) {
            retrieved[v] = dot(W + v * n_features, phi);
            error[v] = -retrieved[v];
        }
        for (int l = 0; l < LANES; ++l) error[p.values[at(l, t)]][l] += 1;
    }

    const Problem<Real> &p;
    const int64_t first;
    V *x, *u, *phi, *slope, *grad_phi, *grad_u, *query_phi, *accumulator, *value_rows, *rest;
};

template <class Real> void forward(const Problem<Real> &p, Real *y, Real *weights, Real *totals, Real *kept, Real *scratch) {
    using V = typename Lanes<Real>::type;
    const int64_t E = p.n_features();
    for (int64_t g = 0; g < p.groups(); ++g) {
        Group<Real> group(p, g, reinterpret_cast<V *>(scratch));
        if (p.rule == SUM) group.sum_forward(weights, y, totals);
        if (p.rule == DELTA) group.delta_forward(weights, y, reinterpret_cast<V *>(kept) + g * E);
        if (p.rule == FWM) {
            const int64_t memories = (p.steps + 1) * p.n_values * E;
            V *own = reinterpret_cast<V *>(kept) + g * (memories + p.steps);
            group.fwm_forward(y, own, own + memories);
        }
    }
}

template <class Real>
void backward(const Problem<Real> &p, const Real *grad_y, const Real *weights, const Real *totals, const Real *kept,
              Real *grad_key_table, Real *grad_value_table, Real *grad_query, Real *grad_beta, Real *scratch) {
    using V = typename Lanes<Real>::type;
    const int64_t E = p.n_features();
    V *work = reinterpret_cast<V *>(scratch) + Group<Real>::scratch_vectors(p);
    for (int64_t g = 0; g < p.groups(); ++g) {
        Group<Real> group(p, g, reinterpret_cast<V *>(scratch));
        if (p.rule == SUM)
            group.sum_backward(weights, totals, grad_y, grad_key_table, grad_value_table, grad_query);
        if (p.rule == DELTA) {
            // a copy: the backward pass winds the residual up again, and may run twice
            std::memcpy(work, reinterpret_cast<const V *>(kept) + g * E, E * sizeof(V));
            group.delta_backward(weights, work, grad_y, grad_key_table, grad_value_table, grad_query, grad_beta);
        }
        if (p.rule == FWM) {
            const int64_t memories = (p.steps + 1) * p.n_values * E;
            const V *own = reinterpret_cast<const V *>(kept) + g * (memories + p.steps);
            group.fwm_backward(own, own + memories, work, grad_y, grad_key_table, grad_value_table, grad_query,
                               grad_beta);
        }
    }
}

}  // namespace

#define FWP_PAIR_READOUT(REAL, SUFFIX)                                                                                  \
    extern "C" void fwp_pair_readout_forward_##SUFFIX(const Problem<REAL> *p, REAL *y, REAL *weights, REAL *totals,     \
                                                      REAL *kept, REAL *scratch) {                                      \
        forward<REAL>(*p, y, weights, totals, kept, scratch);                                                           \
    }                                                                                                                   \
    extern "C" void fwp_pair_readout_backward_##SUFFIX(                                                                 \
        const Problem<REAL> *p, const REAL *grad_y, const REAL *weights, const REAL *totals, const REAL *kept,          \
        REAL *grad_key_table, REAL *grad_value_table, REAL *grad_query, REAL *grad_beta, REAL *scratch) {               \
        backward<REAL>(*p, grad_y, weights, totals, kept, grad_key_table, grad_value_table, grad_query, grad_beta,      \
                       scratch);                                                                                        \
    }                                                                                                                   \
    extern "C" int64_t fwp_pair_readout_scratch_##SUFFIX(const Problem<REAL> *p) {                                      \
        const int64_t work = p->rule == FWM ? p->n_values * p->n_features() : p->n_features();                          \
        return (Group<REAL>::scratch_vectors(*p) + work) * LANES;                                                       \
    }

FWP_PAIR_READOUT(float, float32)
FWP_PAIR_READOUT(double, float64)

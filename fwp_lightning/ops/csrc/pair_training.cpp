// Training of a fast weight memory of key-value pairs that is read once: loss, all gradients and Adam, many steps in one call.
//
// A pair (i, j) has the key x = key_table[i] + value_table[j] and the value onehot(j). A sequence is read by one query, and its loss
// 0.5 |y - onehot(target)|^2 needs y alone, so forward and backward of a sequence follow each other while its rows are in the cache.
// README.md in the folder above derives the recurrences. Features lie side by side in the lanes of vectors; rows are padded with zeros.
// Nothing here allocates or writes outside of the caller's buffers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "fwm_memory.h"
#include "lanes.h"
#include "small_matmul.h"

namespace {

enum Rule { SUM = 0, DELTA = 1, FWM = 2, SOFTMAX = 3 };
enum Map { ELU = 0, DPFP = 1, TANH = 2, IDENTITY = 3, FAVOR = 4 };
enum Stabilizer { NONE = 0, SEQUENCE = 1, VECTOR = 2 };
// embedding [S, e], W_k [D, S + e], b_k [D], W_q [D, e], b_q [D], W_beta [S + e], b_beta [1]
enum Parameter { EMBEDDING = 0, W_K, B_K, W_Q, B_Q, W_BETA, B_BETA, PARAMETERS };

constexpr double LAYER_NORM_EPS = 1e-5;

// of the right factor of a product, which every tile of rows reads again: it shall stay in the second cache
constexpr int64_t PANEL_BYTES = 256 * 1024;
// of rows of a gradient that Adam takes before the next are computed
constexpr int64_t ROWS_BYTES = 128 * 1024;

template <class Real> struct Problem {
    int64_t batch, pairs, n_keys, n_embedding, size;  // B, T, S, e, D
    int64_t rule, map, nu, n_directions, stabilizer, normalise_readout, layer_norm;
    double key_eps, query_eps, readout_eps, input_scale;
    int64_t n_steps, steps_done;
    double lr, beta1, beta2, adam_eps;
    const int64_t *keys, *values, *queries, *targets;  // [N, B, T], [N, B, T], [N, B], [N, B]
    const Real *directions;                            // [N or 1, m, D]
    int64_t directions_per_step;
    Real *losses;  // [N]
    Real *scratch;
    Real *parameters[PARAMETERS], *gradients[PARAMETERS], *means[PARAMETERS], *squares[PARAMETERS];

    bool has_beta() const { return rule == DELTA || rule == FWM; }
    int64_t n_pair() const { return n_keys + n_embedding; }
    int64_t count(int parameter) const {
        const int64_t counts[] = {n_keys * n_embedding, size * n_pair(), size, size * n_embedding, size, n_pair(), 1};
        return parameter >= W_BETA && !has_beta() ? 0 : counts[parameter];
    }
};

constexpr int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

template <class V, class Real> inline V load(const Real *from) {
    V out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
template <class Real, class V> inline void store(Real *to, V x) { std::memcpy(to, &x, sizeof x); }
template <class Real, class V> inline void add(Real *to, V x) { store(to, load<V>(to) + x); }

template <class Real, int N> struct Wide { typedef Real type __attribute__((vector_size(N * sizeof(Real)))); };
template <class Real, int N> inline Real total_of(typename Wide<Real, N>::type x) {
    if constexpr (N == 4) {
        return (x[0] + x[2]) + (x[1] + x[3]);
    } else {
        typename Wide<Real, N / 2>::type halves[2];
        std::memcpy(halves, &x, sizeof x);
        return total_of<Real, N / 2>(halves[0] + halves[1]);
    }
}
inline float total(Lanes<float>::type x) { return total_of<float, LANES>(x); }
inline double total(Lanes<double>::type x) { return total_of<double, LANES>(x); }
// the totals of four vectors, added up in the same order; they share the additions where a vector has room for all
template <class Real> inline void store_totals(Real *to, const typename Lanes<Real>::type *x) {
    if constexpr (LANES == 16) {
        using V = typename Lanes<Real>::type;
        const auto halves = [](V a, V b) {
            return V(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)) +
                   V(__builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
        };
        const V a = halves(x[0], x[1]), b = halves(x[2], x[3]);
        V sum = V(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)) +
                V(__builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
        sum += V(__builtin_shufflevector(sum, sum, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
        sum += V(__builtin_shufflevector(sum, sum, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
        for (int i = 0; i < 4; ++i) to[i] = sum[4 * i];
    } else {
        for (int i = 0; i < 4; ++i) to[i] = total(x[i]);
    }
}
// b unless a is beyond it, so that a NaN in b is passed on
template <class V> inline V larger(V a, V b) { return a > b ? a : b; }
template <class V> inline V smaller(V a, V b) { return a < b ? a : b; }
#if defined(__AVX512F__)
// one instruction each, which the compiler does not find
inline Lanes<float>::type larger(Lanes<float>::type a, Lanes<float>::type b) {
    return (Lanes<float>::type)_mm512_max_ps((__m512)a, (__m512)b);
}
inline Lanes<float>::type smaller(Lanes<float>::type a, Lanes<float>::type b) {
    return (Lanes<float>::type)_mm512_min_ps((__m512)a, (__m512)b);
}
#endif
template <class Real, class V> inline Real largest(V x) {
    Real out = x[0];
    for (int l = 1; l < LANES; ++l) out = std::max<Real>(out, x[l]);
    return out;
}

template <class V> inline V positive_part(V x) { return larger(V{}, x); }
template <class V> inline V negative_part(V x) { return smaller(V{}, x); }

// the exponent under which exp leaves the range of normal numbers, and those over and under which a product of factors loses digits
template <class Real> constexpr Real FLOOR = sizeof(Real) == 4 ? Real(-87) : Real(-708);
template <class Real> constexpr Real CEILING = -FLOOR<Real> - 7;
template <class Real> constexpr Real SMALLEST_PRODUCT = sizeof(Real) == 4 ? Real(8e-27) : Real(1e-280);

// exp, flushed to 0 at the edge of underflow; no overflow is expected but it is infinite as it should be
inline Lanes<float>::type exp_of(Lanes<float>::type x) {
    using V = Lanes<float>::type;
    const V e = exp_in_range(x < -87.0f ? V{} - 87.0f : (x > 88.0f ? V{} + 88.0f : x));
    return x <= -87.0f ? V{} : (x > 88.0f ? V{} + INFINITY : e);
}
inline Lanes<double>::type exp_of(Lanes<double>::type x) {
    for (int l = 0; l < LANES; ++l) x[l] = x[l] <= -708 ? 0 : std::exp(x[l]);
    return x;
}

template <class V> inline V tanh_of(V x) {
    const V size = x < 0 ? -x : x;
    const V e = exp_of(-2 * size);
    const V far = (1 - e) / (1 + e);
    return x < 0 ? -far : far;
}
inline Lanes<float>::type tanh_precisely(Lanes<float>::type x) {
    using V = Lanes<float>::type;
    const V x2 = x * x;
    // 1 - exp loses digits near 0; the series is exact to rounding for |x| < 0.3
    const V series = x * (1.0f + x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315 + x2 * (62.0f / 2835)))));
    return x2 < 0.09f ? series : tanh_of(x);
}
inline Lanes<double>::type tanh_precisely(Lanes<double>::type x) {
    for (int l = 0; l < LANES; ++l) x[l] = std::tanh(x[l]);
    return x;
}

#if defined(__AVX512F__)
// x / (sqrt(s) + eps) to two units in the last place: estimates of 14 bits and a step of Newton's for each. There is one unit
// that takes roots and divides, and either takes it ten cycles or more.
inline Lanes<float>::type over_root(Lanes<float>::type x, Lanes<float>::type s, float eps) {
    using V = Lanes<float>::type;
    // what an estimate is no number for, as 0 and infinity
    const __mmask16 far = _mm512_cmp_ps_mask((__m512)s, _mm512_set1_ps(1e-36f), _CMP_NGE_UQ) |
                          _mm512_cmp_ps_mask((__m512)s, _mm512_set1_ps(1e36f), _CMP_NLE_UQ);
    if (__builtin_expect(far, 0)) return x / ((V)_mm512_sqrt_ps((__m512)s) + eps);
    V inverse = (V)_mm512_rsqrt14_ps((__m512)s);
    inverse *= 1.5f - 0.5f * s * inverse * inverse;
    const V divisor = s * inverse + eps;
    const V estimate = (V)_mm512_rcp14_ps((__m512)divisor);
    return x * (estimate * (2.0f - divisor * estimate));
}
#endif

template <class Real> struct Adam {
    Real rate, eps, b1, b2, c1, c2;

    Adam(const Problem<Real> &p, int64_t steps) : b1(p.beta1), b2(p.beta2), c1(1 - p.beta1), c2(1 - p.beta2) {
        const Real first = 1 - std::pow(p.beta1, double(steps)), second = 1 - std::pow(p.beta2, double(steps));
        // numerator and denominator both times the root: one division a number instead of two
        const Real root = std::sqrt(second);
        rate = p.lr / first * root, eps = p.adam_eps * root;
    }
    // `count` numbers of a parameter from number `from` on; their gradients are the first of p.gradients
    void update(const Problem<Real> &p, int parameter, int64_t from, int64_t count) const {
        const auto [rate, eps, b1, b2, c1, c2] = *this;
        Real *__restrict w = p.parameters[parameter] + from, *__restrict mean = p.means[parameter] + from;
        Real *__restrict square = p.squares[parameter] + from;
        const Real *__restrict g = p.gradients[parameter];
        int64_t j = 0;
#if defined(__AVX512F__)
        if constexpr (sizeof(Real) == 4)
            for (; j + LANES <= count; j += LANES) {
                using V = typename Lanes<Real>::type;
                const V g_j = load<V>(g + j), m = b1 * load<V>(mean + j) + c1 * g_j, s = b2 * load<V>(square + j) + c2 * g_j * g_j;
                store(mean + j, m);
                store(square + j, s);
                store(w + j, load<V>(w + j) - rate * over_root(m, s, eps));
            }
#endif
        for (; j < count; ++j) {
            mean[j] = b1 * mean[j] + c1 * g[j];
            square[j] = b2 * square[j] + c2 * g[j] * g[j];
            w[j] -= rate * mean[j] / (std::sqrt(square[j]) + eps);
        }
    }
};

// SIZE is D where the compiler shall know it, so that loops over D unroll; 0 leaves it to the problem.
template <class Real, int64_t SIZE> class Training {
  public:
    using V = typename Lanes<Real>::type;

    explicit Training(const Problem<Real> &problem) : p(problem) {
        Real *from = p.scratch;
        lay_out([&](int64_t n) {
            Real *taken = from;
            from += padded(n);
            return taken;
        });
        std::fill(p.scratch, from, Real(0));
    }
    static int64_t scratch_numbers(const Problem<Real> &problem) {
        Training sizes(problem, 0);
        int64_t n = 0;
        sizes.lay_out([&](int64_t wanted) {
            n += padded(wanted);
            return static_cast<Real *>(nullptr);
        });
        return n;
    }

    // loss of the one step, all its gradients in p.gradients
    Real gradients() {
        const Real loss = step(0);
        embedding_gradient(0, S, p.gradients[EMBEDDING]);
        return loss;
    }
    // loss of step n, after which Adam takes it
    Real train(int64_t n) {
        const Real loss = step(n);
        const Adam adam(p, p.steps_done + n + 1);
        // a few rows of dL/dE at a time, each in the place of those before: they never leave the cache
        const int64_t fitting = ROWS_BYTES / (e * int64_t(sizeof(Real))), block = std::max<int64_t>(1, fitting / TILE_ROWS) * TILE_ROWS;
        for (int64_t first = 0; first < S; first += block) {
            const int64_t rows = std::min(block, S - first);
            embedding_gradient(first, rows, p.gradients[EMBEDDING]);
            adam.update(p, EMBEDDING, first * e, rows * e);
        }
        for (int i = EMBEDDING + 1; i < PARAMETERS; ++i) adam.update(p, i, 0, p.count(i));
        return loss;
    }

  private:
    // loss of step n, gradients of all but the embedding in p.gradients
    Real step(int64_t n) {
        keys = p.keys + n * B * T, values = p.values + n * B * T, queries = p.queries + n * B, targets = p.targets + n * B;
        directions = p.map == FAVOR ? p.directions + (p.directions_per_step ? n * m * D() : 0) : nullptr;
        project();
        Real loss = 0;
        int64_t b = 0;
        if (p.rule == DELTA && p.map != FAVOR) {
            if (features == 4 * LANES) b = pairs_of_sequences<4, 2>(loss);
            if (features == 8 * LANES) b = pairs_of_sequences<8, 1>(loss);
        }
        for (; b < B; ++b) loss += sequence(b);
        project_backward();
        return loss / B;
    }

    int64_t D() const { return SIZE ? SIZE : p.size; }
    int64_t row() const { return padded(D()); }
    int64_t ring() const { return padded(2 * D()); }

    Training(const Problem<Real> &problem, int) : p(problem) {}

    template <class Take> void lay_out(Take take) {
        B = p.batch, T = p.pairs, S = p.n_keys, e = p.n_embedding, m = p.map == FAVOR ? p.n_directions : 0;
        directions_row = padded(m);
        features = p.map == DPFP ? p.nu * ring() : p.map == FAVOR ? 2 * directions_row : row();
        ring_pad = padded(p.nu), ring_row = ring_pad + ring() + padded(p.nu) + LANES;
        key_table = take(S * row()), value_table = take(S * row()), grad_key_table = take(S * row()), grad_value_table = take(S * row());
        transposed = take(std::max(e * row(), D() * directions_row));
        query = take(B * row()), grad_query = take(B * row()), queried = take(B * e), grad_queried = take(B * e);
        key_exp = take(p.map == ELU ? S * row() : 0), value_exp = take(p.map == ELU ? S * row() : 0);
        key_beta = take(S), value_beta = take(S), grad_key_beta = take(S), grad_value_beta = take(S);
        const bool keeps_rows = p.rule == DELTA || p.rule == FWM;
        for (int place = p.rule == DELTA ? 1 : 0; place >= 0; --place) {
            weights = take(T), grads = take(T), beta = take(T), grad_beta = take(T), scales = take(T), y = take(S), grad_y = take(S);
            query_phi = take(features), grad_query_phi = take(features), state = take(features), adjoint = take(features);
            phi = take(keeps_rows ? T * features : 0), query_u = take(ring() + LANES);
            places[place] = own();
        }
        grad_phi = take(p.rule == FWM ? T * features : TILE * features);
        u = take(TILE * (ring() + LANES)), grad_u = take(TILE * (ring() + LANES)), u_ring = take(TILE * ring_row), pulled_ring = take(TILE * ring_row);
        grad_query_u = take(ring() + LANES);
        key_projected = take(S * directions_row), value_projected = take(S * directions_row);
        key_powers = take(2 * S * directions_row), value_powers = take(2 * S * directions_row);
        grad_key_projected = take(S * directions_row), grad_value_projected = take(S * directions_row);
        query_projected = take(B * directions_row), grad_query_projected = take(B * directions_row);
        key_peak = take(S), value_peak = take(S), peaks = take(T), log_scales = take(T), slow = take(T);
        slow_row = take(2 * directions_row);
        if (p.rule != FWM) return;
        const FwmSequence<Real> one = memory_sequence();
        memory_kept = take(fwm_kept_numbers(one)), memory_scratch = take(fwm_scratch_numbers(one));
    }

    // row-major C [rows, columns] = A B + keep C with B [inner, columns]; columns that no vector covers go one by one
    void product(Factor<Real> A, int64_t rows, int64_t columns, int64_t inner, const Real *right, int64_t ldb, Real keep, Real *C,
                 int64_t ldc) const {
        const int64_t step = TILE_VECTORS * FULL<Real>, fitting = PANEL_BYTES / (inner * int64_t(sizeof(Real))) / step * step;
        const int64_t whole = columns / NARROW<Real> * NARROW<Real>, panel = std::max(step, fitting);
        for (int64_t j = 0; j < whole; j += panel) {
            const int64_t n = std::min(panel, whole - j);
            if (A.row == 1)
                multiply<true>(C + j, ldc, keep, A, right + j, ldb, rows, n, inner);
            else
                multiply<false>(C + j, ldc, keep, A, right + j, ldb, rows, n, inner);
        }
        if (whole == columns) return;
        if (keep == 0 && whole > 0) {
            // the last whole vector once more, to the end
            const int64_t j = columns - NARROW<Real>;
            return product(A, rows, NARROW<Real>, inner, right + j, ldb, 0, C + j, ldc);
        }
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = whole; j < columns; ++j) {
                Real sum = 0;
                for (int64_t l = 0; l < inner; ++l) sum += A.data[i * A.row + l * A.column] * right[l * ldb + j];
                C[i * ldc + j] = keep == 0 ? sum : keep * C[i * ldc + j] + sum;
            }
    }
    // C [rows, columns] = A [rows, inner] B^T + keep C with B [columns, inner] in memory; rows of C are padded
    void product_with_transpose(const Real *A, int64_t lda, int64_t rows, int64_t columns, int64_t inner, const Real *right, int64_t ldb,
                                Real keep, Real *C, int64_t ldc) const {
        const int64_t width = padded(columns);
        transpose(transposed, width, width, right, ldb, columns, inner);
        product({A, lda, 1}, rows, width, inner, transposed, width, keep, C, ldc);
    }

    // ---- projections: keys are sums of two table rows ----
    void project() {
        const Real *E = p.parameters[EMBEDDING], *W = p.parameters[W_K];
        for (int64_t i = 0; i < S; ++i) std::copy_n(p.parameters[B_K], D(), key_table + i * row());
        product_with_transpose(E, e, S, D(), e, W + S, p.n_pair(), 1, key_table, row());
        transpose(value_table, row(), row(), W, p.n_pair(), D(), S);
        for (int64_t b = 0; b < B; ++b) {
            std::copy_n(E + queries[b] * e, e, queried + b * e);
            std::copy_n(p.parameters[B_Q], D(), query + b * row());
        }
        product_with_transpose(queried, e, B, D(), e, p.parameters[W_Q], e, 1, query, row());
        if (p.has_beta()) {
            const Real *w = p.parameters[W_BETA];
            std::copy_n(w, S, value_beta);
            std::fill_n(key_beta, S, *p.parameters[B_BETA]);
            for (int64_t i = 0; i < S; ++i) key_beta[i] += inner_product(E + i * e, w + S, e);
            std::fill_n(grad_key_beta, S, Real(0));
            std::fill_n(grad_value_beta, S, Real(0));
        }
        for (Real *table : {grad_key_table, grad_value_table}) std::fill_n(table, S * row(), Real(0));
        if (p.map == FAVOR) project_on_directions();
        if (p.map == ELU) exponentiate_tables();
    }

    void project_backward() {
        if (p.map == FAVOR) project_on_directions_backward();
        const Real *E = p.parameters[EMBEDDING], *W = p.parameters[W_K];
        Real *const *g = p.gradients;
        transpose(g[W_K], p.n_pair(), S, grad_value_table, row(), S, D());
        product({grad_key_table, 1, row()}, D(), e, S, E, e, 0, g[W_K] + S, p.n_pair());
        column_sums(grad_key_table, S, g[B_K]);
        product({grad_query, 1, row()}, D(), e, B, queried, e, 0, g[W_Q], e);
        column_sums(grad_query, B, g[B_Q]);
        product({grad_query, row(), 1}, B, e, D(), p.parameters[W_Q], e, 0, grad_queried, e);
        if (!p.has_beta()) return;
        std::copy_n(grad_value_beta, S, g[W_BETA]);
        product({grad_key_beta, S, 1}, 1, e, S, E, e, 0, g[W_BETA] + S, e);
        *g[B_BETA] = 0;
        for (int64_t i = 0; i < S; ++i) *g[B_BETA] += grad_key_beta[i];
    }
    // some rows of dL/dE, of keys and of those that are queried
    void embedding_gradient(int64_t first, int64_t rows, Real *to) const {
        product({grad_key_table + first * row(), row(), 1}, rows, e, D(), p.parameters[W_K] + S, p.n_pair(), 0, to, e);
        for (int64_t b = 0; b < B; ++b) {
            const int64_t place = queries[b] - first;
            if (place < 0 || place >= rows) continue;
            for (int64_t i = 0; i < e; ++i) to[place * e + i] += grad_queried[b * e + i];
        }
        if (p.has_beta()) product({grad_key_beta + first, 1, 1}, rows, e, 1, p.parameters[W_BETA] + S, e, 1, to, e);
    }

    static Real inner_product(const Real *a, const Real *b, int64_t n) {
        V sum{};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) sum += load<V>(a + i) * load<V>(b + i);
        Real rest = 0;
        for (; i < n; ++i) rest += a[i] * b[i];
        return total(sum) + rest;
    }
    void column_sums(const Real *rows, int64_t n, Real *sums) const {
        std::fill_n(sums, D(), Real(0));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t d = 0; d < D(); ++d) sums[d] += rows[i * row() + d];
    }

    // ---- one sequence: read, compare, and pull the error back ----
    void begin(int64_t b) {
        key_ids = keys + b * T, value_ids = values + b * T, q = query + b * row(), grad_q = grad_query + b * row(), sequence_index = b;
        std::fill_n(y, S, Real(0));
        prepare_query();
        if (p.has_beta()) write_strengths();
    }
    Real sequence(int64_t b) {
        begin(b);
        if (p.rule == SUM || p.rule == SOFTMAX) read_by_kernel();
        if (p.rule == DELTA) read_by_adjoint();
        if (p.rule == FWM) read_memory();
        const Real loss = compare(targets[b]);
        if (p.rule == SUM || p.rule == SOFTMAX) read_by_kernel_backward();
        if (p.rule == DELTA) read_by_adjoint_backward();
        if (p.rule == FWM) read_memory_backward();
        if (p.has_beta()) write_strengths_backward();
        query_backward();
        return loss;
    }

    // loss, and its gradient in grad_y, already divided by the batch
    Real compare(int64_t target) {
        Real mean = 0, inverse = 1;
        if (p.layer_norm) {
            mean = sum_over(S, [this](int64_t v) { return load<V>(y + v); }) / S;
            const Real variance = sum_over(S, [this, mean](int64_t v) {
                const V distance = load<V>(y + v) - mean;
                return distance * distance;
            });
            inverse = 1 / std::sqrt(variance / S + Real(LAYER_NORM_EPS));
        }
        for (int64_t v = 0; v < S; v += LANES) {
            const V normed = (load<V>(y + v) - mean) * inverse;
            store(y + v, normed);
            store(grad_y + v, normed);
        }
        grad_y[target] -= 1;
        const Real loss = sum_over(S, [this](int64_t v) { return load<V>(grad_y + v) * load<V>(grad_y + v); }) / 2;
        for (int64_t v = 0; v < S; v += LANES) store(grad_y + v, load<V>(grad_y + v) / Real(B));
        if (!p.layer_norm) return loss;
        const Real sum = sum_over(S, [this](int64_t v) { return load<V>(grad_y + v); }) / S;
        const Real along = sum_over(S, [this](int64_t v) { return load<V>(grad_y + v) * load<V>(y + v); }) / S;
        for (int64_t v = 0; v < S; v += LANES) store(grad_y + v, inverse * (load<V>(grad_y + v) - sum - load<V>(y + v) * along));
        return loss;
    }
    // the sum of at(0) .. at(n - 1), of which `at` returns a vector; whatever lies behind the last one does not count
    template <class At> static Real sum_over(int64_t n, At at) {
        V sum{};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) sum += at(i);
        if (i < n) {
            const V rest = at(i);
            alignas(sizeof(V)) Real some[LANES];
            store(some, rest);
            sum += ::load(some, n - i);
        }
        return total(sum);
    }

    void write_strengths() {
        for (int64_t t = 0; t < T; ++t) beta[t] = key_beta[key_ids[t]] + value_beta[value_ids[t]];
        for (int64_t t = 0; t < T; t += LANES) {
            const V x = load<V>(beta + t);
            const V small = exp_of(x < 0 ? x : -x);
            store(beta + t, (x < 0 ? small : V{} + 1) / (1 + small));
        }
    }
    void write_strengths_backward() {
        for (int64_t t = 0; t < T; ++t) {
            const Real g = grad_beta[t] * beta[t] * (1 - beta[t]);
            grad_key_beta[key_ids[t]] += g;
            grad_value_beta[value_ids[t]] += g;
        }
    }

    // ---- sum and softmax: y = sum_t w_t onehot(v_t) with w_t from the kernel of key and query ----
    void read_by_kernel() {
        kernels();
        if (p.rule == SOFTMAX) {
            const Real scale = 1 / std::sqrt(Real(D())), peak = *std::max_element(weights, weights + T);
            for (int64_t t = 0; t < T; t += LANES) store(weights + t, exp_of((load<V>(weights + t) - peak) * scale));
        }
        const Real sum = sum_over(T, [this](int64_t t) { return load<V>(weights + t); });
        denominator = p.rule == SOFTMAX ? sum : p.normalise_readout ? sum + Real(p.readout_eps) : Real(1);
        for (int64_t t = 0; t < T; t += LANES) {
            const V kernel = load<V>(weights + t);
            store(scales + t, kernel);
            store(weights + t, kernel / denominator);
        }
        for (int64_t t = 0; t < T; ++t) y[value_ids[t]] += weights[t];
    }
    void read_by_kernel_backward() {
        for (int64_t t = 0; t < T; ++t) grads[t] = grad_y[value_ids[t]];
        Real mean = 0;
        if (p.rule == SOFTMAX || p.normalise_readout)
            mean = sum_over(T, [this](int64_t t) { return load<V>(weights + t) * load<V>(grads + t); });
        const Real scale = 1 / std::sqrt(Real(D()));
        for (int64_t t = 0; t < T; t += LANES) {
            const V g = load<V>(grads + t) - mean;
            store(grads + t, p.rule == SOFTMAX ? g * load<V>(weights + t) * scale : g / denominator);
        }
        kernels_backward();
    }
    Real &kernel_values(int64_t t) { return scales[t]; }

    // phi(k_t) . phi(q) for all t, in `weights`
    void kernels() {
        if (p.map == DPFP) return ring_kernels();
        if (p.map == FAVOR) return exponential_kernels();
        const int64_t *ids = key_ids, *others = value_ids, width = row();
        const Real *against = query_phi;
        with_map([=](auto map) {
            total_by_token([=](int64_t t) {
                const int64_t i = ids[t] * width, j = others[t] * width;
                V sum{}, f, unused;
                for (int64_t d = 0; d < width; d += LANES) {
                    map(i + d, j + d, f, unused);
                    sum += f * load<V>(against + d);
                }
                return sum;
            });
        });
    }
    // the total of a vector for each token, in `weights`
    template <class Sum> void total_by_token(Sum sum) {
        int64_t t = 0;
        for (; t + 4 <= T; t += 4) {
            const V sums[4] = {sum(t), sum(t + 1), sum(t + 2), sum(t + 3)};
            store_totals<Real>(weights + t, sums);
        }
        for (; t < T; ++t) weights[t] = total(sum(t));
    }
    void kernels_backward() {
        if (p.map == DPFP) return ring_kernels_backward();
        if (p.map == FAVOR) return exponential_kernels_backward();
        const int64_t *ids = key_ids, *others = value_ids, n = T, width = row();
        const Real *g_t = grads;
        with_map([=](auto map) {
            for (int64_t d = 0; d < width; d += LANES) {
                const V against = load<V>(query_phi + d);
                Real *key_grad = grad_key_table + d, *value_grad = grad_value_table + d;
                V grad{};
                for (int64_t t = 0; t < n; ++t) {
                    const int64_t i = ids[t] * width, j = others[t] * width;
                    V f, slope_of_f;
                    map(i + d, j + d, f, slope_of_f);
                    grad += g_t[t] * f;
                    const V g = g_t[t] * against * slope_of_f;
                    add(key_grad + i, g);
                    add(value_grad + j, g);
                }
                store(grad_query_phi + d, grad);
            }
        });
    }

    // maps that act on each component alone: hands `use` the function that computes f and its slope for the component whose
    // places in the tables are i and j. What it reads is in its own pointers: those of this object would be read again after each store.
    template <class Use> void with_map(Use use) const {
        const Real *keys_at = key_table, *values_at = value_table, *key_factor = key_exp, *value_factor = value_exp;
        if (p.map == ELU && has_exponentials) {
            use([=](int64_t i, int64_t j, V &f, V &slope_of_f) {
                const V x = load<V>(keys_at + i) + load<V>(values_at + j);
                // exp(min(x, 0)) from the tables' exponentials, a product instead of an exponential
                const V product = load<V>(key_factor + i) * load<V>(value_factor + j);
                slope_of_f = smaller(V{} + 1, product);
                f = slope_of_f + positive_part(x);
            });
            return;
        }
        use([=](int64_t i, int64_t j, V &f, V &slope_of_f) {
            const V x = load<V>(keys_at + i) + load<V>(values_at + j);
            f = mapped(x);
            slope_of_f = slope(x, f);
        });
    }
    void exponentiate_tables() {
        V high{};
        for (int64_t i = 0; i < S * row(); i += LANES) {
            const V a = load<V>(key_table + i), b = load<V>(value_table + i);
            store(key_exp + i, exp_of(a));
            store(value_exp + i, exp_of(b));
            high = larger(high, larger(a < 0 ? -a : a, b < 0 ? -b : b));
        }
        // Beyond, or with a NaN, a factor may leave the range although the product of both is a number of moderate size. A
        // product that leaves it is as far beyond what ELU can tell from 0 or from 1.
        has_exponentials = largest<Real>(high) < -FLOOR<Real> && !has_nan(high);
    }
    static bool has_nan(V x) {
        bool found = false;
        for (int l = 0; l < LANES; ++l) found |= x[l] != x[l];
        return found;
    }
    V mapped(V x) const {
        if (p.map == ELU) return exp_of(negative_part(x)) + positive_part(x);
        return p.map == TANH ? tanh_precisely(x) : x;
    }
    V slope(V x, V f) const {
        if (p.map == ELU) return x > 0 ? V{} + 1 : f;
        return p.map == TANH ? 1 - f * f : V{} + 1;
    }

    // ---- DPFP: with p = u o u_q on the ring of 2 D, the kernel is sum_i p_i (p_(i+1) + .. + p_(i+nu)) ----
    // u = [relu(x), relu(-x)], zeros behind; `x(d)` are the components from d on
    template <class X> void rectify(X x, Real *to) const {
        if (D() % LANES == 0) {
            for (int64_t d = 0; d < row(); d += LANES) {
                const V at_d = x(d);
                store(to + d, positive_part(at_d));
                store(to + D() + d, positive_part(-at_d));
            }
            return;
        }
        // the last vector of the first half lies over the start of the second
        for (int64_t d = 0; d < row(); d += LANES) store(to + d, positive_part(x(d)));
        for (int64_t d = 0; d < row(); d += LANES) store(to + D() + d, positive_part(-x(d)));
    }
    void rectify_pair(int64_t t, Real *to) const {
        const Real *a = key_table + key_ids[t] * row(), *c = value_table + value_ids[t] * row();
        rectify([=](int64_t d) { return load<V>(a + d) + load<V>(c + d); }, to);
    }
    // copies the ends of a ring of 2 D at `at` behind and before it
    void close_ring(Real *at) const {
        const int64_t nu = p.nu, end = 2 * D();
        for (int64_t i = 0; i < nu; ++i) {
            at[end + i] = at[i];
            at[-1 - i] = at[end - 1 - i];
        }
    }
    // the gradient of u, in `grad`, into those of the table rows of token t
    void unrectify_pair(int64_t t, const Real *u_t, const Real *grad) const {
        Real *a = grad_key_table + key_ids[t] * row(), *c = grad_value_table + value_ids[t] * row();
        for (int64_t d = 0; d < row(); d += LANES) {
            const V g = unrectified(d, u_t, grad);
            add(a + d, g);
            add(c + d, g);
        }
    }
    V unrectified(int64_t d, const Real *u_t, const Real *grad) const {
        return (load<V>(u_t + d) > 0 ? load<V>(grad + d) : V{}) - (load<V>(u_t + D() + d) > 0 ? load<V>(grad + D() + d) : V{});
    }

    // u and the closed ring of p = u o u_q for the tokens of a tile; staged, so that no load waits for a store just made
    int64_t tile_of_rings(int64_t first) {
        const int64_t n = std::min<int64_t>(TILE, T - first), u_row = ring() + LANES;
        const Real *us = u, *against = query_u;
        for (int64_t i = 0; i < n; ++i) rectify_pair(first + i, u + i * u_row);
        for (int64_t i = 0; i < n; ++i) {
            Real *at = ring_at(i);
            for (int64_t d = 0; d < ring(); d += LANES) store(at + d, load<V>(us + i * u_row + d) * load<V>(against + d));
        }
        for (int64_t i = 0; i < n; ++i) close_ring(ring_at(i));
        return n;
    }
    // A ring of the known size in registers, its neighbours by shuffles: for the paper's nu, where it fits.
    static constexpr int RING_VECTORS = 2 * SIZE / LANES;
    static constexpr bool RING_FITS = SIZE > 0 && SIZE % LANES == 0 && RING_VECTORS <= 16;

    // f(integral constant nu), and whether there is one for this problem
    template <class F> bool ring_in_registers(F f) const {
        if constexpr (RING_FITS) {
            if (p.nu == 1) return f(std::integral_constant<int, 1>()), true;
            if (p.nu == 2) return f(std::integral_constant<int, 2>()), true;
            if (p.nu == 3) return f(std::integral_constant<int, 3>()), true;
        }
        return false;
    }
    template <int SHIFT, size_t... I> static V window(V a, V b, std::index_sequence<I...>) {
        return __builtin_shufflevector(a, b, (I + SHIFT)...);
    }
    template <int J> static V after(const V *ring, int v) {
        return window<J>(ring[v], ring[(v + 1) % RING_VECTORS], std::make_index_sequence<LANES>());
    }
    template <int J> static V before(const V *ring, int v) {
        return window<LANES - J>(ring[(v + RING_VECTORS - 1) % RING_VECTORS], ring[v], std::make_index_sequence<LANES>());
    }
    [[gnu::always_inline]] void rectify_in_registers(int64_t t, V *to) const {
        const Real *a = key_table + key_ids[t] * row(), *c = value_table + value_ids[t] * row();
#pragma GCC unroll 8
        for (int v = 0; v < RING_VECTORS / 2; ++v) {
            const V x = load<V>(a + v * LANES) + load<V>(c + v * LANES);
            to[v] = positive_part(x);
            to[v + RING_VECTORS / 2] = positive_part(-x);
        }
    }
    template <int NU> void kernels_in_registers() {
        total_by_token([this](int64_t t) {
            V ring[RING_VECTORS], sum{};
            rectify_in_registers(t, ring);
#pragma GCC unroll 16
            for (int v = 0; v < RING_VECTORS; ++v) ring[v] *= load<V>(query_u + v * LANES);
#pragma GCC unroll 16
            for (int v = 0; v < RING_VECTORS; ++v) {
                V neighbours = after<1>(ring, v);
                if constexpr (NU > 1) neighbours += after<2>(ring, v);
                if constexpr (NU > 2) neighbours += after<3>(ring, v);
                sum += ring[v] * neighbours;
            }
            return sum;
        });
    }
    template <int NU> void kernels_in_registers_backward() {
        V grad_against[RING_VECTORS] = {};
        for (int64_t t = 0; t < T; ++t) {
            V own[RING_VECTORS], ring[RING_VECTORS], grad[RING_VECTORS];
            rectify_in_registers(t, own);
#pragma GCC unroll 16
            for (int v = 0; v < RING_VECTORS; ++v) ring[v] = own[v] * load<V>(query_u + v * LANES);
#pragma GCC unroll 16
            for (int v = 0; v < RING_VECTORS; ++v) {
                V neighbours = after<1>(ring, v) + before<1>(ring, v);
                if constexpr (NU > 1) neighbours += after<2>(ring, v) + before<2>(ring, v);
                if constexpr (NU > 2) neighbours += after<3>(ring, v) + before<3>(ring, v);
                neighbours *= grads[t];
                grad_against[v] += neighbours * own[v];
                grad[v] = neighbours * load<V>(query_u + v * LANES);
            }
            unrectify_in_registers(t, own, grad);
        }
        for (int v = 0; v < RING_VECTORS; ++v) store(grad_query_u + v * LANES, grad_against[v]);
    }
    // rows of features: those with a shift of j lie (j - 1) RING_VECTORS vectors behind the first ones
    template <int NU> void rows_in_registers() {
        total_by_token([this](int64_t t) {
            V own[RING_VECTORS], sum{};
            rectify_in_registers(t, own);
            Real *to = phi + t * NU * RING_VECTORS * LANES;
            store_shifted<1>(own, to, sum);
            if constexpr (NU > 1) store_shifted<2>(own, to + RING_VECTORS * LANES, sum);
            if constexpr (NU > 2) store_shifted<3>(own, to + 2 * RING_VECTORS * LANES, sum);
            return sum;
        });
    }
    template <int J> [[gnu::always_inline]] static void store_shifted(const V *own, Real *to, V &sum) {
#pragma GCC unroll 16
        for (int v = 0; v < RING_VECTORS; ++v) {
            const V x = own[v] * after<J>(own, v);
            store(to + v * LANES, x);
            sum += x;
        }
    }
    template <int NU> void rows_in_registers_backward(int64_t first, int64_t n, const Real *grad_rows) {
        for (int64_t t = first; t < first + n; ++t, grad_rows += NU * RING_VECTORS * LANES) {
            V own[RING_VECTORS], grad[RING_VECTORS] = {};
            rectify_in_registers(t, own);
            pull_shifted<1>(own, grad_rows, grad);
            if constexpr (NU > 1) pull_shifted<2>(own, grad_rows + RING_VECTORS * LANES, grad);
            if constexpr (NU > 2) pull_shifted<3>(own, grad_rows + 2 * RING_VECTORS * LANES, grad);
            unrectify_in_registers(t, own, grad);
        }
    }
    // as in ring_features_backward
    template <int J> [[gnu::always_inline]] static void pull_shifted(const V *own, const Real *grad_features, V *grad) {
        V pulled[RING_VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < RING_VECTORS; ++v) {
            const V g = load<V>(grad_features + v * LANES);
            pulled[v] = g * own[v];
            grad[v] += g * after<J>(own, v);
        }
#pragma GCC unroll 16
        for (int v = 0; v < RING_VECTORS; ++v) grad[v] += before<J>(pulled, v);
    }
    [[gnu::always_inline]] void unrectify_in_registers(int64_t t, const V *own, const V *grad) const {
        Real *a = grad_key_table + key_ids[t] * row(), *c = grad_value_table + value_ids[t] * row();
#pragma GCC unroll 8
        for (int v = 0; v < RING_VECTORS / 2; ++v) {
            const int w = v + RING_VECTORS / 2;
            const V g = (own[v] > 0 ? grad[v] : V{}) - (own[w] > 0 ? grad[w] : V{});
            add(a + v * LANES, g);
            add(c + v * LANES, g);
        }
    }
    void ring_kernels() {
        if (ring_in_registers([this](auto nu) { kernels_in_registers<nu>(); })) return;
        const int64_t u_row = ring() + LANES, between = ring_row, nu = p.nu;
        for (int64_t first = 0; first < T; first += TILE) {
            const int64_t n = tile_of_rings(first);
            const Real *us = u, *rings = ring_at(0), *against = query_u;
            // all of a tile, also where the last is not full: a fixed number of sums stays in registers
            V sums[TILE] = {};
            for (int64_t d = 0; d < ring(); d += LANES) {
                const V q_d = load<V>(against + d);
                for (int64_t i = 0; i < TILE; ++i) {
                    const Real *at = rings + i * between + d;
                    V neighbours = load<V>(at + 1);
                    for (int64_t j = 2; j <= nu; ++j) neighbours += load<V>(at + j);
                    // the ring itself is not zero behind its end; u is
                    sums[i] += load<V>(us + i * u_row + d) * q_d * neighbours;
                }
            }
            for (int64_t i = 0; i < n; ++i) weights[first + i] = total(sums[i]);
        }
    }
    void ring_kernels_backward() {
        if (ring_in_registers([this](auto nu) { kernels_in_registers_backward<nu>(); })) return;
        std::fill_n(grad_query_u, ring(), Real(0));
        const int64_t u_row = ring() + LANES, between = ring_row, nu = p.nu;
        for (int64_t first = 0; first < T; first += TILE) {
            const int64_t n = tile_of_rings(first);
            const Real *us = u, *rings = ring_at(0), *against = query_u, *g = grads + first;
            Real *grad = grad_u, *grad_against = grad_query_u;
            for (int64_t d = 0; d < ring(); d += LANES) {
                const V q_d = load<V>(against + d);
                V sum = load<V>(grad_against + d);
                for (int64_t i = 0; i < n; ++i) {
                    const Real *at = rings + i * between + d;
                    V neighbours = load<V>(at + 1) + load<V>(at - 1);
                    for (int64_t j = 2; j <= nu; ++j) neighbours += load<V>(at + j) + load<V>(at - j);
                    neighbours *= g[i];
                    sum += neighbours * load<V>(us + i * u_row + d);
                    store(grad + i * u_row + d, neighbours * q_d);
                }
                store(grad_against + d, sum);
            }
            for (int64_t i = 0; i < n; ++i) unrectify_pair(first + i, us + i * u_row, grad + i * u_row);
        }
    }

    // ---- queries ----
    void prepare_query() {
        if (p.map == DPFP) {
            rectify([this](int64_t d) { return load<V>(q + d); }, query_u);
            if (p.rule == SUM) return;
            ring_features(1, query_u, query_phi);
        } else if (p.map == FAVOR) {
            exponential_query();
        } else {
            for (int64_t d = 0; d < row(); d += LANES) store(query_phi + d, mapped(load<V>(q + d)));
            clear_padding(query_phi);
        }
        if (p.rule != DELTA) return;
        query_sum = total(lanes_of(query_phi)) + Real(p.query_eps);
        for (int64_t i = 0; i < features; i += LANES) store(query_phi + i, load<V>(query_phi + i) / query_sum);
    }
    // from grad_query_phi (DPFP with the sum rule: grad_query_u) to grad_q
    void query_backward() {
        if (p.rule == DELTA) {
            const Real along = dot(grad_query_phi, query_phi);
            for (int64_t i = 0; i < features; i += LANES)
                store(grad_query_phi + i, (load<V>(grad_query_phi + i) - along) / query_sum);
        }
        if (p.map == FAVOR) return exponential_query_backward();
        if (p.map == DPFP) {
            if (p.rule != SUM) ring_features_backward(1, query_u, grad_query_phi, grad_query_u);
            for (int64_t d = 0; d < row(); d += LANES) store(grad_q + d, unrectified(d, query_u, grad_query_u));
            return;
        }
        for (int64_t d = 0; d < row(); d += LANES) {
            const V x = load<V>(q + d);
            store(grad_q + d, load<V>(grad_query_phi + d) * slope(x, mapped(x)));
        }
    }
    void clear_padding(Real *features_row) const {
        for (int64_t d = D(); d < row(); ++d) features_row[d] = 0;
    }
    // a row of features, added up to one vector
    V lanes_of(const Real *x) const {
        V sum{};
        for (int64_t i = 0; i < features; i += LANES) sum += load<V>(x + i);
        return sum;
    }
    Real dot(const Real *a, const Real *b) const {
        V even{}, odd{};
        int64_t i = 0;
        for (; i + LANES < features; i += 2 * LANES) {
            even += load<V>(a + i) * load<V>(b + i);
            odd += load<V>(a + i + LANES) * load<V>(b + i + LANES);
        }
        if (i < features) even += load<V>(a + i) * load<V>(b + i);
        return total(even + odd);
    }

    // ---- rows of features, for rules that need more than the kernel ----
    // DPFP of n vectors u (zeros behind 2 D), in stages, so that no load waits for a store just made
    void ring_features(int64_t n, const Real *us, Real *out) const {
        const int64_t u_row = ring() + LANES, E = features, nu = p.nu;
        for (int64_t i = 0; i < n; ++i) copy_to_ring(us + i * u_row, ring_at(i));
        for (int64_t i = 0; i < n; ++i) close_ring(ring_at(i));
        for (int64_t i = 0; i < n; ++i) {
            const Real *own = us + i * u_row, *at = ring_at(i);
            for (int64_t j = 1; j <= nu; ++j) {
                Real *to = out + i * E + (j - 1) * ring();
                for (int64_t d = 0; d < ring(); d += LANES) store(to + d, load<V>(own + d) * load<V>(at + d + j));
            }
        }
    }
    // grad_u_i = sum_j g_(j,i) u_(i+j) + (g_j o u)_(i-j)
    void ring_features_backward(int64_t n, const Real *us, const Real *grad, Real *grad_us) const {
        const int64_t u_row = ring() + LANES, E = features, nu = p.nu;
        for (int64_t i = 0; i < n; ++i) copy_to_ring(us + i * u_row, ring_at(i));
        for (int64_t i = 0; i < n; ++i) close_ring(ring_at(i));
        for (int64_t j = 1; j <= nu; ++j) {
            for (int64_t i = 0; i < n; ++i) {
                const Real *g = grad + i * E + (j - 1) * ring(), *own = us + i * u_row;
                Real *pulled = pulled_at(i);
                for (int64_t d = 0; d < ring(); d += LANES) store(pulled + d, load<V>(g + d) * load<V>(own + d));
            }
            for (int64_t i = 0; i < n; ++i) close_ring(pulled_at(i));
            for (int64_t i = 0; i < n; ++i) {
                const Real *g = grad + i * E + (j - 1) * ring(), *at = ring_at(i) + j, *pulled = pulled_at(i) - j;
                Real *to = grad_us + i * u_row;
                for (int64_t d = 0; d < ring(); d += LANES) {
                    const V own = load<V>(g + d) * load<V>(at + d) + load<V>(pulled + d);
                    store(to + d, j == 1 ? own : load<V>(to + d) + own);
                }
            }
        }
    }
    Real *ring_at(int64_t i) const { return u_ring + i * ring_row + ring_pad; }
    Real *pulled_at(int64_t i) const { return pulled_ring + i * ring_row + ring_pad; }
    void copy_to_ring(const Real *u_t, Real *at) const {
        for (int64_t d = 0; d < ring(); d += LANES) store(at + d, load<V>(u_t + d));
    }

    // leaves the sum of each row in `weights`
    void feature_rows() {
        if (p.map == FAVOR) return exponential_rows();
        if (p.map == DPFP) {
            if (ring_in_registers([this](auto nu) { rows_in_registers<nu>(); })) return;
            for (int64_t first = 0; first < T; first += TILE) {
                const int64_t n = std::min<int64_t>(TILE, T - first);
                for (int64_t i = 0; i < n; ++i) rectify_pair(first + i, u + i * (ring() + LANES));
                ring_features(n, u, phi + first * features);
            }
            return total_by_token([this](int64_t t) { return lanes_of(phi + t * features); });
        }
        const int64_t *ids = key_ids, *others = value_ids, width = row();
        Real *rows = phi;
        with_map([=](auto map) {
            total_by_token([=](int64_t t) {
                const int64_t i = ids[t] * width, j = others[t] * width;
                Real *to = rows + t * width;
                V sum{};
                for (int64_t d = 0; d < width; d += LANES) {
                    V f, unused;
                    map(i + d, j + d, f, unused);
                    store(to + d, f);
                    sum += f;
                }
                if (D() == width) return sum;
                clear_padding(to);
                return lanes_of(to);
            });
        });
    }
    // gradients of the features of n tokens, at most TILE, into those of the tables
    void feature_rows_backward(int64_t first, int64_t n, const Real *grad) {
        if (p.map == DPFP) {
            if (ring_in_registers([=](auto nu) { rows_in_registers_backward<nu>(first, n, grad); })) return;
            for (int64_t i = 0; i < n; ++i) rectify_pair(first + i, u + i * (ring() + LANES));
            ring_features_backward(n, u, grad, grad_u);
            for (int64_t i = 0; i < n; ++i) unrectify_pair(first + i, u + i * (ring() + LANES), grad_u + i * (ring() + LANES));
            return;
        }
        if (p.map == FAVOR) {
            for (int64_t i = 0; i < n; ++i) exponential_row_backward(first + i, grad + i * features);
            return;
        }
        const int64_t *ids = key_ids + first, *others = value_ids + first, width = row();
        Real *key_grad = grad_key_table, *value_grad = grad_value_table;
        with_map([=](auto map) {
            for (int64_t t = 0; t < n; ++t) {
                const int64_t i = ids[t] * width, j = others[t] * width;
                for (int64_t d = 0; d < width; d += LANES) {
                    V unused, slope_of_f;
                    map(i + d, j + d, unused, slope_of_f);
                    const V g = load<V>(grad + t * width + d) * slope_of_f;
                    add(key_grad + i + d, g);
                    add(value_grad + j + d, g);
                }
            }
        });
    }

    // ---- delta: r <- r - a_t k_t with a_t = beta_t k_t . r, backwards in time from r = q; k_t = scale_t phi_t ----
    void normalised_rows() {
        feature_rows();
        for (int64_t t = 0; t < T; t += LANES) {
            const V scale = p.map == FAVOR ? load<V>(scales + t) : V{} + 1;
            const V denominator_of_t = scale * load<V>(weights + t) + Real(p.key_eps);
            store(&denominators(t), denominator_of_t);
            store(scales + t, scale / denominator_of_t);
        }
        std::copy_n(query_phi, features, state);
    }
    void read_by_adjoint() {
        normalised_rows();
        Real *r = state;
        const int64_t E = features;
        for (int64_t t = T - 1; t >= 0; --t) {
            const Real *f = phi + t * features;
            const Real a = beta[t] * (dot(f, state) * scales[t]), step = a * scales[t];
            for (int64_t i = 0; i < E; i += LANES) store(r + i, load<V>(r + i) - step * load<V>(f + i));
            weights[t] = a;
            y[value_ids[t]] += a;
        }
    }
    // forwards in time: the residual is wound up again, which is stable because sum-normalised keys have a norm of at most 1
    void read_by_adjoint_backward() {
        std::fill_n(adjoint, features, Real(0));
        Real *residual = state, *pulled = adjoint;
        const int64_t E = features;
        for (int64_t t = 0; t < T; ++t) {
            const Real *f = phi + t * E;
            const Real a = weights[t], s = scales[t], seen = dot(f, adjoint) * s;
            const Real lambda = grad_y[value_ids[t]] - seen, mu = beta[t] * lambda;
            const Real undo = a * s, add_on = mu * s;
            Real *grad = grad_phi + t % TILE * E;
            V reads{};
            for (int64_t i = 0; i < E; i += LANES) {
                const V x = load<V>(f + i), r = load<V>(residual + i) + undo * x, sum = load<V>(pulled + i);
                reads += x * r;
                store(residual + i, r);
                store(grad + i, mu * r - a * sum);
                store(pulled + i, sum + add_on * x);
            }
            const Real retrieved = total(reads) * s;
            grad_beta[t] = lambda * retrieved;
            // through k = phi / (sum phi + eps); gradient . k is known already
            const Real along = mu * retrieved - a * seen, inverse = 1 / denominators(t);
            for (int64_t i = 0; i < E; i += LANES) store(grad + i, (load<V>(grad + i) - along) * inverse);
            const int64_t waiting = t % TILE + 1;
            if (waiting == TILE || t == T - 1) feature_rows_backward(t + 1 - waiting, waiting, grad_phi);
        }
        std::copy_n(adjoint, features, grad_query_phi);
    }
    Real &denominators(int64_t t) { return grads[t]; }

    // The same with r and its adjoint in N registers each, GROUP sequences side by side: each waits long for its own sums.
    struct Recurrence {
        const int64_t *value_ids;
        Real *phi, *beta, *scales, *weights, *y, *state, *adjoint, *grad_y, *grad_beta, *denominators;
    };
    Recurrence recurrence() const {
        return {value_ids, phi, beta, scales, weights, y, state, adjoint, grad_y, grad_beta, grads};
    }
    template <int N> static Real dot_of(const V *a, const V *b) {
        V even{}, odd{};
#pragma GCC unroll 8
        for (int v = 0; v < N; v += 2) {
            even += a[v] * b[v];
            odd += a[v + 1] * b[v + 1];
        }
        return total(even + odd);
    }
    template <int N> static void load_all(V *to, const Real *from) {
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) to[v] = load<V>(from + v * LANES);
    }
    template <int N, int GROUP> void unwind(const Recurrence *of) const {
        V r[GROUP][N];
        for (int g = 0; g < GROUP; ++g) load_all<N>(r[g], of[g].state);
        for (int64_t t = T - 1; t >= 0; --t)
#pragma GCC unroll 2
            for (int g = 0; g < GROUP; ++g) {
                V f[N];
                load_all<N>(f, of[g].phi + t * N * LANES);
                const Real s = of[g].scales[t], a = of[g].beta[t] * (dot_of<N>(f, r[g]) * s), step = a * s;
#pragma GCC unroll 8
                for (int v = 0; v < N; ++v) r[g][v] -= step * f[v];
                of[g].weights[t] = a;
                of[g].y[of[g].value_ids[t]] += a;
            }
        for (int g = 0; g < GROUP; ++g)
            for (int v = 0; v < N; ++v) store(of[g].state + v * LANES, r[g][v]);
    }
    // the gradient of a row of phi takes its place
    template <int N, int GROUP> void wind_up(const Recurrence *of) const {
        V r[GROUP][N], pulled[GROUP][N] = {};
        for (int g = 0; g < GROUP; ++g) load_all<N>(r[g], of[g].state);
        for (int64_t t = 0; t < T; ++t)
#pragma GCC unroll 2
            for (int g = 0; g < GROUP; ++g) {
                V f[N], grad[N], reads{};
                load_all<N>(f, of[g].phi + t * N * LANES);
                const Real a = of[g].weights[t], s = of[g].scales[t], seen = dot_of<N>(f, pulled[g]) * s;
                const Real lambda = of[g].grad_y[of[g].value_ids[t]] - seen, mu = of[g].beta[t] * lambda;
                const Real undo = a * s, add_on = mu * s;
#pragma GCC unroll 8
                for (int v = 0; v < N; ++v) {
                    r[g][v] += undo * f[v];
                    reads += f[v] * r[g][v];
                    grad[v] = mu * r[g][v] - a * pulled[g][v];
                    pulled[g][v] += add_on * f[v];
                }
                const Real retrieved = total(reads) * s;
                of[g].grad_beta[t] = lambda * retrieved;
                const Real inverse = 1 / of[g].denominators[t], along = (mu * retrieved - a * seen) * inverse;
#pragma GCC unroll 8
                for (int v = 0; v < N; ++v) store(of[g].phi + (t * N + v) * LANES, grad[v] * inverse - along);
            }
        for (int g = 0; g < GROUP; ++g)
            for (int v = 0; v < N; ++v) store(of[g].adjoint + v * LANES, pulled[g][v]);
    }
    // all whole pairs of sequences; returns how many sequences those are
    template <int N, int GROUP_BACKWARD> int64_t pairs_of_sequences(Real &loss) {
        int64_t b = 0;
        for (; b + 2 <= B; b += 2) {
            Recurrence both[2];
            for (int i = 0; i < 2; ++i) {
                enter(i);
                begin(b + i);
                normalised_rows();
                both[i] = recurrence();
            }
            unwind<N, 2>(both);
            for (int i = 0; i < 2; ++i) {
                enter(i);
                loss += compare(targets[b + i]);
            }
            for (int i = 0; i < 2; i += GROUP_BACKWARD) wind_up<N, GROUP_BACKWARD>(both + i);
            for (int i = 0; i < 2; ++i) {
                enter(i);
                for (int64_t t = 0; t < T; t += TILE) feature_rows_backward(t, std::min<int64_t>(TILE, T - t), phi + t * features);
                std::copy_n(adjoint, features, grad_query_phi);
                write_strengths_backward();
                query_backward();
            }
        }
        enter(0);
        return b;
    }
    // what belongs to one sequence, of which the rule delta has two under way
    auto own() {
        return std::tie(key_ids, value_ids, q, grad_q, sequence_index, query_sum, weights, grads, beta, grad_beta, scales, y, grad_y,
                        query_phi, grad_query_phi, state, adjoint, phi, query_u);
    }
    void enter(int place) {
        if (place == entered) return;
        places[entered] = own();
        own() = places[place];
        entered = place;
    }

    // ---- fwm: the memory itself is written, and read once ----
    FwmSequence<Real> memory_sequence() const {
        return {T, features, S, {phi, features}, {nullptr, 0}, {value_ids, 1}, {beta, 1}, {nullptr, 0}, nullptr, query_phi};
    }
    void read_memory() {
        feature_rows();
        fwm_forward(memory_sequence(), FwmOutputs<Real>{{nullptr, 0}, nullptr, y}, memory_kept, memory_scratch);
    }
    void read_memory_backward() {
        const FwmGradients<Real> wanted{nullptr, {nullptr, 0}, {grad_phi, features}, {nullptr, 0}, {grad_beta, 1}, {nullptr, 0},
                                        nullptr, grad_y,       grad_query_phi};
        const int64_t reached = fwm_backward(memory_sequence(), memory_kept, wanted, memory_scratch);
        for (int64_t first = reached / TILE * TILE; first < T; first += TILE)
            feature_rows_backward(first, std::min<int64_t>(TILE, T - first), grad_phi + first * features);
    }

    // ---- FAVOR+: phi(k) = exp(+-R k - |k|^2/2 - offset); R k falls into tables as k does, and so do the exponentials ----
    void project_on_directions() {
        const Real s = p.input_scale;
        for (Real *table : {key_table, value_table})
            for (int64_t i = 0; i < S * row(); ++i) table[i] *= s;
        for (int64_t i = 0; i < B * row(); ++i) query[i] *= s;
        product_with_transpose(key_table, row(), S, m, D(), directions, D(), 0, key_projected, directions_row);
        product_with_transpose(value_table, row(), S, m, D(), directions, D(), 0, value_projected, directions_row);
        product_with_transpose(query, row(), B, m, D(), directions, D(), 0, query_projected, directions_row);
        powers(key_projected, key_powers, key_peak);
        powers(value_projected, value_powers, value_peak);
        for (Real *table : {grad_key_projected, grad_value_projected}) std::fill_n(table, S * directions_row, Real(0));
    }
    // exp(P - peak) and exp(-P - peak) of each row, peak = max |P|
    void powers(const Real *projected, Real *out, Real *peak) const {
        for (int64_t i = 0; i < S; ++i) {
            peak[i] = signed_powers(out + 2 * i * directions_row, [&](int64_t r) { return load<V>(projected + i * directions_row + r); });
        }
    }
    template <class Exponents> Real signed_powers(Real *out, Exponents exponents) const {
        V high{};
        for (int64_t r = 0; r < directions_row; r += LANES) {
            const V x = exponents(r);
            high = larger(high, x < 0 ? -x : x);
        }
        const Real peak = largest<Real>(high);
        for (int64_t r = 0; r < directions_row; r += LANES) {
            const V x = exponents(r);
            store(out + r, exp_of(x - peak));
            store(out + directions_row + r, exp_of(-x - peak));
        }
        for (int64_t r = m; r < directions_row; ++r) out[r] = out[directions_row + r] = 0;
        return peak;
    }
    void project_on_directions_backward() {
        const Real s = p.input_scale;
        product({grad_key_projected, directions_row, 1}, S, D(), m, directions, D(), 1, grad_key_table, row());
        product({grad_value_projected, directions_row, 1}, S, D(), m, directions, D(), 1, grad_value_table, row());
        product({grad_query_projected, directions_row, 1}, B, D(), m, directions, D(), 1, grad_query, row());
        for (Real *table : {grad_key_table, grad_value_table})
            for (int64_t i = 0; i < S * row(); ++i) table[i] *= s;
        for (int64_t i = 0; i < B * row(); ++i) grad_query[i] *= s;
    }

    // phi(q) in query_phi
    void exponential_query() {
        const Real *projected = query_projected + sequence_index * directions_row;
        Real offset = half_square(q) + log_count();
        if (p.stabilizer != NONE) {
            V high{};
            for (int64_t r = 0; r < directions_row; r += LANES) {
                const V x = load<V>(projected + r);
                high = larger(high, x < 0 ? -x : x);
            }
            // largest exponent |R q|_max - |q|^2/2
            offset += largest<Real>(high) - half_square(q);
        }
        for (int64_t r = 0; r < directions_row; r += LANES) {
            const V x = load<V>(projected + r);
            store(query_phi + r, exp_of(x - offset));
            store(query_phi + directions_row + r, exp_of(-x - offset));
        }
        for (int64_t r = m; r < directions_row; ++r) query_phi[r] = query_phi[directions_row + r] = 0;
    }
    // stabilisers are constants: gradients pass by them
    void exponential_query_backward() {
        // with the sum-normalised query of the delta rule query_phi has been divided
        const Real scale = p.rule == DELTA ? query_sum : Real(1);
        Real *projected = grad_query_projected + sequence_index * directions_row;
        V along{};
        for (int64_t r = 0; r < directions_row; r += LANES) {
            const V plus = load<V>(grad_query_phi + r) * load<V>(query_phi + r) * scale;
            const V minus = load<V>(grad_query_phi + directions_row + r) * load<V>(query_phi + directions_row + r) * scale;
            store(projected + r, plus - minus);
            along += plus + minus;
        }
        const Real sum = total(along);
        for (int64_t d = 0; d < row(); d += LANES) store(grad_q + d, -sum * load<V>(q + d));
    }
    Real half_square(const Real *x) const {
        V sum{};
        for (int64_t d = 0; d < row(); d += LANES) sum += load<V>(x + d) * load<V>(x + d);
        return total(sum) / 2;
    }
    // 1/sqrt(2m) in the exponent, where it decides what underflows
    Real log_count() const { return std::log(Real(2 * m)) / 2; }
    Real half_square_of_pair(int64_t t) const {
        const Real *a = key_table + key_ids[t] * row(), *c = value_table + value_ids[t] * row();
        V sum{};
        for (int64_t d = 0; d < row(); d += LANES) {
            const V x = load<V>(a + d) + load<V>(c + d);
            sum += x * x;
        }
        return total(sum) / 2;
    }

    // phi_t = exp(log_scales[t]) f_t with f_t the product of two rows of powers, or, where that would lose digits, exponentials anew
    template <class Use> Real with_powers(int64_t t, Use use) {
        const Real *a = key_powers + 2 * key_ids[t] * directions_row, *c = value_powers + 2 * value_ids[t] * directions_row;
        if (slow[t]) {
            pair_powers(t);
            return use([&](int64_t r) { return load<V>(slow_row + r); });
        }
        return use([&](int64_t r) { return load<V>(a + r) * load<V>(c + r); });
    }
    Real pair_powers(int64_t t) {
        const Real *a = key_projected + key_ids[t] * directions_row, *c = value_projected + value_ids[t] * directions_row;
        return signed_powers(slow_row, [&](int64_t r) { return load<V>(a + r) + load<V>(c + r); });
    }
    // peak and log_scale of every token; use(t, f) computes what is wanted of f and returns its largest element
    template <class Use> void exponential_tokens(Use use) {
        Real highest = -INFINITY;
        for (int64_t t = 0; t < T; ++t) {
            const Real half = half_square_of_pair(t);
            slow[t] = 0, peaks[t] = key_peak[key_ids[t]] + value_peak[value_ids[t]];
            Real top = with_powers(t, [&](auto f) { return use(t, f); });
            if (!(top >= SMALLEST_PRODUCT<Real>) || peaks[t] - half > CEILING<Real>) {
                slow[t] = 1, peaks[t] = pair_powers(t);
                top = with_powers(t, [&](auto f) { return use(t, f); });
            }
            log_scales[t] = peaks[t] - half - log_count();
            const Real exponent = peaks[t] - half + (top > 0 ? std::log(top) : Real(0));
            if (p.stabilizer == VECTOR) log_scales[t] -= exponent;
            // a NaN is passed on
            highest = exponent <= highest ? highest : exponent;
        }
        if (p.stabilizer == SEQUENCE)
            for (int64_t t = 0; t < T; ++t) log_scales[t] -= highest;
        for (int64_t t = 0; t < T; t += LANES) store(scales + t, exp_of(load<V>(log_scales + t)));
    }
    void exponential_kernels() {
        exponential_tokens([&](int64_t t, auto f) {
            V sum{}, high{};
            for (int64_t r = 0; r < features; r += LANES) {
                const V x = f(r);
                sum += x * load<V>(query_phi + r);
                high = larger(high, x);
            }
            weights[t] = total(sum);
            return largest<Real>(high);
        });
        for (int64_t t = 0; t < T; ++t) weights[t] *= scales[t];
    }
    void exponential_kernels_backward() {
        std::fill_n(grad_query_phi, features, Real(0));
        for (int64_t t = 0; t < T; ++t) {
            // kernel_values lie where the scales were
            const Real scale = exp_of(V{} + log_scales[t])[0], g = grads[t] * scale;
            Real *a = grad_key_projected + key_ids[t] * directions_row, *c = grad_value_projected + value_ids[t] * directions_row;
            with_powers(t, [&](auto f) {
                for (int64_t r = 0; r < directions_row; r += LANES) {
                    const V plus = g * f(r), minus = g * f(directions_row + r);
                    add(grad_query_phi + r, plus);
                    add(grad_query_phi + directions_row + r, minus);
                    const V pulled = plus * load<V>(query_phi + r) - minus * load<V>(query_phi + directions_row + r);
                    add(a + r, pulled);
                    add(c + r, pulled);
                }
                return Real(0);
            });
            add_along_key(t, -grads[t] * kernel_values(t));
        }
    }
    // f_t in the rows of phi
    void exponential_rows() {
        exponential_tokens([&](int64_t t, auto f) {
            V sum{}, high{};
            for (int64_t r = 0; r < features; r += LANES) {
                const V x = f(r);
                store(phi + t * features + r, x);
                sum += x;
                high = larger(high, x);
            }
            weights[t] = total(sum);
            return largest<Real>(high);
        });
    }
    void exponential_row_backward(int64_t t, const Real *grad) {
        const Real *f = phi + t * features;
        const Real scale = exp_of(V{} + log_scales[t])[0];
        Real *a = grad_key_projected + key_ids[t] * directions_row, *c = grad_value_projected + value_ids[t] * directions_row;
        V along{};
        for (int64_t r = 0; r < directions_row; r += LANES) {
            const V plus = load<V>(grad + r) * load<V>(f + r) * scale;
            const V minus = load<V>(grad + directions_row + r) * load<V>(f + directions_row + r) * scale;
            add(a + r, plus - minus);
            add(c + r, plus - minus);
            along += plus + minus;
        }
        add_along_key(t, -total(along));
    }
    void add_along_key(int64_t t, Real factor) {
        const int64_t i = key_ids[t] * row(), j = value_ids[t] * row();
        for (int64_t d = 0; d < row(); d += LANES) {
            const V g = factor * (load<V>(key_table + i + d) + load<V>(value_table + j + d));
            add(grad_key_table + i + d, g);
            add(grad_value_table + j + d, g);
        }
    }

    static constexpr int64_t TILE = 8;

    const Problem<Real> &p;
    int64_t B, T, S, e, m;
    int64_t directions_row, features, ring_pad, ring_row;
    const int64_t *keys, *values, *queries, *targets, *key_ids = nullptr, *value_ids = nullptr;
    const Real *directions;
    int64_t sequence_index = 0;
    Real denominator, query_sum = 0;
    bool has_exponentials = false;
    Real *q = nullptr, *grad_q = nullptr, *transposed;
    Real *key_table, *value_table, *grad_key_table, *grad_value_table, *query, *grad_query, *queried, *grad_queried;
    Real *key_exp, *value_exp;
    Real *key_beta, *value_beta, *grad_key_beta, *grad_value_beta;
    Real *weights, *grads, *beta, *grad_beta, *scales, *y, *grad_y;
    Real *query_phi, *grad_query_phi, *state, *adjoint, *phi, *grad_phi, *u, *grad_u, *u_ring, *pulled_ring, *query_u, *grad_query_u;
    Real *key_projected, *value_projected, *key_powers, *value_powers, *grad_key_projected, *grad_value_projected;
    Real *query_projected, *grad_query_projected, *key_peak, *value_peak, *peaks, *log_scales, *slow, *slow_row;
    Real *memory_kept, *memory_scratch;
    std::tuple<const int64_t *, const int64_t *, Real *, Real *, int64_t, Real, Real *, Real *, Real *, Real *, Real *, Real *, Real *,
               Real *, Real *, Real *, Real *, Real *, Real *>
        places[2];
    int entered = 0;
};

// the paper's D
constexpr int64_t KNOWN = 64;

template <class Real, int64_t SIZE> void gradients(const Problem<Real> &p) { p.losses[0] = Training<Real, SIZE>(p).gradients(); }

// how many ids are no key's or value's
template <class Real> int64_t stray_ids(const Problem<Real> &p) {
    const int64_t sequences = p.n_steps * p.batch;
    int64_t n = 0;
    for (const int64_t *ids : {p.keys, p.values})
        for (int64_t i = 0; i < sequences * p.pairs; ++i) n += uint64_t(ids[i]) >= uint64_t(p.n_keys);
    for (const int64_t *ids : {p.queries, p.targets})
        for (int64_t i = 0; i < sequences; ++i) n += uint64_t(ids[i]) >= uint64_t(p.n_keys);
    return n;
}

template <class Real, int64_t SIZE> void steps(const Problem<Real> &p) {
    Training<Real, SIZE> training(p);
    for (int64_t n = 0; n < p.n_steps; ++n) p.losses[n] = training.train(n);
}

}  // namespace

#define FWP_PAIR_TRAINING(REAL, SUFFIX)                                                                                   \
    extern "C" void fwp_pair_training_gradients_##SUFFIX(const Problem<REAL> *p) {                                        \
        p->size == KNOWN ? gradients<REAL, KNOWN>(*p) : gradients<REAL, 0>(*p);                                           \
    }                                                                                                                     \
    extern "C" void fwp_pair_training_steps_##SUFFIX(const Problem<REAL> *p) {                                            \
        p->size == KNOWN ? steps<REAL, KNOWN>(*p) : steps<REAL, 0>(*p);                                                   \
    }                                                                                                                     \
    extern "C" int64_t fwp_pair_training_stray_ids_##SUFFIX(const Problem<REAL> *p) { return stray_ids<REAL>(*p); }       \
    extern "C" int64_t fwp_pair_training_scratch_##SUFFIX(const Problem<REAL> *p) {                                       \
        return Training<REAL, 0>::scratch_numbers(*p);                                                                    \
    }

FWP_PAIR_TRAINING(float, float32)
FWP_PAIR_TRAINING(double, float64)

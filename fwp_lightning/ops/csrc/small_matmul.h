// Products of matrices of a few dozen rows, a tile of the result at a time in registers.
//
// Such products are over before a BLAS library has packed its operands. Vectors are as wide as the machine's registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

// a tile of the result takes ROWS x VECTORS registers and leaves some for the operands
#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64, TILE_ROWS = 8, TILE_VECTORS = 3;
#elif defined(__AVX__)
constexpr int REGISTER_BYTES = 32, TILE_ROWS = 4, TILE_VECTORS = 3;
#elif defined(__aarch64__)
constexpr int REGISTER_BYTES = 16, TILE_ROWS = 8, TILE_VECTORS = 3;
#else
constexpr int REGISTER_BYTES = 16, TILE_ROWS = 4, TILE_VECTORS = 3;
#endif
// columns come in multiples of a narrow vector: half a register where registers are wide
constexpr int NARROW_BYTES = REGISTER_BYTES > 16 ? REGISTER_BYTES / 2 : 16;

template <class Real, int BYTES> struct VectorOf {
    typedef Real type __attribute__((vector_size(BYTES)));
};
template <class Real> using Full = typename VectorOf<Real, REGISTER_BYTES>::type;
template <class Real> using Narrow = typename VectorOf<Real, NARROW_BYTES>::type;
template <class Real> constexpr int FULL = REGISTER_BYTES / sizeof(Real);
template <class Real> constexpr int NARROW = NARROW_BYTES / sizeof(Real);

template <class Real> constexpr int64_t whole_vectors(int64_t n) {
    return (n + NARROW<Real> - 1) / NARROW<Real> * NARROW<Real>;
}

template <class V, class Real> inline V load_vector(const Real *from) {
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
template <class V, class Real> inline void store_vector(Real *to, V x) { std::memcpy(to, &x, sizeof x); }

// shuffles rather than copies of bytes: those go through memory
template <class V, size_t... I> inline auto elements_of(V a, V b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, I...);
}
template <class V, size_t... I> inline auto upper_half(V x, std::index_sequence<I...>) {
    return __builtin_shufflevector(x, x, (I + sizeof...(I))...);
}
// followed by zeros if it is narrow
template <class Real, class V> inline Full<Real> widened(V x) {
    if constexpr (sizeof(V) == REGISTER_BYTES)
        return x;
    else
        return elements_of(x, V{}, std::make_index_sequence<FULL<Real>>());
}

// added up in halves
template <class Real, int BYTES> inline Real sum_vector(typename VectorOf<Real, BYTES>::type x) {
    if constexpr (BYTES > 16) {
        using Half = std::make_index_sequence<BYTES / 2 / sizeof(Real)>;
        return sum_vector<Real, BYTES / 2>(elements_of(x, x, Half()) + upper_half(x, Half()));
    } else if constexpr (sizeof(Real) == 4) {
        x += __builtin_shufflevector(x, x, 2, 3, 0, 1);
        return x[0] + x[1];
    } else {
        return x[0] + x[1];
    }
}

// N vectors side by side: f(Block<V, N>{}, first column) for all columns; `columns` is a multiple of a narrow vector
template <class V, int N> struct Block {
    using Vector = V;
    static constexpr int COUNT = N;
};
template <class Real, int N, class F> inline void for_blocks(int64_t columns, F f) {
    int64_t j = 0;
    for (; j + N * FULL<Real> <= columns; j += N * FULL<Real>) f(Block<Full<Real>, N>{}, j);
    if constexpr (N > 2)
        if (j + 2 * FULL<Real> <= columns) {
            f(Block<Full<Real>, 2>{}, j);
            j += 2 * FULL<Real>;
        }
    for (; j + FULL<Real> <= columns; j += FULL<Real>) f(Block<Full<Real>, 1>{}, j);
    for (; j < columns; j += NARROW<Real>) f(Block<Narrow<Real>, 1>{}, j);
}

// The left factor of a product: element (i, l) is data[i * row + l * column].
template <class Real> struct Factor {
    const Real *data;
    int64_t row, column;
};

// What becomes of a vector of the result, at (i, j), before it is stored. What it adds up goes into one of SLOTS sums, so
// that additions need not wait for one another.
constexpr int SLOTS = 4;
struct AsItIs {
    template <class V> V operator()(V x, int64_t, int64_t, int) { return x; }
};

template <class B, int M, bool UNIT_ROW, class Real, class Finish>
inline void tile(Real *out, int64_t out_row, Real keep, Factor<Real> a, const Real *b, int64_t b_row, int64_t depth, int64_t i0,
                 int64_t j0, Finish &shared) {
    using V = typename B::Vector;
    constexpr int N = B::COUNT, LANES_OF_V = sizeof(V) / sizeof(Real);
    V sum[M][N];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
            sum[i][n] = keep == 0 ? V{} : keep * load_vector<V>(out + (i0 + i) * out_row + j0 + n * LANES_OF_V);
    const int64_t row = UNIT_ROW ? 1 : a.row, column = UNIT_ROW ? a.column : 1;
    const Real *from = a.data + i0 * row;
    b += j0;
    for (int64_t l = 0; l < depth; ++l) {
        V x[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) x[n] = load_vector<V>(b + n * LANES_OF_V);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const Real scale = from[i * row];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[i][n] += scale * x[n];
        }
        from += column;
        b += b_row;
    }
    Finish finish = shared;  // a copy, so that what it adds up is in registers
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
            store_vector(out + (i0 + i) * out_row + j0 + n * LANES_OF_V,
                         finish(sum[i][n], i0 + i, j0 + n * LANES_OF_V, (i * N + n) % SLOTS));
    shared = finish;
}

template <int M, bool UNIT_ROW, class Real, class Finish>
inline int64_t tiles(Real *out, int64_t out_row, Real keep, Factor<Real> a, const Real *b, int64_t b_row, int64_t i,
                     int64_t rows, int64_t columns, int64_t depth, Finish &finish) {
    for (; i + M <= rows; i += M)
        for_blocks<Real, TILE_VECTORS>(columns, [&](auto block, int64_t j) {
            tile<decltype(block), M, UNIT_ROW>(out, out_row, keep, a, b, b_row, depth, i, j, finish);
        });
    return i;
}

// out [rows, columns] = keep * out + a [rows, depth] b [depth, columns]; what `out` held does not matter where keep is 0.
// Rows of out and b are `out_row` and `b_row` numbers apart; one of a's strides is 1; columns are whole narrow vectors.
template <bool UNIT_ROW, class Real, class Finish = AsItIs>
inline void multiply(Real *out, int64_t out_row, Real keep, Factor<Real> a, const Real *b, int64_t b_row, int64_t rows,
                     int64_t columns, int64_t depth, Finish &&finish = Finish()) {
    int64_t i = 0;
    i = tiles<TILE_ROWS, UNIT_ROW>(out, out_row, keep, a, b, b_row, i, rows, columns, depth, finish);
    if (TILE_ROWS > 4) i = tiles<4, UNIT_ROW>(out, out_row, keep, a, b, b_row, i, rows, columns, depth, finish);
    tiles<1, UNIT_ROW>(out, out_row, keep, a, b, b_row, i, rows, columns, depth, finish);
}

inline void transpose_block(float *out, int64_t out_row, const float *in, int64_t in_row) {
    using V = VectorOf<float, 16>::type;
    V x[4], y[4];
    for (int i = 0; i < 4; ++i) x[i] = load_vector<V>(in + i * in_row);
    for (int i = 0; i < 2; ++i) {
        y[2 * i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 4, 1, 5);
        y[2 * i + 1] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; ++i) {
        store_vector(out + 2 * i * out_row, V(__builtin_shufflevector(y[i], y[2 + i], 0, 1, 4, 5)));
        store_vector(out + (2 * i + 1) * out_row, V(__builtin_shufflevector(y[i], y[2 + i], 2, 3, 6, 7)));
    }
}
inline void transpose_block(double *out, int64_t out_row, const double *in, int64_t in_row) {
    using V = VectorOf<double, 16>::type;
    const V x = load_vector<V>(in), y = load_vector<V>(in + in_row);
    store_vector(out, V(__builtin_shufflevector(x, y, 0, 2)));
    store_vector(out + out_row, V(__builtin_shufflevector(x, y, 1, 3)));
}

// out [columns, padded] = the transpose of in [rows, columns]; columns of out beyond `rows` become 0
template <class Real>
inline void transpose(Real *out, int64_t out_row, int64_t padded, const Real *in, int64_t in_row, int64_t rows,
                      int64_t columns) {
    constexpr int N = 16 / sizeof(Real);  // N x N blocks in vectors of 16 bytes
    const int64_t whole_rows = rows / N * N, whole_columns = columns / N * N;
    for (int64_t c = 0; c < whole_columns; c += N)
        for (int64_t r = 0; r < whole_rows; r += N)
            transpose_block(out + c * out_row + r, out_row, in + r * in_row + c, in_row);
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = c < whole_columns ? whole_rows : 0; r < padded; ++r)
            out[c * out_row + r] = r < rows ? in[r * in_row + c] : Real(0);
}

}  // namespace

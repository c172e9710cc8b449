// FAVOR+ features of many keys and their dot product with one query per group of rows, in one pass over memory.
//
// In place: x[r, e] becomes exp(x[r, e] - offset[r]), flushed to 0 under e^-87, and kernel[r] its dot product with query[group of r].

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace {

typedef Lanes<float>::type V;

inline V exp_flushing(V x) {
    const V e = exp_in_range(x < -87.0f ? V{} - 87.0f : (x > 88.0f ? V{} + 88.0f : x));
    return x <= -87.0f ? V{} : (x > 88.0f ? V{} + INFINITY : e);
}

inline V load(const float *from, int64_t n) {
    V out{};
    std::memcpy(&out, from, n * sizeof(float));
    return out;
}

struct Problem {
    int64_t rows, columns, rows_per_group;
};

}  // namespace

extern "C" void fwp_exponential_rows_forward_float32(const Problem *p, float *x, const float *offset, const float *query,
                                                     float *kernel) {
    const int64_t columns = p->columns;
    for (int64_t r = 0; r < p->rows; ++r) {
        float *row = x + r * columns;
        const float *q = query + (r / p->rows_per_group) * columns;
        V sum{};
        for (int64_t e = 0; e < columns; e += LANES) {
            const int64_t n = columns - e < LANES ? columns - e : LANES;
            const V features = exp_flushing(load(row + e, n) - offset[r]);
            sum += features * load(q + e, n);
            std::memcpy(row + e, &features, n * sizeof(float));
        }
        float total = 0;
        for (int l = 0; l < LANES; ++l) total += sum[l];
        kernel[r] = total;
    }
}

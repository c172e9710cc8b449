// FAVOR+ features of many keys and their dot product with one query per group of rows, in one pass over memory.
//
// In place: x[r, e] becomes exp(x[r, e] - offset[r]), flushed to 0 under e^-87, and kernel[r] its dot product with query[group of r].

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
typedef float V __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t I __attribute__((vector_size(LANES * sizeof(int32_t))));

inline V exp_flushing(V x) {
    const V bounded = x < -87.0f ? V{} - 87.0f : (x > 88.0f ? V{} + 88.0f : x);
    const V shifter = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (bounded * 1.44269504088896341f + shifter) - shifter;
    const V r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I power = (__builtin_convertvector(n, I) + 127) << 23;
    V scale;
    std::memcpy(&scale, &power, sizeof scale);
    const V e = p * scale;
    return x <= -87.0f ? V{} : (x > 88.0f ? V{} + INFINITY : e);
}

inline V load(const float *from, int64_t n) {
    V out{};
    std::memcpy(&out, from, n * sizeof(float));
    return out;
}

}  // namespace

extern "C" void fwp_exponential_rows(int64_t rows, int64_t columns, int64_t rows_per_group, float *x, const float *offset,
                                     const float *query, float *kernel) {
    for (int64_t r = 0; r < rows; ++r) {
        float *row = x + r * columns;
        const float *q = query + (r / rows_per_group) * columns;
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

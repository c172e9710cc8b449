// Sequences of key-value pairs for associative retrieval, drawn as NumPy draws them from its generator Philox: permutations as
// by Generator.permuted, whole numbers as by Generator.integers. The numbers and those that follow them are the same; they
// come sooner because many are computed at once and nothing branches on them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Problem {
    int64_t rows, n_keys, length, replacement;
    int64_t *keys, *values;    // [rows, length]
    int64_t *query, *target;   // [rows], or neither
    uint64_t key[2], counter;  // of a generator with no number at hand; what is above 64 bits of the counter is 0
    int64_t taken;             // out: how many halves of its numbers were drawn
};

// Philox 4x64 with ten rounds (Salmon et al., 2011), many ahead: each count makes four numbers of 64 bits, and they are handed
// out in halves, the lower one first.
class Halves {
    static constexpr int AHEAD = 64;
    const uint64_t key[2];
    uint64_t counter;
    uint32_t halves[8 * AHEAD];
    int64_t refills = 0, next = 8 * AHEAD;

    __attribute__((noinline)) void refill() {
        // two counts side by side: the rounds of one wait for each other
        for (int i = 0; i < AHEAD; i += 2) {
            uint64_t x[2][4] = {{++counter, 0, 0, 0}, {++counter, 0, 0, 0}}, k0 = key[0], k1 = key[1];
            for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
                for (uint64_t *y : x) {
                    const unsigned __int128 a = (unsigned __int128)(0xD2E7470EE14C6C93u) * y[0];
                    const unsigned __int128 b = (unsigned __int128)(0xCA5A826395121157u) * y[2];
                    y[0] = uint64_t(b >> 64) ^ y[1] ^ k0, y[1] = uint64_t(b);
                    y[2] = uint64_t(a >> 64) ^ y[3] ^ k1, y[3] = uint64_t(a);
                }
                k0 += 0x9E3779B97F4A7C15u, k1 += 0xBB67AE8584CAA73Bu;
            }
            for (int j = 0; j < 8; ++j) {
                halves[8 * i + 2 * j] = uint32_t(x[j / 4][j % 4]);
                halves[8 * i + 2 * j + 1] = uint32_t(x[j / 4][j % 4] >> 32);
            }
        }
        ++refills, next = 0;
    }

  public:
    explicit Halves(const Problem &p) : key{p.key[0], p.key[1]}, counter(p.counter) {}
    int64_t taken() const { return 8 * AHEAD * (refills - 1) + next; }

    // hands them out; its place is in a register, as what others may write to is not
    class Reader {
        Halves &from;
        int64_t next;

      public:
        explicit Reader(Halves &halves) : from(halves), next(halves.next) {}
        ~Reader() { from.next = next; }
        Reader(const Reader &) = delete;
        uint32_t operator()() {
            if (__builtin_expect(next == 8 * AHEAD, 0)) from.refill(), next = 0;
            return from.halves[next++];
        }
    };
};

// 0 .. last, by Lemire's method
struct WholeNumber {
    const uint32_t last, size = last + 1;

    int64_t operator()(Halves::Reader &half) const {
        if (last == 0) return 0;
        uint64_t product = uint64_t(half()) * size;
        if (uint32_t(product) < size) {
            const uint32_t threshold = (UINT32_MAX - last) % size;
            while (uint32_t(product) < threshold) product = uint64_t(half()) * size;
        }
        return int64_t(product >> 32);
    }
};

// Fisher and Yates from the end, places by masked rejection. First all places, and without a branch on what was drawn, since
// none can tell which of them are rejected.
void permute(Halves &from, int64_t *row, int64_t n, std::vector<uint32_t> &places) {
    Halves::Reader half(from);
    uint32_t *const place_of = places.data();
    for (int64_t i = n - 1; i > 0;) {
        const uint32_t mask = ~uint32_t(0) >> __builtin_clz(uint32_t(i));
        // those that have this mask
        for (const int64_t below = mask >> 1; i > below;) {
            const uint32_t drawn = half() & mask;
            place_of[i] = drawn;
            i -= int64_t(drawn) <= i;
        }
    }
    for (int64_t i = 0; i < n; ++i) row[i] = i;
    for (int64_t i = n - 1; i > 0; --i) std::swap(row[i], row[place_of[i]]);
}

void draw(Problem &p) {
    Halves halves(p);
    std::vector<uint32_t> places(p.n_keys);
    const WholeNumber id{uint32_t(p.n_keys - 1)}, place{uint32_t(p.length - 1)};
    for (int64_t *all : {p.keys, p.values})
        for (int64_t row = 0; row < p.rows; ++row) {
            if (!p.replacement) {
                permute(halves, all + row * p.length, p.n_keys, places);
                continue;
            }
            Halves::Reader half(halves);
            for (int64_t t = 0; t < p.length; ++t) all[row * p.length + t] = id(half);
        }
    for (int64_t row = 0; row < (p.query == nullptr ? 0 : p.rows); ++row) {
        Halves::Reader half(halves);
        const int64_t *keys = p.keys + row * p.length;
        const int64_t key = p.query[row] = keys[place(half)];
        int64_t last = p.length - 1;
        while (keys[last] != key) --last;
        p.target[row] = p.values[row * p.length + last];
    }
    p.taken = halves.taken();
}

}  // namespace

extern "C" void fwp_pair_draws_draw_int64(Problem *p) { draw(*p); }

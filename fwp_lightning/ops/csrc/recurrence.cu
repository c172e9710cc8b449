// The sum and delta rules on a GPU, forward and backward, with a state in and out: one launch forward, two backward.
//
// The arithmetic is memory_columns.h with a float for a Num. A unit of sixteen threads has sixteen columns of one head's
// memory (forward, and backward for v and beta) or sixteen of its rows (backward for q and k), each in the registers of one
// thread; two units make a warp. What columns share goes through shared memory, a chunk of steps at a time: while a chunk
// is computed, the next one is on its way. Where a memory has more rows than a thread holds, several warps have a part
// each and add up what they read. Sums have one order, there are no atomics: results are the same every time. Nothing
// here allocates. Inputs are float32 or bfloat16, memories and sums float32. Rows, columns and steps that do not exist are
// zeros; where a memory overflows, NaN stands for infinity. ../README.md has the equations.

#include <type_traits>

#include "blocks.h"

namespace {

constexpr int UNIT = 16;
constexpr int UNITS = WARP / UNIT;
constexpr int STEPS = 2;
constexpr int MOST_ROWS = 64;  // of a memory in the registers of one thread
constexpr int MOST_KEYS = 8 * MOST_ROWS;

struct Problem {
    int64_t batch, steps, heads, keys, values;  // B, T, H, K, V
    int64_t device;                             // CUDA's number of the one that has the tensors
    const void *q, *k, *v, *beta;               // q null: write only; beta null: sum rule
    const float *state;                         // null: an empty memory

    FWP_EITHER int64_t sequences() const { return batch * heads; }
};

// Four numbers of shared memory at a time, read one by one.
struct Row {
    const float *first;
    struct alignas(16) Quad {
        float a, b, c, d;
    };
    FWP_EITHER float operator[](int i) const {
        const Quad x = reinterpret_cast<const Quad *>(first)[i / 4];
        return i % 4 == 0 ? x.a : i % 4 == 1 ? x.b : i % 4 == 2 ? x.c : x.d;
    }
};

FWP_EITHER constexpr int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// The row of step t of a sequence (a head of a batch's entry) in [B, T, H, ...].
FWP_EITHER int64_t row_of(const Problem &p, int64_t sequence, int64_t t) {
    return (sequence / p.heads * p.steps + t) * p.heads + sequence % p.heads;
}

// Sixteen numbers wide rows of one head's steps in a [B, T, H, size] tensor, read by the sixteen threads of a unit.
template <class In> struct Steps {
    const In *first;  // null: zeros
    int64_t stride, size;

    FWP_EITHER Steps(const void *tensor, const Problem &p, int64_t sequence, int64_t width)
        : first(static_cast<const In *>(tensor)), stride(p.heads * width), size(width) {
        if (first) first += row_of(p, sequence, 0) * width;
    }
    FWP_EITHER In at(int64_t t, int64_t i, bool there) const { return there && first && i < size ? first[t * stride + i] : In{}; }
};
// A chunk of rows on their way from global memory to shared memory, in the registers of a unit's threads.
template <class In, int CHUNK, int WIDTH> struct Freight {
    In held[CHUNK * WIDTH / UNIT];

    FWP_EITHER void fetch(const Steps<In> &from, int64_t begin, int64_t end, int64_t column, int c) {
        FWP_UNROLL
        for (int n = 0; n < CHUNK * WIDTH / UNIT; ++n) {
            const int64_t t = begin + n / (WIDTH / UNIT);
            held[n] = from.at(t, column + n % (WIDTH / UNIT) * UNIT + c, t < end);
        }
    }
    FWP_EITHER void put(float *rows, int c) const {
        FWP_UNROLL
        for (int n = 0; n < CHUNK * WIDTH / UNIT; ++n) rows[n * UNIT + c] = to_float(held[n]);
    }
};

// The work of a block: chunk after chunk, the next one fetched meanwhile. A pass is STEPS steps and has rounds; where warps
// have parts of a memory, what a round adds up goes through shared memory, twice the room, so that one barrier is enough.
template <class Thread, class Block> FWP_IN_BLOCK void run_in_parts(Block &block, int64_t chunk) {
    constexpr int ROUNDS = Thread::ROUNDS, PASSES = Thread::CHUNK / STEPS;
    block.phase([=](Thread &me) { me.fetch(chunk + 1); });
    FWP_LOOP
    for (int pass = 0; pass < PASSES; ++pass) {
        FWP_UNROLL
        for (int round = 0; round < ROUNDS; ++round)
            block.phase([=](Thread &me) {
                if (round > 0 || pass > 0) {
                    me.collect((pass * ROUNDS + round - 1) % 2);
                    me.finish(chunk, round > 0 ? pass : pass - 1, round > 0 ? round - 1 : ROUNDS - 1);
                }
                me.accumulate(chunk, pass, round);
                me.publish((pass * ROUNDS + round) % 2);
            });
    }
    block.phase([=](Thread &me) {
        me.collect((PASSES * ROUNDS - 1) % 2);
        me.finish(chunk, PASSES - 1, ROUNDS - 1);
        me.put(chunk + 1);
    });
}
template <class Thread, class Block> FWP_IN_BLOCK void run_alone(Block &block, int64_t chunk) {
    block.phase([=](Thread &me) {
        me.fetch(chunk + 1);
        FWP_LOOP
        for (int pass = 0; pass < Thread::CHUNK / STEPS; ++pass) {
            FWP_UNROLL
            for (int round = 0; round < Thread::ROUNDS; ++round) {
                me.accumulate(chunk, pass, round);
                me.finish(chunk, pass, round);
            }
        }
        me.put(chunk + 1);
    });
}
template <class Thread, class Block> FWP_IN_BLOCK void run_chunks(Block &block, int64_t chunks, int parts) {
    block.phase([](Thread &me) {
        me.begin();
        me.fetch(0);
        me.put(0);
    });
    FWP_LOOP
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        if (!Thread::ALONE || (Thread::MOST_PARTS > 1 && parts > 1))
            run_in_parts<Thread>(block, chunk);
        else
            run_alone<Thread>(block, chunk);
    }
    block.phase([](Thread &me) { me.end(); });
}

// Sums of all parts of a memory, in the order of the parts.
template <int SUMS> struct Exchange {
    float *room;  // [2][parts][SUMS][threads of a part]
    int parts, part, threads, thread;

    static size_t bytes(int parts, int threads) { return 2 * parts * SUMS * threads * sizeof(float); }
    FWP_EITHER float *of(int turn, int from, int i) const {
        return room + ((turn * parts + from) * SUMS + i) * threads + thread;
    }
    FWP_EITHER void publish(int turn, const float *sums) const {
        FWP_UNROLL
        for (int i = 0; i < SUMS; ++i) *of(turn, part, i) = sums[i];
    }
    FWP_EITHER void collect(int turn, float *sums) const {
        FWP_UNROLL
        for (int i = 0; i < SUMS; ++i) sums[i] = *of(turn, 0, i);
        for (int from = 1; from < parts; ++from) {
            FWP_UNROLL
            for (int i = 0; i < SUMS; ++i) sums[i] += *of(turn, from, i);
        }
    }
};

// As many steps as keep a chunk on its way in some forty registers of a thread.
constexpr int chunk_of(int rows) { return 256 / rows; }

struct ColumnsTask {
    Problem p;
    const void *grad_o;      // backward; null where q is
    const float *first;      // the memory, or its gradient, that time starts from; null: zero
    float *last;             // what time ends with
    void *out;               // forward o, backward grad_v
    float *between;          // delta rule: forward v - W^T k, backward what every write receives, G^T k
    int parts;
};

// One column of a memory W (forward), or of G = dL/dW (backward in time): up to ROWS rows of it in registers.
template <class In, int ROWS, bool DELTA, bool BACKWARD> struct Column {
    using Task = ColumnsTask;
    // larger memories come in several parts anyway, and one way of working is enough to compile
    static constexpr bool ALONE = ROWS < MOST_ROWS;
    static constexpr int MOST_PARTS = ROWS > 16 ? 8 : 1;
    static constexpr int MAX_THREADS = MOST_PARTS * WARP;
    static constexpr int CHUNK = chunk_of(ROWS);
    static constexpr int ROUNDS = DELTA && !BACKWARD ? 2 : 1;
    static constexpr int SUMS = 3;

    struct alignas(16) Stage {
        float key[CHUNK][ROWS], query[CHUNK][ROWS], value[CHUNK][UNIT], beta[CHUNK];
    };
    static size_t shared_bytes(int parts) {
        return parts * UNITS * 2 * sizeof(Stage) + (ALONE && parts == 1 ? 0 : Exchange<SUMS>::bytes(parts, WARP));
    }
    static int64_t blocks(const Problem &p) { return pieces(p.sequences() * pieces(p.values, UNIT), UNITS); }

    const Task &task;
    const int part, c;
    Stage *stages;
    Exchange<SUMS> exchange;
    int64_t sequence, column;
    bool active;
    Freight<In, CHUNK, ROWS> key_freight, query_freight;
    Freight<In, CHUNK, UNIT> value_freight;
    In beta_freight;
    float memory[ROWS], sums[SUMS], write[STEPS];

    FWP_EITHER Column(const Task &t, Place place, void *shared)
        : task(t), part(place.thread / WARP), c(place.thread % UNIT) {
        const int unit = place.thread % WARP / UNIT;
        Stage *all = static_cast<Stage *>(shared);
        stages = all + (part * UNITS + unit) * 2;
        exchange = {reinterpret_cast<float *>(all + t.parts * UNITS * 2), t.parts, part, WARP, place.thread % WARP};
        const int64_t tiles = pieces(t.p.values, UNIT), index = place.block * UNITS + unit;
        sequence = index / tiles;
        column = index % tiles * UNIT + c;
        active = sequence < t.p.sequences();
    }

    template <class Block> FWP_IN_BLOCK static void program(const Task &task, Block &block) {
        run_chunks<Column>(block, pieces(task.p.steps, CHUNK), task.parts);
    }

    FWP_EITHER int64_t begin_of(int64_t chunk) const {
        return (BACKWARD ? pieces(task.p.steps, CHUNK) - 1 - chunk : chunk) * CHUNK;
    }
    FWP_EITHER int step_of(int pass) const { return (BACKWARD ? CHUNK / STEPS - 1 - pass : pass) * STEPS; }
    FWP_EITHER bool has_column() const { return active && column < task.p.values; }
    FWP_EITHER bool has_cell(int i) const { return has_column() && part * ROWS + i < task.p.keys; }
    FWP_EITHER int64_t cell_of(int i) const {
        return (sequence * task.p.keys + part * ROWS + i) * task.p.values + column;
    }

    FWP_EITHER void begin() {
        FWP_UNROLL
        for (int i = 0; i < ROWS; ++i) memory[i] = task.first && has_cell(i) ? task.first[cell_of(i)] : 0.0f;
    }
    FWP_EITHER void end() const {
        FWP_UNROLL
        for (int i = 0; i < ROWS; ++i)
            if (has_cell(i)) task.last[cell_of(i)] = memory[i];
    }

    FWP_EITHER void fetch(int64_t chunk) {
        const Problem &p = task.p;
        const bool there = active && chunk < pieces(p.steps, CHUNK);
        const int64_t begin = there ? begin_of(chunk) : 0, end = there ? p.steps : 0;
        key_freight.fetch(Steps<In>(p.k, p, sequence, p.keys), begin, end, part * ROWS, c);
        query_freight.fetch(Steps<In>(p.q, p, sequence, p.keys), begin, end, part * ROWS, c);
        value_freight.fetch(Steps<In>(BACKWARD ? task.grad_o : p.v, p, sequence, p.values), begin, end, column - c, c);
        if (DELTA) beta_freight = Steps<In>(p.beta, p, sequence, 1).at(begin + c, 0, c < CHUNK && begin + c < end);
    }
    FWP_EITHER void put(int64_t chunk) {
        Stage &stage = stages[chunk % 2];
        key_freight.put(stage.key[0], c);
        query_freight.put(stage.query[0], c);
        value_freight.put(stage.value[0], c);
        if (DELTA && c < CHUNK) stage.beta[c] = to_float(beta_freight);
    }

    // the sums of both halves of the rows, which do not wait for each other
    template <class F> FWP_EITHER void in_halves(float *sum, F f) {
        float second[STEPS] = {};
        f(0, sum);
        f(ROWS / 2, second);
        FWP_UNROLL
        for (int s = 0; s < STEPS; ++s) sum[s] += second[s];
    }

    FWP_EITHER void accumulate(int64_t chunk, int pass, int round) {
        const Stage &stage = stages[chunk % 2];
        const int s = step_of(pass);
        FWP_UNROLL
        for (int i = 0; i < SUMS; ++i) sums[i] = 0;
        const float value[STEPS] = {stage.value[s][c], stage.value[s + 1][c]};
        in_halves(sums, [&](int i, float *sum) {
            const Row key[STEPS] = {{stage.key[s] + i}, {stage.key[s + 1] + i}};
            const Row query[STEPS] = {{stage.query[s] + i}, {stage.query[s + 1] + i}};
            const Fixed<ROWS / 2> half{};
            if (BACKWARD)
                receive_values<0, STEPS, true>(memory + i, half, key, value, key, query, value, sum);
            else if (DELTA && round == 0)
                write_and_read<0, STEPS, false>(memory + i, half, key, query, key, value, sum, sum);
            else
                write_and_read<STEPS, 0, true>(memory + i, half, key, query, key, DELTA ? write : value, sum, sum);
        });
        if (DELTA && round == 0) {
            if (ROWS > 32) FWP_FORGET();
            const Row early{stage.key[s]}, late{stage.key[s + 1]};
            FWP_UNROLL
            for (int i = 0; i < ROWS; ++i) sums[2] += early[i] * late[i];
        }
    }
    FWP_EITHER void publish(int turn) const { exchange.publish(turn, sums); }
    FWP_EITHER void collect(int turn) { exchange.collect(turn, sums); }

    FWP_EITHER void finish(int64_t chunk, int pass, int round) {
        const int s = step_of(pass);
        const int64_t t = begin_of(chunk) + s;
        const Stage &stage = stages[chunk % 2];
        if (!(DELTA && round == 0)) return store(static_cast<In *>(task.out), t, sums);
        const float beta[STEPS] = {stage.beta[s], stage.beta[s + 1]};
        const float overlap[STEPS][STEPS] = {{0, 0}, {sums[2], 0}};
        if (BACKWARD) {
            removed_values<STEPS>(beta, overlap, sums, write);
            store(task.between, t, sums);
            store(static_cast<In *>(task.out), t, write);
            if (ROWS > 32) FWP_FORGET();
            const Row key[STEPS] = {{stage.key[s]}, {stage.key[s + 1]}};
            receive_values<STEPS, 0, false>(memory, Fixed<ROWS>{}, key, write, key, key, write, sums);
        } else {
            const float value[STEPS] = {stage.value[s][c], stage.value[s + 1][c]};
            float error[STEPS];
            corrected_values<STEPS>(value, sums, beta, overlap, error, write);
            store(task.between, t, error);
            if (ROWS > 32) FWP_FORGET();
        }
    }
    template <class Out> FWP_EITHER void store(Out *to, int64_t t, const float *numbers) const {
        if (part > 0 || !has_column() || !to) return;
        FWP_UNROLL
        for (int s = 0; s < STEPS; ++s)
            if (t + s < task.p.steps) *cell(to, t + s) = from_float<Out>(numbers[s]);
    }
    template <class Out> FWP_EITHER Out *cell(Out *to, int64_t t) const {
        return to + row_of(task.p, sequence, t) * task.p.values + column;
    }
};

struct RowsTask {
    Problem p;
    const void *grad_o;        // null where q is
    const float *errors;       // delta rule: v - W^T k
    const float *received;     // delta rule: G^T k
    const float *grad_last;
    void *grad_q, *grad_k, *grad_beta;
    float *partial;            // delta rule, [B, T, H, K]: half of grad_k until the other half is known; may be grad_k
    int64_t chunks;
    int parts;
};

// One row of W, forward in time, or of G = dL/dW, backward in time: up to COLUMNS columns of it in registers. Two warps do
// both at once and meet in the middle: the gradient of a key is the sum of what each has for it, and the one that comes first
// leaves it for the other.
template <class In, int COLUMNS, bool DELTA> struct MemoryRow {
    using Task = RowsTask;
    using Written = std::conditional_t<DELTA, float, In>;
    static constexpr bool ALONE = COLUMNS < MOST_ROWS;
    static constexpr int MOST_PARTS = ALONE ? 1 : 4;
    static constexpr int MAX_THREADS = MOST_PARTS * 2 * WARP;
    static constexpr int CHUNK = chunk_of(COLUMNS) / 2;
    static constexpr int ROUNDS = 1;
    static constexpr int SUMS = 2 * STEPS;

    struct alignas(16) Stage {
        float written[CHUNK][COLUMNS], received[CHUNK][COLUMNS], grad[CHUNK][COLUMNS];
        float key[CHUNK][UNIT], query[CHUNK][UNIT], beta[CHUNK];
    };
    static size_t shared_bytes(int parts) {
        return parts * 2 * UNITS * 2 * sizeof(Stage) + (ALONE ? 0 : Exchange<SUMS>::bytes(parts, 2 * WARP));
    }
    static int64_t blocks(const Problem &p) { return pieces(p.sequences() * pieces(p.keys, UNIT), UNITS); }

    const Task &task;
    const int part, c;
    const bool rewinds;
    Stage *stages;
    Exchange<SUMS> exchange;
    int64_t sequence, row;
    bool active, first_tile;
    Freight<Written, CHUNK, COLUMNS> written_freight;
    Freight<float, CHUNK, COLUMNS> received_freight;
    Freight<In, CHUNK, COLUMNS> grad_freight;
    Freight<In, CHUNK, UNIT> key_freight, query_freight;
    In beta_freight;
    float memory[COLUMNS], sums[SUMS];  // for the key of each step, then for its query or its beta

    FWP_EITHER MemoryRow(const Task &t, Place place, void *shared)
        : task(t), part(place.thread / (2 * WARP)), c(place.thread % UNIT), rewinds(place.thread % (2 * WARP) < WARP) {
        const int unit = place.thread % WARP / UNIT;
        Stage *all = static_cast<Stage *>(shared);
        stages = all + place.thread / UNIT * 2;
        exchange = {reinterpret_cast<float *>(all + t.parts * 2 * UNITS * 2), t.parts, part, 2 * WARP,
                    place.thread % (2 * WARP)};
        const int64_t tiles = pieces(t.p.keys, UNIT), index = place.block * UNITS + unit;
        sequence = index / tiles;
        row = index % tiles * UNIT + c;
        first_tile = index % tiles == 0;
        active = sequence < t.p.sequences();
    }

    // with an odd number of chunks one warp waits a turn: both are never at the same chunk
    template <class Block> FWP_IN_BLOCK static void program(const Task &task, Block &block) {
        run_chunks<MemoryRow>(block, task.chunks + task.chunks % 2, task.parts);
    }
    FWP_EITHER int64_t chunk_at(int64_t turn) const { return rewinds ? task.chunks - 1 - turn : turn - task.chunks % 2; }
    FWP_EITHER bool has_chunk(int64_t turn) const { return active && chunk_at(turn) >= 0 && chunk_at(turn) < task.chunks; }
    FWP_EITHER bool comes_first(int64_t turn) const { return 2 * turn < task.chunks + task.chunks % 2; }

    FWP_EITHER void begin() {
        const float *from = rewinds ? task.grad_last : task.p.state;
        const bool there = from && active && row < task.p.keys;
        FWP_UNROLL
        for (int j = 0; j < COLUMNS; ++j) {
            const int64_t column = part * COLUMNS + j;
            memory[j] = there && column < task.p.values ? from[(sequence * task.p.keys + row) * task.p.values + column] : 0.0f;
        }
    }
    FWP_EITHER void end() const {}

    FWP_EITHER void fetch(int64_t turn) {
        const Problem &p = task.p;
        const bool there = has_chunk(turn);
        const int64_t begin = there ? chunk_at(turn) * CHUNK : 0, end = there ? p.steps : 0;
        const void *written = DELTA ? static_cast<const void *>(task.errors) : p.v;
        written_freight.fetch(Steps<Written>(written, p, sequence, p.values), begin, end, part * COLUMNS, c);
        if (DELTA) received_freight.fetch(Steps<float>(task.received, p, sequence, p.values), begin, end, part * COLUMNS, c);
        grad_freight.fetch(Steps<In>(task.grad_o, p, sequence, p.values), begin, end, part * COLUMNS, c);
        key_freight.fetch(Steps<In>(p.k, p, sequence, p.keys), begin, end, row - c, c);
        query_freight.fetch(Steps<In>(p.q, p, sequence, p.keys), begin, end, row - c, c);
        if (DELTA) beta_freight = Steps<In>(p.beta, p, sequence, 1).at(begin + c, 0, c < CHUNK && begin + c < end);
    }
    FWP_EITHER void put(int64_t turn) {
        Stage &stage = stages[turn % 2];
        written_freight.put(stage.written[0], c);
        if (DELTA) received_freight.put(stage.received[0], c);
        grad_freight.put(stage.grad[0], c);
        key_freight.put(stage.key[0], c);
        query_freight.put(stage.query[0], c);
        if (c < CHUNK) stage.beta[c] = DELTA ? to_float(beta_freight) : 1.0f;
    }

    FWP_EITHER int step_of(int pass) const { return (rewinds ? CHUNK / STEPS - 1 - pass : pass) * STEPS; }

    FWP_EITHER void accumulate(int64_t turn, int pass, int) {
        const Stage &stage = stages[turn % 2];
        const int s = step_of(pass);
        const Row written[STEPS] = {{stage.written[s]}, {stage.written[s + 1]}};
        const Row received[STEPS] = {{stage.received[s]}, {stage.received[s + 1]}};
        const Row grad[STEPS] = {{stage.grad[s]}, {stage.grad[s + 1]}};
        // what a write puts in and what it removes both have beta as a factor
        const float query[STEPS] = {stage.query[s][c], stage.query[s + 1][c]};
        const float key[STEPS] = {stage.beta[s] * stage.key[s][c], stage.beta[s + 1] * stage.key[s + 1][c]};
        FWP_UNROLL
        for (int i = 0; i < SUMS; ++i) sums[i] = 0;
        if (!has_chunk(turn)) return;
        const Fixed<COLUMNS> all{};
        if (!rewinds) return read_keys<STEPS, DELTA, true>(memory, all, written, received, grad, key, sums, sums + STEPS);
        receive_keys<STEPS, DELTA, true>(memory, all, written, received, grad, key, query, sums);
        // error . received of one of the pass's steps, which is the gradient of its beta
        if (DELTA && first_tile && c < STEPS) {
            const Row error{stage.written[s + c]}, of_step{stage.received[s + c]};
            FWP_UNROLL
            for (int j = 0; j < COLUMNS; ++j) sums[STEPS] += error[j] * of_step[j];
        }
    }
    FWP_EITHER void publish(int turn) const { exchange.publish(turn, sums); }
    FWP_EITHER void collect(int turn) { exchange.collect(turn, sums); }

    FWP_EITHER void finish(int64_t turn, int pass, int) {
        if (part > 0 || !has_chunk(turn)) return;
        const Stage &stage = stages[turn % 2];
        const int s = step_of(pass);
        const int64_t begin = chunk_at(turn) * CHUNK + s;
        FWP_UNROLL
        for (int i = 0; i < STEPS; ++i) {
            const int64_t t = begin + i;
            if (row >= task.p.keys || t >= task.p.steps) continue;
            const int64_t at = row_of(task.p, sequence, t) * task.p.keys + row;
            if (DELTA)
                add_to_key(turn, at, (rewinds ? stage.beta[s + i] : -stage.beta[s + i]) * sums[i]);
            else if (rewinds)
                static_cast<In *>(task.grad_k)[at] = from_float<In>(sums[i]);
            if (!rewinds && task.grad_q) static_cast<In *>(task.grad_q)[at] = from_float<In>(sums[STEPS + i]);
        }
        if (DELTA && rewinds && first_tile && c < STEPS && begin + c < task.p.steps)
            static_cast<In *>(task.grad_beta)[row_of(task.p, sequence, begin + c)] = from_float<In>(sums[STEPS]);
    }
    FWP_EITHER void add_to_key(int64_t turn, int64_t at, float half) const {
        if (comes_first(turn))
            task.partial[at] = half;
        else
            static_cast<In *>(task.grad_k)[at] = from_float<In>(task.partial[at] + half);
    }
};

// f(Fixed<n>) for the rows of a memory that a thread has: few, so that parts are many, up to 8 x 32; then 8 x 64
template <class F> int with_rows(int64_t size, F f) {
    if (size <= 16) return f(Fixed<16>{});
    if (size <= MOST_KEYS / 2) return f(Fixed<32>{});
    return f(Fixed<MOST_ROWS>{});
}
template <class F> int with_columns(int64_t size, F f) {
    if (size <= 16) return f(Fixed<16>{});
    if (size <= 32) return f(Fixed<32>{});
    return f(Fixed<MOST_ROWS>{});
}

template <class In, bool DELTA, bool BACKWARD> int columns(ColumnsTask task, void *stream) {
    return with_rows(task.p.keys, [&](auto rows) {
        using Thread = Column<In, int(decltype(rows){}), DELTA, BACKWARD>;
        task.parts = int(pieces(task.p.keys, int(decltype(rows){})));
        return launch<Thread>(task, Thread::blocks(task.p), task.parts * WARP, Thread::shared_bytes(task.parts), stream);
    });
}
template <class In, bool DELTA> int rows(RowsTask task, void *stream) {
    return with_columns(task.p.values, [&](auto columns) {
        using Thread = MemoryRow<In, int(decltype(columns){}), DELTA>;
        task.parts = int(pieces(task.p.values, int(decltype(columns){})));
        task.chunks = pieces(task.p.steps, Thread::CHUNK);
        return launch<Thread>(task, Thread::blocks(task.p), task.parts * 2 * WARP, Thread::shared_bytes(task.parts), stream);
    });
}

template <class In> int forward(const Problem &p, void *o, float *errors, float *last, void *stream) {
    const int problem = use_device(p.device);
    if (problem) return problem;
    const ColumnsTask task{p, nullptr, p.state, last, p.q ? o : nullptr, errors, 1};
    return p.beta ? columns<In, true, false>(task, stream) : columns<In, false, false>(task, stream);
}
template <class In>
int backward(const Problem &p, const float *errors, const void *grad_o, const float *grad_last, float *received,
             float *partial, void *grad_q, void *grad_k, void *grad_v, void *grad_beta, float *grad_state, void *stream) {
    int problem = use_device(p.device);
    if (problem) return problem;
    if (!p.q) grad_o = grad_q = nullptr;
    const ColumnsTask values{p, grad_o, grad_last, grad_state, grad_v, received, 1};
    const RowsTask keys{p, grad_o, errors, received, grad_last, grad_q, grad_k, grad_beta, partial, 0, 1};
    problem = p.beta ? columns<In, true, true>(values, stream) : columns<In, false, true>(values, stream);
    if (problem) return problem;
    return p.beta ? rows<In, true>(keys, stream) : rows<In, false>(keys, stream);
}

}  // namespace

// Both return CUDA's error code, 0 if there is none; `fwp_recurrence_words` says it in words. `p` is a Problem: nvcc would not
// let out a function that has a type of this file alone.
#define FWP_RECURRENCE(IN, SUFFIX)                                                                                      \
    extern "C" int fwp_recurrence_forward_##SUFFIX(const void *p, void *o, float *errors, float *last, void *stream) {  \
        return forward<IN>(*static_cast<const Problem *>(p), o, errors, last, stream);                                  \
    }                                                                                                                   \
    extern "C" int fwp_recurrence_backward_##SUFFIX(                                                                    \
        const void *p, const float *errors, const void *grad_o, const float *grad_last, float *received,                \
        float *partial, void *grad_q, void *grad_k, void *grad_v, void *grad_beta, float *grad_state, void *stream) {   \
        return backward<IN>(*static_cast<const Problem *>(p), errors, grad_o, grad_last, received, partial, grad_q,     \
                            grad_k, grad_v, grad_beta, grad_state, stream);                                             \
    }

FWP_RECURRENCE(float, float32)
FWP_RECURRENCE(bfloat16, bfloat16)

extern "C" int fwp_recurrence_probe() { return probe(); }
extern "C" const char *fwp_recurrence_words(int code) { return words_of(code); }

// Paged attention over a page-relative rotary cache, on the CPU.
//
// One call serves one layer of one step: store the rows' keys and values, then attend. A row's
// output is a function of its position and of the cached bytes alone: pages in table order, the
// query rotated by its distance to the page's base, block_size scores, one update of an online
// softmax (Milakov & Gimelshein 2018), one weighted sum of values. How rows, heads and threads are
// grouped only decides which bytes are loaded together: the operations on one row, and their order,
// never change. Hence no -ffast-math and no contraction by the compiler: a fused multiply-add is
// written as `madd`, or it does not happen.
//
// This file is compiled once for each instruction set, into one library, as
// ropeway_attention_<VARIANT>; the caller asks ropeway_supports_attention_<VARIANT> and chooses.

#include "../cpu_memory.h"
#include "../cpu_vector.h"

// The three structures that Python fills, field by field as in cpu.py.

struct RopewayProfile {       // a rotation in force; zeros where there is none
    const float *query_cos;   // [num_positions, rotary_dim / 2], by distance to a page
    const float *query_sin;
    const float *key_cos;     // [block_size, rotary_dim / 2], by offset in a page
    const float *key_sin;
    int32_t num_positions;
};

struct RopewayLayer {  // fixed for the life of the cache, but for what profiles hold
    void *keys;        // [num_blocks, num_heads, head_dim, block_size]
    void *values;      // [num_blocks, num_heads, block_size, head_dim]
    const RopewayProfile *profiles;  // [num_profiles]
    int32_t num_blocks, num_heads, head_dim, rotary_dim, block_size, num_profiles;
    int32_t is_bfloat16;  // element type of keys, values, qkv and out; else float32
    float scale;          // log2(e) / sqrt(head_dim): weights are powers of two
};

struct RopewayStep {  // AttentionMetadata
    const int32_t *query_start, *positions;
    const int64_t *slot_mapping;
    const int32_t *block_tables, *bases, *counts, *profiles;
    int32_t num_rows, num_seqs, max_blocks, num_threads;
};

namespace {

constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_BLOCK = 64;
constexpr int TILE_ROWS = REGISTERS == 32 && LANES == 16 ? 6 : 4;  // that share each load
constexpr int SLAB_ROWS = 64;  // rows that share each visit to a page
constexpr int ROWS_AHEAD = 4;  // rows of qkv are far apart: ask for them early
constexpr float MINUS_INFINITY = -__builtin_inff();

// ---- One page of one head, a tile of rows ------------------------------------------------------

template <class T>
struct Page {
    const T *keys;    // [dim, block]
    const T *values;  // [block, dim]
    int dim, block;
};

// What the rows of one head carry from page to page.
struct Rows {
    float *query;  // [rows, dim], times layer.scale
    float *out;    // [rows, dim], not yet divided by the sum of weights
    float *best;   // [rows], the largest score so far
    Vec *sum;      // [rows], the sum of weights so far, lane by lane

    Rows from(int row, int dim) const {
        return {query + row * dim, out + row * dim, best + row, sum + row};
    }
};

typedef float Queries[MAX_HEAD_DIM];
typedef float Weights[MAX_BLOCK];

// Rotate by the angle whose cosines and sines are given; pairs are (i, i + half).
inline void rotate(float *to, const float *x, const float *cos, const float *sin, int half,
                   int dim) {
    for (int i = 0; i < half; ++i) {
        to[i] = x[i] * cos[i] - x[half + i] * sin[i];
        to[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
    }
    for (int i = 2 * half; i < dim; ++i) to[i] = x[i];
}

// scores[row][slot] = query[row] . key[slot], dimension after dimension, for COLS vectors of slots.
// A single row waits for memory, so it asks for the values meanwhile.
template <int ROWS, int COLS, class T>
inline void score_slots(Page<T> page, const Queries *query, Weights *scores, int slot) {
    Vec sum[ROWS][COLS] = {};
    for (int d = 0; d < page.dim; ++d) {
        const T *const keys = page.keys + d * page.block + slot;
        Vec key[COLS];
        for (int c = 0; c < COLS; ++c) load(keys + c * LANES, key[c]);
        if (ROWS == 1) fetch(page.values + d * page.block + slot, COLS * LANES);
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLS; ++c) sum[r][c] = madd(key[c], all(query[r][d]), sum[r][c]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLS; ++c) store(scores[r] + slot + c * LANES, sum[r][c]);
}

// As wide as the registers allow, then narrower: slots that no row sees are not loaded.
template <int ROWS, int COLS, class T>
inline void score(Page<T> page, const Queries *query, Weights *scores, int slot, int end) {
    for (; slot + COLS * LANES <= end; slot += COLS * LANES)
        score_slots<ROWS, COLS>(page, query, scores, slot);
    if constexpr (COLS > 1) score<ROWS, COLS / 2>(page, query, scores, slot, end);
}

// Turn scores into weights in place; decay[row] is what the row's earlier sums are multiplied by.
// The first row sees `visible` slots, each next row one more, up to `slots`; the rest of the scores
// up to `end` are masked.
template <int ROWS>
inline void weigh(Weights *scores, int visible, int slots, int end, Rows rows, float *decay) {
    static_assert(ROWS <= LANES);
    Vec x, fall = {};
    for (int r = 0; r < ROWS; ++r) {
        for (int s = smaller(slots, visible + r); s < end; ++s) scores[r][s] = MINUS_INFINITY;
        Vec top = all(rows.best[r]);
        for (int s = 0; s < end; s += LANES) {
            load(scores[r] + s, x);
            top = x > top ? x : top;
        }
        const float highest = largest(top);
        fall[r] = rows.best[r] - highest;
        rows.best[r] = highest;
    }
    fall = power_of_two(fall);
    for (int r = 0; r < ROWS; ++r) {
        decay[r] = fall[r];
        Vec sum = rows.sum[r] * decay[r];
        for (int s = 0; s < end; s += LANES) {
            load(scores[r] + s, x);
            x = power_of_two(x - rows.best[r]);
            sum += x;
            store(scores[r] + s, x);
        }
        rows.sum[r] = sum;
    }
}

// out[row] = out[row] * decay[row] + sum over slots of weight[row][slot] * value[slot], slot after
// slot, for COLS vectors of dimensions. V is Vec, or float for what is left of an odd head_dim.
// A single row asks for the next head's keys meanwhile; there is no harm in asking past the last.
template <class V, int ROWS, int COLS, class T>
inline void sum_dims(Page<T> page, int slots, const Weights *weights, const float *decay,
                     float *out, int d) {
    constexpr int WIDTH = sizeof(V) / sizeof(float);
    const int dim = page.dim;
    V sum[ROWS][COLS];
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLS; ++c) {
            load(out + r * dim + d + c * WIDTH, sum[r][c]);
            sum[r][c] *= decay[r];
        }
    for (int s = 0; s < slots; ++s) {
        const T *const values = page.values + s * dim + d;
        V value[COLS];
        for (int c = 0; c < COLS; ++c) load(values + c * WIDTH, value[c]);
        if (ROWS == 1) fetch(page.keys + (page.block + s) * dim + d, COLS * WIDTH);
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLS; ++c)
                sum[r][c] = madd(value[c], weights[r][s] - V{}, sum[r][c]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLS; ++c) store(out + r * dim + d + c * WIDTH, sum[r][c]);
}

template <int ROWS, int COLS, class T>
inline void sum_values(Page<T> page, int slots, const Weights *weights, const float *decay,
                       float *out, int d) {
    for (; d + COLS * LANES <= page.dim; d += COLS * LANES)
        sum_dims<Vec, ROWS, COLS>(page, slots, weights, decay, out, d);
    if constexpr (COLS > 1)
        sum_values<ROWS, COLS / 2>(page, slots, weights, decay, out, d);
    else
        for (; d < page.dim; ++d) sum_dims<float, ROWS, 1>(page, slots, weights, decay, out, d);
}

struct Turns {  // of queries, by distance
    const float *cos, *sin;
    int half;
};

// ROWS consecutive positions, the first of them `distance` after the page's base, see one page.
template <int ROWS, class T>
inline void attend_tile(Turns turns, Page<T> page, int distance, Rows rows) {
    constexpr int COLS = smaller(MAX_BLOCK / LANES, (REGISTERS - 8) / ROWS);  // 8 are not sums
    const int half = turns.half;
    alignas(64) Queries query[ROWS];
    alignas(64) Weights weights[ROWS];
    float decay[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const float *const cos = turns.cos + int64_t(distance + r) * half;
        const float *const sin = turns.sin + int64_t(distance + r) * half;
        rotate(query[r], rows.query + r * page.dim, cos, sin, half, page.dim);
    }
    const int slots = smaller(page.block, distance + ROWS);  // that the last row sees
    const int end = (slots + LANES - 1) / LANES * LANES;
    score<ROWS, COLS>(page, query, weights, 0, end);
    weigh<ROWS>(weights, distance + 1, slots, end, rows, decay);
    sum_values<ROWS, COLS>(page, slots, weights, decay, rows.out, 0);
}

// Rows r and on of one head, in tiles of ROWS, then of half as many; row 0 is `distance` after the
// page's base.
template <int ROWS, class T>
void attend_rows(Turns turns, Page<T> page, int distance, int r, int rows, Rows head) {
    for (; r + ROWS <= rows; r += ROWS)
        attend_tile<ROWS>(turns, page, distance + r, head.from(r, page.dim));
    if constexpr (ROWS > 1) attend_rows<ROWS / 2>(turns, page, distance, r, rows, head);
}

template <class T>
void attend_page(Turns turns, Page<T> page, int distance, int rows, Rows head) {
    const int first = larger(0, -distance);  // the rows before it stand before the page
    attend_rows<TILE_ROWS>(turns, page, distance, first, rows, head);
}

// ---- One item of work: some rows of a sequence, some heads --------------------------------------

struct Item {
    int seq, row, rows, head, heads;
};

template <class T>
void store_item(const RopewayLayer &layer, const RopewayStep &step, const Item &item,
                const T *qkv) {
    const int dim = layer.head_dim, half = layer.rotary_dim / 2, block = layer.block_size;
    const int64_t hidden = int64_t(layer.num_heads) * dim;
    const RopewayProfile &profile = layer.profiles[step.profiles[item.seq]];
    float key[MAX_HEAD_DIM], turned[MAX_HEAD_DIM];
    for (int head = item.head; head < item.head + item.heads; ++head)
        for (int row = item.row; row < item.row + item.rows; ++row) {
            const int64_t id = step.slot_mapping[row] / block;
            const int offset = int(step.slot_mapping[row] - id * block);
            const int64_t page = (id * layer.num_heads + head) * dim * block;
            T *const keys = (T *)layer.keys + page + offset;
            T *const values = (T *)layer.values + page + offset * dim;
            const T *const from = qkv + row * 3 * hidden + hidden + head * dim;
            fetch(from + ROWS_AHEAD * 3 * hidden, dim);
            fetch(from + ROWS_AHEAD * 3 * hidden + hidden, dim);
            widen(key, from, dim);
            rotate(turned, key, profile.key_cos + offset * half, profile.key_sin + offset * half,
                   half, dim);
            for (int d = 0; d < dim; ++d) store(keys + d * block, turned[d]);
            __builtin_memcpy(values, from + hidden, dim * sizeof(T));
        }
}

// Page after page, and through all heads of a page before the next: one stream of loads.
template <class T>
void attend_item(const RopewayLayer &layer, const RopewayStep &step, const Item &item, const T *qkv,
                 T *out, float *scratch) {
    const int dim = layer.head_dim, block = layer.block_size, rows = item.rows;
    const int64_t hidden = int64_t(layer.num_heads) * dim, all_rows = int64_t(item.heads) * rows;
    float *const wide = scratch + all_rows * LANES;
    float *const query = wide + 2 * dim * block, *const sums = query + all_rows * dim;
    const Rows state = {query, sums, sums + all_rows * dim, (Vec *)scratch};
    for (int h = 0; h < item.heads; ++h)
        for (int r = 0; r < rows; ++r) {
            const Rows row = state.from(h * rows + r, dim);
            const T *const from = qkv + (item.row + r) * 3 * hidden + (item.head + h) * dim;
            fetch(from + ROWS_AHEAD * 3 * hidden, dim);
            widen(row.query, from, dim);
            for (int d = 0; d < dim; ++d) row.query[d] *= layer.scale;
            for (int d = 0; d < dim; ++d) row.out[d] = 0;
            *row.best = MINUS_INFINITY;
            *row.sum = Vec{};
        }

    const RopewayProfile &profile = layer.profiles[step.profiles[item.seq]];
    const Turns turns = {profile.query_cos, profile.query_sin, layer.rotary_dim / 2};
    const int64_t table = int64_t(item.seq) * step.max_blocks;
    for (int64_t j = table; j < table + step.counts[item.seq]; ++j) {
        const int distance = step.positions[item.row] - step.bases[j];
        for (int h = 0; h < item.heads; ++h) {
            const int64_t at = int64_t(step.block_tables[j]) * layer.num_heads + item.head + h;
            const T *const keys = (const T *)layer.keys + at * dim * block;
            const T *const values = (const T *)layer.values + at * dim * block;
            const Rows head = state.from(h * rows, dim);
            if (sizeof(T) < sizeof(float) && rows - larger(0, -distance) >= 2 * TILE_ROWS) {
                // Several tiles: widen the page once for all of them. The bits are the same.
                widen(wide, keys, dim * block);
                widen(wide + dim * block, values, dim * block);
                const Page<float> page = {wide, wide + dim * block, dim, block};
                attend_page(turns, page, distance, rows, head);
            } else {
                attend_page(turns, Page<T>{keys, values, dim, block}, distance, rows, head);
            }
        }
    }

    for (int h = 0; h < item.heads; ++h)
        for (int r = 0; r < rows; ++r) {
            const Rows row = state.from(h * rows + r, dim);
            const float sum = total(*row.sum);
            T *const to = out + (item.row + r) * hidden + (item.head + h) * dim;
            for (int d = 0; d < dim; ++d) store(to + d, row.out[d] / sum);
        }
}

// ---- A step ------------------------------------------------------------------------------------

// Whether every address that the step asks for lies inside the cache and the tables.
bool inside(const RopewayLayer &layer, const RopewayStep &step) {
    const int64_t slots = int64_t(layer.num_blocks) * layer.block_size;
    const int32_t *const starts = step.query_start;
    if (starts[0] != 0 || starts[step.num_seqs] != step.num_rows) return false;
    for (int seq = 0; seq < step.num_seqs; ++seq) {
        const int start = starts[seq], end = starts[seq + 1], count = step.counts[seq];
        if (start > end || end > step.num_rows) return false;
        if (count < 0 || count > step.max_blocks) return false;
        if (step.profiles[seq] < 0 || step.profiles[seq] >= layer.num_profiles) return false;
        const int positions = layer.profiles[step.profiles[seq]].num_positions;
        if (!positions) return false;
        for (int row = start; row < end; ++row) {
            if (step.slot_mapping[row] < 0 || step.slot_mapping[row] >= slots) return false;
            if (step.positions[row] != step.positions[start] + row - start) return false;
        }
        const int64_t table = int64_t(seq) * step.max_blocks;
        for (int64_t j = table; j < table + count && start < end; ++j) {
            if (step.block_tables[j] < 0 || step.block_tables[j] >= layer.num_blocks) return false;
            const int64_t distance = int64_t(step.positions[end - 1]) - step.bases[j];
            if (distance < -positions || distance >= positions) return false;
        }
    }
    return true;
}

// Cut the step into items; returns how many. Long chunks go a head at a time, so that a head's page
// and rows stay in the nearest cache; a few rows go through all heads of a page, or through as many
// as leave every thread two shares: where the system holds one thread up, another takes its second.
int64_t divide(const RopewayLayer &layer, const RopewayStep &step, Item *items) {
    int64_t count = 0;
    const int share = (layer.num_heads + 2 * step.num_threads - 1) / (2 * step.num_threads);
    const int few = step.num_seqs < 4 * step.num_threads ? share : layer.num_heads;
    for (int seq = 0; seq < step.num_seqs; ++seq)
        for (int row = step.query_start[seq]; row < step.query_start[seq + 1]; row += SLAB_ROWS) {
            const int rows = smaller(SLAB_ROWS, step.query_start[seq + 1] - row);
            const int heads = rows >= 4 * TILE_ROWS ? 1 : few;
            for (int head = 0; head < layer.num_heads; head += heads)
                items[count++] = {seq, row, rows, head, smaller(heads, layer.num_heads - head)};
        }
    return count;
}

template <class T>
int run(const RopewayLayer &layer, const RopewayStep &step, const T *qkv, T *out) {
    const int64_t slabs = step.num_seqs + step.num_rows / SLAB_ROWS;
    const Memory list(slabs * layer.num_heads * sizeof(Item));
    Item *const items = (Item *)list.at;
    if (!items) return 2;
    const int64_t count = divide(layer, step, items);
    int most = 0;  // rows x heads of the largest item
    for (int64_t i = 0; i < count; ++i) most = larger(most, items[i].rows * items[i].heads);
    int64_t floats = int64_t(most) * (LANES + 2 * layer.head_dim + 1);
    floats = (floats + 2 * layer.head_dim * layer.block_size + 15) / 16 * 16;
    const Memory scratch(floats * step.num_threads * sizeof(float));
    if (!scratch.at) return 2;

#pragma omp parallel num_threads(step.num_threads)
    {
        float *const mine = (float *)scratch.at + floats * omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) store_item(layer, step, items[i], qkv);
        // The barrier here is the contract: everything is stored before anyone attends.
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count; ++i) attend_item(layer, step, items[i], qkv, out, mine);
    }
    return 0;
}

}  // namespace

// Whether this machine has the instructions of this variant.
extern "C" int NAMED(ropeway_supports_attention_, VARIANT)() { return supports_vectors(); }

// qkv [num_rows, 3, num_heads, head_dim] -> out [num_rows, num_heads, head_dim]. Returns 0; 1 when
// the step points outside the cache or the tables; 2 when memory is short.
extern "C" int NAMED(ropeway_attention_, VARIANT)(const RopewayLayer *layer,
                                                  const RopewayStep *step, const void *qkv,
                                                  void *out) {
    if (!inside(*layer, *step)) return 1;
    if (layer->is_bfloat16) return run(*layer, *step, (const BFloat16 *)qkv, (BFloat16 *)out);
    return run(*layer, *step, (const float *)qkv, (float *)out);
}

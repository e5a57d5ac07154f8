// From a row of logits to a token, on the CPU: temperature, filters, and the inverse of the
// cumulative distribution. A row's token is a function of that row and its own parameters.
//
// Nothing is sorted. Tokens are ordered by how far below the highest logit they stand; for numbers
// that are not negative the order is that of their bits, so a filter finds its threshold by
// counting, or weighing, the tokens by the bits of their distance: first by the upper ones, then by
// the next within the bucket that the threshold lies in, then by the last.
//
// This file is compiled once for each instruction set, into one library, as
// ropeway_draw_<VARIANT>; the caller asks ropeway_supports_draw_<VARIANT> and chooses.

#include "../model/cpu_memory.h"
#include "../model/cpu_vector.h"

// A row to draw from, field by field as in cpu_draw.py.
struct RopewayDraw {
    double uniform;  // in [0, 1)
    double top_p;    // 1: all tokens
    float temperature, min_p;
    int32_t row;
    int32_t top_k;  // 0: all tokens
};

namespace {

constexpr int BLOCK = 256;                          // tokens that are summed together
constexpr int SHIFTS[] = {19, 9, 0};                // of the bits of a distance, by level
constexpr int SIZES[] = {1 << 12, 1 << 10, 1 << 9};  // buckets of a level; the sign is zero
constexpr uint32_t FARTHEST = 0x7f800000;           // infinity

struct Scratch {
    float *distance;  // [padded]: the highest logit less this one
    float *weight;    // [padded]: 1 for the highest
    double *sums;     // [padded / BLOCK]
    double *buckets;  // [SIZES[0]]
};

// Call with the vectors of x [count], in order; what the last has too much is -infinity.
template <class F>
inline void each_vector(const float *x, int count, F work) {
    Vec value;
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        load(x + i, value);
        work(i, value);
    }
    if (i == count) return;
    value = all(-__builtin_inff());
    __builtin_memcpy(&value, x + i, (count - i) * sizeof(float));
    work(i, value);
}

// The least distance such that the tokens up to it number, or weigh, at least `enough`. Only tokens
// up to the limit count; if they are not enough, the farthest of them.
template <bool WEIGHED>
inline uint32_t threshold(const Scratch &at, int padded, uint32_t limit, double enough) {
    double before = 0;
    uint32_t low = 0, high = limit;  // bits between which it lies
    for (int level = 0; level < 3; ++level) {
        const int shift = SHIFTS[level], size = SIZES[level];
        for (int b = 0; b < size; ++b) at.buckets[b] = 0;
        for (int i = 0; i < padded; i += LANES) {
            BitVec bits;
            __builtin_memcpy(&bits, at.distance + i, sizeof bits);
            uint32_t lanes = lanes_of((BitVec)(bits >= low) & (BitVec)(bits <= high));
            for (; lanes; lanes &= lanes - 1) {
                const int lane = __builtin_ctz(lanes);
                const double part = WEIGHED ? double(at.weight[i + lane]) : 1.0;
                at.buckets[(bits[lane] - low) >> shift] += part;
            }
        }
        int bucket = 0, last = 0;
        for (; bucket < size && before + at.buckets[bucket] < enough; ++bucket) {
            before += at.buckets[bucket];
            if (at.buckets[bucket] > 0) last = bucket;
        }
        if (bucket == size) before -= at.buckets[bucket = last];  // rounding, or too few
        low += uint32_t(bucket) << shift;
        const uint32_t end = low + (1u << shift) - 1;
        high = end < limit ? end : limit;
    }
    return low;
}

// Clear the weights of tokens beyond a distance, or lighter than a floor; returns the sum of the rest.
inline double keep(const Scratch &at, int padded, uint32_t limit, float floor) {
    double sum = 0;
    for (int block = 0; block < padded / BLOCK; ++block) {
        Vec part = {};
        for (int i = block * BLOCK; i < (block + 1) * BLOCK; i += LANES) {
            Vec distance, weight;
            load(at.distance + i, distance);
            load(at.weight + i, weight);
            const BitVec kept = (BitVec)((BitVec)distance <= every(limit)) & (BitVec)(weight >= all(floor));
            weight = (Vec)((BitVec)weight & kept);
            store(at.weight + i, weight);
            part += weight;
        }
        sum += at.sums[block] = total(part);
    }
    return sum;
}

// The first token up to which the weights, in order of ids, sum up to more than the target.
inline int64_t find(const Scratch &at, int padded, double target) {
    double before = 0;
    int block = 0, last = 0;
    for (; block < padded / BLOCK && before + at.sums[block] <= target; ++block) {
        before += at.sums[block];
        if (at.sums[block] > 0) last = block;
    }
    if (block == padded / BLOCK) before -= at.sums[block = last];  // rounding
    int token = 0;
    for (int i = block * BLOCK; i < (block + 1) * BLOCK; ++i) {
        if (at.weight[i] > 0) token = i;
        before += at.weight[i];
        if (before > target) break;
    }
    return token;
}

int64_t draw(const RopewayDraw &wanted, const float *logits, int vocab_size, const Scratch &at) {
    const int padded = (vocab_size + BLOCK - 1) / BLOCK * BLOCK;
    Vec highest = all(-__builtin_inff());
    each_vector(logits, vocab_size, [&](int, Vec x) { highest = x > highest ? x : highest; });
    const Vec top = all(largest(highest)), temperature = all(wanted.temperature);
    each_vector(logits, vocab_size, [&](int i, Vec x) {
        const Vec distance = top - x;
        store(at.distance + i, distance);
        store(at.weight + i, power_of_two(distance / temperature * all(-1.44269504f)));
    });
    for (int i = (vocab_size + LANES - 1) / LANES * LANES; i < padded; ++i) {
        at.distance[i] = __builtin_inff();
        at.weight[i] = 0;
    }
    uint32_t limit = FARTHEST;
    if (wanted.top_k > 0 && wanted.top_k < vocab_size)
        limit = threshold<false>(at, padded, limit, wanted.top_k);
    double sum = keep(at, padded, limit, 0);
    if (wanted.top_p < 1) {
        limit = threshold<true>(at, padded, limit, wanted.top_p * sum);
        sum = keep(at, padded, limit, wanted.min_p);
    } else if (wanted.min_p > 0) {
        sum = keep(at, padded, limit, wanted.min_p);
    }
    return find(at, padded, wanted.uniform * sum);
}

}  // namespace

// Whether this machine has the instructions of this variant.
extern "C" int NAMED(ropeway_supports_draw_, VARIANT)() { return supports_vectors(); }

// One token of each of the rows asked for, of logits [rows, stride]: finite, or -infinity for tokens
// that must not come. Returns 0, or 2 when memory is short.
extern "C" int NAMED(ropeway_draw_, VARIANT)(const float *logits, int64_t stride,
                                             int32_t vocab_size, const RopewayDraw *draws,
                                             int32_t count, int64_t *token_ids,
                                             int32_t num_threads) {
    const int64_t padded = (vocab_size + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t bytes = 8 * padded + 8 * (padded / BLOCK) + 8 * SIZES[0];
    const int64_t share = (bytes + 63) / 64 * 64;
    const int threads = smaller(num_threads, count);
    const Memory memory(share * threads);
    if (!memory.at) return 2;
#pragma omp parallel num_threads(threads)
    {
        char *const mine = (char *)memory.at + share * omp_get_thread_num();
        float *const floats = (float *)mine;
        double *const doubles = (double *)(floats + 2 * padded);
        const Scratch at = {floats, floats + padded, doubles, doubles + padded / BLOCK};
#pragma omp for schedule(static, 1)
        for (int i = 0; i < count; ++i)
            token_ids[i] = draw(draws[i], logits + draws[i].row * stride, vocab_size, at);
    }
    return 0;
}

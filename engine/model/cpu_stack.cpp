// All blocks of a network in one call: products and attention, one after the other, with no
// interpreter between them. It computes nothing itself: the functions it calls are those of
// cpu_linear.cpp and attention/cpu_kernel.cpp, each of the variant that its caller chose.

#include "cpu_memory.h"

struct RopewayLinear;
struct RopewayLayer;
struct RopewayStep;

// The structures that Python fills, field by field as in cpu_stack.py.

struct RopewayBlock {
    const RopewayLinear *qkv, *out, *up, *down;
};

struct RopewayStack {
    int (*attention)(const RopewayLayer *, const RopewayStep *, const void *qkv, void *out);
    int (*linear)(const RopewayLinear *, const void *x, const float *residual, void *out,
                  int32_t num_rows, int32_t num_threads);
    const RopewayBlock *blocks;
    int32_t num_blocks, hidden_size, intermediate_size;
    int32_t element_size;  // bytes of a number between two products of a block
    int32_t parallel;      // whether the MLP sees the stream as it was before attention
};

namespace {

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

extern "C" int ropeway_supports_stack_generic() { return 1; }

// x [num_rows, hidden_size] -> out, of the same shape; layers: each block's cache. Returns what the
// first failed call did, else 0.
extern "C" int ropeway_stack_generic(const RopewayStack *stack, const RopewayLayer *const *layers,
                                     const RopewayStep *step, const float *x, float *out,
                                     int32_t num_rows, int32_t num_threads) {
    const int64_t hidden = int64_t(num_rows) * stack->hidden_size;
    const int64_t stream = aligned(hidden * sizeof(float));
    const int64_t narrow = aligned(hidden * stack->element_size);
    const int64_t wide =
        aligned(int64_t(num_rows) * stack->intermediate_size * stack->element_size);
    const int64_t qkv_bytes = 3 * narrow;  // an MLP's middle takes the place of both
    const int64_t shared = qkv_bytes + narrow > wide ? qkv_bytes + narrow : wide;
    const Memory scratch(stream + shared);
    if (!scratch.at) return 2;
    float *const attended = (float *)scratch.at;
    char *const qkv = scratch.at + stream, *const heads = qkv + qkv_bytes, *const middle = qkv;
    for (int i = 0; i < stack->num_blocks; ++i) {
        const RopewayBlock &block = stack->blocks[i];
        const auto product = [&](const RopewayLinear *layer, const void *from,
                                 const float *residual, void *to) {
            return stack->linear(layer, from, residual, to, num_rows, num_threads);
        };
        if (int status = product(block.qkv, x, nullptr, qkv)) return status;
        if (int status = stack->attention(layers[i], step, qkv, heads)) return status;
        if (int status = product(block.out, heads, x, attended)) return status;
        const float *const seen = stack->parallel ? x : attended;
        if (int status = product(block.up, seen, nullptr, middle)) return status;
        if (int status = product(block.down, middle, attended, out)) return status;
        x = out;
    }
    return 0;
}

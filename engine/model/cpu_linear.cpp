// Weight products for serving, on the CPU, with the small operations around them.
//
// One call computes, for every row x:  out = residual + activation(weight norm(x) + bias), where
// every part but the product may be absent. A row's output is a function of that row alone: each
// element is one chain of multiply-adds over in_features, in order, in one lane of one register.
// How rows, columns and threads are grouped only decides which bytes are loaded together. Hence no
// -ffast-math and no contraction by the compiler, as in attention/cpu_kernel.cpp.
//
// Weights are stored as they are read: in panels of PANEL outputs, and in a panel step after step,
// a step being one 32-bit word for each output: one float, two bfloat16 or four int8 of consecutive
// in_features. One row reads each panel once, as one stream; several rows share each load. bfloat16
// is held in 12 bits where it can be (cpu_bf12.h): the words, and so the sums, are the same.
//
// This file is compiled once for each instruction set, into one library, as
// ropeway_linear_<VARIANT>; the caller asks ropeway_supports_linear_<VARIANT> and chooses.

#include "cpu_bf12.h"
#include "cpu_formats.h"
#include "cpu_memory.h"
#include "cpu_panel.h"
#include "cpu_vector.h"

// The structure that Python fills, field by field as in cpu_linear.py.

struct RopewayLinear {
    const void *weight;        // [panels, steps, PANEL] words of 32 bits, or BF12Weight's bytes
    const float *scale;        // [panels * PANEL]: int8 only, what a weight of 1 stands for
    const int32_t *offset;     // [panels * PANEL]: int8 only, 128 times the sum of its weights
    const float *bias;         // [panels * PANEL], or null
    const float *norm_weight;  // [in_features, and up to whole vectors], or null
    const float *norm_bias;    // the same
    const uint8_t *codes;      // as BF12Weight; null: the weight is words
    const RopewayPatch *patches;
    const int64_t *patch_begins;
    int32_t in_features, out_features;
    int32_t format;      // 0 float32, 1 bfloat16, 2 int8
    int32_t norm;        // 0 none, 1 LayerNorm, 2 RMSNorm
    int32_t activation;  // 0 none, 1 GELU, 2 its tanh approximation, 3 ReLU, 4 squared ReLU
    int32_t in_bfloat16, out_bfloat16;  // element types of rows and out; else float32
    float eps;                          // of the norm
};

namespace {

constexpr int CHUNK_ROWS = 192;  // rows that stay in the nearer caches while panels pass
constexpr int AHEAD = 24;        // steps: how far ahead of a single row the panel is asked for

// ---- A norm, and the rows as words ---------------------------------------------------------------

// A row being prepared is filled up with zeros to whole vectors, so that no loop has a remainder.

template <class F>
inline float sum_over(const float *x, int count, F term) {  // lane by lane, then over the lanes
    Vec sum = {}, value;
    for (int i = 0; i < count; i += LANES) {
        load(x + i, value);
        sum += term(value);
    }
    return total(sum);
}

template <class F>
inline void change(float *x, int count, F to) {
    Vec value;
    for (int i = 0; i < count; i += LANES) {
        load(x + i, value);
        store(x + i, to(value, i));
    }
}

inline void zero_rest(float *x, int count) {
    for (int i = count; i % LANES; ++i) x[i] = 0;
}

// Turn x [in_features] into its norm, in place.
inline void normalise(const RopewayLinear &layer, float *x) {
    const int count = layer.in_features;
    if (layer.norm == 1) {
        const Vec mean = all(sum_over(x, count, [](Vec v) { return v; }) / float(count));
        change(x, count, [=](Vec v, int) { return v - mean; });
        zero_rest(x, count);
    }
    const float square = sum_over(x, count, [](Vec v) { return v * v; });
    const Vec factor = all(1.0f / __builtin_sqrtf(square / float(count) + layer.eps));
    change(x, count, [&](Vec v, int i) {
        Vec weight = all(1.0f), bias = {};
        if (layer.norm_weight) load(layer.norm_weight + i, weight);
        if (layer.norm_bias) load(layer.norm_bias + i, bias);
        return v * factor * weight + bias;
    });
}

inline int steps_of(const RopewayLinear &layer) {
    const int width = layer.format == 0 ? 1 : layer.format == 1 ? 2 : 4;
    return (layer.in_features + width - 1) / width;
}

inline BF12Weight bf12(const RopewayLinear &layer) {
    return {(const uint8_t *)layer.weight, layer.codes, layer.patches, layer.patch_begins,
            steps_of(layer)};
}

// x [in_features] as words, whole vectors of numbers. Returns what a 1 stands for.
inline float write_words(const RopewayLinear &layer, float *x, uint32_t *words) {
    const int count = layer.in_features;
    zero_rest(x, count);
    Vec value;
    if (layer.format < 2) {
        for (int i = 0; i < count; i += LANES) {
            load(x + i, value);
            if (layer.format == 0)
                store((float *)words + i, value);
            else
                store((BFloat16 *)words + i, value);
        }
        return 1;
    }
    Vec most = {}, wrong = {};
    for (int i = 0; i < count; i += LANES) {
        load(x + i, value);
        const Vec size = (Vec)((BitVec)value & every(0x7fffffffu));
        most = size > most ? size : most;
        wrong += value - value;  // zero, or NaN where the number is not finite
    }
    const float highest = largest(most) + total(wrong);
    const Vec inverse = all(highest > 0 ? 127.0f / highest : 0.0f);
    for (int i = 0; i < count; i += LANES) {
        load(x + i, value);
        const Vec shifted = value * inverse + all(12582912.0f);  // 1.5 * 2^23: to an integer
        const ByteVec bytes = __builtin_convertvector((BitVec)shifted + 128, ByteVec);
        __builtin_memcpy((uint8_t *)words + i, &bytes, sizeof bytes);
    }
    return highest / 127.0f;
}

// ---- A tile: some rows, one panel ----------------------------------------------------------------

struct Rows {
    const uint32_t *words;  // [rows, stride], of which the first `steps` are used
    const float *scale;     // [rows]
    const float *residual;  // [rows, out_features], or null
    void *out;              // [rows, out_features]
    int steps, stride;
};

inline Vec activate(Vec x, int activation) {
    switch (activation) {
        case 1: return gelu(x);
        case 2: return gelu_tanh(x);
        case 3: return x < Vec{} ? Vec{} : x;
        case 4: x = x < Vec{} ? Vec{} : x; return x * x;
        default: return x;
    }
}

inline Vec to_float(const RopewayLinear &, Vec sum, int, float) { return sum; }
inline Vec to_float(const RopewayLinear &layer, IntVec sum, int column, float scale) {
    IntVec offset;
    Vec weight_scale;
    __builtin_memcpy(&offset, layer.offset + column, sizeof offset);
    load(layer.scale + column, weight_scale);
    return __builtin_convertvector(sum - offset, Vec) * (weight_scale * all(scale));
}

template <class Sum>
inline void finish(const RopewayLinear &layer, const Rows &rows, int row, int column, Sum sum) {
    Vec x = to_float(layer, sum, column, rows.scale[row]);
    if (layer.bias) {
        Vec bias;
        load(layer.bias + column, bias);
        x += bias;
    }
    if (layer.activation) x = activate(x, layer.activation);
    const int64_t at = int64_t(row) * layer.out_features + column;
    const int count = smaller(LANES, layer.out_features - column);
    if (count <= 0) return;
    if (rows.residual) {
        Vec residual = {};
        if (count == LANES)
            load(rows.residual + at, residual);
        else
            __builtin_memcpy(&residual, rows.residual + at, count * sizeof(float));
        x += residual;
    }
    if (count == LANES) {
        if (layer.out_bfloat16)
            store((BFloat16 *)rows.out + at, x);
        else
            store((float *)rows.out + at, x);
        return;
    }
    for (int i = 0; i < count; ++i) {
        if (layer.out_bfloat16)
            store((BFloat16 *)rows.out + at + i, x[i]);
        else
            ((float *)rows.out)[at + i] = x[i];
    }
}

// ROWS rows by VECTORS vectors of a panel's outputs. A single row waits for memory: it asks early.
// Not inline: inside its callers the compiler does not keep all sums in registers.
template <class Format, int ROWS, int VECTORS, class Panel>
__attribute__((noinline)) void multiply(const RopewayLinear &layer, const Rows &rows, int row,
                                        Panel panel, int column) {
    typedef typename Format::Sum Sum;
    const uint32_t *const x = rows.words + int64_t(row) * rows.stride;
    const int steps = rows.steps, stride = rows.stride;
    Sum sum[ROWS][VECTORS] = {};
    const auto add = [&](int step, const BitVec *weight) {
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v)
                sum[r][v] = Format::dot(sum[r][v], weight[v], x[r * stride + step]);
    };
    for (int s = 0; s < steps; ++s) {  // steps up to the next patch, without a branch; then that one
        BitVec weight[VECTORS];
        for (const int end = panel.next_patch(steps); s < end; ++s) {
            panel.template read<VECTORS>(s, weight);
            if (ROWS == 1) panel.template ask_for<VECTORS>(s + AHEAD);
            add(s, weight);
        }
        if (s >= steps) break;
        panel.template read_patched<VECTORS>(s, weight);
        if (ROWS == 1) panel.template ask_for<VECTORS>(s + AHEAD);
        add(s, weight);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
            finish(layer, rows, row + r, column + v * LANES, sum[r][v]);
}

// As many rows at once as registers hold, then what is left over. panel(v): a reader of the panel
// from vector v on.
template <class Format, int ROWS, class MakePanel>
inline void multiply_rows(const RopewayLinear &layer, const Rows &rows, int row, int end,
                          MakePanel panel, int column) {
    constexpr int WIDE = REGISTERS == 32 ? PANEL_VECTORS : ROWS == 1 ? 4 : 2;
    for (; row + ROWS <= end; row += ROWS)
        for (int v = 0; v < PANEL_VECTORS; v += WIDE)
            multiply<Format, ROWS, WIDE>(layer, rows, row, panel(v), column + v * LANES);
    if constexpr (ROWS > 1)
        multiply_rows<Format, ROWS - 1>(layer, rows, row, end, panel, column);
}

// Rows up to `end` by one panel.
template <class Format>
inline void multiply_panel(const RopewayLinear &layer, const Rows &rows, int row, int end,
                           int64_t panel) {
    const int column = int(panel) * PANEL;
    if constexpr (Format::IN_12_BITS)
        if (layer.codes) {
            const BF12Weight weight = bf12(layer);
            const auto coded = [&](int vector) { return BF12Panel(weight, panel, vector); };
            return multiply_rows<Format, Format::ROWS>(layer, rows, row, end, coded, column);
        }
    const uint32_t *const words = (const uint32_t *)layer.weight + panel * rows.steps * PANEL;
    const auto whole = [=](int vector) { return WordPanel{words, vector}; };
    multiply_rows<Format, Format::ROWS>(layer, rows, row, end, whole, column);
}

// ---- A call --------------------------------------------------------------------------------------

template <class Format, class T>
int run(const RopewayLinear &layer, const T *x, const float *residual, void *out, int num_rows,
        int num_threads) {
    const int steps = steps_of(layer);
    const int64_t panels = (layer.out_features + PANEL - 1) / PANEL;
    const int chunks = (num_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    const int tiles = (num_rows + Format::ROWS - 1) / Format::ROWS;
    const int chunk_rows = (tiles + chunks - 1) / chunks * Format::ROWS;  // chunks of one size
    const bool as_is = !layer.norm && Format::WIDTH * sizeof(T) == 4 &&
                       layer.in_features % Format::WIDTH == 0;  // rows are words already
    const int wide = (layer.in_features + 63) / 64 * 64, stride = as_is ? steps : wide / Format::WIDTH;
    const int64_t used_words = as_is ? 0 : int64_t(num_rows) * stride;
    const int64_t counters = int64_t(num_threads) * Shares::LINE;
    const Memory scratch(counters * 8 + (used_words + int64_t(num_threads) * wide + num_rows) * 4);
    if (!scratch.at) return 2;
    const Shares shares((int64_t *)scratch.at, chunks * panels, num_threads);
    uint32_t *const words = (uint32_t *)((int64_t *)scratch.at + counters);
    float *const floats = (float *)(words + used_words);
    float *const scales = floats + int64_t(num_threads) * wide;
    const Rows rows = {as_is ? (const uint32_t *)x : words, scales, residual, out, steps, stride};

#pragma omp parallel num_threads(num_threads)
    {
        if (!as_is) {
            float *const mine = floats + wide * omp_get_thread_num();
#pragma omp for schedule(static)
            for (int row = 0; row < num_rows; ++row) {
                widen(mine, x + int64_t(row) * layer.in_features, layer.in_features);
                zero_rest(mine, layer.in_features);
                if (layer.norm) normalise(layer, mine);
                scales[row] = write_words(layer, mine, words + int64_t(row) * stride);
            }
        }
        shares.work(omp_get_thread_num(), [&](int64_t item) {
            const int row = int(item / panels) * chunk_rows;
            multiply_panel<Format>(layer, rows, row, smaller(num_rows, row + chunk_rows),
                                   item % panels);
        });
    }
    return 0;
}

template <class T>
int run_format(const RopewayLinear &layer, const T *x, const float *residual, void *out,
               int num_rows, int num_threads) {
    if (layer.format == 0) return run<Float32>(layer, x, residual, out, num_rows, num_threads);
    if (layer.format == 1) return run<BF16>(layer, x, residual, out, num_rows, num_threads);
    return run<Int8>(layer, x, residual, out, num_rows, num_threads);
}

// A row of the weight as numbers: what an output's panel holds of it, word after word.
inline void gather(const RopewayLinear &layer, int64_t output, float *to) {
    const int steps = steps_of(layer), count = layer.in_features;
    const auto put = [&layer, to, count](int step, uint32_t word) {
        const uint32_t pair[] = {word << 16, word & 0xffff0000u};
        if (layer.format == 0)
            __builtin_memcpy(to + step, &word, sizeof word);
        else
            __builtin_memcpy(to + 2 * step, pair, smaller(2, count - 2 * step) * sizeof *pair);
    };
    if (layer.codes) return bf12(layer).each_word(output, put);
    const uint32_t *const words =
        (const uint32_t *)layer.weight + output / PANEL * steps * PANEL + output % PANEL;
    for (int s = 0; s < steps; ++s) put(s, words[s * PANEL]);
}

}  // namespace

// Whether this machine has the instructions of this variant.
extern "C" int NAMED(ropeway_supports_linear_, VARIANT)() {
#if defined(__AVX512BF16__)
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return 0;
#endif
    return supports_vectors();
}

// x [num_rows, in_features] -> out [num_rows, out_features]; residual float32, of out's shape, or
// null. Returns 0, or 2 when memory is short.
extern "C" int NAMED(ropeway_linear_, VARIANT)(const RopewayLinear *layer, const void *x,
                                               const float *residual, void *out, int32_t num_rows,
                                               int32_t num_threads) {
    if (layer->in_bfloat16)
        return run_format(*layer, (const BFloat16 *)x, residual, out, num_rows, num_threads);
    return run_format(*layer, (const float *)x, residual, out, num_rows, num_threads);
}

// The weight's rows of these ids as float32 [num_ids, in_features]: an embedding that shares its
// weight with the head is held once. Not for int8. Returns 0, or 1 for an id that there is not.
extern "C" int NAMED(ropeway_embedding_, VARIANT)(const RopewayLinear *layer, const int64_t *ids,
                                                  float *out, int32_t num_ids,
                                                  int32_t num_threads) {
    for (int i = 0; i < num_ids; ++i)
        if (ids[i] < 0 || ids[i] >= layer->out_features) return 1;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int i = 0; i < num_ids; ++i)
        gather(*layer, ids[i], out + int64_t(i) * layer->in_features);
    return 0;
}

// To hold a bfloat16 weight [outputs, inputs] in 12 bits: each panel's codes, and where its patches
// begin. The last of patch_begins is how many there are.
extern "C" int NAMED(ropeway_bf12_codes_, VARIANT)(const uint16_t *weight, uint8_t *codes,
                                                   int64_t *patch_begins, int32_t outputs,
                                                   int32_t inputs, int32_t num_threads) {
    const int panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int panel = 0; panel < panels; ++panel) {
        const BF12Writer writer{weight, outputs, inputs, panel * PANEL};
        writer.choose(codes + int64_t(panel) * BF12::CODES);
        patch_begins[panel + 1] = writer.count_patches(codes + int64_t(panel) * BF12::CODES);
    }
    patch_begins[0] = 0;
    for (int panel = 0; panel < panels; ++panel) patch_begins[panel + 1] += patch_begins[panel];
    return 0;
}

// Then the rest of BF12Weight: bytes [panels, steps, BF12::STEP], patches [patch_begins[panels]].
extern "C" int NAMED(ropeway_bf12_write_, VARIANT)(const uint16_t *weight, const uint8_t *codes,
                                                   const int64_t *patch_begins, uint8_t *bytes,
                                                   RopewayPatch *patches, int32_t outputs,
                                                   int32_t inputs, int32_t num_threads) {
    const int panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int panel = 0; panel < panels; ++panel) {
        const BF12Writer writer{weight, outputs, inputs, panel * PANEL};
        writer.write(codes + int64_t(panel) * BF12::CODES,
                     bytes + int64_t(panel) * writer.steps() * BF12::STEP,
                     patches + patch_begins[panel]);
    }
    return 0;
}

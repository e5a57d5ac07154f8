// bfloat16 in 12 bits, without loss: fewer bytes to read for the same numbers.
//
// The upper byte of a bfloat16 is its sign and all but the last bit of its exponent. Weights use
// few of its 256 values: the 16 most frequent of a panel become codes of 4 bits. A word with an
// upper byte that has no code, one in thousands, is kept beside the panel as a patch. Lower bytes
// stay as they are. (Zhang et al. 2025, "70% Size, 100% Accuracy", DFloat11, code exponents by
// Huffman's method, for GPUs; codes of one length are undone by one shuffle of bytes.)
//
// A step of a panel is PANEL words, in quads. A quad is four vectors of words in three of bytes: the
// lower bytes of the first two vectors, those of the last two, and the codes: those of the first two
// in the lower 4 bits of each byte, those of the last two in the upper 4. Bytes stand so that
// interleaving them within every 128 bits, as AVX2 and AVX512-BW do, gives words in order.

#pragma once

#include "cpu_panel.h"

// A word with an upper byte that has no code.
struct RopewayPatch {
    uint32_t place;  // step * PANEL + output within the panel
    uint32_t word;   // two bfloat16, of consecutive in_features
};

namespace {

struct BF12 {
    static constexpr int CODES = 16;
    static constexpr int PAIR = 4 * LANES;          // bytes: the lower ones of two vectors
    static constexpr int QUAD = 3 * PAIR;           // bytes of four vectors
    static constexpr int STEP = PANEL * 4 * 3 / 4;  // bytes of a step

    // Where in a step the lower byte of a word's first (half 0) or second number stands.
    static int lower_byte(int output, int half) {
        const int vector = output / LANES, lane = output % LANES;
        return vector / 4 * QUAD + vector / 2 % 2 * PAIR + lane / 4 * 16 + vector % 2 * 8 +
               lane % 4 * 2 + half;
    }
    // The byte that holds that number's code, and how far up in it.
    static int code_byte(int output, int half) {
        return lower_byte(output, half) + (2 - output / LANES / 2 % 2) * PAIR;
    }
    static int code_shift(int output) { return output / LANES / 2 % 2 * 4; }
};

// A weight [outputs, 2 * steps].
struct BF12Weight {
    const uint8_t *bytes;         // [panels, steps, BF12::STEP]
    const uint8_t *codes;         // [panels, BF12::CODES]: the upper byte that each stands for
    const RopewayPatch *patches;  // of one panel after the other, by rising place
    const int64_t *patch_begins;  // [panels + 1]
    int steps;

    // put(step, word) for every word of an output; for a patched one twice, the right one last.
    template <class Put>
    void each_word(int64_t output, Put put) const {
        const int64_t panel = output / PANEL;
        const int at = int(output % PANEL);
        const uint8_t *from = bytes + panel * steps * BF12::STEP;
        for (int step = 0; step < steps; ++step, from += BF12::STEP) {
            uint32_t word = 0;
            for (int half = 0; half < 2; ++half) {
                const int code = from[BF12::code_byte(at, half)] >> BF12::code_shift(at) & 15;
                const uint32_t upper = codes[panel * BF12::CODES + code];
                word |= (upper << 8 | from[BF12::lower_byte(at, half)]) << 16 * half;
            }
            put(step, word);
        }
        for (int64_t i = patch_begins[panel]; i < patch_begins[panel + 1]; ++i)
            if (int(patches[i].place % PANEL) == at) put(patches[i].place / PANEL, patches[i].word);
    }
};

// ---- Reading -------------------------------------------------------------------------------------

// A panel being read, step after step, from vector `first` on.
struct BF12Panel {
    const uint8_t *const bytes;  // [steps, BF12::STEP]
    const RopewayPatch *patch;   // the next one
    const RopewayPatch *const end;
    const int first;
    WideByteVec upper_bytes;  // by code, once in every 128 bits

    BF12Panel(const BF12Weight &weight, int64_t panel, int vector)
        : bytes(weight.bytes + panel * weight.steps * BF12::STEP),
          patch(weight.patches + weight.patch_begins[panel]),
          end(weight.patches + weight.patch_begins[panel + 1]),
          first(vector) {
        for (int i = 0; i < int(sizeof upper_bytes); i += BF12::CODES)
            __builtin_memcpy((uint8_t *)&upper_bytes + i, weight.codes + panel * BF12::CODES,
                             BF12::CODES);
    }

    int next_patch(int num_steps) const {
        return patch < end ? int(patch->place / PANEL) : num_steps;
    }

    template <int VECTORS>
    void read(int step, BitVec *words) const {
        static_assert(VECTORS % 2 == 0, "two vectors share their bytes");
        const uint8_t *const from = bytes + int64_t(step) * BF12::STEP;
        for (int v = 0; v < VECTORS; v += 2) {
            // Of whole quads it is known when this is compiled.
            const int pair = VECTORS % 4 ? first / 2 % 2 : v / 2 % 2;
            const uint8_t *const quad = from + (first + v) / 4 * BF12::QUAD;
            WideByteVec lower;
            ShortVec codes;
            __builtin_memcpy(&lower, quad + pair * BF12::PAIR, sizeof lower);
            __builtin_memcpy(&codes, quad + 2 * BF12::PAIR, sizeof codes);
            const WideByteVec upper = look_up(upper_bytes, (WideByteVec)(codes >> 4 * pair) & 15);
            words[v] = (BitVec)interleave_first(lower, upper);
            words[v + 1] = (BitVec)interleave_last(lower, upper);
        }
    }

    // The same at a step with patches.
    template <int VECTORS>
    void read_patched(int step, BitVec *words) {
        read<VECTORS>(step, words);
        uint32_t mine[VECTORS * LANES];
        __builtin_memcpy(mine, words, sizeof mine);
        for (; next_patch(step + 1) == step; ++patch) {
            const unsigned at = patch->place % PANEL - first * LANES;  // others': beyond the end
            if (at < VECTORS * LANES) mine[at] = patch->word;
        }
        __builtin_memcpy(words, mine, sizeof mine);
    }

    template <int VECTORS>
    void ask_for(int step) const {  // whole quads: only one row asks, and it reads those
        const uint8_t *const from = bytes + int64_t(step) * BF12::STEP + first / 4 * BF12::QUAD;
        for (int i = 0; i < VECTORS / 4 * BF12::QUAD; i += 64) __builtin_prefetch(from + i, 0, 3);
    }
};

// ---- Writing -------------------------------------------------------------------------------------

// Outputs of a weight [outputs, inputs] from `first` on, a panel; what it has too much is zero.
struct BF12Writer {
    const uint16_t *const weight;
    const int outputs, inputs, first;

    int steps() const { return (inputs + 1) / 2; }

    // A short run of steps [count, PANEL] as words; of each output a cache line is read.
    static constexpr int SHORT = 16;
    void words(int begin, int count, uint32_t *to) const {
        __builtin_memset(to, 0, count * PANEL * sizeof *to);
        for (int output = 0; output < smaller(PANEL, outputs - first); ++output) {
            const uint16_t *const row = weight + int64_t(first + output) * inputs;
            uint32_t run[SHORT] = {};
            __builtin_memcpy(run, row + 2 * begin, smaller(2 * count, inputs - 2 * begin) * 2);
            for (int i = 0; i < count; ++i) to[i * PANEL + output] = run[i];
        }
    }

    template <class Do>
    void each_step(Do step) const {
        uint32_t run[SHORT * PANEL];
        for (int begin = 0; begin < steps(); begin += SHORT) {
            const int count = smaller(SHORT, steps() - begin);
            words(begin, count, run);
            for (int i = 0; i < count; ++i) step(begin + i, run + i * PANEL);
        }
    }

    // The most frequent upper bytes, by falling frequency; of equals the lower byte first.
    void choose(uint8_t *codes) const {
        int32_t counts[256] = {};
        each_step([&](int, const uint32_t *words) {
            for (int output = 0; output < PANEL; ++output) {
                ++counts[words[output] >> 8 & 255];
                ++counts[words[output] >> 24];
            }
        });
        for (int code = 0; code < BF12::CODES; ++code) {
            int best = 0;
            for (int byte = 1; byte < 256; ++byte)
                if (counts[byte] > counts[best]) best = byte;
            codes[code] = uint8_t(best);
            counts[best] = -1;
        }
    }

    struct CodeOf {  // by upper byte; CODES for those that have none
        uint8_t code[256];
        explicit CodeOf(const uint8_t *codes) {
            __builtin_memset(code, BF12::CODES, sizeof code);
            for (int i = 0; i < BF12::CODES; ++i) code[codes[i]] = uint8_t(i);
        }
        bool lacks(uint32_t word) const {
            return (code[word >> 8 & 255] | code[word >> 24]) & BF12::CODES;
        }
    };

    int64_t count_patches(const uint8_t *codes) const {
        const CodeOf of(codes);
        int64_t count = 0;
        each_step([&](int, const uint32_t *words) {
            for (int output = 0; output < PANEL; ++output) count += of.lacks(words[output]);
        });
        return count;
    }

    void write(const uint8_t *codes, uint8_t *bytes, RopewayPatch *patches) const {
        const CodeOf of(codes);
        each_step([&](int step, const uint32_t *words) {
            uint8_t *const to = bytes + int64_t(step) * BF12::STEP;
            __builtin_memset(to, 0, BF12::STEP);
            for (int output = 0; output < PANEL; ++output) {
                const uint32_t word = words[output];
                if (of.lacks(word)) {
                    *patches++ = {uint32_t(step) * PANEL + output, word};
                    continue;
                }
                for (int half = 0; half < 2; ++half) {
                    const uint32_t number = word >> 16 * half;
                    to[BF12::lower_byte(output, half)] = uint8_t(number);
                    to[BF12::code_byte(output, half)] |= of.code[number >> 8 & 255]
                                                         << BF12::code_shift(output);
                }
            }
        });
    }
};

}  // namespace

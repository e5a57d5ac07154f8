// bfloat16 in 12 bits, without loss: fewer bytes to read for the same numbers.
//
// The upper byte of a bfloat16 is its sign and all but the last bit of its exponent. Weights use
// few of its 256 values: the 16 most frequent of a panel become codes of 4 bits. A word with another
// one, about one in ten thousand, is kept beside the panel as a patch. Lower bytes stay as they are.
// (Zhang et al. 2025, "70% Size, 100% Accuracy", DFloat11, code exponents by Huffman's method, for
// GPUs; codes of one length are undone by one shuffle of bytes.)
//
// A step of a panel is PANEL words, in quads. A quad is four vectors of words in three of bytes: the
// lower bytes of the first two vectors, those of the last two, and the codes, of the first two in
// the lower halves of its bytes and of the last two in the upper ones. Bytes stand so that
// interleaving them within every 128 bits, the only way without AVX512-VBMI, gives words in order.

#pragma once

#include "cpu_vector.h"

// A word whose upper bytes have no codes.
struct RopewayPatch {
    uint32_t place;  // step * PANEL + output within the panel
    uint32_t word;   // two bfloat16, of consecutive in_features
};

namespace {

constexpr int PANEL = 64;  // outputs whose weights stand together

struct BF12 {
    static constexpr int CODES = 16;
    static constexpr int HALF = 4 * LANES;         // bytes: the lower ones of two vectors
    static constexpr int QUAD = 3 * HALF;          // bytes of four vectors
    static constexpr int STEP = PANEL * 4 * 3 / 4;  // bytes of a step

    // Where in a step the lower byte stands of a word's lower or upper half.
    static int lower_byte(int output, int half) {
        const int vector = output / LANES, lane = output % LANES;
        return vector / 4 * QUAD + vector / 2 % 2 * HALF + lane / 4 * 16 + vector % 2 * 8 +
               lane % 4 * 2 + half;
    }
    // The byte that its code is in, and how far up.
    static int code_byte(int output, int half) {
        return lower_byte(output, half) + (2 - output / LANES / 2 % 2) * HALF;
    }
    static int code_shift(int output) { return output / LANES / 2 % 2 * 4; }
};

typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));

// table: 16 bytes, once in every 128 bits.
inline Bytes look_up(Bytes table, Bytes codes) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
#elif defined(__AVX2__)
    return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)codes);
#endif
}

// The bytes of two vectors in turns, from the first or the second half of every 128 bits.
template <int HALF>
inline BitVec interleave(Bytes lower, Bytes upper) {
#if defined(__AVX512F__)
    return (BitVec)(HALF ? _mm512_unpackhi_epi8((__m512i)lower, (__m512i)upper)
                         : _mm512_unpacklo_epi8((__m512i)lower, (__m512i)upper));
#elif defined(__AVX2__)
    return (BitVec)(HALF ? _mm256_unpackhi_epi8((__m256i)lower, (__m256i)upper)
                         : _mm256_unpacklo_epi8((__m256i)lower, (__m256i)upper));
#endif
}

// ---- Reading -------------------------------------------------------------------------------------

// A weight [outputs, 2 * steps] in panels.
struct NarrowWeight {
    const uint8_t *bytes;         // [panels, steps, BF12::STEP]
    const uint8_t *codes;         // [panels, BF12::CODES]: the upper byte that each stands for
    const RopewayPatch *patches;  // of one panel after the other, by rising place
    const int64_t *patch_begins;  // [panels + 1]
    int steps;

    uint32_t word(int64_t output, int step) const {
        const int64_t panel = output / PANEL;
        const int at = int(output % PANEL);
        const uint32_t place = uint32_t(step) * PANEL + at;
        const RopewayPatch *low = patches + patch_begins[panel];
        const RopewayPatch *const end = patches + patch_begins[panel + 1], *high = end;
        while (low < high) {
            const RopewayPatch *const middle = low + (high - low) / 2;
            if (middle->place < place) low = middle + 1;
            else high = middle;
        }
        if (low < end && low->place == place) return low->word;
        const uint8_t *const from = bytes + (panel * steps + step) * BF12::STEP;
        uint32_t both = 0;
        for (int half = 0; half < 2; ++half) {
            const int code = from[BF12::code_byte(at, half)] >> BF12::code_shift(at) & 15;
            const uint32_t upper = codes[panel * BF12::CODES + code];
            both |= (upper << 8 | from[BF12::lower_byte(at, half)]) << 16 * half;
        }
        return both;
    }
};

// A panel being read, step after step, from vector `first` on.
struct NarrowPanel {
    const uint8_t *const steps;
    const RopewayPatch *patch;  // the next one
    const RopewayPatch *const end;
    const int first;
    Bytes table;

    NarrowPanel(const NarrowWeight &weight, int64_t panel, int vector)
        : steps(weight.bytes + panel * weight.steps * BF12::STEP),
          patch(weight.patches + weight.patch_begins[panel]),
          end(weight.patches + weight.patch_begins[panel + 1]),
          first(vector) {
        for (int i = 0; i < int(sizeof table); i += BF12::CODES)
            __builtin_memcpy((uint8_t *)&table + i, weight.codes + panel * BF12::CODES,
                             BF12::CODES);
    }

    // The next step that has a patch, or the end.
    int clean_until(int num_steps) const {
        return patch < end ? int(patch->place / PANEL) : num_steps;
    }

    template <int VECTORS>
    void read(int step, BitVec *words) const {
        static_assert(VECTORS % 2 == 0, "two vectors share their bytes");
        const uint8_t *const from = steps + int64_t(step) * BF12::STEP;
        for (int v = 0; v < VECTORS; v += 2) {
            // Of whole quads it is known to the compiler which half of the codes is meant.
            const int pair = VECTORS % 4 ? first / 2 % 2 : v / 2 % 2;
            const uint8_t *const quad = from + (first + v) / 4 * BF12::QUAD;
            Bytes lower;
            ShortVec codes;
            __builtin_memcpy(&lower, quad + pair * BF12::HALF, sizeof lower);
            __builtin_memcpy(&codes, quad + 2 * BF12::HALF, sizeof codes);
            const Bytes upper = look_up(table, (Bytes)(codes >> 4 * pair) & 15);
            words[v] = interleave<0>(lower, upper);
            words[v + 1] = interleave<1>(lower, upper);
        }
    }

    template <int VECTORS>
    void read_patched(int step, BitVec *words) {
        read<VECTORS>(step, words);
        uint32_t mine[VECTORS * LANES];
        __builtin_memcpy(mine, words, sizeof mine);
        for (; patch < end && int(patch->place / PANEL) == step; ++patch) {
            const unsigned at = patch->place % PANEL - first * LANES;  // others': beyond the end
            if (at < VECTORS * LANES) mine[at] = patch->word;
        }
        __builtin_memcpy(words, mine, sizeof mine);
    }

    void ask_for(int step) const {
        const uint8_t *const from = steps + int64_t(step) * BF12::STEP;
        for (int i = 0; i < BF12::STEP; i += 64) __builtin_prefetch(from + i, 0, 3);
    }
};

// ---- Writing -------------------------------------------------------------------------------------

// A panel of a weight [outputs, inputs], read as words; what it has too much is zero.
struct WeightPanel {
    const uint16_t *const weight;
    const int outputs, inputs, first;

    uint32_t number(int output, int input) const {
        const bool inside = first + output < outputs && input < inputs;
        return inside ? weight[int64_t(first + output) * inputs + input] : 0;
    }

    // The most frequent upper bytes, by falling frequency; of equals the lower byte first.
    void choose(uint8_t *codes) const {
        int64_t counts[256] = {};
        for (int output = 0; output < PANEL; ++output)
            for (int i = 0; i < inputs; ++i) ++counts[number(output, i) >> 8];
        for (int code = 0; code < BF12::CODES; ++code) {
            int best = 0;
            for (int byte = 1; byte < 256; ++byte)
                if (counts[byte] > counts[best]) best = byte;
            codes[code] = uint8_t(best);
            counts[best] = -1;
        }
    }

    // Write bytes (zero before) and patches; of null only the patches are counted. Their number.
    int64_t write(const uint8_t *codes, uint8_t *bytes, RopewayPatch *patches) const {
        int code_of[256];
        for (int &code : code_of) code = -1;
        for (int code = 0; code < BF12::CODES; ++code) code_of[codes[code]] = code;
        int64_t count = 0;
        for (int step = 0; step < (inputs + 1) / 2; ++step) {
            uint8_t *const to = bytes + int64_t(step) * BF12::STEP;
            for (int output = 0; output < PANEL; ++output) {
                const uint32_t both[] = {number(output, 2 * step), number(output, 2 * step + 1)};
                const int code[] = {code_of[both[0] >> 8], code_of[both[1] >> 8]};
                const bool whole = code[0] >= 0 && code[1] >= 0;
                if (bytes && whole)
                    for (int half = 0; half < 2; ++half) {
                        to[BF12::lower_byte(output, half)] = uint8_t(both[half]);
                        to[BF12::code_byte(output, half)] |= code[half]
                                                             << BF12::code_shift(output);
                    }
                if (bytes && !whole)
                    patches[count] = {uint32_t(step) * PANEL + output, both[0] | both[1] << 16};
                count += !whole;
            }
        }
        return count;
    }
};

}  // namespace

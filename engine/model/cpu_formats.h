// What a weight is made of: how a 32-bit word of it is multiplied by one of a row, and added up.

#pragma once

#include "cpu_vector.h"

namespace {

// WIDTH: numbers in a word. ROWS: so many have their sums in registers at once. IN_12_BITS: whether
// a weight may be held so (cpu_bf12.h).

struct Float32 {
    typedef Vec Sum;
    static constexpr bool IN_12_BITS = false;
    static constexpr int WIDTH = 1;
    static constexpr int ROWS = REGISTERS == 32 ? 6 : 4;
    static Sum dot(Sum sum, BitVec weight, uint32_t x) {
        return madd((Vec)weight, (Vec)every(x), sum);
    }
};

// AVX512-BF16's instruction, or the same two multiply-adds in float32.
struct BF16 {
    typedef Vec Sum;
    static constexpr bool IN_12_BITS = true;
    static constexpr int WIDTH = 2;
    static constexpr int ROWS = REGISTERS == 32 ? 6 : 3;
    static Sum dot(Sum sum, BitVec weight, uint32_t x) {
#if defined(__AVX512BF16__)
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)every(x));
#else
        sum = madd((Vec)(weight & every(0xffff0000u)), (Vec)every(x & 0xffff0000u), sum);
        return madd((Vec)(weight << 16), (Vec)every(x << 16), sum);
#endif
    }
};

// Rows are unsigned, 128 more than they stand for; RopewayLinear.offset takes that back. Sums are
// integers, so they are exact.
struct Int8 {
    typedef IntVec Sum;
    static constexpr bool IN_12_BITS = false;
    static constexpr int WIDTH = 4;
    static constexpr int ROWS = REGISTERS == 32 ? 6 : 3;
    static Sum dot(Sum sum, BitVec weight, uint32_t x) {
#if defined(__AVX512VNNI__)
        return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)every(x), (__m512i)weight);
#else
        // bytes 0 and 2, then 1 and 3, as 16-bit numbers; two products never overflow 32 bits
        const BitVec low = every(x & 0x00ff00ffu), high = every(x >> 8 & 0x00ff00ffu);
        const ShortVec even = (ShortVec)(weight << 8) >> 8, odd = (ShortVec)weight >> 8;
        return sum + multiply_pairs(even, (ShortVec)low) + multiply_pairs(odd, (ShortVec)high);
#endif
    }
};

}  // namespace

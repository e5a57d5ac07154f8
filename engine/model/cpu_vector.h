// Vectors of numbers, as wide as the instruction set that a kernel is compiled for.
//
// Everything has internal linkage and no standard header brings a template in: of a shared inline
// function the linker keeps one copy, which may use instructions that this machine does not have.

#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
#endif

#if defined(__AVX512F__)
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX2__)
#define LANES 8
#define REGISTERS 16
#elif defined(__aarch64__)
#define LANES 4
#define REGISTERS 32
#else
#define LANES 4
#define REGISTERS 16
#endif

#define JOIN(a, b) a##b
#define NAMED(prefix, variant) JOIN(prefix, variant)

namespace {

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));
typedef uint8_t ByteVec __attribute__((vector_size(LANES)));
typedef uint8_t WideByteVec __attribute__((vector_size(4 * LANES)));
typedef int16_t ShortVec __attribute__((vector_size(4 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

inline void load(const float *from, float &to) { to = *from; }
inline void load(const float *from, Vec &to) { __builtin_memcpy(&to, from, sizeof to); }
inline void load(const BFloat16 *from, float &to) {
    uint32_t bits = uint32_t(from->bits) << 16;
    __builtin_memcpy(&to, &bits, sizeof to);
}
inline void load(const BFloat16 *from, Vec &to) {
    HalfVec half;
    __builtin_memcpy(&half, from, sizeof half);
    to = (Vec)(__builtin_convertvector(half, BitVec) << 16);
}

inline void store(float *to, float from) { *to = from; }
inline void store(float *to, Vec from) { __builtin_memcpy(to, &from, sizeof from); }
inline void store(BFloat16 *to, float from) {  // to nearest, ties to even
    uint32_t bits;
    __builtin_memcpy(&bits, &from, sizeof bits);
    to->bits = from != from ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void store(BFloat16 *to, Vec from) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)from);  // what is below 2^-126 becomes zero
#else
    const BitVec bits = (BitVec)from;
    const BitVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const BitVec nan = (BitVec)(from != from);
    const HalfVec half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), HalfVec);
#endif
    __builtin_memcpy(to, &half, sizeof half);
}

template <class T>
inline void widen(float *to, const T *from, int count) {
    for (int i = 0; i < count; ++i) load(from + i, to[i]);
}

// Ask for `count` numbers that will be wanted soon.
template <class T>
inline void fetch(const T *from, int count) {
    for (int i = 0; i < count; i += 64 / int(sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

inline float madd(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
inline Vec madd(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}
inline Vec all(float x) { return x - Vec{}; }
inline BitVec every(uint32_t x) { return x - BitVec{}; }

// 2^x for x <= 0, to 1 ulp; exactly 1 at 0 and exactly 0 below -125, so that a masked slot counts
// for nothing. The polynomial is the minimax one of 2^f - 1 over |f| <= 1/2 (2e-9 relative).
inline Vec power_of_two(Vec x) {
    const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);
    Vec p = all(0.00015353362f);
    p = madd(p, f, all(0.00133988750f));
    p = madd(p, f, all(0.00961843692f));
    p = madd(p, f, all(0.0555033237f));
    p = madd(p, f, all(0.240226477f));
    p = madd(p, f, all(0.693147182f));
    p = madd(p, f, all(1.0f));
    const BitVec scaled = (BitVec)p + ((BitVec)shifted << 23);  // p * 2^round(x)
    return (Vec)(scaled & (BitVec)(x >= all(-125.0f)));
}

// One bit for each lane of a comparison's outcome.
inline uint32_t lanes_of(BitVec x) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)x);
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= (x[i] >> 31) << i;
    return bits;
#endif
}

inline float largest(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float best = x[0];
    for (int i = 1; i < LANES; ++i) best = x[i] > best ? x[i] : best;
    return best;
#endif
}
inline float total(Vec x) {  // by halves, a fixed order
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) x[i] += x[i + width];
    return x[0];
}
// Products of neighbouring 16-bit numbers, summed in pairs.
#if defined(__AVX512BW__)
inline IntVec multiply_pairs(ShortVec a, ShortVec b) {
    return (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
inline IntVec multiply_pairs(ShortVec a, ShortVec b) {
    return (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#endif

// look_up: a byte for each index below 16, from a table that stands once in every 128 bits.
// interleave_first, _last: a0 b0 a1 b1 ... of the first, or the last, 8 bytes of every 128 bits.
#if defined(__AVX512BW__)
inline WideByteVec look_up(WideByteVec table, WideByteVec indices) {
    return (WideByteVec)_mm512_shuffle_epi8((__m512i)table, (__m512i)indices);
}
inline WideByteVec interleave_first(WideByteVec a, WideByteVec b) {
    return (WideByteVec)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b);
}
inline WideByteVec interleave_last(WideByteVec a, WideByteVec b) {
    return (WideByteVec)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
inline WideByteVec look_up(WideByteVec table, WideByteVec indices) {
    return (WideByteVec)_mm256_shuffle_epi8((__m256i)table, (__m256i)indices);
}
inline WideByteVec interleave_first(WideByteVec a, WideByteVec b) {
    return (WideByteVec)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
}
inline WideByteVec interleave_last(WideByteVec a, WideByteVec b) {
    return (WideByteVec)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
}
#endif

// GELU by the error function, whose rational approximation (Eigen's) is right to 2 ulp.
inline Vec gelu(Vec x) {
    Vec z = x * all(0.70710678118654752f);
    z = z > all(4.0f) ? all(4.0f) : z;
    z = z < all(-4.0f) ? all(-4.0f) : z;
    const Vec square = z * z;
    Vec p = all(-2.72614225801306e-10f);
    p = madd(p, square, all(2.77068142495902e-08f));
    p = madd(p, square, all(-2.10102402082508e-06f));
    p = madd(p, square, all(-5.69250639462346e-05f));
    p = madd(p, square, all(-7.34990630326855e-04f));
    p = madd(p, square, all(-2.95459980854025e-03f));
    p = madd(p, square, all(-1.60960333262415e-02f));
    Vec q = all(-1.45660718464996e-05f);
    q = madd(q, square, all(-2.13374055278905e-04f));
    q = madd(q, square, all(-1.68282697438203e-03f));
    q = madd(q, square, all(-7.37332916720468e-03f));
    q = madd(q, square, all(-1.42647390514189e-02f));
    const Vec half = x * all(0.5f);
    return madd(half, z * p / q, half);
}

// GELU by the tanh approximation: x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
inline Vec gelu_tanh(Vec x) {
    const Vec cubic = madd(x * x, all(0.044715f), all(1.0f)) * x;
    const Vec z = cubic * all(2.30220819813f);  // 2 sqrt(2 / pi) log2(e)
    const Vec power = power_of_two(z < Vec{} ? z : -z);
    return x * ((z < Vec{} ? power : all(1.0f)) / (all(1.0f) + power));
}

// Items of work among threads. Each walks a share of its own in order, as one stream of loads, and
// then takes what the others have not begun: one that the system holds up does not hold up all.
struct Shares {
    static constexpr int LINE = 8;  // counters in a cache line: each thread has one to itself
    int64_t *const next;            // [threads, LINE], the first of each: its next item
    const int64_t count;
    const int threads;

    Shares(int64_t *memory, int64_t items, int num_threads)
        : next(memory), count(items), threads(num_threads) {
        for (int share = 0; share < threads; ++share) next[share * LINE] = begin(share);
    }
    int64_t begin(int share) const { return count * share / threads; }
    template <class Do>
    void work(int thread, Do item) const {
        for (int other = 0; other < threads; ++other) {
            const int share = (thread + other) % threads;
            const int64_t end = begin(share + 1);
            for (int64_t i; (i = __atomic_fetch_add(next + share * LINE, 1, __ATOMIC_RELAXED)) < end;)
                item(i);
        }
    }
};

// Whether this machine has the vectors that this file is compiled for.
inline int supports_vectors() {
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

}  // namespace

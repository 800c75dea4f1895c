// Vectors of sixteen floats and of pairs of bfloat16, also for processors that have no instructions for the latter.
#pragma once

#include <algorithm>
#include <array>

#include "common.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_VECTORS
#include <immintrin.h>

constexpr i64 LANES = 16;

static inline __mmask16 first(i64 n) { return __mmask16((1u << std::min<i64>(n, LANES)) - 1); }

static inline __m512 dot(__m512 sums, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sums); }

// The even and the odd numbers of pairs.
static inline __m512 evens(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
static inline __m512 odds(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}

#ifdef __AVX512BF16__
constexpr bool HAS_PAIRS = true;
using Pairs = __m512bh;
static inline Pairs pairs_of(__m512i x) { return (__m512bh)x; }
static inline __m512 dot(__m512 sums, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sums, a, b); }
static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline __m512i in_pairs(__m512i halves) {  // numbers n and n + 16 become neighbours
    constexpr int STEP = 0x10001, FIRST = 16 << 16;
    const __m512i order = _mm512_setr_epi32(
        FIRST, FIRST + STEP, FIRST + 2 * STEP, FIRST + 3 * STEP, FIRST + 4 * STEP, FIRST + 5 * STEP, FIRST + 6 * STEP,
        FIRST + 7 * STEP, FIRST + 8 * STEP, FIRST + 9 * STEP, FIRST + 10 * STEP, FIRST + 11 * STEP, FIRST + 12 * STEP,
        FIRST + 13 * STEP, FIRST + 14 * STEP, FIRST + 15 * STEP);
    return _mm512_permutexvar_epi16(order, halves);
}
static inline __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#else
constexpr bool HAS_PAIRS = false;
struct Pairs {
    __m512 even, odd;
};
static inline Pairs pairs_of(__m512i x) { return {evens(x), odds(x)}; }
static inline __m512 dot(__m512 sums, const Pairs& a, const Pairs& b) {
    return _mm512_fmadd_ps(a.even, b.even, _mm512_fmadd_ps(a.odd, b.odd, sums));
}
static inline __m256i narrow(__m512 x) {  // to nearest, ties to even; a NaN stays one
    __m512i bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    near = _mm512_mask_or_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16));
}
static inline __m512i narrow(__m512 low, __m512 high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
}
#endif
static inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Pairs of these, rounded: the 32 numbers whose evens and odds they are.
static inline __m512i paired(__m512 evens, __m512 odds) {
    alignas(64) static constexpr auto order = [] {
        std::array<std::uint16_t, 32> found{};
        for (int i = 0; i < 32; i++) found[i] = std::uint16_t(i / 2 + i % 2 * 16);
        return found;
    }();
    return _mm512_permutexvar_epi16(_mm512_load_si512(order.data()), narrow(evens, odds));
}

static inline __m512i sum(__m512i a, __m512i b) {  // of 32 numbers and 32 others
    return paired(_mm512_add_ps(evens(a), evens(b)), _mm512_add_ps(odds(a), odds(b)));
}

static inline __m512 fma_(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
static inline __m512 inverse(__m512 x) {  // to about one unit in the last place
    __m512 near = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(near, _mm512_fnmadd_ps(x, near, _mm512_set1_ps(2.0f)));
}

static inline __m512 exp_(__m512 x) {  // as that of one number
    auto all = [](float value) { return _mm512_set1_ps(value); };
    x = _mm512_min_ps(all(88.0f), _mm512_max_ps(all(-87.0f), x));  // a NaN stays one
    __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, all(1.44269504f), all(12582912.0f)), all(12582912.0f));
    __m512 r = _mm512_fmadd_ps(n, all(2.12194440e-4f), _mm512_fmadd_ps(n, all(-0.693359375f), x));
    __m512 p = all(1.9875691500e-4f);
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, r, all(next));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), all(1.0f));
    return _mm512_scalef_ps(p, n);
}

static inline __m512 exp2_(__m512 x) {  // 2^x to about a unit in the last place; a NaN stays one
    auto all = [](float value) { return _mm512_set1_ps(value); };
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 p = all(1.32764521e-3f);  // within 2^-23.6 of 2^r
    for (float next : {9.67554132e-3f, 5.55071327e-2f, 2.40221197e-1f, 6.93146970e-1f, 1.00000007f})
        p = _mm512_fmadd_ps(p, r, all(next));
    return _mm512_scalef_ps(p, n);
}
#endif

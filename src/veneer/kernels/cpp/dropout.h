// The mask of dropout, which ../dropout.py defines: numbers 2n and 2n + 1 have the halves of the hash of n.
#pragma once

#include "bf16_512.h"

struct Dropout {
    i64 key, threshold, begin;  // begin: the place of the first number in all that the mask is of
    float scale;
};

// The second key, for counters with this upper half.
static inline std::uint32_t second_key(const Dropout& d, i64 counter) {
    return std::uint32_t(d.key >> 32) + std::uint32_t(counter >> 32) * 0x9e3779b9u;
}

// What is added to a sum for x, the number at a place.
template <class T>
static inline float dropped(const Dropout& d, float x, i64 place) {
    const i64 counter = place / 2;
    std::uint32_t h = std::uint32_t(counter) ^ std::uint32_t(d.key);
    h = (h ^ (h >> 16)) * 0x7feb352du ^ second_key(d, counter);
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    h ^= h >> 16;
    return (place % 2 ? h >> 16 : h & 0xffff) >= std::uint32_t(d.threshold) ? rounded<T>(x * d.scale) : 0.0f;
}

#ifdef HAS_VECTORS
// The same for 32 numbers from an even place on, of counters with one upper half.
class Drops {
    __m512i first_, second_, least_;
    __m512 scale_;

    static __m512i key(std::uint32_t k, int shift) { return _mm512_set1_epi32(int(k ^ (k >> shift))); }
    template <int SHIFT>  // of h with a key on it: h ^= h >> SHIFT
    static __m512i mixed(__m512i h, __m512i key) {
        return _mm512_ternarylogic_epi32(h, _mm512_srli_epi32(h, SHIFT), key, 0x96);
    }

public:
    Drops(const Dropout& d, i64 place)
        : first_(key(std::uint32_t(d.key), 16)), second_(key(second_key(d, place / 2), 15)),
          least_(_mm512_set1_epi16(short(d.threshold))), scale_(_mm512_set1_ps(d.scale)) {}

    __mmask32 stays(i64 place) const {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512i h = mixed<16>(_mm512_add_epi32(_mm512_set1_epi32(int(place / 2)), lanes), first_);
        h = mixed<15>(_mm512_mullo_epi32(h, _mm512_set1_epi32(0x7feb352d)), second_);
        h = _mm512_mullo_epi32(h, _mm512_set1_epi32(int(0x846ca68bu)));
        return _mm512_cmpge_epu16_mask(_mm512_xor_si512(h, _mm512_srli_epi32(h, 16)), least_);
    }
    __m512i of(__m512i x, i64 place) const { return of(x, stays(place)); }
    __m512i of(__m512i x, __mmask32 stays) const {
        const __m512i y = paired(_mm512_mul_ps(evens(x), scale_), _mm512_mul_ps(odds(x), scale_));
        return _mm512_maskz_mov_epi16(stays, y);
    }
};

static inline __mmask32 up_to_32(i64 n) { return n >= 2 * LANES ? ~0u : (1u << n) - 1; }

// A row's numbers from `place` on with the mask over them, perhaps in place.
static inline void drop_row(const Drops& drops, const bf16* x, i64 count, i64 place, bf16* out) {
    for (i64 i = 0; i < count; i += 2 * LANES) {
        const __mmask32 there = up_to_32(count - i);
        _mm512_mask_storeu_epi16(out + i, there, drops.of(_mm512_maskz_loadu_epi16(there, x + i), place + i));
    }
}
#endif

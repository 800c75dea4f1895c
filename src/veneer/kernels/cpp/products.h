// What a sum of matrix products is told, and how right-hand sides are laid out in pairs.
#pragma once

#include "dropout.h"

#ifdef HAS_VECTORS
struct Product {  // of A [rows, depth] with W [columns, depth] turned, or with W [depth, columns]; depth is even
    const bf16 *a, *w;
    i64 a_row, w_row, depth, turned;
};

constexpr i64 MOST_PRODUCTS = 8;

// What a mask is over: the left side of the only product, or what the last of several comes to, which is rounded before.
enum Dropped : i64 { NONE_DROPPED, ROWS_DROPPED, LAST_DROPPED };

struct Products {
    Product products[MOST_PRODUCTS];
    i64 count, rows, columns, out_row;
    const bf16 *bias, *less_one;  // or null; rounded sums are multiplied by 1 + less_one, and then there is no bias
    bf16* out;
    i64 dropped;
    Dropout drop;
};

// Of 16 vectors of 16 pairs.
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Sixteen pairs of one row and the next, of up to 16 columns.
static inline __m512i pairs_down(const bf16* row, const bf16* next, i64 columns) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(columns), row));
    if (!next) return low;
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(columns), next));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Sixteen columns, from `column` on, of pairs [pairs, width] of W's depth from `depth` on: `line(k)` is where pair k's
// go. Columns from `there` on are zero.
template <class Line>
static inline void lay_out_columns(const Product& p, i64 column, i64 there, i64 depth, i64 pairs, Line line) {
    if (p.turned) {
        const bf16* w = p.w + column * p.w_row + depth;
        for (i64 k = 0; k < pairs; k += LANES) {
            __m512i r[16];
            for (i64 i = 0; i < LANES; i++)
                r[i] = i < there ? _mm512_maskz_loadu_epi32(first(pairs - k), w + i * p.w_row + 2 * k)
                                 : _mm512_setzero_si512();
            transpose(r);
            for (i64 i = 0; i < std::min(LANES, pairs - k); i++) _mm512_store_si512(line(k + i), r[i]);
        }
    } else {
        const bf16* w = p.w + depth * p.w_row + column;
        for (i64 k = 0; k < pairs; k++, w += 2 * p.w_row)
            _mm512_store_si512(line(k), pairs_down(w, w + p.w_row, there));
    }
}
#endif

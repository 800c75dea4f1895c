// Processors with a unit for whole tiles of a product (AMX): 16 rows of 16 sums, 16 rows of 32 numbers on the left, 16
// rows of 16 pairs on the right.
#pragma once

#include "bf16_512.h"

#if defined(HAS_VECTORS) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define HAS_TILES

constexpr i64 SIDE = 16, DEEP = 32;  // rows and columns of a tile of sums; the depth of a tile on either side

// All that was written lies in memory: compilers do not know what instructions with tiles read.
inline void settle(const void* at = nullptr) { __asm__ volatile("" : : "r"(at) : "memory"); }

// The tiles of a thread, as long as this lives: 0 to 3 are sums, 4 and 5 are left sides, 6 and 7 right ones; tiles 2, 3
// and 5 belong to the second 16 of up to 32 rows.
class Tiles {
    struct alignas(64) Shape {
        std::uint8_t palette = 1, start = 0, none[14] = {};
        std::uint16_t bytes[16] = {};
        std::uint8_t rows[16] = {};
    };
    i64 rows_ = 0;

public:
    Tiles() { take(2 * SIDE); }
    Tiles(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
    void take(i64 rows) {
        if (rows == rows_) return;
        rows_ = rows;
        Shape shape;
        const i64 top = std::min(SIDE, rows), rest = std::max<i64>(1, rows - SIDE);
        const i64 of_tile[] = {top, top, rest, rest, top, rest, SIDE, SIDE};
        for (int i = 0; i < 8; i++) shape.rows[i] = std::uint8_t(of_tile[i]), shape.bytes[i] = 64;
        settle(&shape);
        _tile_loadconfig(&shape);
    }
};

// The sums, M tiles of rows by N of columns; first of all.
template <int M, int N>
inline void clear() {
    settle();
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1 && N > 1) _tile_zero(3);
}
template <int M, int N>
inline void load(const float* c, i64 c_row) {
    settle();
    _tile_loadd(0, c, 4 * c_row);
    if (N > 1) _tile_loadd(1, c + SIDE, 4 * c_row);
    if (M > 1) _tile_loadd(2, c + SIDE * c_row, 4 * c_row);
    if (M > 1 && N > 1) _tile_loadd(3, c + SIDE * c_row + SIDE, 4 * c_row);
}
template <int M, int N>
inline void store(float* c, i64 c_row) {
    _tile_stored(0, c, 4 * c_row);
    if (N > 1) _tile_stored(1, c + SIDE, 4 * c_row);
    if (M > 1) _tile_stored(2, c + SIDE * c_row, 4 * c_row);
    if (M > 1 && N > 1) _tile_stored(3, c + SIDE * c_row + SIDE, 4 * c_row);
}
// C += A B, A [rows, 32] in rows of a_row numbers, B [16 pairs, 16 N] in rows of b_row pairs.
template <int M, int N>
inline void add_product(const void* a, i64 a_row, const Pair* b, i64 b_row) {
    _tile_loadd(4, a, 2 * a_row);
    _tile_loadd(6, b, 4 * b_row);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) {
        _tile_loadd(7, b + SIDE, 4 * b_row);
        _tile_dpbf16ps(1, 4, 7);
    }
    if (M > 1) {
        _tile_loadd(5, (const char*)a + 2 * SIDE * a_row, 2 * a_row);
        _tile_dpbf16ps(2, 5, 6);
        if (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
}
#endif

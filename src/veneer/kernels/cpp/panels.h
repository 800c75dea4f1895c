// Sums of products by tiles, for one thread. The right-hand sides are laid out in panels of 32 columns that stay in the
// second cache together; then 32 rows at a time are read where they lie and go over all panels. What is left of each
// product's depth beyond whole tiles is put side by side in a few more tiles, the edge.
#pragma once

#include "products.h"
#include "tiles.h"

#ifdef HAS_TILES
constexpr i64 WIDTH = 2 * SIDE, TALL = 2 * SIDE, SLICE = 64;  // tiles of the depth at a time
constexpr i64 OF_TILE = SIDE * WIDTH;  // pairs of a panel for a tile of the depth

struct Run {  // consecutive tiles of the depth that lie in one matrix
    const bf16* a;
    i64 a_row, tiles;
};

struct Between {
    float* sums;  // [rows, sums_row] of the depth before and after; null where there is none
    i64 sums_row;
    bool begins, ends;
};

struct Part {  // of the sums
    i64 column, panels, row, end;
};

inline i64 whole_tiles(const Product& p) { return p.depth / DEEP; }
inline i64 edge_of(const Product& p) { return p.depth % DEEP; }

// A panel [pairs, 32] of W's columns from `column` on; of up to 16, the half that is used.
inline void lay_out(const Product& p, i64 column, i64 columns, i64 depth, i64 pairs, Pair* out) {
    for (i64 n = 0; n < std::min(columns, WIDTH); n += LANES)
        lay_out_columns(p, column + n, std::min(LANES, columns - n), depth, pairs,
                        [&](i64 k) { return out + k * WIDTH + n; });
}

inline void lay_out_edge(const Products& s, i64 column, i64 columns, i64 edge, Pair* out) {
    Pair* const end = out + edge / 2 * WIDTH;
    for (i64 i = 0; i < s.count; i++) {
        const Product& p = s.products[i];
        lay_out(p, column, columns, p.depth - edge_of(p), edge_of(p) / 2, out);
        out += edge_of(p) / 2 * WIDTH;
    }
    std::fill(out, end, Pair(0));
}

// The edge of the left sides [rows, edge], with the mask over it where that is theirs.
inline void gather_edge(const Products& s, i64 row, i64 end, i64 edge, bf16* out) {
    for (; row < end; row++, out += edge) {
        bf16* at = out;
        for (i64 i = 0; i < s.count; i++) {
            const Product& p = s.products[i];
            at = std::copy_n(p.a + row * p.a_row + p.depth - edge_of(p), edge_of(p), at);
        }
        if (s.dropped == ROWS_DROPPED)
            drop_row({s.drop, s.drop.begin}, out, at - out,
                     s.drop.begin + (row + 1) * s.products->depth - (at - out), out);
        std::fill(at, out + edge, bf16{0});
    }
}

// What else is done for each block: with the tiles before it, and by vectors at each step of it, while tiles are busy.
struct Nothing {
    void begin(i64, i64, i64) const {}
    void step() const {}
};

// Sums of up to 32 rows and columns. Meanwhile `count` rows from `ahead` on come into the second cache.
template <int M, int N, class Meanwhile>
void block(const Run* runs, const Run* runs_end, i64 row, const Pair* panel, i64 column, const Between& to,
           i64 ahead, i64 count, Meanwhile& meanwhile, float* out) {
    if (to.begins) clear<M, N>();
    else load<M, N>(to.sums + row * to.sums_row + column, to.sums_row);
    for (const Run* run = runs; run < runs_end; run++) {
        const bf16 *a = run->a + row * run->a_row, *next = run->a + ahead * run->a_row;
        for (i64 k = 0; k < run->tiles; k++, panel += OF_TILE) {
            for (i64 i = 0; i < count; i++)
                _mm_prefetch((const char*)(next + i * run->a_row + DEEP * k), _MM_HINT_T1);
            add_product<M, N>(a + DEEP * k, run->a_row, panel, WIDTH);
            meanwhile.step();
        }
    }
    if (to.ends) store<M, N>(out, WIDTH);
    else store<M, N>(to.sums + row * to.sums_row + column, to.sums_row);
}

// finish(sums [rows, 32], row, rows, column, columns) for every block of a part of the products' sum.
template <class Finish, class Meanwhile = const Nothing>
void multiply(const Products& s, const Part& part, Tiles& tiles, const Finish& finish, Meanwhile& meanwhile = {}) {
    alignas(64) float done[TALL * WIDTH];
    static thread_local Room<Pair> for_panels, for_edges, for_masked;
    static thread_local Room<float> for_sums;
    i64 whole = 0, edge = 0;
    for (i64 i = 0; i < s.count; i++) whole += whole_tiles(s.products[i]), edge += edge_of(s.products[i]);
    edge = up_to(edge, DEEP);
    const i64 of_panel = (std::min(whole, SLICE) + edge / DEEP) * OF_TILE, width = part.panels * WIDTH;
    Pair* const panels = for_panels.of(of_panel * part.panels);
    bf16* const edges = (bf16*)for_edges.of((part.end - part.row) * edge / 2);
    float* const sums = whole > SLICE ? for_sums.of((part.end - part.row) * width) : nullptr;
    gather_edge(s, part.row, part.end, edge, edges);
    auto columns_of = [&](i64 column) { return std::min(WIDTH, s.columns - column); };
    for (i64 start = 0; start == 0 || start < whole; start += SLICE) {
        const i64 end = std::min(start + SLICE, whole);
        const Between to{sums ? sums - part.row * width - part.column : nullptr, width, start == 0, end == whole};
        Run runs[MOST_PRODUCTS + 1], *runs_end = runs;
        for (i64 i = 0, passed = 0; i < s.count; passed += whole_tiles(s.products[i++])) {
            const Product& p = s.products[i];
            const i64 from = std::max(start, passed), to_tile = std::min(end, passed + whole_tiles(p));
            if (from >= to_tile) continue;
            for (i64 n = 0; n < part.panels; n++) {
                const i64 column = part.column + n * WIDTH;
                lay_out(p, column, columns_of(column), DEEP * (from - passed), SIDE * (to_tile - from),
                        panels + n * of_panel + (from - start) * OF_TILE);
            }
            *runs_end++ = {p.a + DEEP * (from - passed), p.a_row, to_tile - from};
        }
        if (to.ends && edge) {
            for (i64 n = 0; n < part.panels; n++) {
                const i64 column = part.column + n * WIDTH;
                lay_out_edge(s, column, columns_of(column), edge, panels + n * of_panel + (end - start) * OF_TILE);
            }
            *runs_end++ = {edges - part.row * edge, edge, edge / DEEP};
        }
        for (i64 row = part.row; row < part.end; row += TALL) {
            const i64 rows = std::min(TALL, part.end - row);
            tiles.take(rows);
            if (s.dropped == ROWS_DROPPED && whole) {
                const Product& p = *s.products;
                const Drops drops(s.drop, s.drop.begin);
                bf16* const masked = (bf16*)for_masked.of(TALL * SLICE * DEEP / 2);
                const i64 count = DEEP * (end - start), column = DEEP * start;
                for (i64 i = 0; i < rows; i++)
                    drop_row(drops, p.a + (row + i) * p.a_row + column, count,
                             s.drop.begin + (row + i) * p.depth + column, masked + i * count);
                *runs = {masked - row * count, count, end - start};
            }
            for (i64 n = 0; n < part.panels; n++) {
                const i64 column = part.column + n * WIDTH, columns = columns_of(column);
                const i64 ahead = row + TALL + n * TALL / part.panels;
                const i64 ahead_end =
                    s.dropped == ROWS_DROPPED ? 0 : std::min(row + TALL + (n + 1) * TALL / part.panels, part.end);
                auto go = [&](auto function) {
                    function(runs, runs_end, row, panels + n * of_panel, column, to, ahead, ahead_end - ahead,
                             meanwhile, done);
                };
                if (to.ends) meanwhile.begin(row, rows, column);
                if (rows > SIDE && columns > SIDE) go(block<2, 2, Meanwhile>);
                else if (rows > SIDE) go(block<2, 1, Meanwhile>);
                else if (columns > SIDE) go(block<1, 2, Meanwhile>);
                else go(block<1, 1, Meanwhile>);
                if (to.ends) finish(done, row, rows, column, columns);
            }
        }
        tiles.take(TALL);
    }
}
#endif

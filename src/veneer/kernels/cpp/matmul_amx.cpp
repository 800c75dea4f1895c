// Sums of matrix products in bfloat16 on processors with a unit for whole tiles (AMX). Every element is summed in
// float32 in one order, whatever the threads, and rounded once.
//
// A job is a group of columns and a part of the rows. The group's weights are laid out once, in panels of 32 columns
// that stay in the second cache together; then 32 rows at a time are read where they lie and go over all panels. What is
// left of each product's depth beyond whole tiles is put side by side in a few more tiles, the edge.

#include "products.h"
#include "tiles.h"

#ifdef HAS_TILES
namespace {

constexpr i64 WIDTH = 2 * SIDE, TALL = 2 * SIDE, SLICE = 64, RESIDENT = 1300 << 10;  // tiles of the depth; bytes
constexpr i64 OF_TILE = SIDE * WIDTH;  // pairs of a panel for a tile of the depth

struct Run {  // consecutive tiles of the depth that lie in one matrix
    const bf16* a;
    i64 a_row, tiles;
};

struct Target {
    float* sums;  // [rows, sums_row] of the depth before and after; null where there is none
    i64 sums_row;
    bool begins, ends;
    const bf16* bias;
    bf16* out;
    i64 out_row;
};

struct Job {
    i64 column, panels, row, end;
};

i64 whole_tiles(const Product& p) { return p.depth / DEEP; }
i64 edge_of(const Product& p) { return p.depth % DEEP; }

// A panel [pairs, 32] of W's columns from `column` on.
void lay_out(const Product& p, i64 column, i64 columns, i64 depth, i64 pairs, Pair* out) {
    for (i64 n = 0; n < WIDTH; n += LANES)
        lay_out_columns(p, column + n, std::max<i64>(0, std::min(LANES, columns - n)), depth, pairs,
                        [&](i64 k) { return out + k * WIDTH + n; });
}

void lay_out_edge(const Products& s, i64 column, i64 columns, i64 edge, Pair* out) {
    Pair* const end = out + edge / 2 * WIDTH;
    for (i64 i = 0; i < s.count; i++) {
        const Product& p = s.products[i];
        lay_out(p, column, columns, p.depth - edge_of(p), edge_of(p) / 2, out);
        out += edge_of(p) / 2 * WIDTH;
    }
    std::fill(out, end, Pair(0));
}

// The edge of the left sides [rows, edge].
void gather_edge(const Products& s, i64 row, i64 end, i64 edge, bf16* out) {
    for (; row < end; row++, out += edge) {
        bf16* at = out;
        for (i64 i = 0; i < s.count; i++) {
            const Product& p = s.products[i];
            at = std::copy_n(p.a + row * p.a_row + p.depth - edge_of(p), edge_of(p), at);
        }
        std::fill(at, out + edge, bf16{0});
    }
}

// Sums of up to 32 rows and columns. Meanwhile `count` rows from `ahead` on come into the second cache.
template <int M, int N>
void block(const Run* runs, const Run* runs_end, i64 row, i64 rows, const Pair* panel, i64 column, i64 columns,
           const Target& to, i64 ahead, i64 count) {
    alignas(64) float scratch[TALL * WIDTH];
    if (to.begins) clear<M, N>();
    else load<M, N>(to.sums + row * to.sums_row + column, to.sums_row);
    for (const Run* run = runs; run < runs_end; run++) {
        const bf16 *a = run->a + row * run->a_row, *next = run->a + ahead * run->a_row;
        for (i64 k = 0; k < run->tiles; k++, panel += OF_TILE) {
            for (i64 i = 0; i < count; i++)
                _mm_prefetch((const char*)(next + i * run->a_row + DEEP * k), _MM_HINT_T1);
            add_product<M, N>(a + DEEP * k, run->a_row, panel, WIDTH);
        }
    }
    if (!to.ends) {
        store<M, N>(to.sums + row * to.sums_row + column, to.sums_row);
        return;
    }
    store<M, N>(scratch, WIDTH);
    const __mmask32 there = columns >= WIDTH ? ~0u : (1u << columns) - 1;
    __m512i bias = _mm512_setzero_si512();
    if (to.bias) bias = _mm512_maskz_loadu_epi16(there, to.bias + column);
    const __m512 low_bias = widened(_mm512_castsi512_si256(bias));
    const __m512 high_bias = widened(_mm512_extracti64x4_epi64(bias, 1));
    for (i64 i = 0; i < rows; i++) {
        const __m512 low = _mm512_add_ps(_mm512_load_ps(scratch + i * WIDTH), low_bias);
        const __m512 high = N > 1 ? _mm512_add_ps(_mm512_load_ps(scratch + i * WIDTH + SIDE), high_bias) : low;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_mask_storeu_epi16(to.out + (row + i) * to.out_row + column, there, both);
    }
}

void multiply(const Products& s, const Job& job, Tiles& tiles) {
    static thread_local Room<Pair> for_panels, for_edges;
    static thread_local Room<float> for_sums;
    i64 whole = 0, edge = 0;
    for (i64 i = 0; i < s.count; i++) whole += whole_tiles(s.products[i]), edge += edge_of(s.products[i]);
    edge = up_to(edge, DEEP);
    const i64 of_panel = (std::min(whole, SLICE) + edge / DEEP) * OF_TILE, width = job.panels * WIDTH;
    Pair* const panels = for_panels.of(of_panel * job.panels);
    bf16* const edges = (bf16*)for_edges.of((job.end - job.row) * edge / 2);
    float* const sums = whole > SLICE ? for_sums.of((job.end - job.row) * width) : nullptr;
    gather_edge(s, job.row, job.end, edge, edges);
    auto columns_of = [&](i64 column) { return std::min(WIDTH, s.columns - column); };
    for (i64 start = 0; start == 0 || start < whole; start += SLICE) {
        const i64 end = std::min(start + SLICE, whole);
        const Target to{sums ? sums - job.row * width - job.column : nullptr, width, start == 0, end == whole, s.bias,
                        s.out, s.out_row};
        Run runs[MOST_PRODUCTS + 1], *runs_end = runs;
        for (i64 i = 0, passed = 0; i < s.count; passed += whole_tiles(s.products[i++])) {
            const Product& p = s.products[i];
            const i64 from = std::max(start, passed), to_tile = std::min(end, passed + whole_tiles(p));
            if (from >= to_tile) continue;
            for (i64 n = 0; n < job.panels; n++) {
                const i64 column = job.column + n * WIDTH;
                lay_out(p, column, columns_of(column), DEEP * (from - passed), SIDE * (to_tile - from),
                        panels + n * of_panel + (from - start) * OF_TILE);
            }
            *runs_end++ = {p.a + DEEP * (from - passed), p.a_row, to_tile - from};
        }
        if (to.ends && edge) {
            for (i64 n = 0; n < job.panels; n++) {
                const i64 column = job.column + n * WIDTH;
                lay_out_edge(s, column, columns_of(column), edge, panels + n * of_panel + (end - start) * OF_TILE);
            }
            *runs_end++ = {edges - job.row * edge, edge, edge / DEEP};
        }
        for (i64 row = job.row; row < job.end; row += TALL) {
            const i64 rows = std::min(TALL, job.end - row);
            tiles.take(rows);
            for (i64 n = 0; n < job.panels; n++) {
                const i64 column = job.column + n * WIDTH, columns = columns_of(column);
                const i64 ahead = row + TALL + n * TALL / job.panels;
                const i64 ahead_end = std::min(row + TALL + (n + 1) * TALL / job.panels, job.end);
                auto go = [&](auto function) {
                    function(runs, runs_end, row, rows, panels + n * of_panel, column, columns, to, ahead,
                             ahead_end - ahead);
                };
                if (rows > SIDE && columns > SIDE) go(block<2, 2>);
                else if (rows > SIDE) go(block<2, 1>);
                else if (columns > SIDE) go(block<1, 2>);
                else go(block<1, 1>);
            }
        }
        tiles.take(TALL);
    }
}

void matmul(const Products& s, int threads) {
    i64 depth = 0;
    for (i64 i = 0; i < s.count; i++) depth += up_to(s.products[i].depth, DEEP) / DEEP;
    // Groups of panels that fit, and as many for each thread; where there are too few panels, threads share the rows.
    const i64 panels = up_to(s.columns, WIDTH) / WIDTH, bytes = std::min(depth, SLICE) * OF_TILE * i64(sizeof(Pair));
    const i64 fit = std::max<i64>(1, RESIDENT / bytes), groups = (panels + fit - 1) / fit;
    const bool by_rows = panels % threads && panels < 4 * threads;
    const i64 some = by_rows ? groups : up_to(groups, threads), of_group = (panels + some - 1) / some;
    const i64 parts = by_rows ? threads : 1, of_part = up_to((s.rows + parts - 1) / parts, TALL);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic) collapse(2)
        for (i64 panel = 0; panel < panels; panel += of_group)
            for (i64 row = 0; row < s.rows; row += of_part)
                multiply(s, {panel * WIDTH, std::min(of_group, panels - panel), row, std::min(row + of_part, s.rows)},
                         tiles);
    }
}

// A tile's worth of P, 32 rows by 16 ranks from `p` on, turned: 16 rows of 32 numbers, zero beyond.
void turn_ranks(const bf16* p, i64 p_row, i64 rows, i64 ranks, Pair* out, i64 out_row) {
    __m512i r[16];
    for (i64 k = 0; k < LANES; k++, p += 2 * p_row)
        r[k] = 2 * k < rows ? pairs_down(p, 2 * k + 1 < rows ? p + p_row : nullptr, ranks) : _mm512_setzero_si512();
    transpose(r);
    for (i64 i = 0; i < LANES; i++) _mm512_store_si512(out + i * out_row, r[i]);
}

// Pairs of rows of up to 32 columns [steps / 2, 32]: zero beyond.
void pair_rows(const bf16* x, i64 x_row, i64 rows, i64 columns, i64 steps, Pair* out) {
    alignas(64) static const auto order = [] {
        std::array<std::uint16_t, 64> found{};
        for (i64 i = 0; i < 64; i++) found[i] = std::uint16_t(i / 2 + i % 2 * 32);
        return found;
    }();
    const __m512i low = _mm512_load_si512(&order[0]), high = _mm512_load_si512(&order[32]);
    const __mmask32 there = columns >= WIDTH ? ~0u : (1u << columns) - 1;
    for (i64 t = 0; t < steps; t += 2, x += 2 * x_row, out += WIDTH) {
        const __m512i even = t < rows ? _mm512_maskz_loadu_epi16(there, x) : _mm512_setzero_si512();
        const __m512i odd = t + 1 < rows ? _mm512_maskz_loadu_epi16(there, x + x_row) : _mm512_setzero_si512();
        _mm512_store_si512(out, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(out + LANES, _mm512_permutex2var_epi16(even, high, odd));
    }
}

// out [width, columns] float32 = P [rows, width]^T X [rows, columns].
void outer(const bf16* p, i64 p_row, const bf16* x, i64 x_row, float* out, i64 rows, i64 width, i64 columns,
           int threads) {
    constexpr i64 AT_ONCE = 256;  // rows whose pairs stay in the first cache
    static thread_local Room<Pair> turned;
    const i64 steps = up_to(rows, DEEP), ranks = up_to(width, SIDE);
    Pair* const left = turned.of(ranks * steps / 2);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        static thread_local Room<float> for_sums;
        alignas(64) Pair pairs[AT_ONCE / 2 * WIDTH];
        float* const sums = for_sums.of(up_to(ranks, TALL) * WIDTH);
#pragma omp for schedule(static)
        for (i64 t = 0; t < steps; t += DEEP)
            for (i64 r = 0; r < ranks; r += SIDE)
                turn_ranks(p + t * p_row + r, p_row, rows - t, width - r, left + (r * steps + t) / 2, steps / 2);
#pragma omp for schedule(static)
        for (i64 column = 0; column < columns; column += WIDTH) {
            const i64 here = std::min(WIDTH, columns - column);
            std::fill_n(sums, ranks * WIDTH, 0.0f);
            for (i64 t = 0; t < rows; t += AT_ONCE) {
                const i64 part = std::min(AT_ONCE, steps - t);
                pair_rows(x + t * x_row + column, x_row, rows - t, here, part, pairs);
                for (i64 r = 0; r < ranks; r += TALL) {
                    auto go = [&](auto m) {
                        constexpr int M = decltype(m)::value;
                        load<M, 2>(sums + r * WIDTH, WIDTH);
                        for (i64 k = 0; k < part; k += DEEP)
                            add_product<M, 2>(left + (r * steps + t + k) / 2, steps, pairs + k / 2 * WIDTH, WIDTH);
                        store<M, 2>(sums + r * WIDTH, WIDTH);
                    };
                    if (ranks - r > SIDE) go(std::integral_constant<int, 2>{});
                    else go(std::integral_constant<int, 1>{});
                }
            }
            for (i64 r = 0; r < width; r++) std::copy_n(sums + r * WIDTH, here, out + r * columns + column);
        }
    }
}

}  // namespace

extern "C" i64 block_of_matmul() { return 1; }  // each number keeps its own exponent

extern "C" void matmul_bf16(const Products* sum, int threads) { matmul(*sum, threads); }

extern "C" void outer_bf16(const bf16* p, i64 p_row, const bf16* x, i64 x_row, float* out, i64 rows, i64 width,
                           i64 columns, int threads) {
    outer(p, p_row, x, x_row, out, rows, width, columns, threads);
}
#endif

// Sums of matrix products in bfloat16, for processors that multiply it in pairs (AVX512-BF16) and have no unit for whole
// tiles (AMX), which PyTorch's own library uses. Every element is summed in float32 in one order, whatever the threads,
// and rounded once.
//
// The right-hand sides are laid out in panels of 64 columns; a tile of rows goes over a panel with all its sums in
// registers. The tile's rows are read where they lie.

#include "common.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include <immintrin.h>

#include <algorithm>
#include <vector>

namespace {

struct alignas(64) Line {
    Pair pairs[16];
};

constexpr i64 LANES = 16, COLUMNS = 4 * LANES, DEPTH = 2048, CHUNK = 192, GROUP = 4 << 20, MOST = 8;

struct Product {  // of A [rows, depth] with W [columns, depth] turned, or with W [depth, columns]; depth is even
    const bf16 *a, *w;
    i64 a_row, w_row, depth, turned;
};

struct Products {
    Product products[MOST];
    i64 count, rows, columns, out_row;
    const bf16* bias;  // or null
    bf16* out;
};

inline __mmask16 first(i64 n) { return __mmask16((1u << std::min<i64>(n, LANES)) - 1); }

void transpose(__m512i r[16]) {
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

// [pairs, width] into a panel of that width: pair (k, n) is W's elements 2k and 2k + 1 of column n; zero from `columns`.
void lay_out(const Product& p, i64 column, i64 columns, i64 depth, i64 pairs, Pair* out, i64 width) {
    for (i64 n = 0; n < width; n += LANES) {
        const i64 there = std::max<i64>(0, std::min(LANES, columns - n));
        if (p.turned) {
            const bf16* w = p.w + (column + n) * p.w_row + depth;
            for (i64 k = 0; k < pairs; k += LANES) {
                __m512i r[16];
                for (i64 i = 0; i < LANES; i++)
                    r[i] = i < there ? _mm512_maskz_loadu_epi32(first(pairs - k), w + i * p.w_row + 2 * k)
                                     : _mm512_setzero_si512();
                transpose(r);
                for (i64 i = 0; i < std::min(LANES, pairs - k); i++) _mm512_store_si512(out + (k + i) * width + n, r[i]);
            }
        } else {
            const bf16* w = p.w + depth * p.w_row + column + n;
            for (i64 k = 0; k < pairs; k++) {
                __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(there), w + 2 * k * p.w_row));
                __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(there), w + (2 * k + 1) * p.w_row));
                _mm512_store_si512(out + k * width + n, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }
}

struct Run {  // consecutive pairs of the depth that come from one product
    const bf16* a;
    i64 a_row, pairs;
};

struct Target {
    float* sums;  // [rows, sums_row] of the depth before and after; null where there is none
    i64 sums_row;
    bool begins, ends;
    const bf16* bias;
    bf16* out;
    i64 out_row;
};

template <int M, int N>
inline void tile(const Run* runs, i64 count, i64 row, const Pair* panel, i64 column, i64 columns, const Target& to) {
    __m512 sums[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++)
            sums[i][j] = to.begins ? _mm512_setzero_ps()
                                   : _mm512_loadu_ps(to.sums + (row + i) * to.sums_row + column + j * LANES);
    for (const Run* run = runs; run < runs + count; run++) {
        const bf16* a = run->a + row * run->a_row;
        for (i64 k = 0; k < run->pairs; k++, panel += N * LANES) {
            __m512bh right[N];
            for (int j = 0; j < N; j++) right[j] = (__m512bh)_mm512_load_si512(panel + j * LANES);
            for (int i = 0; i < M; i++) {
                __m512bh left = (__m512bh)_mm512_set1_epi32(int(*(const StoredPair*)(a + i * run->a_row + 2 * k)));
                for (int j = 0; j < N; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
            }
        }
    }
    for (int j = 0; j < N; j++) {
        const __mmask16 there = first(columns - j * LANES);
        const i64 at = column + j * LANES;
        __m512 bias = _mm512_setzero_ps();
        if (to.bias)
            bias = _mm512_castsi512_ps(
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, to.bias + at)), 16));
        for (int i = 0; i < M; i++) {
            if (!to.ends) {
                _mm512_storeu_ps(to.sums + (row + i) * to.sums_row + at, sums[i][j]);
                continue;
            }
            __m512 y = _mm512_add_ps(sums[i][j], bias);
            _mm256_mask_storeu_epi16(to.out + (row + i) * to.out_row + at, there, (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
}

template <int M, int N>
void tiles(const Run* runs, i64 count, i64 row, i64 end, const Pair* panel, i64 column, i64 columns, const Target& to) {
    for (; row + M <= end; row += M) tile<M, N>(runs, count, row, panel, column, columns, to);
    if constexpr (M > 1) tiles<M / 2, N>(runs, count, row, end, panel, column, columns, to);
}

void rows_of(const Run* runs, i64 count, i64 row, i64 end, const Pair* panel, i64 column, i64 columns, i64 width,
             const Target& to) {
    if (width == 4 * LANES) tiles<6, 4>(runs, count, row, end, panel, column, columns, to);
    if (width == 3 * LANES) tiles<8, 3>(runs, count, row, end, panel, column, columns, to);
    if (width == 2 * LANES) tiles<12, 2>(runs, count, row, end, panel, column, columns, to);
    if (width == LANES) tiles<16, 1>(runs, count, row, end, panel, column, columns, to);
}

void matmul(const Products& s, int threads) {
    thread_local std::vector<Line> panels;
    thread_local std::vector<float> between;
    i64 depth = 0;
    for (i64 i = 0; i < s.count; i++) depth += s.products[i].depth / 2;
    const i64 slice = std::min(depth, DEPTH), all = up_to(s.columns, LANES);
    const i64 group = std::min(up_to(s.columns, COLUMNS), std::max<i64>(threads, GROUP / (slice * COLUMNS * 4)) * COLUMNS);
    if (i64(panels.size()) < slice * group / LANES) panels.resize(slice * group / LANES);
    if (depth > slice && i64(between.size()) < s.rows * all) between.resize(s.rows * all);
    Line* const lines = panels.data();
    float* const sums = between.data();
    for (i64 start = 0; start < depth; start += slice) {
        const i64 pairs = std::min(slice, depth - start);
        const Target to{sums, all, start == 0, start + pairs == depth, s.bias, s.out, s.out_row};
        Run runs[MOST];
        i64 from[MOST], count = 0, which[MOST], passed = 0;  // where each begins, and of which product it is
        for (i64 i = 0; i < s.count; passed += s.products[i].depth / 2, i++) {
            const Product& p = s.products[i];
            const i64 begin = std::max(start, passed), end = std::min(start + pairs, passed + p.depth / 2);
            if (begin >= end) continue;
            from[count] = begin - passed, which[count] = i;
            runs[count++] = {p.a + 2 * (begin - passed), p.a_row, end - begin};
        }
        for (i64 column = 0; column < s.columns; column += group) {
            const i64 here = (std::min(group, s.columns - column) + COLUMNS - 1) / COLUMNS;
            const i64 chunks = (s.rows + CHUNK - 1) / CHUNK;
            auto columns_of = [&](i64 panel) { return std::min(COLUMNS, s.columns - column - panel * COLUMNS); };
#pragma omp parallel num_threads(threads)
            {
#pragma omp for schedule(dynamic)
                for (i64 panel = 0; panel < here; panel++) {
                    const i64 width = up_to(columns_of(panel), LANES);
                    Pair* out = lines[panel * pairs * 4].pairs;
                    for (i64 i = 0; i < count; out += runs[i++].pairs * width)
                        lay_out(s.products[which[i]], column + panel * COLUMNS, columns_of(panel), 2 * from[i],
                                runs[i].pairs, out, width);
                }
#pragma omp for schedule(dynamic)
                for (i64 job = 0; job < here * chunks; job++) {
                    const i64 panel = job / chunks, row = job % chunks * CHUNK;
                    rows_of(runs, count, row, std::min(row + CHUNK, s.rows), lines[panel * pairs * 4].pairs,
                            column + panel * COLUMNS, columns_of(panel), up_to(columns_of(panel), LANES), to);
                }
            }
        }
    }
}

// out [R, columns] float32 = P [rows, R]^T X [rows, columns], for up to 16 ranks at a time: pairs of rows, X's joined
// on the way, P's beforehand.
template <int R>
void ranks(const Pair* p, i64 p_row, const bf16* x, i64 x_row, i64 pairs, bool odd, __mmask16 there, float* out,
           i64 out_row, bool begins) {
    __m512 sums[R];
    for (int i = 0; i < R; i++)
        sums[i] = begins ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, out + i * out_row);
    for (i64 t = 0; t < pairs; t++, x += 2 * x_row, p += p_row) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x)), high = _mm512_setzero_si512();
        if (!odd || t + 1 < pairs) high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x + x_row));
        __m512bh right = (__m512bh)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        for (int i = 0; i < R; i++) sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_set1_epi32(int(p[i])), right);
    }
    for (int i = 0; i < R; i++) _mm512_mask_storeu_ps(out + i * out_row, there, sums[i]);
}

void outer(const bf16* p, i64 p_row, const bf16* x, i64 x_row, float* out, i64 rows, i64 width, i64 columns,
           int threads) {
    constexpr i64 BLOCK = 128, SPAN = 2 * LANES;  // pairs of rows whose lines stay in the first cache
    const i64 pairs = (rows + 1) / 2, spans = (columns + SPAN - 1) / SPAN;
    thread_local std::vector<Pair> joined;
    if (i64(joined.size()) < pairs * width) joined.resize(pairs * width);
    Pair* const left = joined.data();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 t = 0; t < pairs; t++)
            for (i64 i = 0; i < width; i++) {
                std::uint16_t odd = 2 * t + 1 < rows ? p[(2 * t + 1) * p_row + i].bits : std::uint16_t(0);
                left[t * width + i] = Pair(p[2 * t * p_row + i].bits) | Pair(odd) << 16;
            }
#pragma omp for schedule(static)
        for (i64 span = 0; span < spans; span++)
            for (i64 t = 0; t < pairs; t += BLOCK) {
                const i64 count = std::min(BLOCK, pairs - t);
                const bool odd = t + count == pairs && rows % 2;
                for (i64 n = span * SPAN; n < std::min((span + 1) * SPAN, columns); n += LANES)
                    for (i64 i = 0; i < width;) {
                        auto run = [&](auto function, i64 step) {
                            function(left + t * width + i, width, x + 2 * t * x_row + n, x_row, count, odd,
                                     first(columns - n), out + i * columns + n, columns, t == 0);
                            i += step;
                        };
                        if (width - i >= 16) run(ranks<16>, 16);
                        else if (width - i >= 8) run(ranks<8>, 8);
                        else run(ranks<1>, 1);
                    }
            }
    }
}

}  // namespace

extern "C" void matmul_bf16(const Products* sum, int threads) { matmul(*sum, threads); }

extern "C" void outer_bf16(const bf16* p, i64 p_row, const bf16* x, i64 x_row, float* out, i64 rows, i64 width,
                           i64 columns, int threads) {
    outer(p, p_row, x, x_row, out, rows, width, columns, threads);
}
#endif

// Sums of matrix products in bfloat16, for processors that have no unit for whole tiles (AMX), which PyTorch's own
// library uses. Every element is summed in one order, whatever the threads, and rounded once.
//
// The right-hand sides are laid out in panels of 64 columns; a tile of rows goes over a panel with all its sums in
// registers. Where bfloat16 is multiplied in pairs (AVX512-BF16), the tile's rows are read where they lie, and sums are
// float32. Elsewhere pairs of 16-bit whole numbers are (AVX512-VNNI), twice as many at a time as floats: both sides are
// laid out in block floating point (Wilkinson 1963), 128 numbers of a row or column under the exponent of their
// largest, with 12 bits and a sign each. Sums within a block are exact. Numbers of at least a sixteenth of the largest
// are, too; others are off by at most 2^-12 of it, where bfloat16 has already rounded the largest by up to 2^-9 of it.

#include "products.h"

#if defined(HAS_VECTORS) && defined(__AVX512VNNI__) && !(defined(__AMX_TILE__) && defined(__AMX_BF16__))
#include <vector>

namespace {

struct alignas(64) Line {
    Pair pairs[16];
};

constexpr i64 COLUMNS = 4 * LANES, DEPTH = 2048, CHUNK = HAS_PAIRS ? 192 : 96, GROUP = 4 << 20, MOST = MOST_PRODUCTS;
constexpr i64 BLOCK = 64, ROWS = 4096;  // pairs under one exponent: 128 * 4080 * 4080 < 2^31; rows laid out at a time

// Lines that pairs of the depth take: theirs, and one of scales after each block.
inline i64 lines_of(i64 pairs) { return HAS_PAIRS ? pairs : pairs + (pairs + BLOCK - 1) / BLOCK; }

inline int pair(const bf16* at) { return int(*(const StoredPair*)at); }
inline __m512i magnitudes(__m512i pairs) { return _mm512_and_si512(pairs, _mm512_set1_epi32(0x7fff7fff)); }

// Of blocks whose largest numbers are given, in bfloat16 as both halves of each: their numbers are multiplied by `up`
// to become whole, the whole ones by `down` to become what they stand for.
struct Scales {
    __m512 up, down;
    explicit Scales(__m512i largest) {
        const __m512i least = _mm512_set1_epi32(40);  // numbers below 2^-100 are lost: products of scales stay normal
        __m512i e = _mm512_and_si512(_mm512_srli_epi32(largest, 7), _mm512_set1_epi32(255));
        e = _mm512_max_epi32(_mm512_max_epi32(e, _mm512_srli_epi32(largest, 23)), least);
        up = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(265), e), 23));
        down = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(11)), 23));
        // Nothing has any scale; what is infinite or no number makes the sums so.
        down = _mm512_mask_mov_ps(down, _mm512_testn_epi32_mask(largest, largest), _mm512_set1_ps(1.0f));
        down = _mm512_mask_mov_ps(down, _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255)), _mm512_set1_ps(NAN));
    }
};

inline __m512i whole(__m512i pairs, const Scales& scales) {
    __m512i even = _mm512_cvtps_epi32(_mm512_mul_ps(evens(pairs), scales.up));
    __m512i odd = _mm512_cvtps_epi32(_mm512_mul_ps(odds(pairs), scales.up));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16));
}

// A block of a panel becomes whole, its scales are laid after it.
void in_block(Pair* lines, i64 pairs, i64 width) {
    for (i64 n = 0; n < width; n += LANES) {
        __m512i largest = _mm512_setzero_si512();
        for (i64 k = 0; k < pairs; k++)
            largest = _mm512_max_epu16(largest, magnitudes(_mm512_load_si512(lines + k * width + n)));
        const Scales scales(largest);
        for (i64 k = 0; k < pairs; k++) {
            Pair* at = lines + k * width + n;
            _mm512_store_si512(at, whole(_mm512_load_si512(at), scales));
        }
        _mm512_store_ps(lines + pairs * width + n, scales.down);
    }
}

// A row in blocks, each with its scale after it.
void in_blocks(const bf16* row, i64 pairs, Pair* out) {
    auto some = [](i64 n) { return first(std::max<i64>(0, n)); };
    for (i64 k = 0; k < pairs; k += BLOCK) {
        const i64 count = std::min(BLOCK, pairs - k);
        __m512i numbers[BLOCK / LANES], largest = _mm512_setzero_si512();
        for (i64 i = 0; i < BLOCK / LANES; i++) {
            numbers[i] = _mm512_maskz_loadu_epi32(some(count - i * LANES), row + 2 * (k + i * LANES));
            largest = _mm512_max_epu16(largest, magnitudes(numbers[i]));
        }
        largest = _mm512_max_epu16(largest, _mm512_slli_epi32(largest, 16));
        const Scales scales(_mm512_set1_epi32(int(_mm512_reduce_max_epu32(largest))));
        for (i64 i = 0; i < BLOCK / LANES; i++)
            _mm512_mask_storeu_epi32(out + i * LANES, some(count - i * LANES), whole(numbers[i], scales));
        out[count] = Pair(_mm512_cvtsi512_si32(_mm512_castps_si512(scales.down)));
        out += count + 1;
    }
}

// [pairs, width] into a panel of that width: pair (k, n) is W's elements 2k and 2k + 1 of column n; zero from `columns`.
void lay_out(const Product& p, i64 column, i64 columns, i64 depth, i64 pairs, Pair* out, i64 width) {
    auto line = [](i64 k) { return HAS_PAIRS ? k : k + k / BLOCK; };
    for (i64 n = 0; n < width; n += LANES)
        lay_out_columns(p, column + n, std::max<i64>(0, std::min(LANES, columns - n)), depth, pairs,
                        [&](i64 k) { return out + line(k) * width + n; });
    if (!HAS_PAIRS)
        for (i64 k = 0; k < pairs; k += BLOCK) in_block(out + line(k) * width, std::min(BLOCK, pairs - k), width);
}

struct Run {  // consecutive pairs of the depth that come from one product
    const bf16* a;  // where they lie, or their blocks
    i64 a_row, pairs;
};

struct Target {
    float* sums;  // [rows, sums_row] of the depth before and after; null where there is none
    i64 sums_row;
    bool begins, ends;
    const bf16 *bias, *less_one;
    bf16* out;
    i64 out_row;
};

// As an instruction, since compilers move the sums about that they give to the function of this name.
inline __m512i add_pairs(__m512i sums, __m512i a, __m512i b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}

// The sums, and those over a block. They are not kept in registers meanwhile: the exact ones need those.
template <int M, int N>
__attribute__((noinline)) void add_block(const bf16* a, i64 a_row, const Pair* panel, i64 pairs, __m512 (&sums)[M][N]) {
    __m512i exact[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) exact[i][j] = _mm512_setzero_si512();
    for (i64 k = 0; k < pairs; k++, panel += N * LANES, a += 2) {
        __m512i right[N];
        for (int j = 0; j < N; j++) right[j] = _mm512_load_si512(panel + j * LANES);
        for (int i = 0; i < M; i++) {
            __m512i left = _mm512_set1_epi32(pair(a + i * a_row));
            for (int j = 0; j < N; j++) exact[i][j] = add_pairs(exact[i][j], left, right[j]);
        }
    }
    for (int j = 0; j < N; j++) {
        __m512 down = _mm512_load_ps(panel + j * LANES);
        for (int i = 0; i < M; i++) {
            __m512 scale = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_set1_epi32(pair(a + i * a_row))), down);
            sums[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[i][j]), scale, sums[i][j]);
        }
    }
}

template <int M, int N>
inline void tile(const Run* runs, i64 count, i64 row, const Pair* panel, i64 column, i64 columns, const Target& to) {
    __m512 sums[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++)
            sums[i][j] = to.begins ? _mm512_setzero_ps()
                                   : _mm512_loadu_ps(to.sums + (row + i) * to.sums_row + column + j * LANES);
    for (const Run* run = runs; run < runs + count; run++) {
        const bf16* a = run->a + row * run->a_row;
        if constexpr (HAS_PAIRS)
            for (i64 k = 0; k < run->pairs; k++, panel += N * LANES) {
                Pairs right[N];
                for (int j = 0; j < N; j++) right[j] = pairs_of(_mm512_load_si512(panel + j * LANES));
                for (int i = 0; i < M; i++) {
                    Pairs left = pairs_of(_mm512_set1_epi32(pair(a + i * run->a_row + 2 * k)));
                    for (int j = 0; j < N; j++) sums[i][j] = dot(sums[i][j], left, right[j]);
                }
            }
        else
            for (i64 k = 0; k < run->pairs; k += BLOCK) {
                const i64 pairs = std::min(BLOCK, run->pairs - k);
                add_block<M, N>(a, run->a_row, panel, pairs, sums);
                a += 2 * (pairs + 1), panel += (pairs + 1) * N * LANES;
            }
    }
    for (int j = 0; j < N; j++) {
        const __mmask16 there = first(columns - j * LANES);
        const i64 at = column + j * LANES;
        __m512 bias = _mm512_setzero_ps(), scale = bias;
        if (to.bias) bias = widened(_mm256_maskz_loadu_epi16(there, to.bias + at));
        if (to.less_one) scale = widened(_mm256_maskz_loadu_epi16(there, to.less_one + at));
        for (int i = 0; i < M; i++) {
            if (!to.ends) {
                _mm512_storeu_ps(to.sums + (row + i) * to.sums_row + at, sums[i][j]);
                continue;
            }
            __m512 y = _mm512_add_ps(sums[i][j], bias);
            if (to.less_one) y = widened(narrow(y)), y = _mm512_fmadd_ps(y, scale, y);
            _mm256_mask_storeu_epi16(to.out + (row + i) * to.out_row + at, there, narrow(y));
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
    thread_local std::vector<Pair> left;
    i64 depth = 0;
    for (i64 i = 0; i < s.count; i++) depth += s.products[i].depth / 2;
    const i64 slice = std::min(depth, DEPTH), all = up_to(s.columns, LANES), most = lines_of(slice) + s.count;
    const i64 at_once = std::max<i64>(threads, GROUP / (slice * COLUMNS * 4)) * COLUMNS;
    const i64 group = std::min(up_to(s.columns, COLUMNS), at_once);
    if (i64(panels.size()) < most * group / LANES) panels.resize(most * group / LANES);
    if (depth > slice && i64(between.size()) < s.rows * all) between.resize(s.rows * all);
    if (!HAS_PAIRS && i64(left.size()) < s.rows * most) left.resize(s.rows * most);
    Line* const panel_lines = panels.data();
    Pair* const blocks = left.data();
    for (i64 start = 0; start < depth; start += slice) {
        const i64 pairs = std::min(slice, depth - start);
        const Target to{between.data(), all, start == 0, start + pairs == depth, s.bias, s.less_one,
                        s.out, s.out_row};
        Run runs[MOST];
        i64 from[MOST], which[MOST], before[MOST];  // where each begins, of which product it is, the lines before it
        i64 count = 0, passed = 0, lines = 0;
        for (i64 i = 0; i < s.count; passed += s.products[i].depth / 2, i++) {
            const Product& p = s.products[i];
            const i64 begin = std::max(start, passed), end = std::min(start + pairs, passed + p.depth / 2);
            if (begin >= end) continue;
            runs[count] = {p.a + 2 * (begin - passed), p.a_row, end - begin};
            before[count] = lines, which[count] = i, from[count++] = begin - passed;
            lines += lines_of(end - begin);
        }
        if (!HAS_PAIRS) {
#pragma omp parallel for num_threads(threads) schedule(static)
            for (i64 row = 0; row < s.rows; row++)
                for (i64 i = 0; i < count; i++)
                    in_blocks(runs[i].a + row * runs[i].a_row, runs[i].pairs, blocks + row * most + before[i]);
            for (i64 i = 0; i < count; i++) runs[i] = {(const bf16*)(blocks + before[i]), 2 * most, runs[i].pairs};
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
                    Pair* out = panel_lines[panel * lines * 4].pairs;
                    for (i64 i = 0; i < count; out += lines_of(runs[i++].pairs) * width)
                        lay_out(s.products[which[i]], column + panel * COLUMNS, columns_of(panel), 2 * from[i],
                                runs[i].pairs, out, width);
                }
#pragma omp for schedule(dynamic)
                for (i64 job = 0; job < here * chunks; job++) {
                    const i64 panel = HAS_PAIRS ? job / chunks : job % here;
                    const i64 row = (HAS_PAIRS ? job % chunks : job / here) * CHUNK;
                    rows_of(runs, count, row, std::min(row + CHUNK, s.rows), panel_lines[panel * lines * 4].pairs,
                            column + panel * COLUMNS, columns_of(panel), up_to(columns_of(panel), LANES), to);
                }
            }
        }
    }
}

// out [R, columns] float32 = P [rows, R]^T X [rows, columns], for up to 16 ranks at a time. P lies in steps: pairs of
// rows where pairs are multiplied, else floats of one row.
constexpr int STEP = HAS_PAIRS ? 2 : 1;

template <int R>
void ranks(const Pair* p, i64 p_row, const bf16* x, i64 x_row, i64 rows, __mmask16 there, float* out, i64 out_row,
           bool begins) {
    __m512 sums[R];
    for (int i = 0; i < R; i++)
        sums[i] = begins ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, out + i * out_row);
    for (i64 t = 0; t < rows; t += STEP, x += STEP * x_row, p += p_row) {
        __m512i right = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x));
        if constexpr (HAS_PAIRS) {
            if (t + 1 < rows) {
                __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x + x_row));
                right = _mm512_or_si512(right, _mm512_slli_epi32(odd, 16));
            }
            for (int i = 0; i < R; i++)
                sums[i] = dot(sums[i], pairs_of(_mm512_set1_epi32(int(p[i]))), pairs_of(right));
        } else {
            for (int i = 0; i < R; i++) {
                __m512 left = _mm512_castsi512_ps(_mm512_set1_epi32(int(p[i])));
                sums[i] = _mm512_fmadd_ps(left, evens(right), sums[i]);
            }
        }
    }
    for (int i = 0; i < R; i++) _mm512_mask_storeu_ps(out + i * out_row, there, sums[i]);
}

void outer(const bf16* p, i64 p_row, const bf16* x, i64 x_row, float* out, i64 rows, i64 width, i64 columns,
           int threads) {
    // Rows whose lines stay in the first cache.
    constexpr i64 AT_ONCE = HAS_PAIRS ? 256 : 64, SPAN = (HAS_PAIRS ? 2 : 8) * LANES;
    const i64 steps = (rows + STEP - 1) / STEP, spans = (columns + SPAN - 1) / SPAN;
    thread_local std::vector<Pair> laid_out;
    if (i64(laid_out.size()) < steps * width) laid_out.resize(steps * width);
    Pair* const left = laid_out.data();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 t = 0; t < steps; t++)
            for (i64 i = 0; i < width; i++) {
                Pair one = p[STEP * t * p_row + i].bits, odd = 0;
                if (HAS_PAIRS && 2 * t + 1 < rows) odd = p[(2 * t + 1) * p_row + i].bits;
                left[t * width + i] = HAS_PAIRS ? one | odd << 16 : one << 16;
            }
#pragma omp for schedule(static)
        for (i64 span = 0; span < spans; span++)
            for (i64 t = 0; t < rows; t += AT_ONCE) {
                const i64 end = std::min((span + 1) * SPAN, columns);
                for (i64 next = t + AT_ONCE; !HAS_PAIRS && next < std::min(t + 2 * AT_ONCE, rows); next++)
                    for (i64 n = span * SPAN; n < end; n += 2 * LANES)
                        _mm_prefetch((const char*)(x + next * x_row + n), _MM_HINT_T0);
                for (i64 n = span * SPAN; n < end; n += LANES)
                    for (i64 i = 0; i < width;) {
                        auto run = [&](auto function, i64 step) {
                            function(left + t / STEP * width + i, width, x + t * x_row + n, x_row,
                                     std::min(AT_ONCE, rows - t), first(columns - n), out + i * columns + n, columns,
                                     t == 0);
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

// Numbers under one exponent; 1 where each keeps its own.
extern "C" i64 block_of_matmul() { return HAS_PAIRS ? 1 : 2 * BLOCK; }

extern "C" void matmul_bf16(const Products* sum, int threads) {
    Products part = *sum;
    for (i64 row = 0; row < sum->rows; row += ROWS) {
        part.rows = std::min(ROWS, sum->rows - row);
        part.out = sum->out + row * sum->out_row;
        for (i64 i = 0; i < sum->count; i++) part.products[i].a = sum->products[i].a + row * sum->products[i].a_row;
        matmul(part, threads);
    }
}

extern "C" void outer_bf16(const bf16* p, i64 p_row, const bf16* x, i64 x_row, float* out, i64 rows, i64 width,
                           i64 columns, int threads) {
    outer(p, p_row, x, x_row, out, rows, width, columns, threads);
}
#endif

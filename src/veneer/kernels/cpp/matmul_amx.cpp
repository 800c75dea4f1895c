// Sums of matrix products in bfloat16 on processors with a unit for whole tiles (AMX). Every element is summed in
// float32 in one order, whatever the threads, and rounded once.

#include "panels.h"

#ifdef HAS_TILES
namespace {

constexpr i64 RESIDENT = 1300 << 10;  // bytes of laid out weights that stay in the second cache

// A narrow product of a part, whose rounded sums go through a mask.
class Masked {
    const Drops drops_;
    const i64 depth_, begin_, columns_;
    const i64 row_, column_;
    Pair* panels_;
    bf16* left_;
    i64 place_ = 0, made_ = TALL;
    __mmask32 stays_[TALL];
    alignas(64) float sums_[TALL * WIDTH];

public:
    Masked(const Products& s, const Part& part)
        : drops_(s.drop, s.drop.begin), depth_(up_to(s.products[s.count].depth, DEEP)), begin_(s.drop.begin),
          columns_(s.columns), row_(part.row), column_(part.column) {
        static thread_local Room<Pair> for_panels, for_left;
        const Product& p = s.products[s.count];
        panels_ = for_panels.of(depth_ / 2 * part.panels * WIDTH);
        left_ = (bf16*)for_left.of((part.end - part.row) * depth_ / 2);
        for (i64 n = 0; n < part.panels; n++) {
            Pair* const panel = panels_ + n * depth_ / 2 * WIDTH;
            lay_out(p, column_ + n * WIDTH, columns_ - column_ - n * WIDTH, 0, p.depth / 2, panel);
            std::fill(panel + p.depth / 2 * WIDTH, panel + depth_ / 2 * WIDTH, Pair(0));
        }
        for (i64 i = 0; i < part.end - row_; i++) {
            bf16* const end = std::copy_n(p.a + (row_ + i) * p.a_row, p.depth, left_ + i * depth_);
            std::fill(end, left_ + (i + 1) * depth_, bf16{0});
        }
    }
    // The product for up to 32 rows and columns; with each step of the others then the mask of two rows.
    void begin(i64 row, i64 rows, i64 column) {
        const Pair* const panel = panels_ + (column - column_) * depth_ / 2;
        auto go = [&](auto m) {
            constexpr int M = decltype(m)::value;
            clear<M, 2>();
            for (i64 k = 0; k < depth_; k += DEEP)
                add_product<M, 2>(left_ + (row - row_) * depth_ + k, depth_, panel + k / 2 * WIDTH, WIDTH);
            store<M, 2>(sums_, WIDTH);
        };
        if (rows > SIDE) go(std::integral_constant<int, 2>{});
        else go(std::integral_constant<int, 1>{});
        made_ = 0;
        place_ = begin_ + row * columns_ + column;
    }
    void step() {
        for (i64 i = 0; i < 2 && made_ < TALL; i++, made_++) stays_[made_] = drops_.stays(place_ + made_ * columns_);
    }
    // What is left of row i of the block.
    __m512i row(i64 i) {
        while (made_ <= i) step();
        const float* const sums = sums_ + i * WIDTH;
        return drops_.of(narrow(_mm512_load_ps(sums), _mm512_load_ps(sums + SIDE)), stays_[i]);
    }
};

// Sums and a bias, rounded; and then a factor, or what a mask leaves of a product.
void put_sums(const Products& s, Masked* masked, const float* sums, i64 row, i64 rows, i64 column, i64 columns) {
    const __mmask32 there = columns >= WIDTH ? ~0u : (1u << columns) - 1;
    __m512i bias = _mm512_setzero_si512();
    if (s.bias) bias = _mm512_maskz_loadu_epi16(there, s.bias + column);
    auto low_half = [](__m512i x) { return widened(_mm512_castsi512_si256(x)); };
    auto high_half = [](__m512i x) { return widened(_mm512_extracti64x4_epi64(x, 1)); };
    auto scaled = [](__m512 x, __m512 less_one) { return _mm512_fmadd_ps(x, less_one, x); };
    const __m512i scale = s.less_one ? _mm512_maskz_loadu_epi16(there, s.less_one + column) : _mm512_setzero_si512();
    const __m512 low_bias = low_half(bias), high_bias = high_half(bias);
    const __m512 low_scale = low_half(scale), high_scale = high_half(scale);
    for (i64 i = 0; i < rows; i++, sums += WIDTH) {
        const __m512 low = _mm512_add_ps(_mm512_load_ps(sums), low_bias);
        const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + SIDE), high_bias);
        __m512i both = narrow(low, high);
        if (masked) both = sum(both, masked->row(i));
        if (s.less_one) both = narrow(scaled(low_half(both), low_scale), scaled(high_half(both), high_scale));
        _mm512_mask_storeu_epi16(s.out + (row + i) * s.out_row + column, there, both);
    }
}

void matmul(Products s, int threads) {
    s.count -= s.dropped == LAST_DROPPED;
    i64 depth = 0;
    for (i64 i = 0; i < s.count; i++) depth += up_to(s.products[i].depth, DEEP) / DEEP;
    // Groups of panels that fit, and as many for each thread; where there are too few panels, threads share the rows.
    const i64 panels = up_to(s.columns, WIDTH) / WIDTH, bytes = std::min(depth, SLICE) * OF_TILE * i64(sizeof(Pair));
    const i64 fit = std::max<i64>(1, RESIDENT / bytes), groups = (panels + fit - 1) / fit;
    // So they do where rows have a mask, which is then made once.
    const bool by_rows = s.dropped == ROWS_DROPPED || (panels % threads && panels < 4 * threads);
    const i64 some = by_rows ? groups : up_to(groups, threads), of_group = (panels + some - 1) / some;
    const i64 parts = by_rows ? threads : 1, of_part = up_to((s.rows + parts - 1) / parts, TALL);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic) collapse(2)
        for (i64 panel = 0; panel < panels; panel += of_group)
            for (i64 row = 0; row < s.rows; row += of_part) {
                const Part part{panel * WIDTH, std::min(of_group, panels - panel), row,
                                std::min(row + of_part, s.rows)};
                if (s.dropped == LAST_DROPPED) {
                    Masked masked(s, part);
                    multiply(s, part, tiles, [&](auto... block) { put_sums(s, &masked, block...); }, masked);
                } else multiply(s, part, tiles, [&](auto... block) { put_sums(s, nullptr, block...); });
            }
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

// Pairs of rows of up to 32 columns [steps / 2, 32]: zero beyond. `value(numbers, row)` is what stands for them.
template <class Value>
void pair_rows(const bf16* x, i64 x_row, i64 rows, i64 columns, i64 steps, Pair* out, const Value& value) {
    alignas(64) static const auto order = [] {
        std::array<std::uint16_t, 64> found{};
        for (i64 i = 0; i < 64; i++) found[i] = std::uint16_t(i / 2 + i % 2 * 32);
        return found;
    }();
    const __m512i low = _mm512_load_si512(&order[0]), high = _mm512_load_si512(&order[32]);
    const __mmask32 there = columns >= WIDTH ? ~0u : (1u << columns) - 1;
    for (i64 t = 0; t < steps; t += 2, x += 2 * x_row, out += WIDTH) {
        const __m512i none = _mm512_setzero_si512();
        const __m512i even = t < rows ? value(_mm512_maskz_loadu_epi16(there, x), t) : none;
        const __m512i odd = t + 1 < rows ? value(_mm512_maskz_loadu_epi16(there, x + x_row), t + 1) : none;
        _mm512_store_si512(out, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(out + LANES, _mm512_permutex2var_epi16(even, high, odd));
    }
}

// out [width, columns] float32 = P [rows, width]^T X [rows, columns], with a mask over X where there is one.
void outer(const bf16* p, i64 p_row, const bf16* x, i64 x_row, float* out, i64 rows, i64 width, i64 columns,
           const Dropout* drop, int threads) {
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
                auto pair = [&](const auto& value) {
                    pair_rows(x + t * x_row + column, x_row, rows - t, here, part, pairs, value);
                };
                if (drop) {
                    const Drops drops(*drop, drop->begin);
                    const i64 place = drop->begin + t * columns + column;
                    pair([&](__m512i numbers, i64 row) { return drops.of(numbers, place + row * columns); });
                } else pair([](__m512i numbers, i64) { return numbers; });
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
extern "C" void matmul_dropped_bf16(const Products* sum, int threads) { matmul(*sum, threads); }

extern "C" void outer_bf16(const bf16* p, i64 p_row, const bf16* x, i64 x_row, float* out, i64 rows, i64 width,
                           i64 columns, int threads) {
    outer(p, p_row, x, x_row, out, rows, width, columns, nullptr, threads);
}
extern "C" void outer_dropped_bf16(const bf16* p, i64 p_row, const bf16* x, i64 x_row, float* out, i64 rows, i64 width,
                                   i64 columns, i64 key, i64 threshold, i64 begin, float scale, int threads) {
    const Dropout drop{key, threshold, begin, scale};
    outer(p, p_row, x, x_row, out, rows, width, columns, &drop, threads);
}
#endif

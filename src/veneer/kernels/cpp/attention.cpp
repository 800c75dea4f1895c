// Causal attention of the documents in a packed row, in bfloat16. The formulas are in attention.py. A job is one document
// under one key head: its keys and values are laid out once, and the queries of all heads that share them go over them
// in tiles of 64, whose scores stay in the second cache and in float32.

#include "products.h"
#include "tiles.h"

#ifdef HAS_VECTORS
#include <vector>

namespace {

// What a lane multiplies at once: two numbers along the depth of a product, or one that is widened already.
constexpr i64 STEP = HAS_PAIRS ? 2 : 1, TILE = 64;
using Unit = std::conditional_t<HAS_PAIRS, Pair, float>;

struct Left {  // a left side: unit (i, k) lies at at[i * row + k * step]
    const Unit* at;
    i64 row, step;
};

#ifdef HAS_TILES
constexpr i64 WHOLE = DEEP;  // what depths are a multiple of: both sides are zero beyond

// C[rows, columns] (+)= A B; B and C have rows of ldb and ldc, columns are a multiple of 16, the depth is in units.
void product(Tiles& tiles, const Left& a, const Unit* b, i64 ldb, float* c, i64 ldc, i64 rows, i64 columns, i64 depth,
             bool add) {
    for (i64 i = 0; i < rows; i += 2 * SIDE) {
        tiles.take(std::min(2 * SIDE, rows - i));
        for (i64 j = 0; j < columns; j += 2 * SIDE) {
            auto go = [&](auto m, auto n) {
                constexpr int M = decltype(m)::value, N = decltype(n)::value;
                float* const at = c + i * ldc + j;
                if (add) load<M, N>(at, ldc);
                else clear<M, N>();
                for (i64 k = 0; k < depth; k += DEEP / STEP)
                    add_product<M, N>(a.at + i * a.row + k, STEP * a.row, b + k * ldb + j, ldb);
                store<M, N>(at, ldc);
            };
            using One = std::integral_constant<int, 1>;
            using Two = std::integral_constant<int, 2>;
            if (rows - i > SIDE) columns - j > SIDE ? go(Two{}, Two{}) : go(Two{}, One{});
            else columns - j > SIDE ? go(One{}, Two{}) : go(One{}, One{});
        }
    }
}

// A left side of what `pairs_of_rows` laid out [steps, size], turned: [size, steps].
Left turned(const Unit* laid_out, i64 size, i64 steps, Unit* room) {
    for (i64 d = 0; d < size; d += LANES)
        for (i64 k = 0; k < steps; k += LANES) {
            __m512i r[16];
            for (i64 i = 0; i < LANES; i++) r[i] = _mm512_loadu_si512(laid_out + (k + i) * size + d);
            transpose(r);
            for (i64 i = 0; i < LANES; i++) _mm512_storeu_si512(room + (d + i) * steps + k, r[i]);
        }
    return {room, steps, 1};
}
#else
constexpr i64 WHOLE = STEP, ROWS = 6, COLUMNS = 4 * LANES;

struct Tiles {};

inline __m512 add_product(__m512 sums, Unit left, __m512i right) {
    if constexpr (HAS_PAIRS) return dot(sums, pairs_of(_mm512_set1_epi32(int(left))), pairs_of(right));
    else return _mm512_fmadd_ps(_mm512_set1_ps(float(left)), _mm512_castsi512_ps(right), sums);
}

template <int M, int N>
inline void block(const Left& a, const Unit* b, i64 ldb, float* c, i64 ldc, i64 depth, bool add) {
    __m512 sums[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * LANES) : _mm512_setzero_ps();
    for (i64 k = 0; k < depth; k++) {
        __m512i right[N];
        for (int j = 0; j < N; j++) right[j] = _mm512_loadu_si512(b + k * ldb + j * LANES);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) sums[i][j] = add_product(sums[i][j], a.at[i * a.row + k * a.step], right[j]);
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) _mm512_storeu_ps(c + i * ldc + j * LANES, sums[i][j]);
}

template <int N>
inline void strip(Left a, const Unit* b, i64 ldb, float* c, i64 ldc, i64 rows, i64 depth, bool add) {
    auto go = [&](auto m) {
        constexpr int M = decltype(m)::value;
        for (; rows >= M; rows -= M, a.at += M * a.row, c += M * ldc) block<M, N>(a, b, ldb, c, ldc, depth, add);
    };
    go(std::integral_constant<int, ROWS>{});
    go(std::integral_constant<int, 2>{});
    go(std::integral_constant<int, 1>{});
}

// C[rows, columns] (+)= A B; B and C have rows of ldb and ldc, columns are a multiple of 16, the depth is in units.
void product(Tiles&, const Left& a, const Unit* b, i64 ldb, float* c, i64 ldc, i64 rows, i64 columns, i64 depth,
             bool add) {
    i64 j = 0;
    for (; j + COLUMNS <= columns; j += COLUMNS) strip<4>(a, b + j, ldb, c + j, ldc, rows, depth, add);
    for (; j < columns; j += LANES) strip<1>(a, b + j, ldb, c + j, ldc, rows, depth, add);
}

Left turned(const Unit* laid_out, i64 size, i64, Unit*) { return {laid_out, 1, size}; }
#endif

constexpr i64 steps(i64 depth) { return up_to(depth, WHOLE) / STEP; }

// The keys of a document as it sees them: those of the shared beginning, then its own.
struct Keys {
    i64 shared, first, count;
    i64 place(i64 n) const { return n < shared ? n : first + n - shared; }
};

// A left side: x [rows, size] in rows of steps(size) units.
Left units_of(const bf16* x, i64 rows, i64 size, Unit* out) {
    const i64 row = steps(size);
    for (i64 i = 0; i < rows; i++, x += size) {
        Unit* at = out + i * row;
        if constexpr (HAS_PAIRS) {
            std::memcpy((void*)at, x, std::size_t(size) * sizeof(bf16));
            std::fill(at + size / 2, at + row, Unit(0));
        } else {
            for (i64 d = 0; d < size; d++) at[d] = get(x[d]);
        }
    }
    return {out, row, 1};
}

// Right sides. [steps(size), ld] of x [count, size], whose columns become rows; columns beyond count are zero.
void columns_of(const bf16* x, const Keys& keys, i64 size, Unit* out, i64 ld) {
    for (i64 n = 0; n < ld; n += LANES)
        for (i64 d = 0; d < steps(size); d += LANES) {
            __m512i r[16];
            for (i64 i = 0; i < LANES; i++) {
                const bf16* row = x + keys.place(std::min(n + i, keys.count - 1)) * size + STEP * d;
                const __mmask16 there = n + i < keys.count ? first(std::max<i64>(0, size / STEP - d)) : 0;
                if constexpr (HAS_PAIRS) r[i] = _mm512_maskz_loadu_epi32(there, row);
                else r[i] = _mm512_castps_si512(widened(_mm256_maskz_loadu_epi16(there, row)));
            }
            transpose(r);
            for (i64 i = 0; i < std::min(LANES, steps(size) - d); i++) _mm512_storeu_si512(out + (d + i) * ld + n, r[i]);
        }
}

// [steps(count), size] of x [count, size]; beyond count it is zero.
void rows_of(const bf16* x, const Keys& keys, i64 size, Unit* out) {
    for (i64 n = 0; n < keys.count; n += STEP, out += size) {
        const bf16 *row = x + keys.place(n) * size, *next = n + 1 < keys.count ? x + keys.place(n + 1) * size : nullptr;
        for (i64 d = 0; d < size; d += LANES) {
            if constexpr (HAS_PAIRS) _mm512_storeu_si512(out + d, pairs_down(row + d, next ? next + d : nullptr, LANES));
            else _mm512_storeu_ps(out + d, widened(_mm256_loadu_si256((const __m256i*)(row + d))));
        }
    }
    std::fill_n(out, (steps(keys.count) - (keys.count + STEP - 1) / STEP) * size, Unit(0));
}

// Sixteen of a row, rounded, as a part of a left side.
inline void put_along(__m512 x, Unit* out) {
    if constexpr (HAS_PAIRS) _mm256_storeu_si256((__m256i*)out, narrow(x));
    else _mm512_storeu_ps(out, widened(narrow(x)));
}

// Sixteen of a row and of the next one, rounded, as a part of a right side of which rows are the depth.
inline void put_down(__m512 x, __m512 next, Unit* out, i64 ld) {
    if constexpr (HAS_PAIRS) {
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(next)), 16);
        _mm512_storeu_si512(out, _mm512_or_si512(_mm512_cvtepu16_epi32(narrow(x)), high));
    } else {
        put_along(x, out), put_along(next, out + ld);
    }
}

struct Shape {
    i64 heads, groups, length, size;  // query heads, those of a key head, T, D
    i64 documents;
    const i64* starts;  // [documents + 1]
    i64 prefix, window;
    float scale;
};

struct Job {
    i64 head, document, work;  // of keys
};

std::vector<Job> jobs_of(const Shape& s) {
    std::vector<Job> jobs;
    for (i64 h = 0; h < s.heads / s.groups; h++)
        for (i64 i = 0; i < s.documents; i++) {
            i64 n = s.starts[i + 1] - s.starts[i];
            jobs.push_back({h, i, n * (n + (i ? 2 * s.prefix : 0))});
        }
    std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.work > b.work; });
    return jobs;
}

// Of a row of keys: whole tiles, and an odd number of lines, so that a column's lie in different sets of a cache.
inline i64 row_for(i64 keys) { return up_to(keys, TILE) + LANES; }
inline i64 width_of(i64 keys) { return up_to(keys, std::max(LANES, WHOLE)); }

Keys keys_of(const Shape& s, i64 document) {
    i64 shared = document ? s.prefix : 0, first = s.starts[document];
    return {shared, first, shared + s.starts[document + 1] - first};
}

// The keys that a query sees, and what their exponentials are taken of.
struct Seen {
    i64 begin, end;
    float top;
    Seen(const float* row, i64 at, const Shape& s)
        : begin(s.window > 0 && at >= s.window ? at + 1 - s.window : 0), end(at + 1) {
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (i64 j = begin / LANES * LANES; j < end; j += LANES)
            most = _mm512_mask_max_ps(most, there(j), most, _mm512_loadu_ps(row + j));
        top = _mm512_reduce_max_ps(most);
    }
    __mmask16 there(i64 j) const {
        return __mmask16(first(end - j) & ~(begin > j ? first(begin - j) : 0));
    }
    // exp of 16 scores less their largest; 0 where the query does not see the key.
    __m512 exponentials(const float* row, i64 j, float scale) const {
        const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(top));
        return _mm512_maskz_mov_ps(there(j), exp_(_mm512_mul_ps(_mm512_set1_ps(scale), x)));
    }
    bool any(i64 j) const { return j < end && j + LANES > begin; }
};

void attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, const Shape& s, int threads) {
    std::vector<Job> jobs = jobs_of(s);
    const i64 of_head = s.length * s.size;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] Tiles tiles;
        static thread_local Room<Unit> rooms[4];
        static thread_local Room<float> for_scores, for_sums;
#pragma omp for schedule(dynamic, 1)
        for (std::size_t n = 0; n < jobs.size(); n++) {
            const Job& job = jobs[n];
            Keys keys = keys_of(s, job.document);
            const i64 ld = row_for(keys.count), own = keys.count - keys.shared;
            Unit *kt = rooms[0].of(steps(s.size) * ld), *vp = rooms[1].of(steps(keys.count) * s.size);
            Unit *p = rooms[2].of(TILE * ld), *tile = rooms[3].of(TILE * steps(s.size));
            float *scores = for_scores.of(TILE * ld), *sums = for_sums.of(TILE * s.size);
            columns_of(k + job.head * of_head, keys, s.size, kt, ld);
            rows_of(v + job.head * of_head, keys, s.size, vp);
            for (i64 head = job.head * s.groups; head < (job.head + 1) * s.groups; head++)
                for (i64 row = 0; row < own; row += TILE) {
                    const i64 rows = std::min(TILE, own - row), seen = keys.shared + row + rows, width = width_of(seen);
                    const i64 at = head * of_head + (keys.first + row) * s.size;
                    product(tiles, units_of(q + at, rows, s.size, tile), kt, ld, scores, ld, rows, width,
                            steps(s.size), false);
                    float each[TILE];
                    for (i64 i = 0; i < rows; i++) {
                        const float* of_row = scores + i * ld;
                        const Seen here(of_row, keys.shared + row + i, s);
                        __m512 sum = _mm512_setzero_ps();
                        for (i64 j = 0; j < width; j += LANES) {
                            __m512 e = here.any(j) ? here.exponentials(of_row, j, s.scale) : _mm512_setzero_ps();
                            sum = _mm512_add_ps(sum, e);
                            put_along(e, p + (i * ld + j) / STEP);
                        }
                        each[i] = 1.0f / _mm512_reduce_add_ps(sum);
                    }
                    product(tiles, {p, ld / STEP, 1}, vp, s.size, sums, s.size, rows, s.size, steps(seen), false);
                    for (i64 i = 0; i < rows; i++)
                        for (i64 d = i * s.size; d < (i + 1) * s.size; d += LANES) {
                            const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(sums + d), _mm512_set1_ps(each[i]));
                            _mm256_storeu_si256((__m256i*)(out + at + d), narrow(y));
                        }
                }
        }
    }
}

// Weights and slopes of two rows of scores and slopes of weights, or of one: next to each other along the row, and
// below each other.
void weigh(const float* scores, const float* slopes, i64 ld, i64 rows, i64 at, i64 width, const Shape& s,
           float* exps, Unit* along, Unit* weights, Unit* down) {
    __m512 each[2], mean[2];
    for (i64 i = 0; i < 2; i++, exps += ld) {
        if (i == rows) {
            std::fill_n(exps, width, 0.0f);
            each[i] = mean[i] = _mm512_setzero_ps();
            continue;
        }
        const float *of_row = scores + i * ld, *slope = slopes + i * ld;
        const Seen here(of_row, at + i, s);
        __m512 sum = _mm512_setzero_ps(), product = _mm512_setzero_ps();
        for (i64 j = 0; j < width; j += LANES) {
            __m512 e = _mm512_setzero_ps();
            if (here.any(j)) {
                e = here.exponentials(of_row, j, s.scale);
                sum = _mm512_add_ps(sum, e);
                product = _mm512_fmadd_ps(e, _mm512_loadu_ps(slope + j), product);
            }
            _mm512_storeu_ps(exps + j, e);
        }
        const float one = 1.0f / _mm512_reduce_add_ps(sum);
        each[i] = _mm512_set1_ps(one), mean[i] = _mm512_set1_ps(one * _mm512_reduce_add_ps(product));
    }
    exps -= 2 * ld;
    for (i64 j = 0; j < width; j += LANES) {
        __m512 w[2], g[2];
        for (i64 i = 0; i < 2; i++) {
            w[i] = _mm512_mul_ps(_mm512_loadu_ps(exps + i * ld + j), each[i]);
            const __m512 d = i < rows ? _mm512_loadu_ps(slopes + i * ld + j) : _mm512_setzero_ps();
            g[i] = _mm512_mul_ps(_mm512_set1_ps(s.scale), _mm512_mul_ps(w[i], _mm512_sub_ps(d, mean[i])));
            if (i < rows) put_along(g[i], along + (i * ld + j) / STEP);
        }
        put_down(w[0], w[1], weights + j, ld), put_down(g[0], g[1], down + j, ld);
    }
}

// x [size, ld] turned, rounded: rows `from` to `end` of x's columns.
void put_turned(const float* x, i64 ld, i64 size, i64 from, i64 end, bf16* out) {
    for (i64 n = from; n < end; n += LANES)
        for (i64 d = 0; d < size; d += LANES) {
            __m512i r[16];
            for (i64 i = 0; i < LANES; i++) r[i] = _mm512_loadu_si512(x + (d + i) * ld + n);
            transpose(r);
            for (i64 i = 0; i < std::min(LANES, end - n); i++)
                _mm256_storeu_si256((__m256i*)(out + (n - from + i) * size + d), narrow(_mm512_castsi512_ps(r[i])));
        }
}

// The same unrounded, of the first `end`.
void put_turned(const float* x, i64 ld, i64 size, i64 end, float* out) {
    for (i64 n = 0; n < end; n++)
        for (i64 d = 0; d < size; d++) out[n * size + d] = x[d * ld + n];
}

void attention_back(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, bf16* dq, bf16* dk, bf16* dv,
                    float* dk_shared, float* dv_shared, const Shape& s, int threads) {
    std::vector<Job> jobs = jobs_of(s);
    const i64 of_head = s.length * s.size;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] Tiles tiles;
        static thread_local Room<Unit> rooms[10];
        static thread_local Room<float> for_scores, for_slopes, for_sums, for_keys, for_values, for_exps;
#pragma omp for schedule(dynamic, 1)
        for (std::size_t n = 0; n < jobs.size(); n++) {
            const Job& job = jobs[n];
            Keys keys = keys_of(s, job.document);
            const i64 ld = row_for(keys.count), own = keys.count - keys.shared, of_rows = steps(TILE) * s.size;
            Unit *kt = rooms[0].of(steps(s.size) * ld), *vt = rooms[1].of(steps(s.size) * ld);
            Unit *kp = rooms[2].of(steps(keys.count) * s.size), *tile = rooms[3].of(TILE * steps(s.size));
            Unit *qp = rooms[4].of(of_rows), *dp = rooms[5].of(of_rows), *room = rooms[9].of(of_rows);
            Unit *g = rooms[6].of(TILE * ld), *wt = rooms[7].of(TILE * ld), *gt = rooms[8].of(TILE * ld);
            float *scores = for_scores.of(TILE * ld), *slopes = for_slopes.of(TILE * ld), *exps = for_exps.of(2 * ld);
            float *sums = for_sums.of(TILE * s.size), *dkeys = for_keys.of(s.size * ld);
            float* dvalues = for_values.of(s.size * ld);
            std::fill_n(dkeys, s.size * ld, 0.0f), std::fill_n(dvalues, s.size * ld, 0.0f);
            columns_of(k + job.head * of_head, keys, s.size, kt, ld);
            columns_of(v + job.head * of_head, keys, s.size, vt, ld);
            rows_of(k + job.head * of_head, keys, s.size, kp);
            for (i64 head = job.head * s.groups; head < (job.head + 1) * s.groups; head++)
                for (i64 row = 0; row < own; row += TILE) {
                    const i64 rows = std::min(TILE, own - row), seen = keys.shared + row + rows, width = width_of(seen);
                    const i64 at = head * of_head + (keys.first + row) * s.size, deep = steps(rows);
                    const Keys mine = {0, 0, rows};
                    rows_of(q + at, mine, s.size, qp);
                    rows_of(dout + at, mine, s.size, dp);
                    auto with_keys = [&](const bf16* x, const Unit* right, float* out) {
                        product(tiles, units_of(x + at, rows, s.size, tile), right, ld, out, ld, rows, width,
                                steps(s.size), false);
                    };
                    with_keys(q, kt, scores), with_keys(dout, vt, slopes);
                    i64 i = 0;
                    for (; i < rows; i += 2)
                        weigh(scores + i * ld, slopes + i * ld, ld, std::min<i64>(2, rows - i), keys.shared + row + i,
                              width, s, exps, g + i * ld / STEP, wt + i * ld / STEP, gt + i * ld / STEP);
                    for (i64 k = i / STEP; k < deep; k++)
                        std::fill_n(wt + k * ld, width, Unit(0)), std::fill_n(gt + k * ld, width, Unit(0));
                    product(tiles, {g, ld / STEP, 1}, kp, s.size, sums, s.size, rows, s.size, steps(seen), false);
                    for (i64 j = 0; j < rows * s.size; j += LANES)
                        _mm256_storeu_si256((__m256i*)(dq + at + j), narrow(_mm512_loadu_ps(sums + j)));
                    product(tiles, turned(dp, s.size, deep, room), wt, ld, dvalues, ld, s.size, width, deep, true);
                    product(tiles, turned(qp, s.size, deep, room), gt, ld, dkeys, ld, s.size, width, deep, true);
                }
            // Each job has its own rows; those of the shared beginning are summed afterwards, in the jobs' own order.
            const i64 beginning = job.document ? keys.shared : s.prefix;
            const i64 shared_at = (job.head * s.documents + job.document) * s.prefix * s.size;
            const i64 place = job.head * of_head + keys.place(beginning) * s.size;
            put_turned(dkeys, ld, s.size, beginning, dk_shared + shared_at);
            put_turned(dvalues, ld, s.size, beginning, dv_shared + shared_at);
            put_turned(dkeys, ld, s.size, beginning, keys.count, dk + place);
            put_turned(dvalues, ld, s.size, beginning, keys.count, dv + place);
        }
    }
}

}  // namespace

extern "C" void attention_bf16(const bf16* q, const bf16* k, const bf16* v, bf16* out, i64 heads, i64 groups,
                               i64 length, i64 size, i64 documents, const i64* starts, i64 prefix, i64 window,
                               float scale, int threads) {
    attention(q, k, v, out, {heads, groups, length, size, documents, starts, prefix, window, scale}, threads);
}
// dk, dv [key heads, T, D] but for the shared beginning, of which each document's share goes to dk_shared, dv_shared
// [key heads, documents, prefix, D] in float32: the caller sums them.
extern "C" void attention_back_bf16(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, bf16* dq, bf16* dk,
                                    bf16* dv, float* dk_shared, float* dv_shared, i64 heads, i64 groups, i64 length,
                                    i64 size, i64 documents, const i64* starts, i64 prefix, i64 window, float scale,
                                    int threads) {
    attention_back(q, k, v, dout, dq, dk, dv, dk_shared, dv_shared,
                   {heads, groups, length, size, documents, starts, prefix, window, scale}, threads);
}
#endif

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

// What rows_of laid out [steps, size] becomes a left side of size rows, as down_of describes it.
void turn(const Unit* laid_out, i64 size, i64 steps, Unit* room) {
    for (i64 d = 0; d < size; d += LANES)
        for (i64 k = 0; k < steps; k += LANES) {
            __m512i r[16];
            for (i64 i = 0; i < LANES; i++) r[i] = _mm512_loadu_si512(laid_out + (k + i) * size + d);
            transpose(r);
            for (i64 i = 0; i < LANES; i++) _mm512_storeu_si512(room + (d + i) * steps + k, r[i]);
        }
}
Left down_of(const Unit* turned, i64, i64 steps) { return {turned, steps, 1}; }
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

void turn(const Unit* laid_out, i64 size, i64 steps, Unit* room) { std::copy_n(laid_out, size * steps, room); }
Left down_of(const Unit* turned, i64 size, i64) { return {turned, 1, size}; }
#endif

constexpr i64 steps(i64 depth) { return up_to(depth, WHOLE) / STEP; }

// The keys of a document as it sees them: those of the shared beginning, then its own.
struct Keys {
    i64 shared, first, count;
    i64 place(i64 n) const { return n < shared ? n : first + n - shared; }
};

// A left side: x [rows, size], whose rows lie x_row apart, in rows of steps(size) units.
Left units_of(const bf16* x, i64 x_row, i64 rows, i64 size, Unit* out) {
    const i64 row = steps(size);
    for (i64 i = 0; i < rows; i++, x += x_row) {
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

// [steps(count), size] of x [count, size], whose rows lie x_row apart; beyond count it is zero.
void rows_of(const bf16* x, i64 x_row, const Keys& keys, i64 size, Unit* out) {
    for (i64 n = 0; n < keys.count; n += STEP, out += size) {
        const bf16* row = x + keys.place(n) * x_row;
        const bf16* next = n + 1 < keys.count ? x + keys.place(n + 1) * x_row : nullptr;
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

// Sixteen of a row and of the next one, rounded, as a part of a right side of which rows are the depth, and as parts of
// left sides where `along` is given.
inline void put_down(__m512 x, __m512 next, Unit* out, i64 ld, Unit* along = nullptr) {
#ifdef __AVX512BF16__
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(next, x);
    _mm512_storeu_si512(out, in_pairs(both));
    if (!along) return;
    _mm256_storeu_si256((__m256i*)along, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(along + ld / STEP), _mm512_extracti64x4_epi64(both, 1));
#else
    put_along(x, out), put_along(next, out + ld);
    if (along) put_along(x, along), put_along(next, along + ld);
#endif
}

struct Shape {
    i64 heads, groups, length, size;  // query heads, those of a key head, T, D
    i64 documents;
    const i64* starts;  // [documents + 1]
    i64 prefix, window;
    float scale;
};

// A document under some of the query heads that share a key head.
struct Job {
    i64 document, first, heads, work;
};

constexpr float LOG2_E = 1.44269504f;
constexpr i64 AT_ONCE = 512;  // keys whose scores with a tile of queries stay in the second cache
constexpr i64 LONG = 1024;    // a document of more keys is several jobs, one a query head

std::vector<Job> jobs_of(const Shape& s) {
    std::vector<Job> jobs;
    for (i64 i = 0; i < s.documents; i++) {
        const i64 n = s.starts[i + 1] - s.starts[i], shared = i ? s.prefix : 0;
        const i64 heads = n + shared > LONG ? 1 : s.groups;
        for (i64 h = 0; h < s.heads; h += heads) jobs.push_back({i, h, heads, heads * n * (n + 2 * shared)});
    }
    std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.work > b.work; });
    return jobs;
}

// Of a row of keys: whole tiles, and an odd number of lines, so that a column's lie in different sets of a cache.
inline i64 row_for(i64 keys) { return up_to(keys, TILE) + LANES; }
inline i64 width_of(i64 keys) { return up_to(keys, std::max(LANES, WHOLE)); }
constexpr i64 SCORES = AT_ONCE + LANES;  // the row of a tile's scores

Keys keys_of(const Shape& s, i64 document) {
    i64 shared = document ? s.prefix : 0, first = s.starts[document];
    return {shared, first, shared + s.starts[document + 1] - first};
}

// The keys from `key` on, at most AT_ONCE, that a tile of queries sees some of.
struct Span {
    i64 key, end, width;
    Span(i64 key, i64 seen) : key(key), end(std::min(key + AT_ONCE, seen)), width(width_of(end - key)) {}
};

// The first span of keys that the query at key `at` and those after it see.
inline i64 first_span(const Shape& s, i64 at) {
    return s.window > 0 && at >= s.window ? (at + 1 - s.window) / AT_ONCE * AT_ONCE : 0;
}

// Of a span's keys, those that the query at key `at` sees.
struct Seen {
    i64 begin, end;
    Seen(const Shape& s, const Span& span, i64 at)
        : begin(s.window > 0 ? std::max<i64>(0, at + 1 - s.window - span.key) : 0),
          end(std::min(at + 1, span.end) - span.key) {}
    bool any(i64 j) const { return j < end && j + LANES > begin; }
    bool all(i64 j) const { return j >= begin && j + LANES <= end; }
    __mmask16 there(i64 j) const {
        return __mmask16(first(std::max<i64>(0, end - j)) & ~(begin > j ? first(begin - j) : 0));
    }
    float largest(const float* row) const {
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (i64 j = begin / LANES * LANES; j < end; j += LANES) {
            const __m512 x = _mm512_loadu_ps(row + j);
            most = all(j) ? _mm512_max_ps(most, x) : _mm512_mask_max_ps(most, there(j), most, x);
        }
        return _mm512_reduce_max_ps(most);
    }
    // 2^(scale * score - less) of 16; 0 where the query does not see the key.
    __m512 powers(const float* row, i64 j, float scale, float less) const {
        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(scale), _mm512_set1_ps(less));
        return all(j) ? exp2_(x) : _mm512_maskz_mov_ps(there(j), exp2_(x));
    }
};

// out [T, heads, D]; lse [heads, T]: log2 of the sum of a query's exponentials.
void attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const Shape& s, int threads) {
    std::vector<Job> jobs = jobs_of(s);
    const i64 of_head = s.length * s.size, out_row = s.heads * s.size;
    const float scale = s.scale * LOG2_E;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] Tiles tiles;
        static thread_local Room<Unit> rooms[4];
        static thread_local Room<float> for_scores, for_sums;
        Unit *p = rooms[2].of(TILE * SCORES), *tile = rooms[3].of(TILE * steps(s.size));
        float *scores = for_scores.of(TILE * SCORES), *sums = for_sums.of(TILE * s.size);
#pragma omp for schedule(dynamic, 1)
        for (std::size_t n = 0; n < jobs.size(); n++) {
            const Job& job = jobs[n];
            const i64 key_head = job.first / s.groups;
            Keys keys = keys_of(s, job.document);
            const i64 ld = row_for(keys.count), own = keys.count - keys.shared;
            Unit *kt = rooms[0].of(steps(s.size) * ld), *vp = rooms[1].of(steps(keys.count) * s.size);
            columns_of(k + key_head * of_head, keys, s.size, kt, ld);
            rows_of(v + key_head * of_head, s.size, keys, s.size, vp);
            for (i64 head = job.first; head < job.first + job.heads; head++)
                for (i64 row = 0; row < own; row += TILE) {
                    const i64 rows = std::min(TILE, own - row), at = keys.shared + row, seen = at + rows;
                    const Left left = units_of(q + head * of_head + (keys.first + row) * s.size, s.size, rows, s.size, tile);
                    float top[TILE], total[TILE];
                    std::fill_n(top, rows, -INFINITY), std::fill_n(total, rows, 0.0f);
                    const i64 begin = first_span(s, at);
                    for (i64 key = begin; key < seen; key += AT_ONCE) {
                        const Span span(key, seen);
                        product(tiles, left, kt + key, ld, scores, SCORES, rows, span.width, steps(s.size), false);
                        for (i64 i = 0; i < rows; i++) {
                            const float *of_row = scores + i * SCORES, before = top[i];
                            const Seen here(s, span, at + i);
                            top[i] = std::max(before, scale * here.largest(of_row));
                            const float less = top[i] == -INFINITY ? 0.0f : top[i];
                            __m512 sum = _mm512_setzero_ps();
                            for (i64 j = 0; j < span.width; j += LANES) {
                                const bool any = here.any(j);
                                __m512 e = any ? here.powers(of_row, j, scale, less) : _mm512_setzero_ps();
                                sum = _mm512_add_ps(sum, e);
                                put_along(e, p + (i * SCORES + j) / STEP);
                            }
                            float fade = 1.0f;
                            if (key > begin && top[i] > before) {  // what was summed up was of smaller numbers
                                fade = before == -INFINITY ? 0.0f : std::exp2(before - top[i]);
                                for (i64 d = i * s.size; d < (i + 1) * s.size; d++) sums[d] *= fade;
                            }
                            total[i] = total[i] * fade + _mm512_reduce_add_ps(sum);
                        }
                        product(tiles, {p, SCORES / STEP, 1}, vp + key / STEP * s.size, s.size, sums, s.size, rows,
                                s.size, steps(span.end - key), key > begin);
                    }
                    for (i64 i = 0; i < rows; i++) {
                        bf16* const y = out + (keys.first + row + i) * out_row + head * s.size;
                        const __m512 each = _mm512_set1_ps(1.0f / total[i]);
                        for (i64 d = 0; d < s.size; d += LANES) {
                            const __m512 sum = _mm512_loadu_ps(sums + i * s.size + d);
                            _mm256_storeu_si256((__m256i*)(y + d), narrow(_mm512_mul_ps(sum, each)));
                        }
                        lse[head * s.length + keys.first + row + i] = top[i] + std::log2(total[i]);
                    }
                }
        }
    }
}

// Weights and slopes of scores of two rows, or of one: next to each other along the row, and below each other.
void weigh(const float* scores, const float* slopes, i64 rows, const float* lse, const float* mean, i64 at,
           const Span& span, const Shape& s, Unit* along, Unit* weights, Unit* down) {
    const Seen seen[2] = {Seen(s, span, at), Seen(s, span, at + 1)};
    for (i64 j = 0; j < span.width; j += LANES) {
        __m512 w[2], g[2];
        for (i64 i = 0; i < 2; i++) {
            w[i] = g[i] = _mm512_setzero_ps();
            if (i < rows && seen[i].any(j)) {
                w[i] = seen[i].powers(scores + i * SCORES, j, s.scale * LOG2_E, lse[i]);
                const __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(slopes + i * SCORES + j), _mm512_set1_ps(mean[i]));
                g[i] = _mm512_maskz_mul_ps(seen[i].there(j), _mm512_set1_ps(s.scale), _mm512_mul_ps(w[i], slope));
            }
        }
        put_down(w[0], w[1], weights + j, SCORES), put_down(g[0], g[1], down + j, SCORES, along + j / STEP);
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

// The queries of a head and the gradients of their outputs, as products of a job's keys with tiles of 64 want them.
struct Queries {
    Room<Unit> rooms[4];
    Room<float> means;
    Unit *q, *dout, *q_down, *dout_down;  // rows as left sides, and turned: [tiles, rows of a tile] each
    float* mean;                          // of a row's slopes, by its weights: dO . O

    void take(const bf16* from, const bf16* dfrom, const bf16* out, i64 d_row, i64 out_row, i64 own, i64 size) {
        const i64 tiles = up_to(own, TILE) / TILE, of_rows = TILE * steps(size), of_columns = size * steps(TILE);
        q = rooms[0].of(tiles * of_rows), dout = rooms[1].of(tiles * of_rows);
        q_down = rooms[2].of(tiles * of_columns), dout_down = rooms[3].of(tiles * of_columns);
        mean = means.of(own);
        thread_local Room<Unit> for_pairs;
        Unit* const pairs = for_pairs.of(of_columns);
        for (i64 n = 0; n < tiles; n++) {
            const i64 row = n * TILE, rows = std::min(TILE, own - row);
            auto lay_out = [&](const bf16* x, i64 x_row, Unit* along, Unit* down) {
                units_of(x + row * x_row, x_row, rows, size, along + n * of_rows);
                rows_of(x + row * x_row, x_row, {0, 0, rows}, size, pairs);
                turn(pairs, size, steps(rows), down + n * of_columns);
            };
            lay_out(from, size, q, q_down), lay_out(dfrom, d_row, dout, dout_down);
        }
        for (i64 i = 0; i < own; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (i64 d = 0; d < size; d += LANES) {
                auto there = [&](const bf16* x) { return widened(_mm256_loadu_si256((const __m256i*)(x + d))); };
                sum = _mm512_fmadd_ps(there(dfrom + i * d_row), there(out + i * out_row), sum);
            }
            mean[i] = _mm512_reduce_add_ps(sum);
        }
    }
};

struct Gradients {  // of some heads' values and keys, each [size, ld]
    float *values, *keys;
    i64 ld;
};

// Each document has its own rows; those of the shared beginning are summed afterwards, in the documents' own order.
void put_gradients(const Gradients& of, const Shape& s, i64 document, i64 key_head, bf16* dk, bf16* dv,
                   float* dk_shared, float* dv_shared) {
    const Keys keys = keys_of(s, document);
    const i64 beginning = document ? keys.shared : s.prefix;
    const i64 shared_at = (key_head * s.documents + document) * s.prefix * s.size;
    const i64 place = key_head * s.length * s.size + keys.place(beginning) * s.size;
    put_turned(of.keys, of.ld, s.size, beginning, dk_shared + shared_at);
    put_turned(of.values, of.ld, s.size, beginning, dv_shared + shared_at);
    put_turned(of.keys, of.ld, s.size, beginning, keys.count, dk + place);
    put_turned(of.values, of.ld, s.size, beginning, keys.count, dv + place);
}

// out and dout [T, heads, D]; the latter's rows and heads lie d_row and d_head apart.
void attention_back(const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse, const bf16* dout,
                    i64 d_row, i64 d_head, bf16* dq, bf16* dk, bf16* dv, float* dk_shared, float* dv_shared,
                    const Shape& s, int threads) {
    std::vector<Job> jobs = jobs_of(s);
    std::vector<std::vector<float>> parts(jobs.size());  // of those that are one of several for a key head
    const i64 of_head = s.length * s.size, out_row = s.heads * s.size;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] Tiles tiles;
        static thread_local Room<Unit> rooms[6];
        static thread_local Room<float> floats[4];
        static thread_local Queries queries;
        Unit *g = rooms[3].of(TILE * SCORES), *wt = rooms[4].of(TILE * SCORES), *gt = rooms[5].of(TILE * SCORES);
        float *scores = floats[0].of(TILE * SCORES), *slopes = floats[1].of(TILE * SCORES);
#pragma omp for schedule(dynamic, 1)
        for (std::size_t n = 0; n < jobs.size(); n++) {
            const Job& job = jobs[n];
            const i64 key_head = job.first / s.groups;
            Keys keys = keys_of(s, job.document);
            const i64 ld = row_for(keys.count), own = keys.count - keys.shared;
            Unit *kt = rooms[0].of(steps(s.size) * ld), *vt = rooms[1].of(steps(s.size) * ld);
            Unit* kp = rooms[2].of(steps(keys.count) * s.size);
            float* dqueries = floats[2].of(own * s.size);
            float* both = job.heads < s.groups ? (parts[n].resize(2 * s.size * ld), parts[n].data())
                                               : floats[3].of(2 * s.size * ld);
            const Gradients of_job{both, both + s.size * ld, ld};
            std::fill_n(both, 2 * s.size * ld, 0.0f);
            columns_of(k + key_head * of_head, keys, s.size, kt, ld);
            columns_of(v + key_head * of_head, keys, s.size, vt, ld);
            rows_of(k + key_head * of_head, s.size, keys, s.size, kp);
            for (i64 head = job.first; head < job.first + job.heads; head++) {
                const i64 at_head = head * of_head + keys.first * s.size;
                queries.take(q + at_head, dout + keys.first * d_row + head * d_head,
                             out + keys.first * out_row + head * s.size, d_row, out_row, own, s.size);
                for (i64 key = 0; key < keys.count; key += AT_ONCE)
                    for (i64 row = 0; row < own; row += TILE) {
                        const i64 rows = std::min(TILE, own - row), at = keys.shared + row, seen = at + rows;
                        const i64 begin = first_span(s, at);
                        if (key >= seen || key < begin) continue;
                        const Span span(key, seen);
                        const i64 deep = steps(rows), n = row / TILE, of_row = steps(s.size);
                        auto with_keys = [&](const Unit* left, const Unit* right, float* to) {
                            product(tiles, {left + row * of_row, of_row, 1}, right + key, ld, to, SCORES, rows,
                                    span.width, of_row, false);
                        };
                        with_keys(queries.q, kt, scores), with_keys(queries.dout, vt, slopes);
                        const float* of_rows = lse + head * s.length + keys.first + row;
                        i64 i = 0;
                        for (; i < rows; i += 2)
                            weigh(scores + i * SCORES, slopes + i * SCORES, std::min<i64>(2, rows - i), of_rows + i,
                                  queries.mean + row + i, at + i, span, s, g + i * SCORES / STEP,
                                  wt + i * SCORES / STEP, gt + i * SCORES / STEP);
                        for (i64 k = i / STEP; k < deep; k++)
                            for (Unit* to : {wt, gt}) std::fill_n(to + k * SCORES, span.width, Unit(0));
                        float* const sums = dqueries + row * s.size;
                        product(tiles, {g, SCORES / STEP, 1}, kp + key / STEP * s.size, s.size, sums, s.size, rows,
                                s.size, steps(span.end - key), key > begin);
                        auto with_rows = [&](const Unit* left, const Unit* right, float* to) {
                            product(tiles, down_of(left + n * s.size * steps(TILE), s.size, deep), right, SCORES,
                                    to + key, ld, s.size, span.width, deep, true);
                        };
                        with_rows(queries.dout_down, wt, of_job.values), with_rows(queries.q_down, gt, of_job.keys);
                    }
                for (i64 j = 0; j < own * s.size; j += LANES)
                    _mm256_storeu_si256((__m256i*)(dq + at_head + j), narrow(_mm512_loadu_ps(dqueries + j)));
            }
            if (job.heads == s.groups)
                put_gradients(of_job, s, job.document, key_head, dk, dv, dk_shared, dv_shared);
        }
#pragma omp for schedule(dynamic, 1)
        for (std::size_t n = 0; n < jobs.size(); n++) {
            const Job& job = jobs[n];
            if (job.heads == s.groups || job.first % s.groups) continue;
            std::vector<float>& total = parts[n];
            for (i64 head = job.first + 1; head < job.first + s.groups; head++)
                for (std::size_t m = 0; m < jobs.size(); m++)
                    if (jobs[m].document == job.document && jobs[m].first == head)
                        for (std::size_t i = 0; i < total.size(); i++) total[i] += parts[m][i];
            const i64 ld = i64(total.size()) / (2 * s.size);
            put_gradients({total.data(), total.data() + s.size * ld, ld}, s, job.document, job.first / s.groups, dk,
                          dv, dk_shared, dv_shared);
        }
    }
}

}  // namespace

extern "C" void attention_bf16(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, i64 heads, i64 groups,
                               i64 length, i64 size, i64 documents, const i64* starts, i64 prefix, i64 window,
                               float scale, int threads) {
    attention(q, k, v, out, lse, {heads, groups, length, size, documents, starts, prefix, window, scale}, threads);
}
// dk, dv [key heads, T, D] but for the shared beginning, of which each document's share goes to dk_shared, dv_shared
// [key heads, documents, prefix, D] in float32: the caller sums them.
extern "C" void attention_back_bf16(const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse,
                                    const bf16* dout, i64 d_row, i64 d_head, bf16* dq, bf16* dk, bf16* dv,
                                    float* dk_shared, float* dv_shared, i64 heads, i64 groups, i64 length, i64 size,
                                    i64 documents, const i64* starts, i64 prefix, i64 window, float scale,
                                    int threads) {
    attention_back(q, k, v, out, lse, dout, d_row, d_head, dq, dk, dv, dk_shared, dv_shared,
                   {heads, groups, length, size, documents, starts, prefix, window, scale}, threads);
}
#endif

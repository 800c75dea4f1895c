// Causal attention of the documents in a packed row, in bfloat16. The formulas are in attention.py. A job is one document
// under one key head: its keys and values are laid out once, and the queries of all heads that share them go over them
// in tiles of 64, whose scores stay in the second cache and in float32.

#include "bf16_512.h"

#ifdef HAS_VECTORS
#include <vector>

namespace {

// What a lane multiplies at once: two numbers along the depth of a product, or one that is widened already.
constexpr i64 STEP = HAS_PAIRS ? 2 : 1, TILE = 64, ROWS = 6, COLUMNS = 4 * LANES;
using Unit = std::conditional_t<HAS_PAIRS, Pair, float>;

constexpr i64 steps(i64 depth) { return (depth + STEP - 1) / STEP; }

inline __m512 add_product(__m512 sums, Unit left, __m512i right) {
    if constexpr (HAS_PAIRS) return dot(sums, pairs_of(_mm512_set1_epi32(int(left))), pairs_of(right));
    else return _mm512_fmadd_ps(_mm512_set1_ps(float(left)), _mm512_castsi512_ps(right), sums);
}

// C[m, n] (+)= sum over k of A[m, k] B[k, n], in units along k. A's lie at a[m * a_row + k * a_step]; B and C have rows
// of ldb and ldc, n a multiple of 16.
template <int M, int N>
inline void block(const Unit* a, i64 a_row, i64 a_step, const Unit* b, i64 ldb, float* c, i64 ldc, i64 depth,
                  bool add) {
    __m512 sums[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * LANES) : _mm512_setzero_ps();
    for (i64 k = 0; k < depth; k++) {
        __m512i right[N];
        for (int j = 0; j < N; j++) right[j] = _mm512_loadu_si512(b + k * ldb + j * LANES);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) sums[i][j] = add_product(sums[i][j], a[i * a_row + k * a_step], right[j]);
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) _mm512_storeu_ps(c + i * ldc + j * LANES, sums[i][j]);
}

template <int N>
inline void strip(const Unit* a, i64 a_row, i64 a_step, const Unit* b, i64 ldb, float* c, i64 ldc, i64 rows, i64 depth,
                  bool add) {
    i64 i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        block<ROWS, N>(a + i * a_row, a_row, a_step, b, ldb, c + i * ldc, ldc, depth, add);
    for (; i + 2 <= rows; i += 2) block<2, N>(a + i * a_row, a_row, a_step, b, ldb, c + i * ldc, ldc, depth, add);
    for (; i < rows; i++) block<1, N>(a + i * a_row, a_row, a_step, b, ldb, c + i * ldc, ldc, depth, add);
}

void product(const Unit* a, i64 a_row, i64 a_step, const Unit* b, i64 ldb, float* c, i64 ldc, i64 rows, i64 columns,
             i64 depth, bool add) {
    i64 j = 0;
    for (; j + COLUMNS <= columns; j += COLUMNS)
        strip<4>(a, a_row, a_step, b + j, ldb, c + j, ldc, rows, depth, add);
    for (; j < columns; j += LANES) strip<1>(a, a_row, a_step, b + j, ldb, c + j, ldc, rows, depth, add);
}

// The keys of a document as it sees them: those of the shared beginning, then its own.
struct Keys {
    i64 shared, first, count;
    i64 place(i64 n) const { return n < shared ? n : first + n - shared; }
};

inline Unit unit(const bf16* at, const bf16* next) {
    if constexpr (HAS_PAIRS) return Pair(at->bits) | (next ? Pair(next->bits) << 16 : 0);
    else return get(*at);
}

// Left sides: the units of x [rows, size] as they lie.
void units_of(const bf16* x, i64 rows, i64 size, Unit* out) {
    if constexpr (HAS_PAIRS) std::memcpy((void*)out, x, std::size_t(rows * size) * sizeof(bf16));
    else
        for (i64 i = 0; i < rows * size; i++) out[i] = get(x[i]);
}

// Right sides. [steps(size), ld] of x [count, size], whose columns become rows; columns beyond count are zero.
void columns_of(const bf16* x, const Keys& keys, i64 size, Unit* out, i64 ld) {
    for (i64 n = 0; n < keys.count; n++) {
        const bf16* row = x + keys.place(n) * size;
        for (i64 d = 0; d < size; d += STEP) out[d / STEP * ld + n] = unit(row + d, row + d + 1);
    }
    for (i64 d = 0; d < steps(size); d++) std::fill(out + d * ld + keys.count, out + (d + 1) * ld, Unit(0));
}

// [steps(count), size] of x [count, size]; beyond count it is zero.
void rows_of(const bf16* x, const Keys& keys, i64 size, Unit* out) {
    for (i64 n = 0; n < keys.count; n += STEP, out += size) {
        const bf16 *row = x + keys.place(n) * size, *next = n + 1 < keys.count ? x + keys.place(n + 1) * size : nullptr;
#pragma omp simd
        for (i64 d = 0; d < size; d++) out[d] = unit(row + d, next ? next + d : nullptr);
    }
}

// A row of sums, rounded: a left side.
inline void round_along(const float* row, Unit* out, i64 count) {
    for (i64 j = 0; j < count; j += LANES) {
        __m256i x = narrow(_mm512_loadu_ps(row + j));
        if constexpr (HAS_PAIRS) _mm256_storeu_si256((__m256i*)(out + j / 2), x);
        else _mm512_storeu_ps(out + j, widened(x));
    }
}

// [steps(rows), ld] of x [rows, ld], rounded: a left side of which the rows are the depth.
void round_across(const float* x, i64 rows, i64 ld, i64 width, Unit* out) {
    for (i64 i = 0; i < rows; i += STEP, out += ld) {
        if constexpr (!HAS_PAIRS) {
            round_along(x + i * ld, out, width);
            continue;
        }
        for (i64 j = 0; j < width; j += LANES) {
            auto wide = [&](i64 row) { return _mm512_cvtepu16_epi32(narrow(_mm512_loadu_ps(x + row * ld + j))); };
            __m512i high = i + 1 < rows ? _mm512_slli_epi32(wide(i + 1), 16) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + j, _mm512_or_si512(wide(i), high));
        }
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
inline i64 row_for(i64 keys) { return up_to(keys, COLUMNS) + LANES; }

Keys keys_of(const Shape& s, i64 document) {
    i64 shared = document ? s.prefix : 0, first = s.starts[document];
    return {shared, first, shared + s.starts[document + 1] - first};
}

// Of the query at key `at`: the exponentials of its scores, in place, and what makes a softmax of them; zero from the
// first key that it does not see up to `width`, and before its window.
inline float weigh(float* row, i64 at, i64 width, const Shape& s) {
    i64 end = at + 1, begin = s.window > 0 && end > s.window ? end - s.window : 0;
    float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (i64 j = begin; j < end; j++) top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : sum)
    for (i64 j = begin; j < end; j++) {
        row[j] = exp_(s.scale * (row[j] - top));
        sum += row[j];
    }
    std::fill(row, row + begin, 0.0f);
    std::fill(row + end, row + width, 0.0f);
    return 1.0f / sum;
}

inline void narrow_all(const float* from, bf16* to, i64 count) {
    for (i64 j = 0; j < count; j += LANES)
        _mm256_storeu_si256((__m256i*)(to + j), narrow(_mm512_loadu_ps(from + j)));
}

void attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, const Shape& s, int threads) {
    std::vector<Job> jobs = jobs_of(s);
    const i64 of_head = s.length * s.size;
#pragma omp parallel num_threads(threads)
    {
        Room<Unit> rooms[4];
        Room<float> for_scores, for_sums;
#pragma omp for schedule(dynamic, 1)
        for (std::size_t n = 0; n < jobs.size(); n++) {
            const Job& job = jobs[n];
            Keys keys = keys_of(s, job.document);
            const i64 ld = row_for(keys.count), own = keys.count - keys.shared;
            Unit *kt = rooms[0].of(steps(s.size) * ld), *vp = rooms[1].of(steps(keys.count) * s.size);
            Unit *p = rooms[2].of(TILE * ld), *tile = rooms[3].of(TILE * s.size);
            float *scores = for_scores.of(TILE * ld), *sums = for_sums.of(TILE * s.size);
            columns_of(k + job.head * of_head, keys, s.size, kt, ld);
            rows_of(v + job.head * of_head, keys, s.size, vp);
            for (i64 head = job.head * s.groups; head < (job.head + 1) * s.groups; head++)
                for (i64 row = 0; row < own; row += TILE) {
                    i64 rows = std::min(TILE, own - row), seen = keys.shared + row + rows, width = up_to(seen, LANES);
                    i64 at = head * of_head + (keys.first + row) * s.size;
                    units_of(q + at, rows, s.size, tile);
                    product(tile, steps(s.size), 1, kt, ld, scores, ld, rows, width, steps(s.size), false);
                    float each[TILE];
                    for (i64 i = 0; i < rows; i++) {
                        each[i] = weigh(scores + i * ld, keys.shared + row + i, width, s);
                        round_along(scores + i * ld, p + i * ld / STEP, width);
                    }
                    product(p, ld / STEP, 1, vp, s.size, sums, s.size, rows, s.size, steps(seen), false);
                    for (i64 i = 0; i < rows; i++)
                        for (i64 d = 0; d < s.size; d++) sums[i * s.size + d] *= each[i];
                    narrow_all(sums, out + at, rows * s.size);
                }
        }
    }
}

void attention_back(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, bf16* dq, float* dk, float* dv,
                    float* dk_shared, float* dv_shared, const Shape& s, int threads) {
    std::vector<Job> jobs = jobs_of(s);
    const i64 of_head = s.length * s.size;
#pragma omp parallel num_threads(threads)
    {
        Room<Unit> rooms[9];
        Room<float> for_scores, for_slopes, for_sums;
        std::vector<float> dkeys, dvalues;
#pragma omp for schedule(dynamic, 1)
        for (std::size_t n = 0; n < jobs.size(); n++) {
            const Job& job = jobs[n];
            Keys keys = keys_of(s, job.document);
            const i64 ld = row_for(keys.count), own = keys.count - keys.shared;
            Unit *kt = rooms[0].of(steps(s.size) * ld), *vt = rooms[1].of(steps(s.size) * ld);
            Unit *kp = rooms[2].of(steps(keys.count) * s.size), *tile = rooms[3].of(TILE * s.size);
            Unit *qp = rooms[4].of(TILE * s.size), *dp = rooms[5].of(TILE * s.size);
            Unit *g = rooms[6].of(TILE * ld), *wt = rooms[7].of(TILE * ld), *gt = rooms[8].of(TILE * ld);
            float *scores = for_scores.of(TILE * ld), *slopes = for_slopes.of(TILE * ld);
            float* sums = for_sums.of(TILE * s.size);
            dkeys.assign(keys.count * s.size, 0.0f), dvalues.assign(keys.count * s.size, 0.0f);
            columns_of(k + job.head * of_head, keys, s.size, kt, ld);
            columns_of(v + job.head * of_head, keys, s.size, vt, ld);
            rows_of(k + job.head * of_head, keys, s.size, kp);
            for (i64 head = job.head * s.groups; head < (job.head + 1) * s.groups; head++)
                for (i64 row = 0; row < own; row += TILE) {
                    i64 rows = std::min(TILE, own - row), seen = keys.shared + row + rows, width = up_to(seen, LANES);
                    i64 at = head * of_head + (keys.first + row) * s.size;
                    const Keys mine = {0, 0, rows};
                    rows_of(q + at, mine, s.size, qp);
                    rows_of(dout + at, mine, s.size, dp);
                    auto with_keys = [&](const bf16* x, const Unit* right, float* out) {
                        units_of(x + at, rows, s.size, tile);
                        product(tile, steps(s.size), 1, right, ld, out, ld, rows, width, steps(s.size), false);
                    };
                    with_keys(q, kt, scores), with_keys(dout, vt, slopes);
                    for (i64 i = 0; i < rows; i++) {
                        float *w = scores + i * ld, *d = slopes + i * ld, sum = 0.0f;
                        float each = weigh(w, keys.shared + row + i, width, s);
#pragma omp simd reduction(+ : sum)
                        for (i64 j = 0; j < width; j++) {
                            w[j] *= each;
                            sum += w[j] * d[j];
                        }
#pragma omp simd
                        for (i64 j = 0; j < width; j++) d[j] = s.scale * (w[j] * (d[j] - sum));
                        round_along(d, g + i * ld / STEP, width);
                    }
                    round_across(scores, rows, ld, width, wt);
                    round_across(slopes, rows, ld, width, gt);
                    product(g, ld / STEP, 1, kp, s.size, sums, s.size, rows, s.size, steps(seen), false);
                    narrow_all(sums, dq + at, rows * s.size);
                    product(wt, 1, ld, dp, s.size, dvalues.data(), s.size, seen, s.size, steps(rows), true);
                    product(gt, 1, ld, qp, s.size, dkeys.data(), s.size, seen, s.size, steps(rows), true);
                }
            // Each job has its own rows; those of the shared beginning are summed afterwards, in the jobs' own order.
            i64 beginning = keys.shared * s.size, rest = own * s.size, place = job.head * of_head + keys.first * s.size;
            i64 shared_at = (job.head * s.documents + job.document) * s.prefix * s.size;
            std::copy_n(dkeys.data(), beginning, dk_shared + shared_at);
            std::copy_n(dvalues.data(), beginning, dv_shared + shared_at);
            std::copy_n(dkeys.data() + beginning, rest, dk + place);
            std::copy_n(dvalues.data() + beginning, rest, dv + place);
        }
    }
}

}  // namespace

extern "C" void attention_bf16(const bf16* q, const bf16* k, const bf16* v, bf16* out, i64 heads, i64 groups,
                               i64 length, i64 size, i64 documents, const i64* starts, i64 prefix, i64 window,
                               float scale, int threads) {
    attention(q, k, v, out, {heads, groups, length, size, documents, starts, prefix, window, scale}, threads);
}
// dk, dv [key heads, T, D] and dk_shared, dv_shared [key heads, documents, prefix, D] in float32: the caller sums the
// shared ones over documents.
extern "C" void attention_back_bf16(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, bf16* dq, float* dk,
                                    float* dv, float* dk_shared, float* dv_shared, i64 heads, i64 groups, i64 length,
                                    i64 size, i64 documents, const i64* starts, i64 prefix, i64 window, float scale,
                                    int threads) {
    attention_back(q, k, v, dout, dq, dk, dv, dk_shared, dv_shared,
                   {heads, groups, length, size, documents, starts, prefix, window, scale}, threads);
}
#endif

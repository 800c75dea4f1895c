// Causal attention of the documents in a packed row, in bfloat16. The formulas are in attention.py. A job is one document
// under one query head: its keys and values are laid out once, and its queries go over them in tiles of 64, whose scores
// stay in the second cache and in float32.

#include "bf16_512.h"

#ifdef HAS_VECTORS
#include <vector>

namespace {

constexpr i64 TILE = 64, ROWS = HAS_PAIRS ? 6 : 5, COLUMNS = 4 * LANES;

// C[m, n] (+)= sum over k of A[m, k] B[k, n], in pairs along k. A's pairs lie at a[m * a_row + k * a_pair]; B and C
// have rows of ldb and ldc, n a multiple of 16.
template <int M, int N>
inline void block(const StoredPair* a, i64 a_row, i64 a_pair, const Pair* b, i64 ldb, float* c, i64 ldc, i64 depth,
                  bool add) {
    __m512 sums[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * LANES) : _mm512_setzero_ps();
    for (i64 k = 0; k < depth; k++) {
        Pairs right[N];
        for (int j = 0; j < N; j++) right[j] = pairs_of(_mm512_loadu_si512(b + k * ldb + j * LANES));
        for (int i = 0; i < M; i++) {
            Pairs left = pairs_of(_mm512_set1_epi32(int(a[i * a_row + k * a_pair])));
            for (int j = 0; j < N; j++) sums[i][j] = dot(sums[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) _mm512_storeu_ps(c + i * ldc + j * LANES, sums[i][j]);
}

template <int N>
inline void strip(const StoredPair* a, i64 a_row, i64 a_pair, const Pair* b, i64 ldb, float* c, i64 ldc, i64 rows,
                  i64 depth, bool add) {
    i64 i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        block<ROWS, N>(a + i * a_row, a_row, a_pair, b, ldb, c + i * ldc, ldc, depth, add);
    for (; i + 2 <= rows; i += 2) block<2, N>(a + i * a_row, a_row, a_pair, b, ldb, c + i * ldc, ldc, depth, add);
    for (; i < rows; i++) block<1, N>(a + i * a_row, a_row, a_pair, b, ldb, c + i * ldc, ldc, depth, add);
}

void product(const StoredPair* a, i64 a_row, i64 a_pair, const Pair* b, i64 ldb, float* c, i64 ldc, i64 rows,
             i64 columns, i64 depth, bool add) {
    i64 j = 0;
    for (; j + COLUMNS <= columns; j += COLUMNS)
        strip<4>(a, a_row, a_pair, b + j, ldb, c + j, ldc, rows, depth, add);
    for (; j < columns; j += LANES) strip<1>(a, a_row, a_pair, b + j, ldb, c + j, ldc, rows, depth, add);
}

inline Pair join(bf16 low, bf16 high) { return Pair(low.bits) | Pair(high.bits) << 16; }

// The keys of a document as it sees them: those of the shared beginning, then its own.
struct Keys {
    i64 shared, first, count;
    i64 place(i64 n) const { return n < shared ? n : first + n - shared; }
};

// [size / 2, ld] of x [count, size]: element (d, n) is x[n, 2d], x[n, 2d + 1]; columns beyond count are zero.
void columns_of(const bf16* x, const Keys& keys, i64 size, Pair* out, i64 ld) {
    for (i64 n = 0; n < keys.count; n++) {
        const bf16* row = x + keys.place(n) * size;
        for (i64 d = 0; d < size / 2; d++) out[d * ld + n] = join(row[2 * d], row[2 * d + 1]);
    }
    for (i64 d = 0; d < size / 2; d++) std::fill(out + d * ld + keys.count, out + (d + 1) * ld, Pair(0));
}

// [ceil(count / 2), size] of x [count, size]: element (j, d) is x[2j, d], x[2j + 1, d]; beyond count it is zero.
void rows_of(const bf16* x, const Keys& keys, i64 size, Pair* out) {
    for (i64 n = 0; n < keys.count; n += 2) {
        const bf16 *even = x + keys.place(n) * size, *odd = n + 1 < keys.count ? x + keys.place(n + 1) * size : nullptr;
        Pair* row = out + n / 2 * size;
#pragma omp simd
        for (i64 d = 0; d < size; d++) row[d] = join(even[d], odd ? odd[d] : bf16{0});
    }
}

struct Shape {
    i64 heads, groups, length, size;  // query heads, query heads per key head, T, D
    i64 documents;
    const i64* starts;  // [documents + 1]
    i64 prefix, window;
    float scale;
};

struct Job {
    i64 head, document, work;
};

std::vector<Job> jobs_of(const Shape& s) {
    std::vector<Job> jobs;
    for (i64 h = 0; h < s.heads; h++)
        for (i64 i = 0; i < s.documents; i++) {
            i64 n = s.starts[i + 1] - s.starts[i];
            jobs.push_back({h, i, n * (n + (i ? 2 * s.prefix : 0))});
        }
    std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.work > b.work; });
    return jobs;
}

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
    i64 j = 0;
    for (; j + LANES <= count; j += LANES)
        _mm256_storeu_si256((__m256i*)(to + j), narrow(_mm512_loadu_ps(from + j)));
    for (; j < count; j++) put(to[j], from[j]);
}

// Two rows as one of pairs; without a second one it is zero. `count` is a multiple of 16.
inline void interleave(const float* even, const float* odd, Pair* out, i64 count) {
    for (i64 j = 0; j < count; j += LANES) {
        auto wide = [](const float* x) { return _mm512_cvtepu16_epi32(narrow(_mm512_loadu_ps(x))); };
        __m512i high = odd ? _mm512_slli_epi32(wide(odd + j), 16) : _mm512_setzero_si512();
        _mm512_storeu_si512(out + j, _mm512_or_si512(wide(even + j), high));
    }
}

void attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, const Shape& s, int threads) {
    std::vector<Job> jobs = jobs_of(s);
#pragma omp parallel num_threads(threads)
    {
        std::vector<Pair> kt, vp;
        std::vector<float> scores, sums(TILE * s.size);
        std::vector<bf16> p;
#pragma omp for schedule(dynamic, 1)
        for (std::size_t n = 0; n < jobs.size(); n++) {
            const Job& job = jobs[n];
            Keys keys = keys_of(s, job.document);
            i64 ld = up_to(keys.count, COLUMNS), own = keys.count - keys.shared;
            i64 of_head = job.head * s.length * s.size, of_key = job.head / s.groups * s.length * s.size;
            kt.resize(s.size / 2 * ld), vp.resize((keys.count + 1) / 2 * s.size), scores.resize(TILE * ld);
            p.resize(TILE * ld);
            columns_of(k + of_key, keys, s.size, kt.data(), ld);
            rows_of(v + of_key, keys, s.size, vp.data());
            for (i64 row = 0; row < own; row += TILE) {
                i64 rows = std::min(TILE, own - row), seen = keys.shared + row + rows, width = up_to(seen, LANES);
                const bf16* qt = q + of_head + (keys.first + row) * s.size;
                product((const StoredPair*)qt, s.size / 2, 1, kt.data(), ld, scores.data(), ld, rows, width, s.size / 2,
                        false);
                float each[TILE];
                for (i64 i = 0; i < rows; i++) {
                    each[i] = weigh(scores.data() + i * ld, keys.shared + row + i, width, s);
                    narrow_all(scores.data() + i * ld, p.data() + i * ld, width);
                }
                product((const StoredPair*)p.data(), ld / 2, 1, vp.data(), s.size, sums.data(), s.size, rows, s.size,
                        (seen + 1) / 2, false);
                for (i64 i = 0; i < rows; i++)
                    for (i64 d = 0; d < s.size; d++) sums[i * s.size + d] *= each[i];
                narrow_all(sums.data(), out + of_head + (keys.first + row) * s.size, rows * s.size);
            }
        }
    }
}

void attention_back(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, bf16* dq, float* dk, float* dv,
                    float* dk_shared, float* dv_shared, const Shape& s, int threads) {
    std::vector<Job> jobs = jobs_of(s);
#pragma omp parallel num_threads(threads)
    {
        std::vector<Pair> kt, kp, vt, qp, dp, wt, gt;
        std::vector<float> scores, slopes, sums(TILE * s.size), dkeys, dvalues;
        std::vector<bf16> g;
#pragma omp for schedule(dynamic, 1)
        for (std::size_t n = 0; n < jobs.size(); n++) {
            const Job& job = jobs[n];
            Keys keys = keys_of(s, job.document);
            i64 ld = up_to(keys.count, COLUMNS), own = keys.count - keys.shared;
            i64 of_head = job.head * s.length * s.size, of_key = job.head / s.groups * s.length * s.size;
            kt.resize(s.size / 2 * ld), vt.resize(s.size / 2 * ld), kp.resize((keys.count + 1) / 2 * s.size);
            qp.resize(TILE / 2 * s.size), dp.resize(TILE / 2 * s.size);
            scores.resize(TILE * ld), slopes.resize(TILE * ld), g.resize(TILE * ld);
            wt.resize(TILE / 2 * ld), gt.resize(TILE / 2 * ld);
            dkeys.assign(keys.count * s.size, 0.0f), dvalues.assign(keys.count * s.size, 0.0f);
            columns_of(k + of_key, keys, s.size, kt.data(), ld);
            columns_of(v + of_key, keys, s.size, vt.data(), ld);
            rows_of(k + of_key, keys, s.size, kp.data());
            for (i64 row = 0; row < own; row += TILE) {
                i64 rows = std::min(TILE, own - row), seen = keys.shared + row + rows, width = up_to(seen, LANES);
                i64 at = of_head + (keys.first + row) * s.size;
                Keys mine = {0, 0, rows};
                rows_of(q + at, mine, s.size, qp.data());
                rows_of(dout + at, mine, s.size, dp.data());
                product((const StoredPair*)(q + at), s.size / 2, 1, kt.data(), ld, scores.data(), ld, rows, width,
                        s.size / 2, false);
                product((const StoredPair*)(dout + at), s.size / 2, 1, vt.data(), ld, slopes.data(), ld, rows, width,
                        s.size / 2, false);
                for (i64 i = 0; i < rows; i++) {
                    float *w = scores.data() + i * ld, *d = slopes.data() + i * ld, sum = 0.0f;
                    float each = weigh(w, keys.shared + row + i, width, s);
#pragma omp simd reduction(+ : sum)
                    for (i64 j = 0; j < width; j++) {
                        w[j] *= each;
                        sum += w[j] * d[j];
                    }
#pragma omp simd
                    for (i64 j = 0; j < width; j++) d[j] = s.scale * (w[j] * (d[j] - sum));
                    narrow_all(d, g.data() + i * ld, width);
                }
                for (i64 i = 0; i < rows; i += 2) {  // pairs of rows, for the products over rows
                    const float *w = scores.data() + i * ld, *d = slopes.data() + i * ld;
                    bool odd = i + 1 < rows;
                    interleave(w, odd ? w + ld : nullptr, wt.data() + i / 2 * ld, width);
                    interleave(d, odd ? d + ld : nullptr, gt.data() + i / 2 * ld, width);
                }
                product((const StoredPair*)g.data(), ld / 2, 1, kp.data(), s.size, sums.data(), s.size, rows, s.size,
                        (seen + 1) / 2, false);
                narrow_all(sums.data(), dq + at, rows * s.size);
                product((const StoredPair*)wt.data(), 1, ld, dp.data(), s.size, dvalues.data(), s.size, seen, s.size,
                        (rows + 1) / 2, true);
                product((const StoredPair*)gt.data(), 1, ld, qp.data(), s.size, dkeys.data(), s.size, seen, s.size,
                        (rows + 1) / 2, true);
            }
            // Each job has its own rows; those of the shared beginning are summed afterwards, in the jobs' own order.
            i64 beginning = keys.shared * s.size, rest = own * s.size, place = of_head + keys.first * s.size;
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
// dk, dv [heads, T, D] and dk_shared, dv_shared [heads, documents, prefix, D] in float32: the caller sums over the
// query heads of a key head, and the shared ones over documents.
extern "C" void attention_back_bf16(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, bf16* dq, float* dk,
                                    float* dv, float* dk_shared, float* dv_shared, i64 heads, i64 groups, i64 length,
                                    i64 size, i64 documents, const i64* starts, i64 prefix, i64 window, float scale,
                                    int threads) {
    attention_back(q, k, v, dout, dq, dk, dv, dk_shared, dv_shared,
                   {heads, groups, length, size, documents, starts, prefix, window, scale}, threads);
}
#endif

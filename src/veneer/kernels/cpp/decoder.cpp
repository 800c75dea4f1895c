// One new token of every row through all layers of a decoder: norms, projections with their low-rank updates, rotation,
// attention over the cache, gated MLP. One parallel region holds the step, so that a token costs little more than
// reading the weights. What is computed, and where it is rounded, is what the layers' own operations do one by one.

#include "panels.h"

#include <omp.h>

#include <vector>

namespace {

template <class T>
struct Linear {  // y = g (x W^T + (x A^T) B^T) + b
    const T *weight, *bias, *a, *b, *less_one;  // [out, in], [out], [r, in], [out, r], [out] = g - 1
    i64 out, rank;
};

template <class T>
struct Low {  // a second product of the same sums: + h B^T
    const T *h = nullptr, *b = nullptr;  // [rows, rank], [out, rank]
    i64 rank = 0;
};

template <class T>
struct Layer {
    const T *norm, *mlp_norm;
    Linear<T> q, k, v, o, gate, up, down;
    T *keys, *values;  // [rows, key_heads, capacity, head]
};

template <class T>
struct Step {
    const Layer<T>* layer;
    T* x;                   // [rows, width]: embeddings in, hidden states after the final norm out
    const T *norm, *cos, *sin;  // [width], [rows, head]
    const i64* mask;        // [rows, mask_row]: 1 where a column is seen; null: all are
    i64 layers, rows, width, heads, key_heads, head, hidden, length, key_row, key_head, mask_row;
    float eps, scaling;
};

template <int N>
using Count = std::integral_constant<int, N>;

// dots<M, N>: sums[m * N + n] = x[m] . w[n] + h[m] . b[n], for M rows of x and N rows of w. Meanwhile the first rows of
// `next` are fetched.
#ifdef HAS_VECTORS
template <class T>
struct Vector {  // sixteen floats
    using Held = __m512;
    static constexpr int SIZE = 16;
    static Held load(const float* p) { return _mm512_loadu_ps(p); }
    static Held load(const float* p, i64 size) { return _mm512_maskz_loadu_ps(first(size), p); }
    static void widen(Held v, float* to) { _mm512_store_ps(to, v); }
};
template <>
struct Vector<bf16> {  // sixteen pairs
    using Held = Pairs;
    static constexpr int SIZE = 32;
    static Held load(const bf16* p) { return pairs_of(_mm512_loadu_si512(p)); }
    static Held load(const bf16* p, i64 size) {
        return pairs_of(_mm512_maskz_loadu_epi16((__mmask32(1) << size) - 1, p));
    }
#ifndef __AVX512BF16__
    static void widen(Held v, float* to) { _mm512_store_ps(to, v.odd), _mm512_store_ps(to + LANES, v.even); }
#endif
};

inline __m512 pairs_of_two(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
inline __m512 pairs_of_four(__m512 a, __m512 b) {
    __m512d p = _mm512_castps_pd(a), q = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
}
inline __m512 halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
// The sums of sixteen vectors.
inline __m512 sums_of(const __m512* v) {
    __m512 quads[4];
    for (int i = 0; i < 4; i++)
        quads[i] = pairs_of_four(pairs_of_two(v[4 * i], v[4 * i + 1]), pairs_of_two(v[4 * i + 2], v[4 * i + 3]));
    return halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]));
}

template <int M, int N, class T>
inline void dots(const T* x, i64 ldx, const T* w, i64 depth, Low<T> low, float* sums, const T* next, int fetch) {
    using V = Vector<T>;
    __m512 parts[16];
    for (auto& part : parts) part = _mm512_setzero_ps();
    auto add = [&](const T* x, i64 ldx, const T* w, i64 ldw, auto load) {
        typename V::Held left[M], right[N];
        for (int m = 0; m < M; m++) left[m] = load(x + m * ldx);
        for (int n = 0; n < N; n++) right[n] = load(w + n * ldw);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) parts[m * N + n] = dot(parts[m * N + n], left[m], right[n]);
    };
    auto add_all = [&](const T* x, i64 ldx, const T* w, i64 size, int fetch) {
        i64 k = 0;
        for (; k + V::SIZE <= size; k += V::SIZE) {
            for (int i = 0; i < fetch; i++) __builtin_prefetch(next + i * size + k);
            add(x + k, ldx, w + k, size, [](const T* p) { return V::load(p); });
        }
        if (k < size) add(x + k, ldx, w + k, size, [left = size - k](const T* p) { return V::load(p, left); });
    };
    add_all(x, ldx, w, depth, fetch);
    if (low.rank) add_all(low.h, low.rank, low.b, low.rank, 0);
    _mm512_mask_storeu_ps(sums, __mmask16((1u << M * N) - 1), sums_of(parts));
}

struct Ahead {  // lines that are fetched while something is computed
    static constexpr i64 LINE = 64;
    const char *next, *end;
    void fetch() {
        if (next < end) __builtin_prefetch(next), next += LINE;
    }
};

// The same for rows that were widened: in the same order, to the same sums.
template <int M, int N>
inline void wide_dots(const float* x, const float* w, i64 size, float* sums, Ahead& ahead) {
    __m512 parts[16];
    for (auto& part : parts) part = _mm512_setzero_ps();
    for (i64 k = 0; k < size; k += LANES) {
        ahead.fetch();
        __m512 right[N];
        for (int n = 0; n < N; n++) right[n] = _mm512_load_ps(w + n * size + k);
        for (int m = 0; m < M; m++) {
            __m512 left = _mm512_load_ps(x + m * size + k);
            for (int n = 0; n < N; n++) parts[m * N + n] = dot(parts[m * N + n], left, right[n]);
        }
    }
    _mm512_mask_storeu_ps(sums, __mmask16((1u << M * N) - 1), sums_of(parts));
}

template <class T>
constexpr bool WIDENS = !(HAS_PAIRS && sizeof(T) == 2);

template <class T>
inline float* widen(const T* row, i64 size, float* to) {
    using V = Vector<T>;
    i64 k = 0;
    for (; k + V::SIZE <= size; k += V::SIZE) V::widen(V::load(row + k), to + k);
    if (k < size) V::widen(V::load(row + k, size - k), to + k), k += V::SIZE;
    return to + k;
}

// The sums of many rows: those of w are widened a few at a time, and meet all rows of x, which were widened before.
template <class T, class Finish>
inline void wide_product(const T* x, i64 ldx, i64 rows, const T* w, i64 begin, i64 end, i64 depth, Low<T> low,
                         const Finish& finish) {
    constexpr int TILE = 4;
    thread_local Room<float> for_x, for_w;
    const i64 size = up_to(depth, Vector<T>::SIZE) + up_to(low.rank, Vector<T>::SIZE);
    const i64 group = std::max<i64>(1, 6144 / (TILE * size)) * TILE;  // of the first cache a half
    float *wide_x = for_x.of(rows * size), *wide_w = for_w.of(group * size), sums[TILE * TILE];
    for (i64 m = 0; m < rows; m++)
        widen(low.h + m * low.rank, low.rank, widen(x + m * ldx, depth, wide_x + m * size));
    for (i64 n = begin; n < end; n += group) {
        const i64 count = std::min(group, end - n);
        for (i64 i = 0; i < count; i++)
            widen(low.b + (n + i) * low.rank, low.rank, widen(w + (n + i) * depth, depth, wide_w + i * size));
        const T *next = w + (n + count) * depth, *after = w + std::min(n + count + group, end) * depth;
        Ahead ahead{(const char*)next, (const char*)after};
        for (i64 m = 0; m < rows; m += TILE) {
            auto across = [&](auto M) {
                i64 i = 0;
                for (; i + TILE <= count; i += TILE) {
                    wide_dots<M, TILE>(wide_x + m * size, wide_w + i * size, size, sums, ahead);
                    finish(m, n + i, sums, M, Count<TILE>());
                }
                for (; i < count; i++) {
                    wide_dots<M, 1>(wide_x + m * size, wide_w + i * size, size, sums, ahead);
                    finish(m, n + i, sums, M, Count<1>());
                }
            };
            switch (rows - m) {
                case 1: across(Count<1>()); break;
                case 2: across(Count<2>()); break;
                case 3: across(Count<3>()); break;
                default: across(Count<TILE>());
            }
        }
    }
}
#else
template <int M, int N, class T>
inline void dots(const T* x, i64 ldx, const T* w, i64 depth, Low<T> low, float* sums, const T*, int) {
    auto dot = [](const T* left, const T* right, i64 size) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (i64 k = 0; k < size; k++) sum += left[k] * right[k];
        return sum;
    };
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            sums[m * N + n] = dot(x + m * ldx, w + n * depth, depth) +
                              dot(low.h + m * low.rank, low.b + n * low.rank, low.rank);
}
#endif

#ifdef HAS_TILES
// The rows of w are the left side, as they lie: the sums come turned. Row after row they are summed in the same order.
template <class Finish>
void tile_product(const bf16* x, i64 ldx, i64 rows, const bf16* w, i64 begin, i64 end, i64 depth, Low<bf16> low,
                  const Finish& finish) {
    Products s{{{w, x, depth, ldx, depth, 1}, {low.b, low.h, low.rank, low.rank, low.rank, 1}},
               2, end, rows, 0, {}, {}, {}, NONE_DROPPED, {}};
    Tiles tiles;
    multiply(s, {0, up_to(rows, WIDTH) / WIDTH, begin, end}, tiles,
             [&](const float* sums, i64 n, i64 outs, i64 m, i64 columns) {
                 for (i64 i = 0; i < outs; i += SIDE)
                     for (i64 j = 0; j < columns; j += SIDE) {
                         __m512i turned[16];
                         for (i64 k = 0; k < SIDE; k++)
                             turned[k] = _mm512_load_si512(sums + (i + k) * WIDTH + j);
                         transpose(turned);
                         for (i64 k = 0; k < std::min(SIDE, columns - j); k++) {
                             alignas(64) float row[SIDE];
                             _mm512_store_si512(row, turned[k]);
                             if (outs - i >= SIDE) finish(m + j + k, n + i, row, Count<1>(), Count<int(SIDE)>());
                             else
                                 for (i64 o = 0; o < outs - i; o++)
                                     finish(m + j + k, n + i + o, row + o, Count<1>(), Count<1>());
                         }
                     }
             });
}
#endif

// finish(m, n, sums, M, N) with the sums of rows m .. m + M of x and n .. n + N of w, for the M rows of x from `m` on
// and the rows of w from `begin` to `end`.
template <int M, int N, class T, class Finish>
inline void tile(const T* x, i64 ldx, i64 m, const T* w, i64 begin, i64 end, i64 depth, Low<T> low,
                 const Finish& finish, i64 ahead = 0, int fetch = 0) {
    float sums[M * N];
    i64 n = begin;
    for (; n + N <= end; n += N) {
        Low<T> here = {low.h + m * low.rank, low.b + n * low.rank, low.rank};
        dots<M, N>(x + m * ldx, ldx, w + n * depth, depth, here, sums, w + (n + ahead) * depth, fetch);
        finish(m, n, sums, Count<M>(), Count<N>());
    }
    if constexpr (N > 1)
        if (n < end) tile<M, 1>(x, ldx, m, w, n, end, depth, low, finish);
}

constexpr i64 BLOCK = 32;  // rows of w that stay in the cache while all rows of x meet them

// The same for all rows of x. A row gives the same sums whatever stands beside it.
template <class T, class Finish>
inline void product(const T* x, i64 ldx, i64 rows, const T* w, i64 begin, i64 end, i64 depth, const Finish& finish,
                    Low<T> low = {}) {
#ifdef HAS_TILES
    if constexpr (sizeof(T) == 2)
        if (depth % 2 == 0 && low.rank % 2 == 0)
            return tile_product(x, ldx, rows, w, begin, end, depth, low, finish);
#endif
#ifdef HAS_VECTORS
    if constexpr (WIDENS<T>)
        if (rows >= 4) return wide_product(x, ldx, rows, w, begin, end, depth, low, finish);
#endif
    for (i64 n = begin; n < end; n += BLOCK) {
        i64 to = std::min(n + BLOCK, end), m = 0;
        // Tiles of x find the block in the cache, but for the first; they share in fetching the next one, four rows of
        // it for each four that they use.
        const int fetch = rows >= 16 ? 1 : rows >= 8 ? 2 : 0;
        for (; m + 4 <= rows; m += 4)
            tile<4, 4>(x, ldx, m, w, n, to, depth, low, finish, BLOCK + m / 4 * fetch, m / 4 * fetch < 4 ? fetch : 0);
        for (; m + 2 <= rows; m += 2) tile<2, 8>(x, ldx, m, w, n, to, depth, low, finish);
        for (; m < rows; m++) tile<1, 8>(x, ldx, m, w, n, to, depth, low, finish);
    }
}

// M rows of N numbers, rounded, to y.
template <int M, int N, class T>
inline void store(const float* sums, T* y, i64 ldy) {
    T out[M * N];
#pragma omp simd
    for (int i = 0; i < M * N; i++) put(out[i], sums[i]);
    for (int m = 0; m < M; m++) std::memcpy(y + m * ldy, out + m * N, N * sizeof(T));
}

// The part of `count` things that this thread takes, in blocks of 32.
inline void share(i64 count, i64& begin, i64& end) {
    i64 blocks = (count + BLOCK - 1) / BLOCK, threads = omp_get_num_threads(), own = omp_get_thread_num();
    begin = std::min(count, blocks * own / threads * BLOCK);
    end = std::min(count, blocks * (own + 1) / threads * BLOCK);
}

// y = g (x W^T + h B^T) + b, for this thread's share of the outputs; h = x A^T.
template <class T>
void outputs(const Linear<T>& p, const T* x, i64 rows, i64 depth, const T* h, T* y, i64 ldy) {
    i64 begin, end;
    share(p.out, begin, end);
    product(x, depth, rows, p.weight, begin, end, depth, [&](i64 m, i64 n, float* sums, auto M, auto N) {
        auto add_bias = [&] {
            for (int i = 0; i < M; i++)
                for (int j = 0; j < N; j++) sums[i * N + j] += get(p.bias[n + j]);
        };
        if (p.bias && !p.less_one) add_bias();
        if (p.less_one) {
            for (int i = 0; i < M; i++)
                for (int j = 0; j < N; j++) {
                    float u = rounded<T>(sums[i * N + j]);
                    sums[i * N + j] = rounded<T>(u + u * get(p.less_one[n + j]));
                }
            if (p.bias) add_bias();
        }
        store<M, N>(sums, y + m * ldy + n, ldy);
    }, Low<T>{h, p.b, p.rank});
}

// h = x A^T of several linears, one after another in `low`; the threads share the rows of all A.
template <class T>
void lows(std::initializer_list<const Linear<T>*> parts, const T* x, i64 rows, i64 depth, T* low) {
    i64 at = 0;
    for (auto p : parts) {
        if (p->rank) {
            i64 threads = omp_get_num_threads(), own = omp_get_thread_num();
            T* h = low + at * rows;
            product(x, depth, rows, p->a, p->rank * own / threads, p->rank * (own + 1) / threads, depth,
                    [&](i64 m, i64 r, const float* sums, auto M, auto N) {
                        store<M, N>(sums, h + m * p->rank + r, p->rank);
                    });
        }
        at += p->rank;
    }
}

template <class T>
void norm_row(const T* x, const T* w, T* y, i64 width, float eps) {
    Sum<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < width; j++) sum += Sum<T>(get(x[j])) * get(x[j]);
    float r = float(1 / std::sqrt(sum / width + eps));
#pragma omp simd
    for (i64 j = 0; j < width; j++) put(y[j], rounded<T>(get(x[j]) * r) * get(w[j]));
}

template <class T>
void turn_head(T* u, const T* c, const T* s, i64 size) {
    i64 half = size / 2;
    for (i64 j = 0; j < half; j++) {
        float a = get(u[j]), b = get(u[j + half]);
        put(u[j], rounded<T>(a * get(c[j])) - rounded<T>(b * get(s[j])));
        put(u[j + half], rounded<T>(b * get(c[j + half])) + rounded<T>(a * get(s[j + half])));
    }
}

// out[g] = sum of weights[g][j] * values[j], for G query heads and one of their value head.
template <int G, class T>
void weigh(const float* weights, i64 ldw, const T* values, i64 first, i64 count, i64 head, T* out) {
    constexpr int WIDTH = 16;
    for (i64 d = 0; d < head; d += WIDTH) {
        const int some = int(std::min<i64>(WIDTH, head - d));
        float sums[G][WIDTH] = {};
        auto add = [&](i64 j, auto size) {
            for (int g = 0; g < G; g++) {
                const float weight = weights[g * ldw + j];
#pragma omp simd
                for (int i = 0; i < size; i++) sums[g][i] += weight * get(values[j * head + d + i]);
            }
        };
        if (some == WIDTH)
            for (i64 j = first; j < count; j++) add(j, Count<WIDTH>());
        else
            for (i64 j = first; j < count; j++) add(j, some);
        for (int g = 0; g < G; g++)
            for (int i = 0; i < some; i++) put(out[g * head + d + i], sums[g][i]);
    }
}

// Attention of the query heads that share a key head, of one row: o = softmax(scale q k^T) v.
template <class T>
void attend(const Step<T>& s, const Layer<T>& layer, i64 row, i64 key_head, const T* q, T* out, float* scores) {
    const T* keys = layer.keys + row * s.key_row + key_head * s.key_head;
    const T* values = layer.values + row * s.key_row + key_head * s.key_head;
    const i64* seen = s.mask ? s.mask + row * s.mask_row : nullptr;
    const i64 count = s.length + 1, groups = s.heads / s.key_heads;
    i64 first = 0;
    while (seen && first < count - 1 && !seen[first]) first++;
    q += key_head * groups * s.head, out += key_head * groups * s.head;
    product(q, s.head, groups, keys, first, count, s.head, [&](i64 m, i64 j, const float* sums, auto M, auto N) {
        for (int i = 0; i < M; i++)
            for (int n = 0; n < N; n++)
                scores[(m + i) * count + j + n] = seen && !seen[j + n] ? -INFINITY : s.scaling * sums[i * N + n];
    });
    for (i64 g = 0; g < groups; g++) {
        float *own = scores + g * count, top = -INFINITY, total = 0.0f;
#pragma omp simd reduction(max : top)
        for (i64 j = first; j < count; j++) top = std::max(top, own[j]);
#pragma omp simd reduction(+ : total)
        for (i64 j = first; j < count; j++) {
            own[j] = own[j] == -INFINITY ? 0.0f : exp_(own[j] - top);
            total += own[j];
        }
#pragma omp simd
        for (i64 j = first; j < count; j++) own[j] /= total;
    }
    for (i64 g = 0, some; g < groups; g += some) {
        some = std::min<i64>(groups - g, 4);
        auto of = some == 4 ? weigh<4, T> : some == 3 ? weigh<3, T> : some == 2 ? weigh<2, T> : weigh<1, T>;
        of(scores + g * count, count, values, first, count, s.head, out + g * s.head);
    }
}

template <class T>
void step(const Step<T>& s, int threads) {
    i64 q_width = s.heads * s.head, k_width = s.key_heads * s.head, rank = 0;
    for (i64 i = 0; i < s.layers; i++) {
        const Layer<T>& l = s.layer[i];
        rank = std::max({rank, l.q.rank + l.k.rank + l.v.rank, l.o.rank, l.gate.rank + l.up.rank, l.down.rank});
    }
    std::vector<T> normed(s.rows * s.width), qs(s.rows * q_width), ks(s.rows * k_width), vs(s.rows * k_width),
        mixed(s.rows * q_width), added(s.rows * s.width), gates(s.rows * s.hidden), ups(s.rows * s.hidden),
        low(s.rows * rank);
    T* h = low.data();
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(s.heads / s.key_heads * (s.length + 1));
        auto each_row = [&](const T* w, bool add) {  // x += what was added; its norm
#pragma omp for schedule(static)
            for (i64 m = 0; m < s.rows; m++) {
                T* x = s.x + m * s.width;
                if (add)
                    for (i64 j = 0; j < s.width; j++) put(x[j], get(x[j]) + get(added[m * s.width + j]));
                norm_row(x, w, normed.data() + m * s.width, s.width, s.eps);
            }
        };
        for (i64 i = 0; i < s.layers; i++) {
            const Layer<T>& l = s.layer[i];
            each_row(l.norm, i > 0);
            lows({&l.q, &l.k, &l.v}, normed.data(), s.rows, s.width, h);
#pragma omp barrier
            outputs(l.q, normed.data(), s.rows, s.width, h, qs.data(), q_width);
            outputs(l.k, normed.data(), s.rows, s.width, h + l.q.rank * s.rows, ks.data(), k_width);
            outputs(l.v, normed.data(), s.rows, s.width, h + (l.q.rank + l.k.rank) * s.rows, vs.data(), k_width);
#pragma omp barrier
#pragma omp for collapse(2) schedule(static)
            for (i64 m = 0; m < s.rows; m++)
                for (i64 n = 0; n < s.key_heads; n++) {
                    const T *c = s.cos + m * s.head, *sn = s.sin + m * s.head;
                    i64 groups = s.heads / s.key_heads, at = m * s.key_row + n * s.key_head + s.length * s.head;
                    T* key = ks.data() + m * k_width + n * s.head;
                    turn_head(key, c, sn, s.head);
                    std::copy(key, key + s.head, l.keys + at);
                    std::copy_n(vs.data() + m * k_width + n * s.head, s.head, l.values + at);
                    for (i64 g = 0; g < groups; g++)
                        turn_head(qs.data() + m * q_width + (n * groups + g) * s.head, c, sn, s.head);
                    attend(s, l, m, n, qs.data() + m * q_width, mixed.data() + m * q_width, scores.data());
                }
            lows({&l.o}, mixed.data(), s.rows, q_width, h);
#pragma omp barrier
            outputs(l.o, mixed.data(), s.rows, q_width, h, added.data(), s.width);
#pragma omp barrier
            each_row(l.mlp_norm, true);
            lows({&l.gate, &l.up}, normed.data(), s.rows, s.width, h);
#pragma omp barrier
            outputs(l.gate, normed.data(), s.rows, s.width, h, gates.data(), s.hidden);
            outputs(l.up, normed.data(), s.rows, s.width, h + l.gate.rank * s.rows, ups.data(), s.hidden);
            i64 begin, end;
            share(s.hidden, begin, end);  // what this thread has just computed
            for (i64 m = 0; m < s.rows; m++) {
                T *e = gates.data() + m * s.hidden, *g = ups.data() + m * s.hidden;
#pragma omp simd
                for (i64 n = begin; n < end; n++) {
                    float x = get(e[n]);
                    put(e[n], rounded<T>(x / (1.0f + exp_(-x))) * get(g[n]));
                }
            }
#pragma omp barrier
            lows({&l.down}, gates.data(), s.rows, s.hidden, h);
#pragma omp barrier
            outputs(l.down, gates.data(), s.rows, s.hidden, h, added.data(), s.width);
#pragma omp barrier
        }
        each_row(s.norm, true);
    }
    std::copy(normed.begin(), normed.end(), s.x);
}

// y = x W^T + b of a few rows.
template <class T>
void few_rows(const T* x, const T* w, const T* bias, T* y, i64 rows, i64 out, i64 depth, int threads) {
    Linear<T> plain{w, bias, nullptr, nullptr, nullptr, out, 0};
#pragma omp parallel num_threads(threads)
    outputs(plain, x, rows, depth, (const T*)nullptr, y, out);
}

}  // namespace

#define EXPORT(T, name)                                                                                       \
    extern "C" void decoder_step_##name(const void* s, int threads) { step(*(const Step<T>*)s, threads); }    \
    extern "C" void few_rows_##name(const T* x, const T* w, const T* bias, T* y, i64 rows, i64 out, i64 depth, \
                                    int threads) {                                                            \
        few_rows(x, w, bias, y, rows, out, depth, threads);                                                   \
    }

EXPORT(float, f32)
#ifdef HAS_VECTORS
EXPORT(bf16, bf16)
#endif

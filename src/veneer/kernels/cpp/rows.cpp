// What lies between the products of a step on a CPU, each in one pass over its rows. Plain C++: the compiler makes the
// vectors. The formulas, and the plain PyTorch that each must agree with, are in the .py file of the operation.

#ifdef __AVX512F__
#pragma GCC target("prefer-vector-width=512")  // compilers take half of it by themselves
#endif
#include "dropout.h"

// ---- cross entropy of rows of logits -------------------------------------------------------------------------------

template <class T>
static void cross_entropy(T* z, const i64* labels, float* nll, std::uint8_t* correct, i64 rows, i64 width, float scale,
                          i64 grad, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < rows; i++) {
        T* row = z + i * width;
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (i64 j = 0; j < width; j++) {
            float x = scale * get(row[j]);
            top = x > top ? x : top;
        }
        Sum<T> sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 j = 0; j < width; j++) sum += exp_(scale * get(row[j]) - top);
        float own = scale * get(row[labels[i]]);
        nll[i] = float(std::log(sum)) + (top - own);
        i64 earlier = 0;  // words before the label that are as likely: the first of them is the choice
        if (own == top)
            for (i64 j = 0; j < labels[i]; j++) earlier += scale * get(row[j]) == top;
        correct[i] = own == top && earlier == 0;
        if (!grad) continue;
        float share = float(exp_(own - top) / sum) - 1.0f, each = float(1 / sum);
#pragma omp simd
        for (i64 j = 0; j < width; j++) put(row[j], scale * (exp_(scale * get(row[j]) - top) * each));
        put(row[labels[i]], scale * share);
    }
}

// ---- root-mean-square norm -----------------------------------------------------------------------------------------

// y = x rstd (w + offset); given more, x is x + more, which is written to total. Without an offset x rstd is rounded.
template <class T>
static void rms_norm(const T* x, const T* more, T* total, const T* w, T* y, float* rstd, i64 rows, i64 width, float eps,
                     float offset, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < rows; i++) {
        const T* in = x + i * width;
        T* out = y + i * width;
        if (more) {
            const T* other = more + i * width;
            T* both = total + i * width;
#pragma omp simd
            for (i64 j = 0; j < width; j++) put(both[j], get(in[j]) + get(other[j]));
            in = both;
        }
        Sum<T> sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 j = 0; j < width; j++) sum += Sum<T>(get(in[j])) * get(in[j]);
        float r = float(1 / std::sqrt(sum / width + eps));
        rstd[i] = r;
        if (offset == 0.0f) {
#pragma omp simd
            for (i64 j = 0; j < width; j++) put(out[j], rounded<T>(get(in[j]) * r) * get(w[j]));
        } else {
#pragma omp simd
            for (i64 j = 0; j < width; j++) put(out[j], get(in[j]) * r * (get(w[j]) + offset));
        }
    }
}

// Given dmore, dx is the sum of it and of the norm's gradient. dx may be dy.
template <class T>
static void rms_norm_back(const T* dy, const T* x, const T* w, const float* rstd, const T* dmore, T* dx, i64 rows,
                          i64 width, float offset, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < rows; i++) {
        const T *up = dy + i * width, *in = x + i * width;
        T* out = dx + i * width;
        Sum<T> sum = 0;
        float r = rstd[i];
#pragma omp simd reduction(+ : sum)
        for (i64 j = 0; j < width; j++) sum += Sum<T>(get(up[j]) * (get(w[j]) + offset)) * (get(in[j]) * r);
        float mean = float(sum / width);
        if (dmore) {
            const T* other = dmore + i * width;
#pragma omp simd
            for (i64 j = 0; j < width; j++)
                put(out[j], r * (get(up[j]) * (get(w[j]) + offset) - get(in[j]) * r * mean) + get(other[j]));
        } else {
#pragma omp simd
            for (i64 j = 0; j < width; j++)
                put(out[j], r * (get(up[j]) * (get(w[j]) + offset) - get(in[j]) * r * mean));
        }
    }
}

// ---- dropout -------------------------------------------------------------------------------------------------------

// out = mask(x), or out + mask(x).
template <class T>
static void drop(const T* __restrict x, T* __restrict out, i64 count, i64 key, i64 threshold, float scale, i64 add,
                 i64 begin, int threads) {
    constexpr i64 CHUNK = 1 << 14;  // in one the counter's upper half does not change
    const Dropout d{key, threshold, begin, scale};
    const i64 end = begin + count;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 chunk = begin / CHUNK * CHUNK; chunk < end; chunk += CHUNK) {
        const i64 stop = std::min(chunk + CHUNK, end);
        i64 i = std::max(chunk, begin);
#ifdef HAS_VECTORS
        if constexpr (sizeof(T) == 2) {
            const Drops drops(d, chunk);
            for (i64 at = i / 32 * 32; at < stop; at += 32) {
                const __mmask32 there = up_to_32(stop - at) & (at < i ? ~0u << (i - at) : ~0u);
                const T* from = x + (at - begin);
                T* to = out + (at - begin);
                __m512i y = drops.of(_mm512_maskz_loadu_epi16(there, from), at);
                if (add) y = sum(_mm512_maskz_loadu_epi16(there, to), y);
                _mm512_mask_storeu_epi16(to, there, y);
            }
            continue;
        }
#endif
        if (add) {
#pragma omp simd
            for (i64 j = i; j < stop; j++) {
                T& to = out[j - begin];
                put(to, get(to) + dropped<T>(d, get(x[j - begin]), j));
            }
        } else {
#pragma omp simd
            for (i64 j = i; j < stop; j++) put(out[j - begin], dropped<T>(d, get(x[j - begin]), j));
        }
    }
}

// How a number, or a vector of them, is read, rounded to a type, and written.
struct One {
    template <class T> float from(const T* x) const { return get(*x); }
    template <class T> float round(float x, const T*) const { return rounded<T>(x); }
    template <class T> void to(T* place, float x) const { put(*place, x); }
};
#ifdef HAS_VECTORS
struct Vector {
    __mmask16 there = 0xffff;
    __m512 from(const bf16* x) const { return widened(_mm256_maskz_loadu_epi16(there, x)); }
    __m512 from(const float* x) const { return _mm512_maskz_loadu_ps(there, x); }
    __m512 round(__m512 x, const bf16*) const { return widened(narrow(x)); }
    void to(bf16* place, __m512 x) const { _mm256_mask_storeu_epi16(place, there, narrow(x)); }
    void to(float* place, __m512 x) const { _mm512_mask_storeu_ps(place, there, x); }
};
#endif

// Calls each(place, how) for the numbers of a row: in bfloat16 by vectors, else the compiler makes them.
template <class T, class Each>
static inline void along(i64 count, const Each& each) {
#ifdef HAS_VECTORS
    if constexpr (sizeof(T) == 2) {
        i64 j = 0;
        for (; j + LANES <= count; j += LANES) each(j, Vector{});
        if (j < count) each(j, Vector{first(count - j)});
        return;
    }
#endif
#pragma omp simd
    for (i64 j = 0; j < count; j++) each(j, One{});
}

// ---- a factor for each column --------------------------------------------------------------------------------------

// The columns' sums of N things: run(begin, end, parts) adds those of some rows to parts [N, width]. Runs are summed up in
// their order, so that sums do not depend on the number of threads.
template <std::size_t N, class Run>
static void column_sums(i64 rows, i64 width, float* const (&sums)[N], int threads, const Run& run) {
    constexpr i64 ROWS = 64, COLUMNS = 256;
    const i64 runs = (rows + ROWS - 1) / ROWS;
    std::vector<float> parts(std::size_t(runs * width) * N);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 r = 0; r < runs; r++)
            run(r * ROWS, std::min((r + 1) * ROWS, rows), parts.data() + r * i64(N) * width);
#pragma omp for schedule(static) collapse(2)
        for (std::size_t n = 0; n < N; n++)
            for (i64 begin = 0; begin < width; begin += COLUMNS) {
                const i64 end = std::min(begin + COLUMNS, width);
                std::fill(sums[n] + begin, sums[n] + end, 0.0f);
                for (i64 r = 0; r < runs; r++) {
                    const float* part = parts.data() + (r * i64(N) + i64(n)) * width;
                    for (i64 j = begin; j < end; j++) sums[n][j] += part[j];
                }
            }
    }
}

// out = dy (1 + less_one), perhaps in place, and sums = the columns' sums of dy z.
template <class T>
static void scale_back(const T* dy, const T* z, const T* less_one, T* out, float* sums, i64 rows, i64 width,
                       int threads) {
    column_sums(rows, width, {sums}, threads, [=](i64 begin, i64 end, float* part) {
        for (i64 at = begin * width; at < end * width; at += width)
            along<T>(width, [=](i64 j, auto some) {
                auto d = some.from(dy + at + j);
                some.to(part + j, fma_(d, some.from(z + at + j), some.from(part + j)));
                some.to(out + at + j, fma_(d, some.from(less_one + j), d));
            });
    });
}

// ---- rotation of heads ---------------------------------------------------------------------------------------------

// out[h, t] = R(t) in[h, t], or its inverse; both with strides of their own, in elements, and whole heads in a row.
template <class T>
static void turn(const T* in, T* out, const T* cos, const T* sin, i64 heads, i64 rows, i64 size, i64 in_head,
                 i64 in_row, i64 out_head, i64 out_row, float sign, int threads) {
    i64 half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 t = 0; t < rows; t++) {
        const T *c = cos + t * size, *s = sin + t * size;
        for (i64 h = 0; h < heads; h++) {
            const T* u = in + h * in_head + t * in_row;
            T* o = out + h * out_head + t * out_row;
#pragma omp simd
            for (i64 j = 0; j < half; j++) {
                float a = get(u[j]), b = get(u[half + j]), k = sign * get(s[j]);
                put(o[j], rounded<T>(a * get(c[j])) - rounded<T>(b * k));
                put(o[half + j], rounded<T>(b * get(c[half + j])) + rounded<T>(a * k));
            }
        }
    }
}

// x / sum: near 1 the last bit counts, since the gradient takes the difference; in 16 bits a product is near enough.
template <class T>
static inline float share(float x, float sum, float each) {
    return sizeof(T) == 2 ? x * each : x / sum;
}

// ---- causal softmax of a tile of scores ----------------------------------------------------------------------------

// scores [rows, keys] in place; row i stands at position i % tile of the tile, whose last is at the last key.
template <class T>
static void softmax(T* scores, i64 rows, i64 keys, i64 tile, i64 window, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < rows; i++) {
        T* row = scores + i * keys;
        i64 end = keys - tile + i % tile + 1;
        i64 begin = window > 0 && end > window ? end - window : 0;
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (i64 j = begin; j < end; j++) {
            float x = get(row[j]);
            top = x > top ? x : top;
        }
        Sum<T> sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 j = begin; j < end; j++) sum += exp_(scale * (get(row[j]) - top));
        float total = float(sum), each = 1.0f / total;
        for (i64 j = 0; j < begin; j++) put(row[j], 0.0f);
#pragma omp simd
        for (i64 j = begin; j < end; j++) put(row[j], share<T>(exp_(scale * (get(row[j]) - top)), total, each));
        for (i64 j = end; j < keys; j++) put(row[j], 0.0f);
    }
}

// dP becomes scale * P * (dP - rowsum(P * dP)) in place.
template <class T>
static void softmax_back(T* dp, const T* p, i64 rows, i64 keys, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < rows; i++) {
        T* d = dp + i * keys;
        const T* w = p + i * keys;
        Sum<T> sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 j = 0; j < keys; j++) sum += Sum<T>(get(w[j])) * get(d[j]);
        float mean = float(sum);
#pragma omp simd
        for (i64 j = 0; j < keys; j++) put(d[j], scale * (get(w[j]) * (get(d[j]) - mean)));
    }
}

// ---- a gated product -----------------------------------------------------------------------------------------------

// Of one number or of a vector of them: act(e) into `value`, and its derivative.
struct Silu {
    template <class F>
    static inline F of(F e, F& value) {
        F s = inverse(1.0f + exp_(-e));
        value = e * s;
        return s * (1.0f + e * (1.0f - s));
    }
};
struct GeluTanh {
    template <class F>
    static inline F of(F e, F& value) {
        const float k = 0.79788456f, c = 0.044715f;
        F t = 1.0f - 2.0f * inverse(1.0f + exp_(2.0f * k * (e + c * e * e * e)));  // tanh
        value = 0.5f * e * (1.0f + t);
        return 0.5f * (1.0f + t) + 0.5f * e * (1.0f - t * t) * k * (1.0f + 3.0f * c * e * e);
    }
};

// m = act(e) g; given dm as well, it becomes de in place, dg is written, and m is written to `again`.
template <class T, class ACT>
static void gate(const T* e, const T* g, T* m, T* dg, T* again, i64 count, i64 back, int threads) {
    constexpr i64 CHUNK = 4096;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 begin = 0; begin < count; begin += CHUNK) {
        const i64 here = std::min(CHUNK, count - begin);
        const T *x = e + begin, *y = g + begin;
        T *to = m + begin, *slopes = dg + begin, *product = again + begin;
        if (!back)
            along<T>(here, [=](i64 j, auto some) {
                auto value = some.from(x + j);
                ACT::of(some.from(x + j), value);
                some.to(to + j, some.round(value, x) * some.from(y + j));
            });
        else
            along<T>(here, [=](i64 j, auto some) {
                auto value = some.from(x + j), slope = ACT::of(value, value), gain = some.from(y + j);
                auto dm = some.from(to + j);
                value = some.round(value, x);
                some.to(slopes + j, value * dm);
                some.to(product + j, value * gain);
                some.to(to + j, some.round(dm * gain, x) * slope);
            });
    }
}

// The same of factors whose columns are scaled: e (1 + ke) and g (1 + kg) stand for e and g, and are nowhere written.
template <class T, class ACT>
static void scaled_gate(const T* e, const T* g, const T* ke, const T* kg, T* m, i64 rows, i64 width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 t = 0; t < rows; t++) {
        const T *x = e + t * width, *y = g + t * width;
        T* to = m + t * width;
        along<T>(width, [=](i64 j, auto some) {
            auto own = some.from(x + j), gain = some.from(y + j), value = own;
            ACT::of(some.round(fma_(own, some.from(ke + j), own), e), value);
            some.to(to + j, some.round(value, e) * some.round(fma_(gain, some.from(kg + j), gain), e));
        });
    }
}

// dm becomes de in place, dg and m are written, and the columns' sums of the gradients by what was scaled: those of the
// scales.
template <class T, class ACT>
static void scaled_gate_back(const T* e, const T* g, const T* ke, const T* kg, T* dm, T* dg, T* again, float* e_sums,
                             float* g_sums, i64 rows, i64 width, int threads) {
    column_sums(rows, width, {e_sums, g_sums}, threads, [=](i64 begin, i64 end, float* e_part) {
        float* const g_part = e_part + width;
        for (i64 at = begin * width; at < end * width; at += width)
            along<T>(width, [=](i64 j, auto some) {
                auto up = some.from(dm + at + j), own = some.from(e + at + j), gain = some.from(g + at + j);
                auto a = some.from(ke + j), b = some.from(kg + j), value = own;
                auto slope = ACT::of(some.round(fma_(own, a, own), e), value);
                auto scaled = some.round(fma_(gain, b, gain), e);
                value = some.round(value, e);
                auto dy = some.round(value * up, e), dx = some.round(some.round(up * scaled, e) * slope, e);
                some.to(e_part + j, fma_(dx, own, some.from(e_part + j)));
                some.to(g_part + j, fma_(dy, gain, some.from(g_part + j)));
                some.to(dm + at + j, fma_(dx, a, dx));
                some.to(dg + at + j, fma_(dy, b, dy));
                some.to(again + at + j, value * scaled);
            });
    });
}

// ---- weights in 4-bit codes ----------------------------------------------------------------------------------------

// out [rows, 2 * half] = book[code] * scale, rounded once; the code of an even column is a byte's upper half, and the
// columns of a row fall into `groups` of one scale each.
template <class T>
static void decode4(T* out, const std::uint8_t* codes, const float* scales, const float* book, i64 rows, i64 half,
                    i64 groups, i64 codes_row, i64 scales_row, int threads) {
    const i64 size = 2 * half / groups;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 r = 0; r < rows; r++) {
        const std::uint8_t* code = codes + r * codes_row;
        T* to = out + r * 2 * half;
        for (i64 group = 0; group < groups; group++, to += size, code += size / 2) {
            const float scale = scales[r * scales_row + group];
            i64 i = 0;
#ifdef __AVX512F__
            const __m512 values = _mm512_loadu_ps(book);
            const __m512i shift = _mm512_set1_epi64(4);  // of every lane that is even; none of the others
            for (; i + 16 <= size; i += 16) {
                __m128i bytes = _mm_loadl_epi64((const __m128i*)(code + i / 2));
                __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
                alignas(64) float products[16];
                __m512 value = _mm512_permutexvar_ps(_mm512_srlv_epi32(twice, shift), values);  // takes the low 4 bits
                _mm512_store_ps(products, _mm512_mul_ps(value, _mm512_set1_ps(scale)));
#pragma omp simd
                for (int j = 0; j < 16; j++) put(to[i + j], products[j]);
            }
#endif
            for (; i < size; i++) put(to[i], book[(code[i / 2] >> (i % 2 ? 0 : 4)) & 15] * scale);
        }
    }
}

#define EACH(T, suffix)                                                                                                \
    extern "C" void cross_entropy_##suffix(T* z, const i64* labels, float* nll, std::uint8_t* correct, i64 rows,       \
                                           i64 width, float scale, i64 grad, int threads) {                            \
        cross_entropy<T>(z, labels, nll, correct, rows, width, scale, grad, threads);                                  \
    }                                                                                                                  \
    extern "C" void rms_norm_##suffix(const T* x, const T* more, T* total, const T* w, T* y, float* rstd, i64 rows,    \
                                      i64 width, float eps, float offset, int threads) {                               \
        rms_norm<T>(x, more, total, w, y, rstd, rows, width, eps, offset, threads);                                    \
    }                                                                                                                  \
    extern "C" void rms_norm_back_##suffix(const T* dy, const T* x, const T* w, const float* rstd, const T* dmore,     \
                                           T* dx, i64 rows, i64 width, float offset, int threads) {                    \
        rms_norm_back<T>(dy, x, w, rstd, dmore, dx, rows, width, offset, threads);                                     \
    }                                                                                                                  \
    extern "C" void turn_##suffix(const T* in, T* out, const T* cos, const T* sin, i64 heads, i64 rows, i64 size,      \
                                  i64 in_head, i64 in_row, i64 out_head, i64 out_row, float sign, int threads) {       \
        turn<T>(in, out, cos, sin, heads, rows, size, in_head, in_row, out_head, out_row, sign, threads);              \
    }                                                                                                                  \
    extern "C" void scale_back_##suffix(const T* dy, const T* z, const T* less_one, T* out, float* sums, i64 rows,     \
                                        i64 width, int threads) {                                                      \
        scale_back<T>(dy, z, less_one, out, sums, rows, width, threads);                                               \
    }                                                                                                                  \
    extern "C" void drop_##suffix(const T* x, T* out, i64 count, i64 key, i64 threshold, float scale, i64 add,         \
                                  i64 begin, int threads) {                                                            \
        drop<T>(x, out, count, key, threshold, scale, add, begin, threads);                                           \
    }                                                                                                                  \
    extern "C" void gate_silu_##suffix(const T* e, const T* g, T* m, T* dg, T* again, i64 count, i64 back,            \
                                       int threads) {                                                                  \
        gate<T, Silu>(e, g, m, dg, again, count, back, threads);                                                       \
    }                                                                                                                  \
    extern "C" void gate_gelu_tanh_##suffix(const T* e, const T* g, T* m, T* dg, T* again, i64 count, i64 back,       \
                                            int threads) {                                                             \
        gate<T, GeluTanh>(e, g, m, dg, again, count, back, threads);                                                   \
    }                                                                                                                  \
    extern "C" void gate_silu_scaled_##suffix(const T* e, const T* g, const T* ke, const T* kg, T* m, i64 rows,        \
                                        i64 width, int threads) {                                                      \
        scaled_gate<T, Silu>(e, g, ke, kg, m, rows, width, threads);                                                   \
    }                                                                                                                  \
    extern "C" void gate_silu_scaled_back_##suffix(const T* e, const T* g, const T* ke, const T* kg, T* dm, T* dg,     \
                                        T* again, float* e_sums, float* g_sums, i64 rows, i64 width, int threads) {              \
        scaled_gate_back<T, Silu>(e, g, ke, kg, dm, dg, again, e_sums, g_sums, rows, width, threads);                         \
    }                                                                                                                  \
    extern "C" void gate_gelu_tanh_scaled_##suffix(const T* e, const T* g, const T* ke, const T* kg, T* m, i64 rows,   \
                                        i64 width, int threads) {                                                      \
        scaled_gate<T, GeluTanh>(e, g, ke, kg, m, rows, width, threads);                                              \
    }                                                                                                                  \
    extern "C" void gate_gelu_tanh_scaled_back_##suffix(const T* e, const T* g, const T* ke, const T* kg, T* dm, T* dg,\
                                        T* again, float* e_sums, float* g_sums, i64 rows, i64 width, int threads) {              \
        scaled_gate_back<T, GeluTanh>(e, g, ke, kg, dm, dg, again, e_sums, g_sums, rows, width, threads);                    \
    }                                                                                                                  \
    extern "C" void decode4_##suffix(T* out, const std::uint8_t* codes, const float* scales, const float* book,        \
                                     i64 rows, i64 half, i64 groups, i64 codes_row, i64 scales_row, int threads) {     \
        decode4<T>(out, codes, scales, book, rows, half, groups, codes_row, scales_row, threads);                      \
    }                                                                                                                  \
    extern "C" void softmax_##suffix(T* scores, i64 rows, i64 keys, i64 tile, i64 window, float scale,      \
                                     int threads) {                                                                    \
        softmax<T>(scores, rows, keys, tile, window, scale, threads);                                           \
    }                                                                                                                  \
    extern "C" void softmax_back_##suffix(T* dp, const T* p, i64 rows, i64 keys, float scale, int threads) {           \
        softmax_back<T>(dp, p, rows, keys, scale, threads);                                                            \
    }

EACH(float, f32)
EACH(bf16, bf16)

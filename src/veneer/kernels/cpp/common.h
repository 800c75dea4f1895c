// Numbers: bfloat16 and float32, rounding, exp. Every function computes in float32 and rounds where PyTorch's separate
// operations would have rounded, so that a model gives the numbers that it gives without these files. They are compiled
// without contraction: a * b + c is two roundings, but for fma_.
#pragma once

#include <cstdint>
#include <cstring>
#include <cmath>
#include <type_traits>
#include <vector>

using i64 = std::int64_t;
using Pair = std::uint32_t;                                   // two bf16 that are multiplied and added together
typedef std::uint32_t __attribute__((may_alias)) StoredPair;  // one where it lies as two bf16

static constexpr i64 up_to(i64 n, i64 step) { return (n + step - 1) / step * step; }

// Room that begins at a whole line and grows when asked for more.
template <class T>
struct Room {
    std::vector<T> held;
    T* of(i64 count) {
        constexpr i64 LINE = 64;
        if (i64(held.size()) < count + LINE) held.resize(count + LINE);
        return (T*)up_to(i64(held.data()), LINE);
    }
};

struct bf16 {
    std::uint16_t bits;
};

static inline float get(float x) { return x; }
static inline float get(bf16 x) {
    std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
static inline void put(float& to, float x) { to = x; }
static inline void put(bf16& to, float x) {  // to nearest, ties to even; a NaN stays one
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = std::uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
template <class T>
static inline float rounded(float x) {
    T t;
    put(t, x);
    return get(t);
}

static inline float fma_(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline float inverse(float x) { return 1.0f / x; }

template <class T>  // what a sum over a row is taken in: no less exact than PyTorch's
using Sum = std::conditional_t<sizeof(T) == 2, float, double>;

// exp to about one unit in the last place of float32 (Cephes' polynomial); below -87 it stays at exp(-87).
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = fma_(x, 1.44269504f, 12582912.0f) - 12582912.0f;  // to the nearest whole number
    float r = fma_(n, 2.12194440e-4f, fma_(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = fma_(p, r, 1.3981999507e-3f);
    p = fma_(p, r, 8.3334519073e-3f);
    p = fma_(p, r, 4.1665795894e-2f);
    p = fma_(p, r, 1.6666665459e-1f);
    p = fma_(p, r, 5.0000001201e-1f);
    p = fma_(p, r * r, r) + 1.0f;
    std::int32_t power = (std::int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

// Vectors of one instruction set, by the compiler's vector extensions: plain C++ for x86-64 and aarch64 alike.
//
// Included only by kernels.cpp, which is compiled once per instruction set. Everything lies in a namespace of its own
// for each, and nothing of the standard library is instantiated: the linker must never hand code that was compiled for
// AVX-512 to a machine without it.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fpg {
namespace FPG_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTile = 4;  // rows of a register tile: 4 x 4 accumulators and 8 operands of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTile = 3;  // 9 accumulators and 6 operands of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTile = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kTile = 3;
#endif

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

constexpr int kFloats = kLanes<float>;
constexpr int kDoubles = kLanes<double>;

typedef uint32_t UInts __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
typedef float HalfFloats
    __attribute__((vector_size(kVectorBytes / 2)));  // as many floats as a Vector<double> has lanes
typedef uint32_t HalfUInts __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t QuarterShorts __attribute__((vector_size(kVectorBytes / 4)));

template <class V>
inline V load_unaligned(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
inline void store_unaligned(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// The bits of fp16 as fp32, on vectors of uint32: the exponent is moved by an exact multiplication, so that
// subnormals come out right; inf and NaN get their exponent back.
template <class Bits, class Floats>
inline Floats half_to_float(Bits half) {
  const Bits sign = (half & 0x8000u) << 16;
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Floats scaled = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
  const Bits special = reinterpret_cast<Bits>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return reinterpret_cast<Floats>(reinterpret_cast<Bits>(scaled) | special | sign);
}

inline Vector<float> load(const float* from, float) { return load_unaligned<Vector<float>>(from); }
inline Vector<double> load(const double* from, double) { return load_unaligned<Vector<double>>(from); }
inline Vector<double> load(const float* from, double) {
  return __builtin_convertvector(load_unaligned<HalfFloats>(from), Vector<double>);
}

inline Vector<float> load(const BFloat* from, float) {
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(load_unaligned<Shorts>(from), UInts) << 16);
}
inline Vector<double> load(const BFloat* from, double) {
  const HalfUInts bits = __builtin_convertvector(load_unaligned<QuarterShorts>(from), HalfUInts) << 16;
  return __builtin_convertvector(reinterpret_cast<HalfFloats>(bits), Vector<double>);
}

inline Vector<float> load(const Half* from, float) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return half_to_float<UInts, Vector<float>>(__builtin_convertvector(load_unaligned<Shorts>(from), UInts));
#endif
}
inline Vector<double> load(const Half* from, double) {
  const HalfUInts bits = __builtin_convertvector(load_unaligned<QuarterShorts>(from), HalfUInts);
  return __builtin_convertvector((half_to_float<HalfUInts, HalfFloats>(bits)), Vector<double>);
}

// The smaller and the larger of each lane, of two numbers.
#if defined(__AVX512F__)
inline Vector<float> smaller(Vector<float> a, Vector<float> b) { return _mm512_min_ps(a, b); }
inline Vector<float> larger(Vector<float> a, Vector<float> b) { return _mm512_max_ps(a, b); }
inline Vector<double> smaller(Vector<double> a, Vector<double> b) { return _mm512_min_pd(a, b); }
inline Vector<double> larger(Vector<double> a, Vector<double> b) { return _mm512_max_pd(a, b); }
#elif defined(__AVX2__)
inline Vector<float> smaller(Vector<float> a, Vector<float> b) { return _mm256_min_ps(a, b); }
inline Vector<float> larger(Vector<float> a, Vector<float> b) { return _mm256_max_ps(a, b); }
inline Vector<double> smaller(Vector<double> a, Vector<double> b) { return _mm256_min_pd(a, b); }
inline Vector<double> larger(Vector<double> a, Vector<double> b) { return _mm256_max_pd(a, b); }
#else
template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
#endif

// Rounding to the row type: to nearest, ties to even; NaN stays NaN.
inline uint16_t round_to_bfloat(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t round_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds beyond 65504
  if (bits < 0x38800000) {                       // subnormal in fp16: let an addition round at the last place, 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, sizeof(bits));
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xc8000fff + ((bits >> 13) & 1);  // exponent from bias 127 to 15, and half of the last place
  return sign | static_cast<uint16_t>(bits >> 13);
}

inline void round_to(float* to, float value) { *to = value; }
inline void round_to(float* to, double value) { *to = static_cast<float>(value); }
inline void round_to(double* to, double value) { *to = value; }
inline void round_to(BFloat* to, float value) { to->bits = round_to_bfloat(value); }
inline void round_to(BFloat* to, double value) { to->bits = round_to_bfloat(static_cast<float>(value)); }
inline void round_to(Half* to, float value) { to->bits = round_to_half(value); }
inline void round_to(Half* to, double value) { to->bits = round_to_half(static_cast<float>(value)); }

inline bool is_nonzero(float value) { return value != 0; }
inline bool is_nonzero(double value) { return value != 0; }
inline bool is_nonzero(BFloat value) { return (value.bits & 0x7fff) != 0; }
inline bool is_nonzero(Half value) { return (value.bits & 0x7fff) != 0; }

// Vectors of the accumulator into rows. The two types with an exact match store a register; fp16 and bf16 convert.
template <class Row, class Acc>
inline void store(Row* to, Vector<Acc> value) {
  for (int lane = 0; lane < kLanes<Acc>; ++lane) round_to(to + lane, value[lane]);
}
template <>
inline void store<float, float>(float* to, Vector<float> value) {
  store_unaligned(to, value);
}
template <>
inline void store<double, double>(double* to, Vector<double> value) {
  store_unaligned(to, value);
}
template <>
inline void store<BFloat, float>(BFloat* to, Vector<float> value) {
  const UInts bits = reinterpret_cast<UInts>(value);
  const UInts rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UInts quiet = (bits >> 16) | 0x40u;
  const UInts is_nan = reinterpret_cast<UInts>(value != value);
  store_unaligned(to, __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), Shorts));
}
#if defined(__AVX512F__)
template <>
inline void store<Half, float>(Half* to, Vector<float> value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
template <>
inline void store<Half, float>(Half* to, Vector<float> value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// A store that bypasses the caches. `to` is aligned to kVectorBytes.
inline void stream(float* to, Vector<float> value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, value);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, value);
#elif defined(__x86_64__)
  _mm_stream_ps(to, value);
#else
  store_unaligned(to, value);
#endif
}

// The lanes of one accumulator as float64, halves added. No address of the argument is taken: an accumulator whose
// address is known lives in memory.
inline Vector<double> widen(Vector<double> value) { return value; }
inline Vector<double> widen(Vector<float> value) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_castps512_ps256(value)) + _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(value)) + _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1));
#else
  return Vector<double>{value[0], value[1]} + Vector<double>{value[2], value[3]};
#endif
}

}  // namespace FPG_ISA
}  // namespace fpg

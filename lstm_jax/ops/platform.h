// What differs between processors and systems: vectors of float32 and of words of 32 bits, for AVX-512
// with 16 lanes, AVX2 with FMA with 8, and NEON with 4; and huge pages. ROWS is the number of rows of a
// tile, by 4 vectors, whose sums fit into the registers.

#include <stdint.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__aarch64__)
#include <arm_neon.h>
enum { LANES = 4, ROWS = 6 };
#elif defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, ROWS = 6 };
#else
#include <immintrin.h>
enum { LANES = 8, ROWS = 3 };
#endif

typedef uint32_t word __attribute__((may_alias));
typedef uint16_t bits16 __attribute__((may_alias));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef bits16 Halves __attribute__((vector_size(2 * LANES)));

// `multiply_add` is a * b + c, rounded once. Of `lesser` and `greater`, the second operand is the result
// if one is NaN. `choose_small` is x where |x| < limit, otherwise `other`. `interleave_low` is a[0],
// b[0], a[1], b[1] and so on, and `interleave_high` the other half. `add_pairs` adds the two products
// of each pair of words of two numbers in bfloat16, and `round_lanes` rounds to bfloat16. `relax` lets
// a waiting thread rest.

#if defined(__aarch64__)

static inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
static inline Floats lesser(Floats a, Floats b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline Floats greater(Floats a, Floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline Floats choose_small(Floats x, float limit, Floats other) {
  return vbslq_f32(vcaltq_f32(x, vdupq_n_f32(limit)), x, other);
}
static inline Words interleave_low(Words a, Words b) { return vzip1q_u32(a, b); }
static inline Words interleave_high(Words a, Words b) { return vzip2q_u32(a, b); }
static inline void relax(void) { __asm__ volatile("yield"); }

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
enum { HAS_BFLOAT16 = 1 };
static inline Floats add_pairs(Floats sum, Words a, Words b) {
  return vbfdotq_f32(sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
static inline Halves round_lanes(Floats x) { return (Halves)vcvt_bf16_f32(x); }
#endif

#elif defined(__AVX512F__)

static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats lesser(Floats a, Floats b) { return _mm512_min_ps(a, b); }
static inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats choose_small(Floats x, float limit, Floats other) {
  __mmask16 is_small = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(limit), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(other, is_small, x);
}
static inline Words interleave_low(Words a, Words b) {
  const Words order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  return (Words)_mm512_permutex2var_epi32((__m512i)a, (__m512i)order, (__m512i)b);
}
static inline Words interleave_high(Words a, Words b) {
  const Words order = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Words)_mm512_permutex2var_epi32((__m512i)a, (__m512i)order, (__m512i)b);
}
static inline void relax(void) { _mm_pause(); }

#if defined(__AVX512BF16__)
enum { HAS_BFLOAT16 = 1 };
static inline Floats add_pairs(Floats sum, Words a, Words b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
static inline Halves round_lanes(Floats x) { return (Halves)_mm512_cvtneps_pbh(x); }
#endif

#else  // AVX2.

static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats lesser(Floats a, Floats b) { return _mm256_min_ps(a, b); }
static inline Floats greater(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline Floats choose_small(Floats x, float limit, Floats other) {
  __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.f), x);
  return _mm256_blendv_ps(other, x, _mm256_cmp_ps(size, _mm256_set1_ps(limit), _CMP_LT_OQ));
}
static inline Words interleave_halves(Words a, Words b, int half) {
  __m256i low = _mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  __m256i high = _mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
  return (Words)(half ? _mm256_permute2x128_si256(low, high, 0x31)
                      : _mm256_permute2x128_si256(low, high, 0x20));
}
static inline Words interleave_low(Words a, Words b) { return interleave_halves(a, b, 0); }
static inline Words interleave_high(Words a, Words b) { return interleave_halves(a, b, 1); }
static inline void relax(void) { _mm_pause(); }

#endif

#if !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && !defined(__AVX512BF16__)
enum { HAS_BFLOAT16 = 0 };  // The functions are not called.
static inline Floats add_pairs(Floats sum, Words a, Words b) { return (void)a, (void)b, sum; }
static inline Halves round_lanes(Floats x) { return (void)x, (Halves){0}; }
#endif

// Below is the same for all.

static inline Floats load(const float *p) {
  Floats x;
  memcpy(&x, p, sizeof(x));
  return x;
}

static inline void store(float *p, Floats x) { memcpy(p, &x, sizeof(x)); }

static inline Words load_words(const word *p) {
  Words x;
  memcpy(&x, p, sizeof(x));
  return x;
}

static inline void store_words(word *p, Words x) { memcpy(p, &x, sizeof(x)); }

// Copy the first `bytes` of a vector of `size` bytes, or all if there are more.
static inline void copy_first(void *to, const void *from, size_t bytes, size_t size) {
  if (bytes < size) memcpy(to, from, bytes);
  else memcpy(to, from, size);
}

// Load the first n lanes; the others are `rest`.
static inline Floats load_first(const float *p, size_t n, float rest) {
  Floats x = (Floats){0} + rest;
  copy_first(&x, p, n * sizeof(float), sizeof(x));
  return x;
}

static inline void store_first(float *p, Floats x, size_t n) {
  copy_first(p, &x, n * sizeof(float), sizeof(x));
}

static inline float add_lanes(Floats x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

static inline float find_largest(Floats x) {
  float largest = x[0];
  for (int i = 1; i < LANES; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// Transpose as many vectors as there are lanes: each round interleaves the two halves of the vectors.
static inline void transpose(Words x[LANES]) {
  for (int round = 1; round < LANES; round *= 2) {
    Words y[LANES];
    for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = interleave_low(x[i], x[i + LANES / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + LANES / 2]);
    }
    memcpy(x, y, sizeof(y));
  }
}

// Let Linux map the whole huge pages of an array at their first use each: a page fault for each 4 KiB
// takes longer than the computation that writes them.
static inline void prefer_huge_pages(void *array, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t size = 1 << 21;
  uintptr_t first = ((uintptr_t)array + size - 1) / size * size;
  uintptr_t end = ((uintptr_t)array + bytes) / size * size;
  if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
  (void)array, (void)bytes;
#endif
}

// Products of bf16 matrices with fp32 sums, for tiles that lie in a core's cache: torch's `brgemm` where it has one (AMX),
// else our own with the dot products of AVX512-BF16, which AMD's CPUs have and torch leaves unused.

#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

using half = at::BFloat16;

// `a` [m, k] times `b` [k, n] into, or with `add` onto, `c` [m, n]. `b` holds pairs of rows side by side: words of two
// numbers [k / 2, n]. All sizes are multiples of 32; the lda, ldb and ldc are distances of rows (of `b`, of pairs).
using Product = void (*)(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const half* a, const half* b,
    float* c);

#ifdef __AVX512BF16__

// 32 columns at a time, which are gathered first: they lie far apart. Then 8 rows at a time, whose sums are 16 registers.
inline void own_product(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const half* a, const half* b,
    float* c) {
  constexpr int kRows = 8;
  constexpr int64_t kDeep = 256;  // numbers of a sum that are worked on at once
  alignas(64) uint32_t columns[kDeep / 2 * 32];
  const uint32_t* words = reinterpret_cast<const uint32_t*>(b);
  for (int64_t col = 0; col < n; col += 32)
    for (int64_t from = 0; from < k; from += kDeep) {
      const int64_t pairs = (k - from < kDeep ? k - from : kDeep) / 2;
      for (int64_t p = 0; p < pairs; ++p) std::memcpy(columns + 32 * p, words + (from / 2 + p) * ldb + col, 128);
      for (int64_t row = 0; row < m; row += kRows) {
        const half* left = a + row * lda + from;
        float* out = c + row * ldc + col;
        __m512 sums[kRows][2];
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < 2; ++j)
            sums[i][j] = add || from ? _mm512_loadu_ps(out + i * ldc + 16 * j) : _mm512_setzero_ps();
        for (int64_t p = 0; p < pairs; ++p) {
          const __m512i low = _mm512_load_si512(columns + 32 * p), high = _mm512_load_si512(columns + 32 * p + 16);
          for (int i = 0; i < kRows; ++i) {
            int32_t pair;
            std::memcpy(&pair, left + i * lda + 2 * p, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, (__m512bh)low);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, (__m512bh)high);
          }
        }
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < 2; ++j) _mm512_storeu_ps(out + i * ldc + 16 * j, sums[i][j]);
      }
    }
}

#endif

// The one that this CPU has; null where it has none.
inline Product find_product() {
  if (at::native::cpublas::could_pack(at::kBFloat16))
    return [](int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const half* a,
              const half* b, float* c) { at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c); };
#ifdef __AVX512BF16__
  return own_product;
#else
  return nullptr;
#endif
}

// Causal attention over packed documents in bf16, forward and backward, in the manner of FlashAttention-2
// (Dao 2023, arXiv:2307.08691): tiles of scores that stay in the cache of one core, the weights computed anew in the
// backward pass from each query's log-sum-exp. The products are torch's own small ones (`brgemm`: AMX or AVX512-BF16,
// fp32 sums), whose right-hand factor holds pairs of rows side by side.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using at::native::cpublas::brgemm;
using half = at::BFloat16;

// One of q, k, v, ...: bf16 [heads, tokens, dim], the last dimension contiguous.
struct Matrix {
  half* data;
  int64_t head, token;  // strides

  half* at(int64_t h, int64_t t) const { return data + h * head + t * token; }
};

struct Shape {
  const int32_t* bounds;  // where documents begin and the last one ends [documents + 1]
  int64_t documents, tokens, heads, kv_heads, dim, value_dim, window;  // window: tokens a query sees, 0 for all
  float scale;
};

namespace {

constexpr int64_t kGrain = 32;              // sizes are rounded up to it: torch makes a kernel for every new size
constexpr int64_t kRows = 128, kKeys = 256;  // a tile of scores

int64_t round_up(int64_t n) { return (n + kGrain - 1) / kGrain * kGrain; }

inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// The bf16 nearest to x, ties to even.
inline uint32_t rounded(float x) {
  const uint32_t u = bits(x);
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

// exp(x) for x <= 0, to 2e-7 of itself (Cephes' polynomial); a loop over it becomes vector code. NaN stays NaN.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return from_bits(bits(p) + (static_cast<uint32_t>(static_cast<int32_t>(n)) << 23));
}

// Rows of x [real, dim], zeros up to `rows`.
void copy_rows(const half* x, int64_t stride, int64_t real, int64_t rows, int64_t dim, half* out) {
  for (int64_t r = 0; r < real; ++r) std::memcpy(out + r * dim, x + r * stride, dim * sizeof(half));
  std::memset(static_cast<void*>(out + real * dim), 0, (rows - real) * dim * sizeof(half));
}

// [rows, columns] -> [columns, rows], a few cache lines at a time.
template <class In, class Out>
void transpose(const In* x, int64_t stride, int64_t rows, int64_t columns, Out* out, int64_t out_stride) {
  constexpr int64_t side = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += side)
    for (int64_t c0 = 0; c0 < columns; c0 += side)
      for (int64_t r = r0; r < std::min(rows, r0 + side); ++r)
        for (int64_t c = c0; c < std::min(columns, c0 + side); ++c)
          out[c * out_stride + r] = static_cast<Out>(x[r * stride + c]);
}

// x [real, dim] as the right-hand factor x^T: words of two columns [dim / 2, rows].
void pack_turned(const half* x, int64_t stride, int64_t real, int64_t rows, int64_t dim, uint32_t* out) {
  transpose(reinterpret_cast<const uint32_t*>(x), stride / 2, real, dim / 2, out, rows);
  for (int64_t c = 0; c < dim / 2; ++c) std::fill(out + c * rows + real, out + (c + 1) * rows, 0u);
}

// x [real, dim] as the right-hand factor x: words of two rows [rows / 2, dim].
void pack(const half* x, int64_t stride, int64_t real, int64_t rows, int64_t dim, uint32_t* out) {
  for (int64_t r = 0; r < rows; r += 2, out += dim) {
    const uint16_t* even = reinterpret_cast<const uint16_t*>(x + r * stride);
    const uint16_t* odd = even + stride;
    for (int64_t c = 0; c < dim; ++c)
      out[c] = (r < real ? even[c] : 0u) | (r + 1 < real ? static_cast<uint32_t>(odd[c]) << 16 : 0u);
  }
}

half* halves(std::vector<uint32_t>& words) { return reinterpret_cast<half*>(words.data()); }

uint16_t* words(std::vector<half>& x) { return reinterpret_cast<uint16_t*>(x.data()); }

// A block of queries of a document: its first, how many, rounded up; the tiles of keys it sees lie in [from, to).
struct Block {
  int64_t first, real, rows, from, to, window;

  Block(int64_t first, int64_t length, int64_t window)
      : first(first),
        real(std::min(kRows, length - first)),
        rows(round_up(real)),
        from(window ? std::max<int64_t>(0, first - window + 1) / kGrain * kGrain : 0),
        to(first + rows),
        window(window) {}

  // The columns of the tile that begins at `key` which query `r` sees.
  void seen(int64_t r, int64_t key, int64_t count, int64_t* begin, int64_t* end) const {
    *end = r < real ? std::clamp<int64_t>(first + r + 1 - key, 0, count) : 0;
    *begin = window ? std::clamp<int64_t>(first + r + 1 - window - key, 0, *end) : 0;
  }
};

// Calls body(start, length, kv_head, scratch) for every document and key head, shared out among torch's threads.
template <class Scratch, class Body>
void for_each(const Shape& s, Body body) {
  int64_t longest = 0;
  for (int64_t d = 0; d < s.documents; ++d) longest = std::max<int64_t>(longest, s.bounds[d + 1] - s.bounds[d]);
  const int64_t tasks = s.documents * s.kv_heads;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Scratch scratch(s, round_up(longest));
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
      const int64_t doc = task / s.kv_heads, start = s.bounds[doc];
      body(start, s.bounds[doc + 1] - start, task % s.kv_heads, scratch);
    }
    at::native::cpublas::brgemm_release();
  });
}

struct ForwardScratch {
  std::vector<uint32_t> k_turned, v;
  std::vector<float> scores, sums;
  std::vector<half> weights, q;

  ForwardScratch(const Shape& s, int64_t keys)
      : k_turned(s.dim / 2 * keys),
        v(keys / 2 * s.value_dim),
        scores(kRows * kKeys),
        sums(kRows * s.value_dim),
        weights(kRows * kKeys),
        q(kRows * s.dim) {}
};

struct BackwardScratch {
  std::vector<uint32_t> k_turned, v_turned, k, weights, slopes;
  std::vector<float> scores, above, to_q, to_k, to_v;  // gradients of keys and values as [dim, keys]
  std::vector<half> slope_rows, q, q_turned, g, g_turned;

  BackwardScratch(const Shape& s, int64_t keys)
      : k_turned(s.dim / 2 * keys),
        v_turned(s.value_dim / 2 * keys),
        k(keys / 2 * s.dim),
        weights(kRows / 2 * kKeys),
        slopes(kRows / 2 * kKeys),
        scores(kRows * kKeys),
        above(kRows * kKeys),
        to_q(kRows * s.dim),
        to_k(s.dim * keys),
        to_v(s.value_dim * keys),
        slope_rows(kRows * kKeys),
        q(kRows * s.dim),
        q_turned(kRows * s.dim),
        g(kRows * s.value_dim),
        g_turned(kRows * s.value_dim) {}
};

}  // namespace

extern "C" bool litft_attention_runs_here() { return at::native::cpublas::could_pack(at::kBFloat16); }

// lse: log-sum-exp of each query's scores, [heads, tokens].
extern "C" void litft_attention(
    const Matrix* q, const Matrix* k, const Matrix* v, float* lse, const Matrix* out, const Shape* shape) {
  const Shape& s = *shape;
  const int64_t group = s.heads / s.kv_heads, dim = s.dim, value_dim = s.value_dim;
  for_each<ForwardScratch>(s, [&](int64_t start, int64_t length, int64_t kv_head, ForwardScratch& x) {
    const int64_t keys = round_up(length);
    pack_turned(k->at(kv_head, start), k->token, length, keys, dim, x.k_turned.data());
    pack(v->at(kv_head, start), v->token, length, keys, value_dim, x.v.data());
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t first = 0; first < length; first += kRows) {
        const Block block(first, length, s.window);
        const int64_t rows = block.rows;
        float top[kRows], total[kRows];  // of the scaled scores seen so far
        std::fill_n(top, rows, -INFINITY);
        std::fill_n(total, rows, 0.f);
        copy_rows(q->at(head, start + first), q->token, block.real, rows, dim, x.q.data());
        for (int64_t key = block.from; key < block.to; key += kKeys) {
          const int64_t count = std::min(kKeys, block.to - key);
          brgemm(rows, count, dim, dim, keys, count, false, x.q.data(), halves(x.k_turned) + 2 * key, x.scores.data());
          for (int64_t r = 0; r < rows; ++r) {
            float* a = x.scores.data() + r * count;
            uint16_t* w = words(x.weights) + r * count;
            int64_t begin, end;
            block.seen(r, key, count, &begin, &end);
            float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
            for (int64_t j = begin; j < end; ++j) most = a[j] > most ? a[j] : most;
            const float now = std::max(top[r], most * s.scale);
            for (int64_t j = 0; j < begin; ++j) w[j] = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = begin; j < end; ++j) {
              const float e = exponential(a[j] * s.scale - now);
              w[j] = static_cast<uint16_t>(rounded(e));
              sum += e;
            }
            for (int64_t j = end; j < count; ++j) w[j] = 0;
            if (begin == end) continue;
            if (key > block.from && now > top[r]) {
              const float shrink = exponential(top[r] - now);
              total[r] *= shrink;
              for (int64_t c = 0; c < value_dim; ++c) x.sums[r * value_dim + c] *= shrink;
            }
            total[r] += sum;
            top[r] = now;
          }
          brgemm(
              rows, value_dim, count, count, value_dim, value_dim, key > block.from, x.weights.data(),
              halves(x.v) + key * value_dim, x.sums.data());
        }
        for (int64_t r = 0; r < block.real; ++r) {
          lse[head * s.tokens + start + first + r] = top[r] + std::log(total[r]);
          half* to = out->at(head, start + first + r);
          const float inverse = 1.f / total[r];
          for (int64_t c = 0; c < value_dim; ++c) to[c] = x.sums[r * value_dim + c] * inverse;
        }
      }
  });
}

extern "C" void litft_attention_backward(
    const Matrix* q, const Matrix* k, const Matrix* v, const Matrix* g, const Matrix* out, const float* lse,
    const Matrix* dq, const Matrix* dk, const Matrix* dv, const Shape* shape) {
  const Shape& s = *shape;
  const int64_t group = s.heads / s.kv_heads, dim = s.dim, value_dim = s.value_dim;
  for_each<BackwardScratch>(s, [&](int64_t start, int64_t length, int64_t kv_head, BackwardScratch& x) {
    const int64_t keys = round_up(length);
    const half *k0 = k->at(kv_head, start), *v0 = v->at(kv_head, start);
    pack_turned(k0, k->token, length, keys, dim, x.k_turned.data());
    pack_turned(v0, v->token, length, keys, value_dim, x.v_turned.data());
    pack(k0, k->token, length, keys, dim, x.k.data());
    std::fill_n(x.to_k.data(), dim * keys, 0.f);
    std::fill_n(x.to_v.data(), value_dim * keys, 0.f);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t first = 0; first < length; first += kRows) {
        const Block block(first, length, s.window);
        const int64_t rows = block.rows;
        copy_rows(q->at(head, start + first), q->token, block.real, rows, dim, x.q.data());
        copy_rows(g->at(head, start + first), g->token, block.real, rows, value_dim, x.g.data());
        transpose(x.q.data(), dim, rows, dim, x.q_turned.data(), rows);
        transpose(x.g.data(), value_dim, rows, value_dim, x.g_turned.data(), rows);
        float mean[kRows];  // of the weights' gradients, weighted by the weights: output times its gradient
        for (int64_t r = 0; r < block.real; ++r) {
          const half* o = out->at(head, start + first + r);
          float sum = 0;
          for (int64_t c = 0; c < value_dim; ++c) sum += float(o[c]) * float(x.g[r * value_dim + c]);
          mean[r] = sum;
        }
        for (int64_t key = block.from; key < block.to; key += kKeys) {
          const int64_t count = std::min(kKeys, block.to - key);
          brgemm(rows, count, dim, dim, keys, count, false, x.q.data(), halves(x.k_turned) + 2 * key, x.scores.data());
          brgemm(
              rows, count, value_dim, value_dim, keys, count, false, x.g.data(), halves(x.v_turned) + 2 * key,
              x.above.data());
          for (int64_t r = 0; r < rows; ++r) {  // scores become weights, gradients of weights those of scores
            float *a = x.scores.data() + r * count, *b = x.above.data() + r * count;
            int64_t begin, end;
            block.seen(r, key, count, &begin, &end);
            std::fill(a, a + begin, 0.f);
            std::fill(b, b + begin, 0.f);
            if (begin < end) {
              const float top = lse[head * s.tokens + start + first + r], m = mean[r], scale = s.scale;
#pragma omp simd
              for (int64_t j = begin; j < end; ++j) {
                const float w = exponential(a[j] * scale - top);
                a[j] = w;
                b[j] = w * (b[j] - m) * scale;
              }
            }
            std::fill(a + end, a + count, 0.f);
            std::fill(b + end, b + count, 0.f);
          }
          for (int64_t r = 0; r < rows; r += 2) {
            const float *a = x.scores.data() + r * count, *b = x.above.data() + r * count;
            uint32_t *w = x.weights.data() + r / 2 * count, *slope = x.slopes.data() + r / 2 * count;
            uint16_t* row = words(x.slope_rows) + r * count;
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) {
              w[j] = rounded(a[j]) | (rounded(a[j + count]) << 16);
              const uint32_t even = rounded(b[j]), odd = rounded(b[j + count]);
              slope[j] = even | (odd << 16);
              row[j] = static_cast<uint16_t>(even);
              row[j + count] = static_cast<uint16_t>(odd);
            }
          }
          brgemm(
              value_dim, count, rows, rows, count, keys, true, x.g_turned.data(), halves(x.weights),
              x.to_v.data() + key);
          brgemm(dim, count, rows, rows, count, keys, true, x.q_turned.data(), halves(x.slopes), x.to_k.data() + key);
          brgemm(
              rows, dim, count, count, dim, dim, key > block.from, x.slope_rows.data(), halves(x.k) + key * dim,
              x.to_q.data());
        }
        for (int64_t r = 0; r < block.real; ++r) {
          half* to = dq->at(head, start + first + r);
          for (int64_t c = 0; c < dim; ++c) to[c] = x.to_q[r * dim + c];
        }
      }
    transpose(x.to_k.data(), keys, dim, length, dk->at(kv_head, start), dk->token);
    transpose(x.to_v.data(), keys, value_dim, length, dv->at(kv_head, start), dv->token);
  });
}

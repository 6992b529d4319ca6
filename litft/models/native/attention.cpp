// Causal attention over packed documents in bf16, forward and backward, in the manner of FlashAttention-2
// (Dao 2023, arXiv:2307.08691): tiles of scores that stay in the cache of one core, the weights computed anew in the
// backward pass from each query's log-sum-exp. The right-hand factor of a product holds pairs of rows side by side.

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "product.h"

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

const Product product = find_product();

constexpr int64_t kGrain = 32;              // sizes are rounded up to it: torch makes a kernel for every new size
constexpr int64_t kRows = 128, kKeys = 256;  // a tile of scores
constexpr int64_t kLanes = 16;               // numbers that are worked on at once

int64_t round_up(int64_t n) { return (n + kGrain - 1) / kGrain * kGrain; }

// Sixteen numbers: one register with AVX512, two or four with less.
using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(32)));

inline Floats load(const float* x) {
  Floats v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

inline Floats load(const half* x) {
  Shorts v;
  std::memcpy(&v, x, sizeof v);
  return (Floats)(__builtin_convertvector(v, Words) << 16);
}

template <class T, class V>
inline void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// The bf16 nearest to each, ties to even, in the lower half of a word.
inline Words rounded(Floats x) {
  const Words u = (Words)x;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

// exp(x) for x <= 0, to 2e-7 of itself (Cephes' polynomial); 0 below -87.
inline Floats exponential(Floats x) {
  constexpr float shift = 12582912.f;  // adding it rounds to whole numbers
  const Floats n = (x * 1.44269504f + shift) - shift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words scaled = (Words)p + ((Words) __builtin_convertvector(n, Ints) << 23);
  return (Floats)(scaled & ~(Words)(x < -87.0f));
}

// Rows of x [real, dim], zeros up to `rows`.
void copy_rows(const half* x, int64_t stride, int64_t real, int64_t rows, int64_t dim, half* out) {
  for (int64_t r = 0; r < real; ++r) std::memcpy(out + r * dim, x + r * stride, dim * sizeof(half));
  std::memset(static_cast<void*>(out + real * dim), 0, (rows - real) * dim * sizeof(half));
}

// Swaps the off-diagonal quarters of every square of 2 * side words in two rows that lie `side` apart.
template <int side, int... lane>
inline void exchange(Words& a, Words& b, std::integer_sequence<int, lane...>) {
  const Words low = __builtin_shufflevector(a, b, (lane & side ? 16 + lane - side : lane)...);
  b = __builtin_shufflevector(a, b, (lane & side ? 16 + lane : lane + side)...);
  a = low;
}

template <int side>
inline void exchange(Words (&row)[16]) {
  for (int i = 0; i < 16; ++i)
    if (!(i & side)) exchange<side>(row[i], row[i + side], std::make_integer_sequence<int, 16>());
}

// [rows, columns] -> [columns, rows], of words, both multiples of 16 (Eklundh 1972).
void transpose(const void* x, int64_t stride, int64_t rows, int64_t columns, void* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16) {
      Words row[16];
      for (int i = 0; i < 16; ++i) std::memcpy(&row[i], static_cast<const uint32_t*>(x) + (r + i) * stride + c, 64);
      exchange<8>(row);
      exchange<4>(row);
      exchange<2>(row);
      exchange<1>(row);
      for (int i = 0; i < 16; ++i) std::memcpy(static_cast<uint32_t*>(out) + (c + i) * out_stride + r, &row[i], 64);
    }
}

// x [rows, dim] as the right-hand factor x^T: words of two columns [dim / 2, rows].
void pack_turned(const half* x, int64_t rows, int64_t dim, uint32_t* out) { transpose(x, dim / 2, rows, dim / 2, out, rows); }

// x [rows, dim] as the right-hand factor x: words of two rows [rows / 2, dim].
void pack(const half* x, int64_t rows, int64_t dim, uint32_t* out) {
  const uint16_t* even = reinterpret_cast<const uint16_t*>(x);
  for (int64_t r = 0; r < rows; r += 2, even += 2 * dim, out += dim) {
    for (int64_t c = 0; c < dim; ++c) out[c] = even[c] | (static_cast<uint32_t>(even[dim + c]) << 16);
  }
}

// x [rows, dim] -> [dim, rows], by way of words of two rows.
void turn(const half* x, int64_t rows, int64_t dim, uint32_t* scratch, half* out) {
  pack(x, rows, dim, scratch);
  transpose(scratch, dim, rows / 2, dim, out, rows / 2);
}

// A gradient [dim, keys] into the rows of a matrix; `scratch` holds as many numbers.
void write_turned(const float* x, int64_t keys, int64_t dim, int64_t real, float* scratch, const Matrix& to, int64_t head, int64_t start) {
  transpose(x, keys, dim, keys, scratch, dim);
  for (int64_t j = 0; j < real; ++j) {
    half* row = to.at(head, start + j);
    for (int64_t c = 0; c < dim; ++c) row[c] = scratch[j * dim + c];
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

  // The columns [begin, end) that hold all which query `r` sees of the tile that begins at `key`, by whole lanes; scores
  // among them that it doesn't see become minus infinity.
  void seen(int64_t r, int64_t key, int64_t count, float* scores, int64_t* begin, int64_t* end) const {
    const int64_t stop = r < real ? std::clamp<int64_t>(first + r + 1 - key, 0, count) : 0;
    const int64_t start = window ? std::clamp<int64_t>(first + r + 1 - window - key, 0, stop) : 0;
    *begin = start == stop ? stop : start / kLanes * kLanes;
    *end = start == stop ? stop : (stop + kLanes - 1) / kLanes * kLanes;
    if (start == stop) return;
    std::fill(scores + *begin, scores + start, -INFINITY);
    std::fill(scores + stop, scores + *end, -INFINITY);
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
    at::native::cpublas::brgemm_release();  // of a core's AMX, where that was used
  });
}

struct ForwardScratch {
  std::vector<uint32_t> k_turned, v;
  std::vector<float> scores, sums;
  std::vector<half> rows, weights, q;

  ForwardScratch(const Shape& s, int64_t keys)
      : k_turned(s.dim / 2 * keys),
        v(keys / 2 * s.value_dim),
        scores(kRows * kKeys),
        sums(kRows * s.value_dim),
        rows(keys * std::max(s.dim, s.value_dim)),
        weights(kRows * kKeys),
        q(kRows * s.dim) {}
};

struct BackwardScratch {
  std::vector<uint32_t> k_turned, v_turned, k, pairs, weights, slopes;
  std::vector<float> scores, above, to_q, to_k, to_v, turned;  // gradients of keys and values as [dim, keys]
  std::vector<half> rows, slope_rows, q, q_turned, g, g_turned;

  BackwardScratch(const Shape& s, int64_t keys)
      : k_turned(s.dim / 2 * keys),
        v_turned(s.value_dim / 2 * keys),
        k(keys / 2 * s.dim),
        pairs(kRows / 2 * std::max(s.dim, s.value_dim)),
        weights(kRows / 2 * kKeys),
        slopes(kRows / 2 * kKeys),
        scores(kRows * kKeys),
        above(kRows * kKeys),
        to_q(kRows * s.dim),
        to_k(s.dim * keys),
        to_v(s.value_dim * keys),
        turned(std::max(s.dim, s.value_dim) * keys),
        rows(keys * std::max(s.dim, s.value_dim)),
        slope_rows(kRows * kKeys),
        q(kRows * s.dim),
        q_turned(kRows * s.dim),
        g(kRows * s.value_dim),
        g_turned(kRows * s.value_dim) {}
};

}  // namespace

extern "C" bool litft_attention_runs_here() { return product != nullptr; }

// lse: log-sum-exp of each query's scores, [heads, tokens].
extern "C" void litft_attention(
    const Matrix* q, const Matrix* k, const Matrix* v, float* lse, const Matrix* out, const Shape* shape) {
  const Shape& s = *shape;
  const int64_t group = s.heads / s.kv_heads, dim = s.dim, value_dim = s.value_dim;
  for_each<ForwardScratch>(s, [&](int64_t start, int64_t length, int64_t kv_head, ForwardScratch& x) {
    const int64_t keys = round_up(length);
    copy_rows(k->at(kv_head, start), k->token, length, keys, dim, x.rows.data());
    pack_turned(x.rows.data(), keys, dim, x.k_turned.data());
    copy_rows(v->at(kv_head, start), v->token, length, keys, value_dim, x.rows.data());
    pack(x.rows.data(), keys, value_dim, x.v.data());
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
          product(rows, count, dim, dim, keys, count, false, x.q.data(), halves(x.k_turned) + 2 * key, x.scores.data());
          for (int64_t r = 0; r < rows; ++r) {
            float* a = x.scores.data() + r * count;
            uint16_t* w = words(x.weights) + r * count;
            int64_t begin, end;
            block.seen(r, key, count, a, &begin, &end);
            std::fill(w, w + begin, uint16_t(0));
            std::fill(w + end, w + count, uint16_t(0));
            if (begin == end) continue;
            Floats most = load(a + begin), all = {};
            for (int64_t j = begin + kLanes; j < end; j += kLanes) {
              const Floats v = load(a + j);
              most = v > most ? v : most;
            }
            float now = top[r];
            for (int i = 0; i < kLanes; ++i) now = std::max(now, most[i] * s.scale);
            for (int64_t j = begin; j < end; j += kLanes) {
              const Floats e = exponential(load(a + j) * s.scale - now);
              store(w + j, __builtin_convertvector(rounded(e), Shorts));
              all += e;
            }
            if (key > block.from && now > top[r]) {
              const float shrink = std::exp(top[r] - now);
              total[r] *= shrink;
              for (int64_t c = 0; c < value_dim; ++c) x.sums[r * value_dim + c] *= shrink;
            }
            total[r] += sum(all);
            top[r] = now;
          }
          product(
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
    copy_rows(v->at(kv_head, start), v->token, length, keys, value_dim, x.rows.data());
    pack_turned(x.rows.data(), keys, value_dim, x.v_turned.data());
    copy_rows(k->at(kv_head, start), k->token, length, keys, dim, x.rows.data());
    pack_turned(x.rows.data(), keys, dim, x.k_turned.data());
    pack(x.rows.data(), keys, dim, x.k.data());
    std::fill_n(x.to_k.data(), dim * keys, 0.f);
    std::fill_n(x.to_v.data(), value_dim * keys, 0.f);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t first = 0; first < length; first += kRows) {
        const Block block(first, length, s.window);
        const int64_t rows = block.rows;
        copy_rows(q->at(head, start + first), q->token, block.real, rows, dim, x.q.data());
        copy_rows(g->at(head, start + first), g->token, block.real, rows, value_dim, x.g.data());
        turn(x.q.data(), rows, dim, x.pairs.data(), x.q_turned.data());
        turn(x.g.data(), rows, value_dim, x.pairs.data(), x.g_turned.data());
        float mean[kRows];  // of the weights' gradients, weighted by the weights: output times its gradient
        for (int64_t r = 0; r < block.real; ++r) {
          const half* o = out->at(head, start + first + r);
          Floats all = {};
          for (int64_t c = 0; c < value_dim; c += kLanes) all += load(o + c) * load(x.g.data() + r * value_dim + c);
          mean[r] = sum(all);
        }
        for (int64_t key = block.from; key < block.to; key += kKeys) {
          const int64_t count = std::min(kKeys, block.to - key);
          product(rows, count, dim, dim, keys, count, false, x.q.data(), halves(x.k_turned) + 2 * key, x.scores.data());
          product(
              rows, count, value_dim, value_dim, keys, count, false, x.g.data(), halves(x.v_turned) + 2 * key,
              x.above.data());
          for (int64_t r = 0; r < rows; ++r) {  // scores become weights, gradients of weights those of scores
            float *a = x.scores.data() + r * count, *b = x.above.data() + r * count;
            int64_t begin, end;
            block.seen(r, key, count, a, &begin, &end);
            std::fill(a, a + begin, 0.f);
            std::fill(b, b + begin, 0.f);
            const float scale = s.scale, m = begin < end ? mean[r] : 0.f;
            const float top = begin < end ? lse[head * s.tokens + start + first + r] : 0.f;
            for (int64_t j = begin; j < end; j += kLanes) {
              const Floats w = exponential(load(a + j) * scale - top);
              store(a + j, w);
              store(b + j, w * (load(b + j) - m) * scale);
            }
            std::fill(a + end, a + count, 0.f);
            std::fill(b + end, b + count, 0.f);
          }
          for (int64_t r = 0; r < rows; r += 2) {
            const float *a = x.scores.data() + r * count, *b = x.above.data() + r * count;
            uint32_t *w = x.weights.data() + r / 2 * count, *slope = x.slopes.data() + r / 2 * count;
            uint16_t* row = words(x.slope_rows) + r * count;
            for (int64_t j = 0; j < count; j += kLanes) {
              store(w + j, rounded(load(a + j)) | (rounded(load(a + j + count)) << 16));
              const Words even = rounded(load(b + j)), odd = rounded(load(b + j + count));
              store(slope + j, even | (odd << 16));
              store(row + j, __builtin_convertvector(even, Shorts));
              store(row + j + count, __builtin_convertvector(odd, Shorts));
            }
          }
          product(
              value_dim, count, rows, rows, count, keys, true, x.g_turned.data(), halves(x.weights),
              x.to_v.data() + key);
          product(dim, count, rows, rows, count, keys, true, x.q_turned.data(), halves(x.slopes), x.to_k.data() + key);
          product(
              rows, dim, count, count, dim, dim, key > block.from, x.slope_rows.data(), halves(x.k) + key * dim,
              x.to_q.data());
        }
        for (int64_t r = 0; r < block.real; ++r) {
          half* to = dq->at(head, start + first + r);
          for (int64_t c = 0; c < dim; ++c) to[c] = x.to_q[r * dim + c];
        }
      }
    write_turned(x.to_k.data(), keys, dim, length, x.turned.data(), *dk, kv_head, start);
    write_turned(x.to_v.data(), keys, value_dim, length, x.turned.data(), *dv, kv_head, start);
  });
}

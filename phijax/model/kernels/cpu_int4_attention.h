// Attention of one new token a row over a cache in pieces, for cpu_int4.cc: rotation, the write into the cache, and
// softmax(q k^T / sqrt(H)) v. In XLA this is thirty small programs a layer, longer than the products beside them.
// Several tokens a row: cpu_int4_prompt.h.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_int4_cache.h"

namespace {

struct Attention {
  const float *q, *k, *v;         // (rows, tokens, N H), (rows, tokens, K H), (rows, tokens, K H): not rotated
  const float *cosines, *sines;   // (rows, tokens, rotary)
  const int32_t* positions;       // (rows), of the first token
  float* out;                     // (rows, tokens, N H)
  int tokens, kv_heads, group, head_dim, rotary, window;  // group: queries of a kv head; window 0: none
  std::vector<Piece> pieces;

  int heads() const { return kv_heads * group; }
  // Where a token's part of `heads` heads begins, and in a piece a row's kv head, in lines.
  int64_t at(int row, int token, int heads, int head) const {
    return ((static_cast<int64_t>(row) * tokens + token) * heads + head) * head_dim;
  }
  int64_t table(int row, int token) const { return (static_cast<int64_t>(row) * tokens + token) * rotary; }
  int64_t line(const Piece& piece, int row, int kv_head) const {
    return (static_cast<int64_t>(row) * kv_heads + kv_head) * piece.length;
  }
};

// Pairs (i, i + rotary / 2), as model/rope.py rotates them.
INLINE void rotate(const float* x, const float* c, const float* s, int rotary, int head_dim, float factor,
                   float* __restrict__ to) {
  const int half = rotary / 2;
  for (int i = 0; i < half; ++i) {
    to[i] = (x[i] * c[i] - x[i + half] * s[i]) * factor;
    to[i + half] = (x[i + half] * c[i + half] + x[i] * s[i + half]) * factor;
  }
  for (int i = rotary; i < head_dim; ++i) to[i] = x[i] * factor;
}

// Vectors as wide as the path's: wider ones, which compilers should cut down, go through memory.
typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Sixteen __attribute__((vector_size(64)));

template <typename Vector>
INLINE float dot(const float* a, const float* b, int count) {
  constexpr int kWidth = sizeof(Vector) / 4;
  Vector sums = {}, x, y;
  int k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    std::memcpy(&x, a + k, sizeof(x)), std::memcpy(&y, b + k, sizeof(y));
    sums += x * y;
  }
  Four parts[kWidth / 4];
  std::memcpy(parts, &sums, sizeof(sums));
  for (int i = 1; i < kWidth / 4; ++i) parts[0] += parts[i];
  float total = (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
  for (; k < count; ++k) total += a[k] * b[k];
  return total;
}

// out += the sum over keys of weight * value, for a few vectors of columns.
template <typename Vector, int VECTORS>
INLINE void add_weighted(const float* weights, const float* values, int64_t keys, int stride, float* out) {
  constexpr int kWidth = sizeof(Vector) / 4;
  // Loaded and stored one by one: an array of vectors that is known by its address would live in memory.
  Vector sums[VECTORS], v;
  for (int j = 0; j < VECTORS; ++j) std::memcpy(&sums[j], out + kWidth * j, sizeof(v));
  for (int64_t p = 0; p < keys; ++p) {
    for (int j = 0; j < VECTORS; ++j) {
      std::memcpy(&v, values + p * stride + kWidth * j, sizeof(v));
      sums[j] += weights[p] * v;
    }
  }
  for (int j = 0; j < VECTORS; ++j) std::memcpy(out + kWidth * j, &sums[j], sizeof(v));
}

// A token's key and value of one kv head.
INLINE void write_body(const Attention& a, int row, int token, int kv_head) {
  thread_local std::vector<float> rotated;
  rotated.resize(a.head_dim);
  const int64_t from = a.at(row, token, a.kv_heads, kv_head), table = a.table(row, token);
  rotate(a.k + from, a.cosines + table, a.sines + table, a.rotary, a.head_dim, 1.0f, rotated.data());
  int64_t place = a.positions[row] + token;
  for (const Piece& piece : a.pieces) {
    if (place < piece.length) {
      const int64_t line = a.line(piece, row, kv_head) + place;
      write_line(piece.k, line, rotated.data(), a.head_dim);
      write_line(piece.v, line, a.v + from, a.head_dim);
      return;
    }
    place -= piece.length;
  }
}

// visit(piece, place, place in the piece, count) for keys at `lowest` to `end` - 1, at most kKeys at once. They end at
// multiples of kKeys from the piece's beginning, whatever the range: where they end is part of the order of sums.
template <typename Visit>
INLINE void by_blocks(const Attention& a, int64_t lowest, int64_t end, Visit visit) {
  int64_t begin = 0;
  for (const Piece& piece : a.pieces) {
    const int64_t last = std::min(end, begin + piece.length);
    for (int64_t p = std::max(lowest, begin), next; p < last; p = next) {
      next = std::min(last, begin + ((p - begin) / kKeys + 1) * kKeys);
      visit(piece, p, p - begin, static_cast<int>(next - p));
    }
    begin += piece.length;
  }
}

// One query. Keys are visited in order of position, whatever else is in the cache.
template <typename Vector>
INLINE void attend_body(const Attention& a, int row, int head) {
  thread_local std::vector<float> memory;
  const int h = a.head_dim, kv_head = head / a.group;
  const int64_t position = a.positions[row], table = a.table(row, 0), first = a.at(row, 0, a.heads(), head);
  const int64_t lowest = a.window ? std::max<int64_t>(position - a.window + 1, 0) : 0;
  const int64_t seen = position + 1 - lowest;
  memory.resize((1 + kKeys) * h + seen);
  float *query = memory.data(), *scratch = query + h, *scores = scratch + kKeys * h;
  rotate(a.q + first, a.cosines + table, a.sines + table, a.rotary, h, 1.0f / __builtin_sqrtf(h), query);
  by_blocks(a, lowest, position + 1, [&](const Piece& piece, int64_t place, int64_t at, int count) {
    const float* k = read_lines(piece.k, a.line(piece, row, kv_head) + at, count, h, scratch);
    for (int p = 0; p < count; ++p) scores[place - lowest + p] = dot<Vector>(query, k + p * h, h);
  });

  // Sixteen at once: a maximum, like a sum, is a chain that no compiler cuts.
  float most[16], parts[16] = {};
  for (int j = 0; j < 16; ++j) most[j] = scores[0];
  int64_t p = 0;
  for (; p + 16 <= seen; p += 16) {
    for (int j = 0; j < 16; ++j) most[j] = scores[p + j] > most[j] ? scores[p + j] : most[j];
  }
  for (int j = 0; p + j < seen; ++j) most[j] = scores[p + j] > most[j] ? scores[p + j] : most[j];
  float highest = most[0];
  for (int j = 1; j < 16; ++j) highest = most[j] > highest ? most[j] : highest;
  p = 0;
  for (; p + 16 <= seen; p += 16) {
    for (int j = 0; j < 16; ++j) parts[j] += scores[p + j] = exponential(scores[p + j] - highest);
  }
  for (int j = 0; p + j < seen; ++j) parts[j] += scores[p + j] = exponential(scores[p + j] - highest);
  const float total = sum_of(parts);

  float* out = a.out + first;
  for (int i = 0; i < h; ++i) out[i] = 0.0f;
  by_blocks(a, lowest, position + 1, [&](const Piece& piece, int64_t place, int64_t at, int count) {
    constexpr int kWidth = sizeof(Vector) / 4;
    const float* v = read_lines(piece.v, a.line(piece, row, kv_head) + at, count, h, scratch);
    const float* weights = scores + (place - lowest);
    int i = 0;
    for (; i + 4 * kWidth <= h; i += 4 * kWidth) add_weighted<Vector, 4>(weights, v + i, count, h, out + i);
    for (; i + kWidth <= h; i += kWidth) add_weighted<Vector, 1>(weights, v + i, count, h, out + i);
    for (int p = 0; p < count; ++p) {
      for (int j = i; j < h; ++j) out[j] += weights[p] * v[p * h + j];
    }
  });
  for (int i = 0; i < h; ++i) out[i] /= total;
}

}  // namespace

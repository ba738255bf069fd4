// Attention of one new token a row over a cache in pieces, for cpu_int4.cc: rotation, the write into the cache, and
// softmax(q k^T / sqrt(H)) v. In XLA this is thirty small programs a layer, longer than the products beside them.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_int4_tiles.h"

namespace {

struct Piece {
  float *k, *v;  // (R, K, length, H)
  int64_t length;
};

struct Attention {
  const float *q, *k, *v;         // (rows, N H), (rows, K H), (rows, K H): not rotated
  const float *cosines, *sines;   // (rows, rotary)
  const int32_t* positions;       // (rows)
  float* out;                     // (rows, N H)
  int kv_heads, group, head_dim, rotary, window;  // group: queries of a kv head; window 0: none
  std::vector<Piece> pieces;
};

// Pairs (i, i + rotary / 2), as model/rope.py rotates them.
INLINE void rotate(const float* x, const float* c, const float* s, int rotary, int head_dim, float factor, float* to) {
  const int half = rotary / 2;
  for (int i = 0; i < half; ++i) {
    to[i] = (x[i] * c[i] - x[i + half] * s[i]) * factor;
    to[i + half] = (x[i + half] * c[i + half] + x[i] * s[i + half]) * factor;
  }
  for (int i = rotary; i < head_dim; ++i) to[i] = x[i] * factor;
}

INLINE float dot(const float* a, const float* b, int count) {
  float parts[16] = {};
  int k = 0;
  for (; k + 16 <= count; k += 16) {
    for (int j = 0; j < 16; ++j) parts[j] += a[k + j] * b[k + j];
  }
  for (int j = 0; k + j < count; ++j) parts[j] += a[k + j] * b[k + j];
  for (int width = 8; width; width /= 2) {
    for (int j = 0; j < width; ++j) parts[j] += parts[j + width];
  }
  return parts[0];
}

// One row, one kv head and its queries. Keys are visited in order of position, whatever else is in the cache.
INLINE void attend_body(const Attention& a, int row, int head) {
  thread_local std::vector<float> memory;
  const int h = a.head_dim;
  const int64_t position = a.positions[row];
  const int64_t lowest = a.window ? std::max<int64_t>(position - a.window + 1, 0) : 0;
  const int64_t seen = position + 1 - lowest;
  memory.resize(a.group * (h + seen));
  float *queries = memory.data(), *scores = queries + a.group * h;
  const float *c = a.cosines + static_cast<int64_t>(row) * a.rotary, *s = a.sines + static_cast<int64_t>(row) * a.rotary;
  const int64_t kv = (static_cast<int64_t>(row) * a.kv_heads + head) * h, first = kv * a.group;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(h));
  for (int g = 0; g < a.group; ++g) rotate(a.q + first + g * h, c, s, a.rotary, h, scale, queries + g * h);

  int64_t begin = 0;
  for (const Piece& piece : a.pieces) {
    float *k = piece.k + kv * piece.length, *v = piece.v + kv * piece.length;
    if (position >= begin && position < begin + piece.length) {
      rotate(a.k + kv, c, s, a.rotary, h, 1.0f, k + (position - begin) * h);
      std::memcpy(v + (position - begin) * h, a.v + kv, h * sizeof(float));
    }
    const int64_t end = std::min(position + 1, begin + piece.length);
    for (int64_t p = std::max(lowest, begin); p < end; ++p) {
      for (int g = 0; g < a.group; ++g) {
        scores[g * seen + p - lowest] = dot(queries + g * h, k + (p - begin) * h, h);
      }
    }
    begin += piece.length;
  }

  for (int g = 0; g < a.group; ++g) {
    float* row_scores = scores + g * seen;
    float highest = row_scores[0], parts[16] = {};
    for (int64_t p = 1; p < seen; ++p) highest = row_scores[p] > highest ? row_scores[p] : highest;
    int64_t p = 0;
    for (; p + 16 <= seen; p += 16) {
      for (int j = 0; j < 16; ++j) parts[j] += row_scores[p + j] = exponential(row_scores[p + j] - highest);
    }
    for (int j = 0; p + j < seen; ++j) parts[j] += row_scores[p + j] = exponential(row_scores[p + j] - highest);
    for (int width = 8; width; width /= 2) {
      for (int j = 0; j < width; ++j) parts[j] += parts[j + width];
    }
    const float inverse = 1.0f / parts[0];
    for (int64_t i = 0; i < seen; ++i) row_scores[i] *= inverse;
  }

  float* out = a.out + first;
  for (int i = 0; i < a.group * h; ++i) out[i] = 0.0f;
  begin = 0;
  for (const Piece& piece : a.pieces) {
    const float* v = piece.v + kv * piece.length;
    const int64_t end = std::min(position + 1, begin + piece.length);
    for (int64_t p = std::max(lowest, begin); p < end; ++p) {
      for (int g = 0; g < a.group; ++g) {
        const float weight = scores[g * seen + p - lowest];
        for (int i = 0; i < h; ++i) out[g * h + i] += weight * v[(p - begin) * h + i];
      }
    }
    begin += piece.length;
  }
}

using AttendFunction = void (*)(const Attention&, int row, int head);

void attend_generic(const Attention& a, int row, int head) { attend_body(a, row, head); }

#if defined(__x86_64__)
TARGET_AVX512 void attend_avx512(const Attention& a, int row, int head) { attend_body(a, row, head); }
TARGET_AVX2 void attend_avx2(const Attention& a, int row, int head) { attend_body(a, row, head); }
#endif

AttendFunction attend_function(int path) {
#if defined(__x86_64__)
  if (path == kAvx512Vnni) return attend_avx512;
  if (path != kGeneric) return attend_avx2;
#endif
  return attend_generic;
}

}  // namespace

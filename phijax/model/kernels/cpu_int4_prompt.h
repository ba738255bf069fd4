// Attention of several new tokens a row, for cpu_int4.cc, and which functions of attention a path is made of.
//
// A block of a head's queries, consecutive tokens, stands in the lanes of vectors: sums over a head's dimensions and over
// keys are then elementwise, a key's or a value's number is one factor for all lanes, and nothing is turned but the
// queries and the result. The softmax runs on over blocks of keys (Milakov and Gimelshein 2018, arXiv:1805.02867). A
// masked key adds an exact zero, so a query's bits do not depend on how its prompt is cut.

#pragma once

#include "cpu_int4_attention.h"

namespace {

constexpr float kMasked = -1e30f;

template <typename Vector>
constexpr int kLanes = 2 * sizeof(Vector) / 4;

// What a block of queries has seen so far; [.][lane].
template <typename Vector>
struct Lanes {
  static constexpr int kCount = kLanes<Vector>;
  float *query, *out;  // [head_dim]
  float scores[kKeys * kCount], highest[kCount], total[kCount], scale[kCount];
  int64_t place;       // of the first lane's query
};

// A line of lanes: a pair of vectors.
template <typename Vector>
INLINE void load(Vector (&pair)[2], const float* from) {
  std::memcpy(&pair[0], from, sizeof(Vector)), std::memcpy(&pair[1], from + kLanes<Vector> / 2, sizeof(Vector));
}

template <typename Vector>
INLINE void store(const Vector (&pair)[2], float* to) {
  std::memcpy(to, &pair[0], sizeof(Vector)), std::memcpy(to + kLanes<Vector> / 2, &pair[1], sizeof(Vector));
}

// Scores of KEYS keys: the sum over i of k[key][i] * query[i][lane].
template <typename Vector, int KEYS>
INLINE void add_scores(const float* query, const float* k, int h, float* scores) {
  Vector sums[KEYS][2] = {}, q[2];
  for (int i = 0; i < h; ++i) {
    load(q, query + i * kLanes<Vector>);
    for (int p = 0; p < KEYS; ++p) sums[p][0] += k[p * h + i] * q[0], sums[p][1] += k[p * h + i] * q[1];
  }
  for (int p = 0; p < KEYS; ++p) store(sums[p], scores + p * kLanes<Vector>);
}

// out[i][lane] = out[i][lane] * scale[lane] + the sum over keys of weight[key][lane] * v[key][i], for COLUMNS of i.
template <typename Vector, int COLUMNS>
INLINE void add_values(const Lanes<Vector>& lanes, const float* v, int keys, int h, float* out) {
  Vector sums[COLUMNS][2], w[2];
  load(w, lanes.scale);
  for (int i = 0; i < COLUMNS; ++i) {
    load(sums[i], out + i * kLanes<Vector>);
    sums[i][0] *= w[0], sums[i][1] *= w[1];
  }
  for (int p = 0; p < keys; ++p) {
    load(w, lanes.scores + p * kLanes<Vector>);
    for (int i = 0; i < COLUMNS; ++i) sums[i][0] += v[p * h + i] * w[0], sums[i][1] += v[p * h + i] * w[1];
  }
  for (int i = 0; i < COLUMNS; ++i) store(sums[i], out + i * kLanes<Vector>);
}

// Scores of keys at `place` and on -> weights; `highest`, `total` and `scale` with them.
template <typename Vector>
INLINE void soften(Lanes<Vector>& lanes, int64_t place, int keys, int window) {
  constexpr int kCount = kLanes<Vector>;
  float *scores = lanes.scores, before[kCount];
  const int64_t nearest_key = lanes.place - (place + keys - 1), farthest = lanes.place + kCount - 1 - place;
  const bool all_seen = nearest_key >= 0 && (!window || farthest < window);
  const auto seen = [&](int p, int j) {
    const int distance = static_cast<int>(lanes.place - place) + j - p;
    return distance >= 0 && (!window || distance < window);
  };
  for (int p = 0; p < keys && !all_seen; ++p) {
    for (int j = 0; j < kCount; ++j) scores[p * kCount + j] = seen(p, j) ? scores[p * kCount + j] : kMasked;
  }
  for (int j = 0; j < kCount; ++j) before[j] = lanes.highest[j];
  for (int p = 0; p < keys; ++p) {
    for (int j = 0; j < kCount; ++j) {
      const float score = scores[p * kCount + j];
      lanes.highest[j] = score > lanes.highest[j] ? score : lanes.highest[j];
    }
  }
  for (int j = 0; j < kCount; ++j) {
    lanes.scale[j] = exponential(before[j] - lanes.highest[j]);
    lanes.total[j] *= lanes.scale[j];
  }
  for (int p = 0; p < keys; ++p) {
    for (int j = 0; j < kCount; ++j) scores[p * kCount + j] = exponential(scores[p * kCount + j] - lanes.highest[j]);
    for (int j = 0; j < kCount && !all_seen; ++j) scores[p * kCount + j] *= seen(p, j) ? 1.0f : 0.0f;
    for (int j = 0; j < kCount; ++j) lanes.total[j] += scores[p * kCount + j];
  }
}

// Keys and values (keys, h), the first of them at `place`.
template <typename Vector>
INLINE void see(Lanes<Vector>& lanes, const float* k, const float* v, int64_t place, int keys, int h, int window) {
  constexpr int kCount = kLanes<Vector>, kAtOnce = sizeof(Vector) == 64 ? 8 : 4;
  int p = 0, i = 0;
  for (; p + kAtOnce <= keys; p += kAtOnce) {
    add_scores<Vector, kAtOnce>(lanes.query, k + p * h, h, lanes.scores + p * kCount);
  }
  for (; p < keys; ++p) add_scores<Vector, 1>(lanes.query, k + p * h, h, lanes.scores + p * kCount);
  soften(lanes, place, keys, window);
  for (; i + kAtOnce <= h; i += kAtOnce) add_values<Vector, kAtOnce>(lanes, v + i, keys, h, lanes.out + i * kCount);
  for (; i < h; ++i) add_values<Vector, 1>(lanes, v + i, keys, h, lanes.out + i * kCount);
}

// A row's head, a block of as many tokens as there are lanes.
template <typename Vector>
INLINE void attend_block_body(const Attention& a, int row, int head, int block) {
  constexpr int kCount = kLanes<Vector>;
  thread_local std::vector<float> memory;
  const int h = a.head_dim, first = block * kCount, count = std::min(kCount, a.tokens - first);
  memory.resize((2 * kCount + 1 + 2 * kKeys) * h);
  Lanes<Vector> lanes;
  lanes.query = memory.data(), lanes.out = lanes.query + kCount * h;
  float *line = lanes.out + kCount * h, *k = line + h, *v = k + kKeys * h;
  std::fill(lanes.query, line, 0.0f);
  lanes.place = a.positions[row] + first;
  for (int j = 0; j < kCount; ++j) lanes.highest[j] = kMasked, lanes.total[j] = 0.0f;
  for (int j = 0; j < count; ++j) {
    const int64_t table = a.table(row, first + j);
    const float* q = a.q + a.at(row, first + j, a.heads(), head);
    rotate(q, a.cosines + table, a.sines + table, a.rotary, h, 1.0f / __builtin_sqrtf(h), line);
    for (int i = 0; i < h; ++i) lanes.query[i * kCount + j] = line[i];
  }

  const int64_t lowest = a.window ? std::max<int64_t>(lanes.place - a.window + 1, 0) : 0;
  by_blocks(a, lowest, lanes.place + count, [&](const Piece& piece, int64_t place, int64_t at, int keys) {
    const int64_t from = a.line(piece, row, head / a.group) + at;
    see(lanes, read_lines(piece.k, from, keys, h, k), read_lines(piece.v, from, keys, h, v), place, keys, h, a.window);
  });
  for (int i = 0; i < h; ++i) {
    for (int j = 0; j < kCount; ++j) lanes.out[i * kCount + j] /= lanes.total[j];
  }
  for (int j = 0; j < count; ++j) {
    float* out = a.out + a.at(row, first + j, a.heads(), head);
    for (int i = 0; i < h; ++i) out[i] = lanes.out[i * kCount + j];
  }
}

// --- Which functions a path is made of. `write` keys and values, then, when all are, `attend` queries: one token's, or
// a block of `lanes` tokens.

struct AttendFunctions {
  int lanes;
  void (*write)(const Attention&, int row, int token, int kv_head);
  void (*attend)(const Attention&, int row, int head);
  void (*attend_block)(const Attention&, int row, int head, int block);
};

#define ATTEND_FUNCTIONS(PATH, TARGET, VECTOR)                                                                    \
  TARGET void write_##PATH(const Attention& a, int row, int token, int head) { write_body(a, row, token, head); } \
  TARGET void attend_##PATH(const Attention& a, int row, int head) { attend_body<VECTOR>(a, row, head); }         \
  TARGET void attend_block_##PATH(const Attention& a, int row, int head, int block) {                             \
    attend_block_body<VECTOR>(a, row, head, block);                                                               \
  }                                                                                                               \
  constexpr AttendFunctions kAttend_##PATH = {kLanes<VECTOR>, write_##PATH, attend_##PATH, attend_block_##PATH};

ATTEND_FUNCTIONS(generic, , Four)
#if defined(__x86_64__)
ATTEND_FUNCTIONS(avx2, TARGET_AVX2, Eight)
ATTEND_FUNCTIONS(avx512, TARGET_AVX512, Sixteen)
#endif

AttendFunctions attend_functions([[maybe_unused]] int path) {
#if defined(__x86_64__)
  if (path == kAvx512Vnni) return kAttend_avx512;
  if (path != kGeneric) return kAttend_avx2;
#endif
  return kAttend_generic;
}

}  // namespace

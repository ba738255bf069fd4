// Rounding of activations and the inner products of cpu_int4.cc, once for each path.
//
// Weights lie in tiles of 32 outputs, a tile in chunks of 128 bytes: of 4 bits, byte (n, j) of chunk c is input
// 8 c + j of output n in the low half and input 8 c + 4 + j in the high half, both plus 8; of 8 bits it is input
// 4 c + j plus 128. So a vector of bytes meets four consecutive activations in each lane, as the dot instructions
// want it, and a tile is one stream of memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace {

constexpr int kTile = 32;          // outputs
constexpr int kChunk = kTile * 4;  // bytes
constexpr int kMostRows = 6;       // of a block
constexpr int kLargestGroup = 128;

enum Path { kGeneric = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3 };

#define INLINE static inline __attribute__((always_inline))

// Activations of some rows, interleaved by four inputs, so that a block is one stream too.
struct Block {
  int first, rows;
  int32_t* values;   // four int8 each: [inputs / 4][rows]
  int32_t* offsets;  // [groups][rows]: minus what is added to each weight, times the sum of the values
  float* scales;     // [groups][rows]
};

struct Weights {
  const uint8_t* data;    // [tiles]: float16 scales [groups, or 1][32], then the chunks
  float* out;             // [rows][outputs]
  const float* residual;  // as out, is added to it; or null
  int outputs, tiles;
};

// What is rounded: rows of x; or, with `norm`, x / rms(x) * norm; or, with `up`, silu(x) * up.
struct Source {
  const float *x = nullptr, *norm = nullptr, *up = nullptr;
  float epsilon = 0.0f;
};

struct Product {
  Source source;
  int rows, inputs, groups, group, bits, path;
  bool by_channel;
  std::vector<Weights> weights;
  std::vector<Block> blocks;

  int chunks() const { return group / (bits == 4 ? 8 : 4); }  // of a group
  int64_t scale_bytes() const { return (by_channel ? 1 : groups) * kTile * int64_t{2}; }
  int64_t tile_bytes() const { return scale_bytes() + static_cast<int64_t>(groups) * chunks() * kChunk; }
};

// --- Activations. All of it is elementwise, or summed in one order, so a row has the same bits wherever it stands.

INLINE int32_t nearest(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits are now the integer
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4B400000;
}

// Within 2e-7 of itself. Cody and Waite's reduction, Taylor to degree 7 on [-ln 2 / 2, ln 2 / 2].
INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const int32_t n = nearest(x * 1.44269504f);
  const float whole = static_cast<float>(n);
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (n + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// Halves added to each other. Written out: of a loop over the halvings no compiler makes vectors.
INLINE float sum_of(float (&parts)[16]) {
  for (int j = 0; j < 8; ++j) parts[j] += parts[j + 8];
  for (int j = 0; j < 4; ++j) parts[j] += parts[j + 4];
  return (parts[0] + parts[2]) + (parts[1] + parts[3]);
}

INLINE float sum_of_squares(const float* x, int count) {
  float parts[16] = {};
  int k = 0;
  for (; k + 16 <= count; k += 16) {
    for (int j = 0; j < 16; ++j) parts[j] += x[k + j] * x[k + j];
  }
  for (int j = 0; k + j < count; ++j) parts[j] += x[k + j] * x[k + j];
  return sum_of(parts);
}

// A row as it is to be rounded: where it lies, or made in `scratch`.
INLINE const float* row_of(const Source& s, int row, int inputs, float* scratch) {
  const float* x = s.x + static_cast<int64_t>(row) * inputs;
  if (s.norm) {
    const float inverse = 1.0f / __builtin_sqrtf(sum_of_squares(x, inputs) / inputs + s.epsilon);
    for (int k = 0; k < inputs; ++k) scratch[k] = s.norm[k] * (x[k] * inverse);
    return scratch;
  }
  if (s.up) {
    const float* up = s.up + static_cast<int64_t>(row) * inputs;
    for (int k = 0; k < inputs; ++k) scratch[k] = x[k] / (1.0f + exponential(-x[k])) * up[k];
    return scratch;
  }
  return x;
}

// A row's group of inputs: the largest magnitude becomes 127. What is not finite makes the scale NaN.
INLINE void round_group(const float* x, int count, int group, int8_t* out, float* scale, int32_t* total) {
  float highest[16] = {}, poison[16] = {};
  int k = 0;
  for (; k + 16 <= count; k += 16) {
    for (int j = 0; j < 16; ++j) {
      const float size = __builtin_fabsf(x[k + j]);
      highest[j] = size > highest[j] ? size : highest[j];
      poison[j] += x[k + j] * 0.0f;
    }
  }
  for (int j = 0; k + j < count; ++j) {
    const float size = __builtin_fabsf(x[k + j]);
    highest[j] = size > highest[j] ? size : highest[j];
    poison[j] += x[k + j] * 0.0f;
  }
  for (int width = 8; width; width /= 2) {
    for (int j = 0; j < width; ++j) {
      highest[j] = highest[j + width] > highest[j] ? highest[j + width] : highest[j];
      poison[j] += poison[j + width];
    }
  }
  const bool zero = !(highest[0] > 1e-30f);
  const float factor = zero ? 0.0f : 127.0f / highest[0];
  int32_t sum = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t value = static_cast<int8_t>(nearest(x[i] * factor));
    out[i] = static_cast<int8_t>(value);
    sum += value;
  }
  for (int i = count; i < group; ++i) out[i] = 0;
  *scale = (zero ? 0.0f : highest[0] / 127.0f) + poison[0];
  *total = sum;
}

template <typename RoundGroup>
INLINE void round_block(const Product& p, const Block& b, RoundGroup round) {
  thread_local std::vector<float> scratch;
  if (p.source.norm || p.source.up) scratch.resize(p.inputs);
  const bool is_signed = p.path == kGeneric || (p.path == kAvx2 && p.bits == 8);
  const int32_t added = is_signed ? 0 : p.bits == 4 ? 8 : 128;
  alignas(64) int8_t rounded[kLargestGroup];
  for (int r = 0; r < b.rows; ++r) {
    const float* x = row_of(p.source, b.first + r, p.inputs, scratch.data());
    for (int g = 0; g < p.groups; ++g) {
      const int count = std::min(p.group, p.inputs - g * p.group);
      int32_t total;
      round(x + g * p.group, count, p.group, rounded, &b.scales[g * b.rows + r], &total);
      b.offsets[g * b.rows + r] = -added * total;
      for (int k = 0; k < p.group / 4; ++k) {
        std::memcpy(&b.values[(g * p.group / 4 + k) * b.rows + r], rounded + 4 * k, 4);
      }
    }
  }
}

// --- The generic path: any compiler, any CPU.

float half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3FF;
  uint32_t bits;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255u : exponent + 112) << 23) | (fraction << 13);
  }
  std::memcpy(&value, &bits, 4);
  return value;
}

template <int R, int BITS>
void tile_generic(const Product& p, const Weights& w, int tile, const Block& b) {
  const int chunks = p.chunks();
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(w.data + tile * p.tile_bytes());
  const uint8_t* values = w.data + tile * p.tile_bytes() + p.scale_bytes();
  float sums[R][kTile] = {};
  for (int g = 0; g < p.groups; ++g) {
    int32_t dots[R][kTile] = {};
    for (int c = 0; c < chunks; ++c, values += kChunk) {
      const int k = (g * chunks + c) * (BITS == 4 ? 2 : 1);  // in fours
      for (int r = 0; r < R; ++r) {
        const int8_t* x = reinterpret_cast<const int8_t*>(b.values + k * R + r);
        for (int n = 0; n < kTile; ++n) {
          int32_t dot = 0;
          for (int j = 0; j < 4; ++j) {
            const int v = values[4 * n + j];
            if (BITS == 4) {
              dot += x[j] * ((v & 15) - 8) + x[4 * R + j] * ((v >> 4) - 8);
            } else {
              dot += x[j] * (v - 128);
            }
          }
          dots[r][n] += dot;
        }
      }
    }
    for (int n = 0; n < kTile; ++n) {
      const float scale = p.by_channel ? 1.0f : half(scales[g * kTile + n]);
      for (int r = 0; r < R; ++r) sums[r][n] += static_cast<float>(dots[r][n]) * (scale * b.scales[g * R + r]);
    }
  }
  const int count = std::min(kTile, w.outputs - tile * kTile);
  for (int r = 0; r < R; ++r) {
    const int64_t at = static_cast<int64_t>(b.first + r) * w.outputs + tile * kTile;
    for (int n = 0; n < count; ++n) {
      const float sum = sums[r][n] * (p.by_channel ? half(scales[n]) : 1.0f);
      w.out[at + n] = w.residual ? w.residual[at + n] + sum : sum;
    }
  }
}

// --- x86-64: the same sums in vectors. `kTarget...` lets a function use instructions that the build does not assume.

#if defined(__x86_64__)

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define TARGET_AVXVNNI __attribute__((target("avxvnni,avx2,fma,f16c")))
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))

template <int R, int BITS>
TARGET_AVX512 void tile_avx512(const Product& p, const Weights& w, int tile, const Block& b) {
  const int chunks = p.chunks();
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(w.data + tile * p.tile_bytes());
  const uint8_t* values = w.data + tile * p.tile_bytes() + p.scale_bytes();
  const int32_t* x = b.values;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 sums[R][2];
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int g = 0; g < p.groups; ++g) {
    __m512i dots[R][2];
    for (int r = 0; r < R; ++r) dots[r][0] = dots[r][1] = _mm512_set1_epi32(b.offsets[g * R + r]);
    for (int c = 0; c < chunks; ++c, values += kChunk) {
      const __m512i first = _mm512_loadu_si512(values), second = _mm512_loadu_si512(values + 64);
      if (R <= 2) _mm_prefetch(reinterpret_cast<const char*>(values) + 4096, _MM_HINT_T0);
      if (R <= 2) _mm_prefetch(reinterpret_cast<const char*>(values) + 4160, _MM_HINT_T0);
      if (BITS == 4) {
        const __m512i a = _mm512_and_si512(first, low), e = _mm512_and_si512(second, low);
        for (int r = 0; r < R; ++r) {
          const __m512i v = _mm512_set1_epi32(x[r]);
          dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], a, v);
          dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], e, v);
        }
        const __m512i h = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
        const __m512i i = _mm512_and_si512(_mm512_srli_epi16(second, 4), low);
        for (int r = 0; r < R; ++r) {
          const __m512i v = _mm512_set1_epi32(x[R + r]);
          dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], h, v);
          dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], i, v);
        }
        x += 2 * R;
      } else {
        for (int r = 0; r < R; ++r) {
          const __m512i v = _mm512_set1_epi32(x[r]);
          dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], first, v);
          dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], second, v);
        }
        x += R;
      }
    }
    for (int i = 0; i < 2; ++i) {
      __m512 scale = _mm512_set1_ps(1.0f);
      if (!p.by_channel) {
        scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + g * kTile + 16 * i)));
      }
      for (int r = 0; r < R; ++r) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(b.scales[g * R + r]));
        sums[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][i]), both, sums[r][i]);
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    const int count = w.outputs - tile * kTile - 16 * i;
    const __mmask16 there = count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1;
    __m512 scale = _mm512_set1_ps(1.0f);
    if (p.by_channel) {
      scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 16 * i)));
    }
    for (int r = 0; r < R; ++r) {
      const int64_t at = static_cast<int64_t>(b.first + r) * w.outputs + tile * kTile + 16 * i;
      __m512 sum = _mm512_mul_ps(sums[r][i], scale);
      if (w.residual) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(there, w.residual + at), sum);
      _mm512_mask_storeu_ps(w.out + at, there, sum);
    }
  }
}

// 32 bytes of weights by four activations: 8 sums. Eight bits go through their magnitudes, since 16 bits hold two
// products of 128 by 127 but not of 255 by 127.
template <int BITS>
TARGET_AVX2 INLINE __m256i dot_avx2(__m256i sum, __m256i w, __m256i x) {
  __m256i pairs;
  if (BITS == 4) {
    pairs = _mm256_maddubs_epi16(w, x);
  } else {
    const __m256i plain = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(plain), _mm256_sign_epi8(x, plain));
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int BITS>
TARGET_AVXVNNI INLINE __m256i dot_avxvnni(__m256i sum, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(sum, w, x);
}

#define TILE_256(NAME, TARGET, DOT)                                                                                    \
  template <int R, int BITS>                                                                                           \
  TARGET void NAME(const Product& p, const Weights& w, int tile, const Block& b) {                                     \
    const int chunks = p.chunks();                                                                                     \
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(w.data + tile * p.tile_bytes());                        \
    const uint8_t* values = w.data + tile * p.tile_bytes() + p.scale_bytes();                                          \
    const int32_t* x = b.values;                                                     \
    const __m256i low = _mm256_set1_epi8(15);                                                                          \
    __m256 sums[R][4];                                                                                                 \
    for (int r = 0; r < R; ++r)                                                                                        \
      for (int i = 0; i < 4; ++i) sums[r][i] = _mm256_setzero_ps();                                                    \
    for (int g = 0; g < p.groups; ++g) {                                                                               \
      __m256i dots[R][4];                                                                                              \
      for (int r = 0; r < R; ++r)                                                                                      \
        for (int i = 0; i < 4; ++i) dots[r][i] = _mm256_set1_epi32(b.offsets[g * R + r]);                              \
      for (int c = 0; c < chunks; ++c, values += kChunk) {                                                             \
        for (int i = 0; i < 4; ++i) {                                                                                  \
          const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32 * i));                     \
          for (int r = 0; r < R; ++r) {                                                                                \
            if (BITS == 4) {                                                                                           \
              const __m256i h = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);                                        \
              dots[r][i] = DOT<4>(dots[r][i], _mm256_and_si256(v, low), _mm256_set1_epi32(x[r]));                      \
              dots[r][i] = DOT<4>(dots[r][i], h, _mm256_set1_epi32(x[R + r]));                                         \
            } else {                                                                                                   \
              dots[r][i] = DOT<8>(dots[r][i], v, _mm256_set1_epi32(x[r]));                                             \
            }                                                                                                          \
          }                                                                                                            \
        }                                                                                                              \
        x += BITS == 4 ? 2 * R : R;                                                                                    \
      }                                                                                                                \
      for (int i = 0; i < 4; ++i) {                                                                                    \
        __m256 scale = _mm256_set1_ps(1.0f);                                                                           \
        if (!p.by_channel) scale = halves_avx2(scales + g * kTile + 8 * i);                                            \
        for (int r = 0; r < R; ++r) {                                                                                  \
          const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(b.scales[g * R + r]));                               \
          sums[r][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][i]), both, sums[r][i]);                              \
        }                                                                                                              \
      }                                                                                                                \
    }                                                                                                                  \
    const int count = std::min(kTile, w.outputs - tile * kTile);                                                       \
    for (int r = 0; r < R; ++r) {                                                                                      \
      alignas(32) float row[kTile];                                                                                    \
      for (int i = 0; i < 4; ++i) {                                                                                    \
        const __m256 scale = p.by_channel ? halves_avx2(scales + 8 * i) : _mm256_set1_ps(1.0f);                        \
        _mm256_store_ps(row + 8 * i, _mm256_mul_ps(sums[r][i], scale));                                                \
      }                                                                                                                \
      const int64_t at = static_cast<int64_t>(b.first + r) * w.outputs + tile * kTile;                                 \
      for (int n = 0; n < count; ++n) w.out[at + n] = w.residual ? w.residual[at + n] + row[n] : row[n];               \
    }                                                                                                                  \
  }

TARGET_AVX2 INLINE __m256 halves_avx2(const uint16_t* scales) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
}

TILE_256(tile_avx2, TARGET_AVX2, dot_avx2)
TILE_256(tile_avxvnni, TARGET_AVXVNNI, dot_avxvnni)

// round_group of a whole group of a multiple of 32 inputs.
TARGET_AVX512 INLINE void round_group_avx512(const float* x, int count, int group, int8_t* out, float* scale,
                                             int32_t* total) {
  if (count != group || group % 32) return round_group(x, count, group, out, scale, total);
  __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
  __mmask16 odd = 0;
  for (int k = 0; k < group; k += 32) {
    const __m512 a = _mm512_loadu_ps(x + k), b = _mm512_loadu_ps(x + k + 16), zero = _mm512_setzero_ps();
    odd |= _mm512_cmp_ps_mask(_mm512_mul_ps(a, zero), zero, _CMP_NEQ_UQ);
    odd |= _mm512_cmp_ps_mask(_mm512_mul_ps(b, zero), zero, _CMP_NEQ_UQ);
    first = _mm512_max_ps(first, _mm512_abs_ps(a)), second = _mm512_max_ps(second, _mm512_abs_ps(b));
  }
  const float highest = _mm512_reduce_max_ps(_mm512_max_ps(first, second));
  const bool zero = !(highest > 1e-30f);
  const __m512 factor = _mm512_set1_ps(zero ? 0.0f : 127.0f / highest);
  __m512i sum = _mm512_setzero_si512();
  for (int k = 0; k < group; k += 16) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), factor));
    sum = _mm512_add_epi32(sum, v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm512_cvtepi32_epi8(v));
  }
  *scale = odd ? __builtin_nanf("") : zero ? 0.0f : highest / 127.0f;
  *total = _mm512_reduce_add_epi32(sum);
}

TARGET_AVX512 void round_avx512(const Product& p, const Block& b) { round_block(p, b, round_group_avx512); }
TARGET_AVX2 void round_avx2(const Product& p, const Block& b) { round_block(p, b, round_group); }

#endif  // __x86_64__

void round_generic(const Product& p, const Block& b) { round_block(p, b, round_group); }

// --- Which functions a path is made of.

using TileFunction = void (*)(const Product&, const Weights&, int tile, const Block&);
using RoundFunction = void (*)(const Product&, const Block&);

template <int BITS>
TileFunction tile_function([[maybe_unused]] int path, int rows) {
#if defined(__x86_64__)
  if (path == kAvx512Vnni) {
    constexpr TileFunction by_rows[] = {tile_avx512<1, BITS>, tile_avx512<2, BITS>, tile_avx512<3, BITS>,
                                        tile_avx512<4, BITS>, tile_avx512<5, BITS>, tile_avx512<6, BITS>};
    return by_rows[rows - 1];
  }
  if (path == kAvxVnni) return rows == 1 ? tile_avxvnni<1, BITS> : tile_avxvnni<2, BITS>;
  if (path == kAvx2) return rows == 1 ? tile_avx2<1, BITS> : tile_avx2<2, BITS>;
#endif
  return rows == 1 ? tile_generic<1, BITS> : tile_generic<2, BITS>;
}

RoundFunction round_function([[maybe_unused]] int path) {
#if defined(__x86_64__)
  if (path == kAvx512Vnni) return round_avx512;
  if (path != kGeneric) return round_avx2;
#endif
  return round_generic;
}

#if defined(__x86_64__)
// Some features have no name in clang's __builtin_cpu_supports; register 0 is eax, 2 ecx.
bool cpuid_bit(unsigned leaf, unsigned subleaf, int number, int bit) {
  unsigned registers[4] = {};
  __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]);
  return registers[number] >> bit & 1;
}
#endif

// Whether this CPU has a path.
bool has([[maybe_unused]] int path) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = cpuid_bit(1, 0, 2, 12), f16c = cpuid_bit(1, 0, 2, 29), avx2 = __builtin_cpu_supports("avx2");
  if (path == kAvx2) return avx2 && fma && f16c;
  if (path == kAvxVnni) return avx2 && fma && f16c && cpuid_bit(7, 1, 0, 4);
  if (path == kAvx512Vnni) {
    return avx2 && fma && f16c && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
  }
#endif
  return path == kGeneric;
}

int rows_of_block(int path) { return path == kAvx512Vnni ? kMostRows : 2; }

}  // namespace

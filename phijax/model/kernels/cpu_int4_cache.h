// Keys and values of a cache in pieces, for cpu_int4_attention.h: float32, or int8 with a bfloat16 scale for each line of
// a head's numbers (model/kernels/int8_lines.py).

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu_int4_tiles.h"

namespace {

constexpr int kKeys = 64;  // that are read at once: keys and values then stay in the first cache

// (R, K, length, H); either floats, or integers and their scales (R, K, length).
struct Lines {
  float* floats = nullptr;
  int8_t* integers = nullptr;
  uint16_t* scales = nullptr;
};

struct Piece {
  Lines k, v;
  int64_t length;
};

INLINE float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To the nearest, ties to even.
INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// `count` lines as floats: where they lie, or in `scratch`.
INLINE const float* read_lines(const Lines& lines, int64_t first, int count, int h, float* __restrict__ scratch) {
  if (lines.floats) return lines.floats + first * h;
  for (int p = 0; p < count; ++p) {
    const int8_t* integers = lines.integers + (first + p) * h;
    const float scale = from_bfloat16(lines.scales[first + p]);
    for (int i = 0; i < h; ++i) scratch[p * h + i] = static_cast<float>(integers[i]) * scale;
  }
  return scratch;
}

// What is not finite makes the scale NaN.
INLINE void write_line(const Lines& lines, int64_t number, const float* x, int h) {
  if (lines.floats) {
    std::memcpy(lines.floats + number * h, x, h * sizeof(float));
    return;
  }
  float highest = 0.0f, poison = 0.0f;
  for (int i = 0; i < h; ++i) {
    const float size = __builtin_fabsf(x[i]);
    highest = size > highest ? size : highest;
    poison += x[i] * 0.0f;
  }
  const uint16_t scale = to_bfloat16(highest * ((1.0f + 0x1p-8f) / 127.0f) + poison);
  const float divisor = scale ? from_bfloat16(scale) : 1.0f;
  lines.scales[number] = scale;
  int8_t* integers = lines.integers + number * h;
  for (int i = 0; i < h; ++i) integers[i] = static_cast<int8_t>(nearest(x[i] / divisor));
}

}  // namespace

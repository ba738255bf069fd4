// Products of float32 activations with weights in four or eight bits, for CPUs; called from XLA programs.
//
// Built by cpu_int4_library.py with the compiler of the machine, for the paths below that the CPU has at run time.
//
// The product is out[m][n] = sum over groups g of x_scale[m][g] * w_scale[n][g] * sum over k in g of x[m][k] * w[n][k].
// Activations are rounded to int8, a scale for each row and group; the inner sum is exact in int32, the outer one is
// float32 in the order of the groups. No sum crosses outputs or rows, and each path has one order of operations, so a
// row's bits depend neither on the other rows nor on the number of threads.
//
// A call does what stands around the products too: RMSNorm before, silu(gate) * up between, the residual sum behind.
// At one token a step a layer's products take some ten microseconds each, and so does everything that XLA starts.

#include <string>

#include "cpu_int4_prompt.h"
#include "cpu_int4_threads.h"
#include "cpu_int4_tiles.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// --- A product's parts.

void make_blocks(Product& p, std::vector<int32_t>& memory) {
  const int most = rows_of_block(p.path);
  const int64_t padded = static_cast<int64_t>(p.groups) * p.group;
  memory.resize(p.rows * (padded / 4 + 2 * p.groups));
  int32_t* at = memory.data();
  for (int first = 0; first < p.rows; first += most) {
    Block b;
    b.first = first, b.rows = std::min(most, p.rows - first);
    b.values = at, at += b.rows * padded / 4;
    b.offsets = at, at += b.rows * p.groups;
    b.scales = reinterpret_cast<float*>(at), at += b.rows * p.groups;
    p.blocks.push_back(b);
  }
}

int tiles_of(const Product& p) {
  int tiles = 0;
  for (const Weights& w : p.weights) tiles += w.tiles;
  return tiles;
}

// Tiles that a thread takes at once.
int stride_of(const Product& p, int threads) { return std::clamp(tiles_of(p) / (6 * threads), 1, 8); }

void run_tiles(const Product& p, int first, int end) {
  for (int t = first; t < end; ++t) {
    int tile = t, number = 0;
    while (tile >= p.weights[number].tiles) tile -= p.weights[number++].tiles;
    for (const Block& b : p.blocks) {
      const TileFunction f = p.bits == 4 ? tile_function<4>(p.path, b.rows) : tile_function<8>(p.path, b.rows);
      f(p, p.weights[number], tile, b);
    }
  }
}

// Products one after another, each over what the one before gave.
void run(const std::vector<Product*>& products, ffi::ThreadPool pool) {
  Threads& all = Threads::all(pool.num_threads());
  const int threads = all.count();
  std::vector<int> counts;
  for (const Product* p : products) {
    const int blocks = p->blocks.size(), stride = stride_of(*p, threads);
    counts.push_back(blocks);
    counts.push_back((tiles_of(*p) + stride - 1) / stride);
  }
  all.run(counts, [&products, threads](int phase, int i) {
    const Product& p = *products[phase / 2];
    if (phase % 2 == 0) {
      round_function(p.path)(p, p.blocks[i]);
    } else {
      const int stride = stride_of(p, threads);
      run_tiles(p, i * stride, std::min(tiles_of(p), (i + 1) * stride));
    }
  });
}

// --- What XLA calls. Arrays that are not there are empty.

using F32 = ffi::Buffer<ffi::F32>;

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("phijax cpu_int4: ") + what); }

const float* data_or_null(const F32& array) { return array.element_count() ? array.typed_data() : nullptr; }

// Matrix `number` of the rest of the arguments, (tiles, bytes). False where its shape is not one of p's.
bool add_matrix(Product& p, ffi::RemainingArgs rest, int number, int64_t outputs, float* out, const float* residual) {
  auto data = rest.get<ffi::Buffer<ffi::U8>>(number);
  if (!data || data->dimensions().size() != 2) return false;
  Weights w;
  w.data = data->typed_data(), w.out = out, w.residual = residual, w.outputs = outputs;
  w.tiles = data->dimensions()[0];
  p.weights.push_back(w);
  return w.tiles == (outputs + kTile - 1) / kTile && data->dimensions()[1] == p.tile_bytes();
}

bool begin(Product& p, int64_t rows, int64_t inputs, int32_t bits, int32_t group, bool by_channel, int32_t path) {
  p.rows = rows, p.inputs = inputs, p.bits = bits, p.group = group, p.by_channel = by_channel, p.path = path;
  if (group <= 0 || group > kLargestGroup || group % 8 || (bits != 4 && bits != 8)) return false;
  p.groups = (inputs + group - 1) / group;
  return true;
}

// Rows that count; the others become zeros.
int64_t counted(const ffi::Buffer<ffi::S32>& count, int64_t rows) {
  return count.element_count() ? std::clamp<int64_t>(count.typed_data()[0], 0, rows) : rows;
}

// x (rows, inputs), norm (inputs) or (0), residual (rows, outputs) or (0), count (1) or (0), then matrices ->
// (rows, outputs) for each. A residual is for one matrix.
ffi::Error product(ffi::ThreadPool pool, F32 x, F32 norm, F32 residual, ffi::Buffer<ffi::S32> count,
                   ffi::RemainingArgs matrices, ffi::RemainingRets outs, int32_t bits, int32_t group,
                   int32_t by_channel, int32_t path, float epsilon) {
  if (x.dimensions().size() != 2 || matrices.size() != outs.size()) return wrong("arguments");
  Product p;
  const int64_t all = x.dimensions()[0];
  if (!begin(p, counted(count, all), x.dimensions()[1], bits, group, by_channel, path)) {
    return wrong("bits or group");
  }
  p.source.x = x.typed_data(), p.source.norm = data_or_null(norm), p.source.epsilon = epsilon;
  for (size_t i = 0; i < outs.size(); ++i) {
    auto out = outs.get<F32>(i);
    if (!out || (*out)->dimensions().size() != 2 || (*out)->dimensions()[0] != all) return wrong("results");
    const int64_t outputs = (*out)->dimensions()[1];
    float* to = (*out)->typed_data();
    if (!add_matrix(p, matrices, i, outputs, to, data_or_null(residual))) return wrong("shapes of a matrix");
    std::fill(to + p.rows * outputs, to + all * outputs, 0.0f);
  }
  if (p.rows == 0) return ffi::Error::Success();
  thread_local std::vector<int32_t> memory;
  make_blocks(p, memory);
  run({&p}, pool);
  return ffi::Error::Success();
}

// x (rows, D) as above, then gate, up (D -> F) and down (F -> D): residual + down(silu(gate(x)) * up(x)).
ffi::Error gated(ffi::ThreadPool pool, F32 x, F32 norm, F32 residual, ffi::Buffer<ffi::S32> count,
                 ffi::RemainingArgs matrices, ffi::Result<F32> out, int32_t bits, int32_t group, int32_t by_channel,
                 int32_t down_bits, int32_t down_group, int32_t down_by_channel, int32_t hidden, int32_t path,
                 float epsilon) {
  if (x.dimensions().size() != 2 || matrices.size() != 3) return wrong("arguments");
  const int64_t all = x.dimensions()[0], outputs = out->dimensions()[1];
  Product first, second;
  const int64_t rows = counted(count, all);
  if (!begin(first, rows, x.dimensions()[1], bits, group, by_channel, path) ||
      !begin(second, rows, hidden, down_bits, down_group, down_by_channel, path)) {
    return wrong("bits or group");
  }
  thread_local std::vector<float> between;
  between.resize(2 * rows * hidden);
  first.source.x = x.typed_data(), first.source.norm = data_or_null(norm), first.source.epsilon = epsilon;
  second.source.x = between.data(), second.source.up = between.data() + rows * hidden;
  float* to = out->typed_data();
  if (!add_matrix(first, matrices, 0, hidden, between.data(), nullptr) ||
      !add_matrix(first, matrices, 1, hidden, between.data() + rows * hidden, nullptr) ||
      !add_matrix(second, matrices, 2, outputs, to, data_or_null(residual))) {
    return wrong("shapes of a matrix");
  }
  std::fill(to + rows * outputs, to + all * outputs, 0.0f);
  if (rows == 0) return ffi::Error::Success();
  thread_local std::vector<int32_t> memory, more;
  make_blocks(first, memory);
  make_blocks(second, more);
  run({&first, &second}, pool);
  return ffi::Error::Success();
}

// Writes all, then attends. Little work is one item: a thread that is waited for costs more.
void run(const Attention& a, const AttendFunctions& functions, int rows, ffi::ThreadPool pool) {
  const bool one = a.tokens == 1;
  const int blocks = one ? 1 : (a.tokens + functions.lanes - 1) / functions.lanes;
  Threads::all(pool.num_threads()).run({one ? 1 : rows * blocks, rows * a.heads() * blocks}, [&](int phase, int i) {
    if (phase == 1) {
      // The last block sees most keys, so it comes first.
      const int block = blocks - 1 - i / (rows * a.heads()), row = i / a.heads() % rows, head = i % a.heads();
      return one ? functions.attend(a, row, head) : functions.attend_block(a, row, head, block);
    }
    const int first = one ? 0 : i / blocks, end = one ? rows : first + 1, from = i % blocks * functions.lanes;
    for (int row = first; row < end; ++row) {
      for (int token = from; token < std::min(a.tokens, from + functions.lanes); ++token) {
        for (int head = 0; head < a.kv_heads; ++head) functions.write(a, row, token, head);
      }
    }
  });
}

// The pieces of a cache: k and v float32, or k, v int8 and their scales bfloat16. False where it is something else.
bool add_pieces(Attention& a, ffi::RemainingRets outs, size_t begin, bool integers) {
  for (size_t i = begin; i + 1 < outs.size(); i += integers ? 4 : 2) {
    Piece piece;
    auto add = [&](Lines& lines, size_t number) {
      if (!integers) {
        auto floats = outs.get<F32>(number);
        if (floats) lines.floats = (*floats)->typed_data(), piece.length = (*floats)->dimensions()[2];
        return floats.has_value();
      }
      auto values = outs.get<ffi::Buffer<ffi::S8>>(number);
      auto scales = outs.get<ffi::Buffer<ffi::BF16>>(number + 2);
      if (!values || !scales) return false;
      lines.integers = (*values)->typed_data(), piece.length = (*values)->dimensions()[2];
      lines.scales = (*scales)->typed_data();
      return true;
    };
    if (!add(piece.k, i) || !add(piece.v, i + 1)) return false;
    a.pieces.push_back(piece);
  }
  return !a.pieces.empty();
}

// q (rows, T, N H), k and v (rows, T, K H), cosines and sines (rows, T, rotary), positions (rows) of the first tokens,
// count as above, then the pieces of the cache -> (rows, T, N H) and the pieces, which are the same memory.
ffi::Error attend(ffi::ThreadPool pool, F32 q, F32 k, F32 v, F32 cosines, F32 sines, ffi::Buffer<ffi::S32> positions,
                  ffi::Buffer<ffi::S32> count, ffi::RemainingArgs cache, ffi::RemainingRets outs, int32_t window,
                  int32_t path) {
  if (outs.size() != cache.size() + 1 || cache.size() < 2) return wrong("arguments");
  auto out = outs.get<F32>(0);
  auto shape = cache.get<ffi::AnyBuffer>(0);
  if (!out || !shape || shape->dimensions().size() != 4 || q.dimensions().size() != 3) return wrong("arguments");
  const auto heads = shape->dimensions();  // (R, K, S, H)
  Attention a;
  a.q = q.typed_data(), a.k = k.typed_data(), a.v = v.typed_data(), a.out = (*out)->typed_data();
  a.cosines = cosines.typed_data(), a.sines = sines.typed_data(), a.positions = positions.typed_data();
  a.kv_heads = heads[1], a.head_dim = heads[3], a.rotary = cosines.dimensions().back(), a.window = window;
  const int64_t all = q.dimensions()[0], width = q.dimensions()[2];
  a.tokens = q.dimensions()[1], a.group = width / (a.kv_heads * a.head_dim);
  if (k.dimensions().back() != heads[1] * heads[3] || width != a.heads() * heads[3]) return wrong("heads");
  if (!add_pieces(a, outs, 1, shape->element_type() == ffi::S8)) return wrong("cache");
  int64_t places = 0;
  for (const Piece& piece : a.pieces) places += piece.length;
  const int64_t rows = std::min<int64_t>(counted(count, all), heads[0]);
  for (int64_t r = 0; r < rows; ++r) {
    if (a.positions[r] < 0 || a.positions[r] + a.tokens > places) return wrong("position outside of the cache");
  }
  std::fill(a.out + rows * a.tokens * width, a.out + all * a.tokens * width, 0.0f);
  if (rows > 0 && a.tokens > 0) run(a, attend_functions(path), rows, pool);
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)

extern "C" int phijax_cpu_int4_has(int path) { return has(path); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(phijax_cpu_int4_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("group")
                                  .Attr<int32_t>("by_channel")
                                  .Attr<int32_t>("path")
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(phijax_cpu_int4_gated, gated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<F32>()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("group")
                                  .Attr<int32_t>("by_channel")
                                  .Attr<int32_t>("down_bits")
                                  .Attr<int32_t>("down_group")
                                  .Attr<int32_t>("down_by_channel")
                                  .Attr<int32_t>("hidden")
                                  .Attr<int32_t>("path")
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(phijax_cpu_int4_attend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("window")
                                  .Attr<int32_t>("path"));

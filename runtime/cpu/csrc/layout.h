// The engine's own weight layouts, and how GGUF tensors are packed into them.
//
// Panel: a matrix whose every row is wanted. 16 rows side by side, so that lane = row and no horizontal sum is
// needed; the whole matrix is one stream. Quantized: per 16 rows and pair of 32-blocks, the nibbles (or bytes) of
// both blocks, then 2 x 16 f16 scales. Float types: per 16 rows, column after column.
//
// Bundle: the gate, up and down rows of one neuron side by side, so that an inactive neuron is never touched. Gate and
// up rows keep lane = 32-block (16 blocks per group, the rest in pairs); down rows are cut in chunks of 128 outputs (64
// for Q8_0) whose bytes are ordered for b_interleave4. The f16 scales of 16 blocks stand before their quants, so that a
// row is read forwards: hardware prefetchers follow that, and lose a row whose scales lie at its end.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

namespace hotcold {

enum class Type : int { F32, F16, BF16, Q8_0, Q4_0 };

constexpr int kLanes = 16;   // rows of a panel group, floats of a vector
constexpr int kBlock = 32;   // weights that share a scale
constexpr int kSlack = 64;   // readable bytes past every packed buffer

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr bool is_quantized(Type t) { return t == Type::Q8_0 || t == Type::Q4_0; }
constexpr int float_size(Type t) { return t == Type::F32 ? 4 : 2; }
// Bytes that the quants of n weights take.
constexpr int quant_bytes(Type t, int n) { return t == Type::Q4_0 ? n / 2 : n; }
// Width that activations and packed rows are padded to.
constexpr int padded(int n) { return round_up(n, 64); }

// Bytes of one row as GGUF stores it.
size_t gguf_row_bytes(Type type, int n);

// ---- panels
size_t panel_group_bytes(Type type, int cols);
size_t panel_bytes(Type type, int rows, int cols);
// Packs rows [first, last) of `src` (GGUF rows of `cols` weights); output row r is source row order[r], or r without
// an order. `first` and `last` are multiples of 16, or the end.
void pack_panel(Type type, const uint8_t* src, int rows, int cols, const int32_t* order, int first, int last, uint8_t* dst);
void panel_row(Type type, const uint8_t* panel, int cols, int row, float* out);

// ---- neuron rows
// Where the quants of 32-block b begin in a row of `blocks` blocks (b a multiple of 16 or, in a row's last group, of a
// pair or chunk), and where the scale of block b is.
constexpr size_t row_quants_at(Type t, int b, int blocks) {
  const int group = b / kLanes * kLanes, here = blocks - group < kLanes ? blocks - group : kLanes;
  return size_t(b) * quant_bytes(t, kBlock) + size_t(group + here) * 2;
}
constexpr size_t row_scale_at(Type t, int b) {
  return size_t(b / kLanes * kLanes) * quant_bytes(t, kBlock) + size_t(b) * 2;
}
size_t row_bytes(Type type, int n);   // one gate or up row
size_t down_bytes(Type type, int n);  // one transposed down row
void pack_row(Type type, const uint8_t* src, int n, uint8_t* dst);
void pack_down(Type type, const uint8_t* src, int n, uint8_t* dst);

}  // namespace hotcold

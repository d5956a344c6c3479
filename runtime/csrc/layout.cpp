#include "layout.h"

#include <bit>
#include <cstring>

#include "half.h"

namespace hotcold {
namespace {

constexpr int kGgufQ4 = 18, kGgufQ8 = 34;  // bytes of a GGUF block: f16 scale, then the quants

int gguf_block(Type type) { return type == Type::Q4_0 ? kGgufQ4 : kGgufQ8; }

// One GGUF block as 32 unsigned bytes (0..15 for Q4_0, weight + 128 for Q8_0); returns its f16 scale.
uint16_t unpack_block(Type type, const uint8_t* block, uint8_t out[kBlock]) {
  uint16_t scale;
  std::memcpy(&scale, block, 2);
  for (int i = 0; i < kBlock; ++i)
    out[i] = type == Type::Q8_0 ? block[2 + i] ^ 0x80 : i < 16 ? block[2 + i] & 15 : block[2 + i - 16] >> 4;
  return scale;
}

// A quantised row as unsigned bytes and scales; what lies past n is weight zero with scale zero.
struct UnpackedRow {
  UnpackedRow(uint8_t* bytes, uint16_t* scales) : q(bytes), scale(scales) {}
  uint8_t* q;
  uint16_t* scale;

  void fill(Type type, const uint8_t* src, int n, int width) {
    std::memset(q, type == Type::Q4_0 ? 8 : 128, width);
    std::memset(scale, 0, width / kBlock * sizeof(uint16_t));
    for (int b = 0; b < n / kBlock; ++b) scale[b] = unpack_block(type, src + b * gguf_block(type), q + b * kBlock);
  }
};

constexpr int kMaxWidth = 1 << 16;
struct RowBuffer {
  alignas(64) uint8_t q[kMaxWidth];
  uint16_t scale[kMaxWidth / kBlock];
};
RowBuffer& row_buffer() {
  static thread_local RowBuffer buffer;
  return buffer;
}

void pack_row_scales(Type type, const uint16_t* scales, int blocks, uint8_t* dst) {
  for (int b = 0; b < blocks; ++b) std::memcpy(dst + row_scale_at(type, b), &scales[b], 2);
}

uint8_t nibbles(uint8_t low, uint8_t high) { return uint8_t(low | high << 4); }

// 128-bit lane l, dword k of interleaved vector r holds byte 16l + 4r + k: so that byte belongs to output
// 16 * unit + 4l + k, where a unit is one vector of 16 outputs.
int lane_output(int byte) { return 4 * (byte / 16) + byte % 4; }
int lane_vector(int byte) { return byte % 16 / 4; }

void pack_panel_group(Type type, const uint8_t* src, int rows, int cols, const int32_t* order, int group, uint8_t* dst) {
  const size_t stride = gguf_row_bytes(type, cols);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int r = group * kLanes + lane;
    const uint8_t* row = r < rows ? src + size_t(order ? order[r] : r) * stride : nullptr;
    if (!is_quantised(type)) {
      const int size = float_size(type);
      for (int c = 0; c < cols; ++c) {
        uint8_t* at = dst + (size_t(c) * kLanes + lane) * size;
        if (row) std::memcpy(at, row + size_t(c) * size, size);
        else std::memset(at, 0, size);
      }
      continue;
    }
    UnpackedRow u(row_buffer().q, row_buffer().scale);
    u.fill(type, row, row ? cols : 0, padded(cols));
    const int bytes = quant_bytes(type, kBlock);  // of one block and row
    const size_t pair_bytes = size_t(2) * kLanes * (bytes + 2);
    for (int b = 0; b < padded(cols) / kBlock; ++b) {
      uint8_t* pair = dst + b / 2 * pair_bytes;
      uint8_t* quants = pair + b % 2 * kLanes * bytes;
      const uint8_t* q = u.q + b * kBlock;
      for (int s = 0; s < bytes / 4; ++s)
        for (int k = 0; k < 4; ++k)
          quants[s * 64 + lane * 4 + k] = type == Type::Q4_0 ? nibbles(q[4 * s + k], q[4 * s + 16 + k]) : q[4 * s + k];
      std::memcpy(pair + 2 * kLanes * bytes + (b % 2 * kLanes + lane) * 2, &u.scale[b], 2);
    }
  }
}

}  // namespace

size_t gguf_row_bytes(Type type, int n) {
  return is_quantised(type) ? size_t(n / kBlock) * gguf_block(type) : size_t(n) * float_size(type);
}

size_t panel_group_bytes(Type type, int cols) {
  if (!is_quantised(type)) return size_t(cols) * kLanes * float_size(type);
  return size_t(kLanes) * (quant_bytes(type, padded(cols)) + padded(cols) / kBlock * 2);
}

size_t panel_bytes(Type type, int rows, int cols) {
  return size_t(round_up(rows, kLanes) / kLanes) * panel_group_bytes(type, cols);
}

void pack_panel(Type type, const uint8_t* src, int rows, int cols, const int32_t* order, int first, int last, uint8_t* dst) {
  const size_t bytes = panel_group_bytes(type, cols);
  for (int g = first / kLanes; g < round_up(last, kLanes) / kLanes; ++g)
    pack_panel_group(type, src, rows, cols, order, g, dst + g * bytes);
}

void panel_row(Type type, const uint8_t* panel, int cols, int row, float* out) {
  const uint8_t* group = panel + row / kLanes * panel_group_bytes(type, cols);
  const int lane = row % kLanes;
  if (!is_quantised(type)) {
    const int size = float_size(type);
    for (int c = 0; c < cols; ++c) {
      uint32_t bits = 0;
      std::memcpy(&bits, group + (size_t(c) * kLanes + lane) * size, size);
      out[c] = type == Type::F32 ? std::bit_cast<float>(bits) : type == Type::F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
    }
    return;
  }
  const int bytes = quant_bytes(type, kBlock);
  for (int c = 0; c < cols; ++c) {
    const int b = c / kBlock, i = c % kBlock;
    const uint8_t* pair = group + size_t(b / 2) * 2 * kLanes * (bytes + 2);
    const uint8_t* quants = pair + b % 2 * kLanes * bytes;
    uint16_t scale;
    std::memcpy(&scale, pair + 2 * kLanes * bytes + (b % 2 * kLanes + lane) * 2, 2);
    const int j = type == Type::Q4_0 ? i % 16 : i;
    const uint8_t byte = quants[j / 4 * 64 + lane * 4 + j % 4];
    const int q = type == Type::Q8_0 ? byte - 128 : (i < 16 ? byte & 15 : byte >> 4) - 8;
    out[c] = f16_to_f32(scale) * float(q);
  }
}

size_t row_bytes(Type type, int n) {
  if (!is_quantised(type)) return size_t(round_up(n, kLanes)) * float_size(type);
  return quant_bytes(type, padded(n)) + padded(n) / kBlock * 2;
}

size_t down_bytes(Type type, int n) {
  if (!is_quantised(type)) return size_t(round_up(n, 64)) * float_size(type);
  const int width = round_up(n, 128);
  return quant_bytes(type, width) + width / kBlock * 2;
}

void pack_row(Type type, const uint8_t* src, int n, uint8_t* dst) {
  if (!is_quantised(type)) {
    std::memset(dst, 0, row_bytes(type, n));
    std::memcpy(dst, src, gguf_row_bytes(type, n));
    return;
  }
  const int width = padded(n), blocks = width / kBlock, grouped = blocks / kLanes * kLanes;
  UnpackedRow u(row_buffer().q, row_buffer().scale);
  u.fill(type, src, n, width);
  const int steps = quant_bytes(type, kBlock) / 4;  // dwords per block
  for (int b = 0; b < grouped; ++b) {
    uint8_t* group = dst + row_quants_at(type, b / kLanes * kLanes, blocks);
    const uint8_t* q = u.q + b * kBlock;
    for (int s = 0; s < steps; ++s)
      for (int k = 0; k < 4; ++k)
        group[s * 64 + b % kLanes * 4 + k] = type == Type::Q4_0 ? nibbles(q[4 * s + k], q[4 * s + 16 + k]) : q[4 * s + k];
  }
  for (int b = grouped; b < blocks; b += 2) {
    uint8_t* pair = dst + row_quants_at(type, b, blocks);
    const uint8_t* q = u.q + b * kBlock;
    if (type == Type::Q8_0) std::memcpy(pair, q, 64);
    else for (int i = 0; i < kBlock; ++i) pair[i] = nibbles(q[i], q[i + kBlock]);
  }
  pack_row_scales(type, u.scale, blocks, dst);
}

void pack_down(Type type, const uint8_t* src, int n, uint8_t* dst) {
  if (!is_quantised(type)) {
    std::memset(dst, 0, down_bytes(type, n));
    std::memcpy(dst, src, gguf_row_bytes(type, n));
    return;
  }
  const int width = round_up(n, 128);
  UnpackedRow u(row_buffer().q, row_buffer().scale);
  u.fill(type, src, n, width);
  const int chunk = type == Type::Q4_0 ? 128 : 64;  // outputs in 64 bytes
  for (int c = 0; c < width / chunk; ++c) {
    uint8_t* to = dst + row_quants_at(type, c * chunk / kBlock, width / kBlock);
    const uint8_t* q = u.q + c * chunk;
    for (int byte = 0; byte < 64; ++byte) {
      const int r = lane_vector(byte), o = lane_output(byte);
      to[byte] = type == Type::Q4_0 ? nibbles(q[32 * r + o], q[32 * r + 16 + o]) : q[16 * r + o];
    }
  }
  pack_row_scales(type, u.scale, width / kBlock, dst);
}

}  // namespace hotcold

#include "layout.h"

#include <bit>
#include <cstring>

#include "half.h"

namespace hotcold {
namespace {

constexpr int kGgufQ4 = 18, kGgufQ8 = 34;  // bytes of a GGUF block: f16 scale, then the quants

int gguf_block(Type type) { return type == Type::Q4_0 ? kGgufQ4 : kGgufQ8; }

// Four quants-bytes of a GGUF block, or of a block of zeros where there is none. Q4_0 stays as it is: byte j holds the
// weights j and j + 16, which is what panels and gate rows want.
uint32_t block_dword(Type type, const uint8_t* block, int step) {
  const uint32_t sign = type == Type::Q8_0 ? 0x80808080 : 0;
  if (!block) return type == Type::Q4_0 ? 0x88888888 : sign;
  uint32_t v;
  std::memcpy(&v, block + 2 + 4 * step, 4);
  return v ^ sign;
}

uint16_t block_scale(const uint8_t* block) {
  uint16_t scale = 0;
  if (block) std::memcpy(&scale, block, 2);
  return scale;
}

// A GGUF block, or one of zeros, as 32 unsigned bytes: 0..15 for Q4_0, weight + 128 for Q8_0.
void unpack_block(Type type, const uint8_t* block, uint8_t out[kBlock]) {
  for (int i = 0; i < kBlock; ++i) {
    const int j = type == Type::Q4_0 ? i % 16 : i, byte = block_dword(type, block, j / 4) >> (j % 4 * 8) & 255;
    out[i] = uint8_t(type == Type::Q8_0 ? byte : i < 16 ? byte & 15 : byte >> 4);
  }
}

uint8_t nibbles(uint8_t low, uint8_t high) { return uint8_t(low | high << 4); }

void pack_panel_group(Type type, const uint8_t* src, int rows, int cols, const int32_t* order, int group, uint8_t* dst) {
  const size_t stride = gguf_row_bytes(type, cols);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int r = group * kLanes + lane;
    const uint8_t* row = r < rows ? src + size_t(order ? order[r] : r) * stride : nullptr;
    if (!is_quantized(type)) {
      const int size = float_size(type);
      for (int c = 0; c < cols; ++c) {
        uint8_t* at = dst + (size_t(c) * kLanes + lane) * size;
        if (row) std::memcpy(at, row + size_t(c) * size, size);
        else std::memset(at, 0, size);
      }
      continue;
    }
    const int bytes = quant_bytes(type, kBlock);  // of one block and row
    const size_t pair_bytes = size_t(2) * kLanes * (bytes + 2);
    for (int b = 0; b < padded(cols) / kBlock; ++b) {
      uint8_t* pair = dst + b / 2 * pair_bytes;
      uint8_t* quants = pair + b % 2 * kLanes * bytes;
      const uint8_t* block = row && b < cols / kBlock ? row + b * gguf_block(type) : nullptr;
      for (int s = 0; s < bytes / 4; ++s) {
        const uint32_t dword = block_dword(type, block, s);
        std::memcpy(quants + s * 64 + lane * 4, &dword, 4);
      }
      const uint16_t scale = block_scale(block);
      std::memcpy(pair + 2 * kLanes * bytes + (b % 2 * kLanes + lane) * 2, &scale, 2);
    }
  }
}

}  // namespace

size_t gguf_row_bytes(Type type, int n) {
  return is_quantized(type) ? size_t(n / kBlock) * gguf_block(type) : size_t(n) * float_size(type);
}

size_t panel_group_bytes(Type type, int cols) {
  if (!is_quantized(type)) return size_t(cols) * kLanes * float_size(type);
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
  if (!is_quantized(type)) {
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
  if (!is_quantized(type)) return size_t(round_up(n, kLanes)) * float_size(type);
  return quant_bytes(type, padded(n)) + padded(n) / kBlock * 2;
}

size_t down_bytes(Type type, int n) {
  if (!is_quantized(type)) return size_t(round_up(n, 64)) * float_size(type);
  const int width = round_up(n, 128);
  return quant_bytes(type, width) + width / kBlock * 2;
}

void pack_row(Type type, const uint8_t* src, int n, uint8_t* dst) {
  if (!is_quantized(type)) {
    std::memset(dst, 0, row_bytes(type, n));
    std::memcpy(dst, src, gguf_row_bytes(type, n));
    return;
  }
  const int blocks = padded(n) / kBlock, grouped = blocks / kLanes * kLanes;
  const int steps = quant_bytes(type, kBlock) / 4;  // dwords per block
  const auto source = [&](int b) { return b < n / kBlock ? src + b * gguf_block(type) : nullptr; };
  for (int b = 0; b < blocks; ++b) {
    const uint16_t scale = block_scale(source(b));
    std::memcpy(dst + row_scale_at(type, b), &scale, 2);
  }
  for (int b = 0; b < grouped; ++b) {
    uint8_t* group = dst + row_quants_at(type, b / kLanes * kLanes, blocks);
    for (int s = 0; s < steps; ++s) {
      const uint32_t dword = block_dword(type, source(b), s);
      std::memcpy(group + s * 64 + b % kLanes * 4, &dword, 4);
    }
  }
  for (int b = grouped; b < blocks; b += 2) {
    uint8_t q[2 * kBlock], *pair = dst + row_quants_at(type, b, blocks);
    unpack_block(type, source(b), q);
    unpack_block(type, source(b + 1), q + kBlock);
    if (type == Type::Q8_0) std::memcpy(pair, q, sizeof q);
    else for (int i = 0; i < kBlock; ++i) pair[i] = nibbles(q[i], q[i + kBlock]);
  }
}

void pack_down(Type type, const uint8_t* src, int n, uint8_t* dst) {
  if (!is_quantized(type)) {
    std::memset(dst, 0, down_bytes(type, n));
    std::memcpy(dst, src, gguf_row_bytes(type, n));
    return;
  }
  const int blocks = round_up(n, 128) / kBlock, per_chunk = type == Type::Q4_0 ? 4 : 2;  // blocks in 64 bytes
  const auto source = [&](int b) { return b < n / kBlock ? src + b * gguf_block(type) : nullptr; };
  // 128-bit lane l, dword r of a chunk: four outputs of the interleaved vector r (see b_interleave4).
  for (int b = 0; b < blocks; b += per_chunk)
    for (int i = 0; i < 16; ++i) {
      const int l = i / 4, r = i % 4;
      const uint32_t dword = type == Type::Q4_0 ? block_dword(type, source(b + r), l)
                                                : block_dword(type, source(b + r / 2), r % 2 * 4 + l);
      std::memcpy(dst + row_quants_at(type, b, blocks) + 4 * i, &dword, 4);
    }
  for (int b = 0; b < blocks; ++b) {
    const uint16_t scale = block_scale(source(b));
    std::memcpy(dst + row_scale_at(type, b), &scale, 2);
  }
}

}  // namespace hotcold

#include "model.h"

#include <algorithm>

#include "buffers.h"

namespace hotcold {

Model::Model(const Config& c, int threads, size_t weight_bytes, const Kernels& kernels)
    : config(c), k(kernels), layers(c.n_layers), team(threads), arena_(weight_bytes) {}

Model::~Model() = default;

Panel Model::add_panel(Type type, const uint8_t* src, int rows, int cols, const int32_t* order) {
  uint8_t* data = arena_.take(panel_bytes(type, rows, cols));
  team.run([&](int thread) {
    const Range r = split(rows, thread, team.size(), kLanes);
    pack_panel(type, src, rows, cols, order, r.first, r.last, data);
  });
  return {type, rows, cols, data};
}

InputRows Model::add_input_rows(int inputs, const std::vector<InputPart>& parts) {
  InputRows rows;
  rows.inputs = inputs;
  for (const InputPart& part : parts) {
    const size_t bytes = down_bytes(part.type, part.outputs);
    rows.parts.push_back({{part.type, rows.bytes, bytes}, part.outputs, rows.width()});
    rows.bytes += bytes;
  }
  rows.stride = (rows.bytes + 63) / 64 * 64;
  uint8_t* data = arena_.take(rows.stride * inputs);
  team.run([&](int thread) {
    const Range r = split(inputs, thread, team.size());
    for (int i = r.first; i < r.last; ++i)
      for (size_t p = 0; p < parts.size(); ++p)
        pack_down(parts[p].type, parts[p].data + i * gguf_row_bytes(parts[p].type, parts[p].outputs), parts[p].outputs,
                  data + i * rows.stride + rows.parts[p].row.at);
  });
  rows.data = data;
  return rows;
}

void Model::add_bundles(Layer& layer, const uint8_t* gate, Type gate_type, const uint8_t* up, Type up_type,
                        const uint8_t* down, Type down_type) {
  add_neurons(layer, config.d_ff, gate, gate_type, up, up_type, down, down_type);
}

void Model::add_neurons(Layer& layer, int rows, const uint8_t* gate, Type gate_type, const uint8_t* up, Type up_type,
                        const uint8_t* down, Type down_type) {
  const int n = config.d_model;
  layer.gate_row = {gate_type, 0, gate ? row_bytes(gate_type, n) : 0};
  layer.up_row = {up_type, layer.gate_row.bytes, up ? row_bytes(up_type, n) : 0};
  layer.down_row = {down_type, layer.up_row.at + layer.up_row.bytes, down_bytes(down_type, n)};
  layer.bundle_stride = (layer.down_row.at + layer.down_row.bytes + 63) / 64 * 64;
  uint8_t* data = arena_.take(layer.bundle_stride * rows);
  team.run([&](int thread) {
    const Range r = split(rows, thread, team.size());
    for (int i = r.first; i < r.last; ++i) {
      uint8_t* bundle = data + size_t(i) * layer.bundle_stride;
      if (gate) pack_row(gate_type, gate + i * gguf_row_bytes(gate_type, n), n, bundle);
      if (up) pack_row(up_type, up + i * gguf_row_bytes(up_type, n), n, bundle + layer.up_row.at);
      pack_down(down_type, down + i * gguf_row_bytes(down_type, n), n, bundle + layer.down_row.at);
    }
  });
  layer.bundles = data;
}

Model::Buffers& Model::buffers(int positions) const {
  if (!buffers_) {
    int rank = 1, width = 0;
    for (const Layer& l : layers) {
      rank = std::max(rank, l.fc1.rows);
      for (const InputSite& site : l.inputs) width = std::max(width, site.rows.width());
    }
    buffers_ = std::make_unique<Buffers>(config, team.size(), rank, width);
  }
  buffers_->reserve_scores(config, positions);
  return *buffers_;
}

}  // namespace hotcold

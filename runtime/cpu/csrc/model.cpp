#include "model.h"

#include <algorithm>
#include <cstring>

#include "buffers.h"
#include "pass.h"

namespace hotcold {

Model::Model(const Config& c, int threads, size_t weight_bytes, const Kernels& kernels)
    : config(c), k(kernels), team(threads), layers(c.n_layers), arena_(weight_bytes), total_(c.n_layers) {}

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

Model::Buffers& Model::buffers() {
  if (!buffers_) {
    int rank = 1, width = 0;
    for (const Layer& l : layers) {
      rank = std::max(rank, l.fc1.rows);
      for (const InputSite& site : l.inputs) width = std::max(width, site.rows.width());
    }
    buffers_ = std::make_unique<Buffers>(config, team.size(), rank, width);
  }
  return *buffers_;
}

void Model::forward(const int32_t* tokens, int n, bool all_logits, float* logits) {
  buffers();
  for (int done = 0; done < n;) {
    const int block = std::min(kMaxBlock, n - done);
    const int wanted = all_logits ? block : done + block == n ? 1 : 0;
    Pass pass{*this, *buffers_, tokens + done, block, position, wanted};
    pass.prepare();
    team.run([&](int thread) { pass.run(thread); });
    const size_t stride = round_up(config.n_vocab, kLanes);
    for (int i = 0; i < wanted; ++i)
      std::memcpy(logits + size_t(all_logits ? done + i : 0) * config.n_vocab, &buffers_->logits[i * stride],
                  config.n_vocab * sizeof(float));
    done += block;
    position += block;
    tokens_run += block;
  }
}

const std::vector<LayerStats>& Model::stats() {
  std::fill(total_.begin(), total_.end(), LayerStats{});
  if (!buffers_) return total_;
  for (const auto& scratch : buffers_->scratch)
    for (int l = 0; l < config.n_layers; ++l) {
      total_[l].fired += scratch->stats[l].fired;
      total_[l].predicted += scratch->stats[l].predicted;
      total_[l].missed += scratch->stats[l].missed;
    }
  return total_;
}

std::array<InputStats, kSites> Model::input_stats() const {
  std::array<InputStats, kSites> total{};
  if (!buffers_) return total;
  for (const auto& scratch : buffers_->scratch)
    for (int i = 0; i < kSites; ++i) {
      total[i].bytes += scratch->inputs_read[i].bytes;
      total[i].seen += scratch->inputs_read[i].seen;
      total[i].kept += scratch->inputs_read[i].kept;
    }
  return total;
}

void Model::reset_stats() {
  tokens_run = 0;
  if (!buffers_) return;
  for (auto& scratch : buffers_->scratch) {
    std::fill(scratch->stats.begin(), scratch->stats.end(), LayerStats{});
    scratch->inputs_read = {};
  }
}

}  // namespace hotcold

// The feed-forward layers: dense, or over the rows of the neurons that fire.
#include <algorithm>
#include <bit>
#include <cfloat>

#include "pass.h"
#include "rows.h"

namespace hotcold {

void Pass::ffn(int thread, int l) {
  const Layer& layer = m.layers[l];
  Stream& s = stream(thread);
  const Acts &x = s.x.acts, &norm = s.norm.acts;
  each_token(thread, [&](int t) {
    norm_token(thread, t, layer.ffn_norm, t);
    leave_out_inputs(thread, l, Site::GateUp, norm, t);
    if (c().mode != Mode::Dense) m.k.arrange(norm, t, prefetches(thread));
    if (c().mode == Mode::Predicted && !layer.predictor_normed) m.k.quantize(x, t, 0, x.blocks(), prefetches(thread));
  });
  if (c().mode == Mode::Dense) return ffn_dense(thread, l);
  if (c().mode == Mode::Exact) list_fired(thread, l);
  else list_predicted(thread, l);
  m.team.barrier();
  ffn_rows(thread, l);
  if (seq.audit() && c().mode == Mode::Predicted) count_missed(thread, l);
  prefetch(thread, after(l));
  m.team.barrier();
  const int stride = round_up(c().d_model, 128);
  each_token(thread, [&](int t) {
    for (const auto& other : b.scratch) m.k.add(x.f + size_t(t) * x.width, &other->y[size_t(t) * stride], c().d_model);
    if (!layer.down_bias.empty()) m.k.add(x.f + size_t(t) * x.width, layer.down_bias.data(), c().d_model);
  });
}

// The panel that is multiplied after the FFN of layer l.
const Panel& Pass::after(int l) const { return l + 1 < c().n_layers ? m.layers[l + 1].q : m.head; }

void Pass::ffn_dense(int thread, int l) {
  const Layer& layer = m.layers[l];
  Stream& s = stream(thread);
  const Acts& a = b.intermediate.acts;
  const int stride = Model::Buffers::ff_stride(c()), per_block = kBlock / kLanes;
  const Range blocks = split(round_up(c().d_ff, kBlock) / kBlock, thread, threads());
  const int groups = round_up(c().d_ff, kLanes) / kLanes;
  const int first = blocks.first * per_block, last = std::min(blocks.last * per_block, groups);
  if (input_rows(l, Site::GateUp).data) {
    const Outputs gate_up[] = {{b.gate.get(), stride}, {b.up.get(), stride}};
    multiply_inputs(thread, l, Site::GateUp, s.norm.acts, gate_up);
    m.team.barrier();
  } else {
    m.k.panel(layer.gate.type, layer.gate.data, c().d_model, first, last, s.norm.acts, n, b.gate.get(), stride);
    if (c().gated) m.k.panel(layer.up.type, layer.up.data, c().d_model, first, last, s.norm.acts, n, b.up.get(), stride);
  }
  add_bias(layer.gate_bias, first, last);
  const int from = first * kLanes, to = std::max(from, std::min(last * kLanes, c().d_ff));
  const Thresholds thresholds = layer.thresholds().from(from);
  LayerStats& stats = counts(thread).layers[l];
  prefetch(thread, layer.down);
  int64_t fired = 0;
  for (int t = 0; t < n; ++t) {
    float *gate = &b.gate[size_t(t) * stride], *up = &b.up[size_t(t) * stride];
    fired += m.k.activate(c().rule, gate + from, up + from, thresholds, to - from);
    std::copy(gate + from, gate + last * kLanes, a.f + size_t(t) * a.width + from);
    if (leaves_out(l, Site::Down)) leave_out_inputs(thread, l, Site::Down, a, t, from, to, true);
    m.k.quantize(a, t, blocks.first, blocks.last, prefetches(thread));
  }
  stats.fired += fired;
  stats.predicted += int64_t(n) * (to - from);  // every neuron is computed here
  m.team.barrier();
  const int out_stride = round_up(c().d_model, kLanes);
  const Outputs down{b.out.get(), out_stride};
  if (input_rows(l, Site::Down).data) multiply_inputs(thread, l, Site::Down, a, &down);
  else multiply(thread, layer.down, a, b.out.get(), out_stride);
  prefetch(thread, after(l));
  m.team.barrier();
  add_to_stream(thread, b.out.get(), out_stride, layer.down_bias);
}

// Adds a bias to the gates or scores of the row groups [first, last), all tokens.
void Pass::add_bias(const std::vector<float>& bias, int first, int last) {
  if (bias.empty()) return;
  const int from = first * kLanes, count = (last - first) * kLanes;
  for (int t = 0; t < n; ++t) m.k.add(&b.gate[size_t(t) * Model::Buffers::ff_stride(c()) + from], &bias[from], count);
}

// Lists the neurons of one group of 16 that fire, or whose score reaches the threshold, for any token, and for which. Gates of
// exact mode become values. `always` and, for
// the first token of the block, `always_first` are bits of neurons that are listed whatever their score.
void Pass::list_group(ThreadScratch& s, const Layer& layer, int first, uint32_t always, uint32_t always_first) {
  const int stride = Model::Buffers::ff_stride(c());
  float* scores = &b.gate[first];
  const Thresholds thresholds = layer.thresholds().from(first);
  const auto wanted = [&](int t) {
    float* here = scores + size_t(t) * stride;
    return c().mode == Mode::Predicted ? m.k.at_least(here, layer.predictor_threshold) : m.k.fires(c().rule, here, thresholds);
  };
  const uint32_t valid = first + kLanes <= c().d_ff ? 0xFFFF : (1u << (c().d_ff - first)) - 1;
  if (n == 1) {
    uint32_t on = (wanted(0) | always | always_first) & valid;
    if (seq.audit())
      for (int i = 0; i < kLanes; ++i) b.masks[first + i] = on >> i & 1;
    for (; on; on &= on - 1) s.list[s.listed++] = first + std::countr_zero(on);
    return;
  }
  uint64_t masks[kLanes] = {};
  uint32_t any = 0;
  for (int t = 0; t < n; ++t) {
    uint32_t on = (wanted(t) | always | (t ? 0 : always_first)) & valid;
    any |= on;
    for (; on; on &= on - 1) masks[std::countr_zero(on)] |= uint64_t(1) << t;
  }
  std::copy(masks, masks + kLanes, &b.masks[first]);
  for (; any; any &= any - 1) s.list[s.listed++] = first + std::countr_zero(any);
}

void Pass::list_fired(int thread, int l) {
  const Layer& layer = m.layers[l];
  list_neurons(thread, l, layer.gate, stream(thread).norm.acts);
  const Range groups = split(round_up(c().d_ff, kLanes) / kLanes, thread, threads());
  const int mine = std::min(groups.last * kLanes, c().d_ff) - std::min(groups.first * kLanes, c().d_ff);
  counts(thread).layers[l].predicted += int64_t(n) * mine;  // no neuron is left out unseen
}

void Pass::list_predicted(int thread, int l) {
  const Layer& layer = m.layers[l];
  Stream& st = stream(thread);
  const Acts& hidden = st.hidden.acts;
  const int rank = layer.fc1.rows, hidden_stride = round_up(rank, kLanes);
  multiply(thread, layer.fc1, layer.predictor_normed ? st.norm.acts : st.x.acts, b.hidden.get(), hidden_stride);
  prefetch(thread, layer.fc2);
  m.team.barrier();
  const float least = layer.predictor_relu ? 0.0f : -FLT_MAX;
  each_token(thread, [&](int t) {
    for (int i = 0; i < rank; ++i) hidden.f[size_t(t) * hidden.width + i] = std::max(b.hidden[size_t(t) * hidden_stride + i], least);
    m.k.quantize(hidden, t, 0, hidden.blocks(), prefetches(thread));
  });
  list_neurons(thread, l, layer.fc2, hidden);
}

// Lists this thread's neurons whose gates fire, or whose logits of the predictor reach its threshold.
void Pass::list_neurons(int thread, int l, const Panel& panel, const Acts& acts) {
  const Layer& layer = m.layers[l];
  const bool predicted = c().mode == Mode::Predicted;
  ThreadScratch& s = *b.scratch[thread];
  const int stride = Model::Buffers::ff_stride(c());
  // The first token of a context becomes the attention sink of all others (arXiv 2402.17762): a neuron missed there
  // costs every later token, and computing all of it costs one token.
  const uint32_t sink = predicted && position == 0 ? 0xFFFF : 0;
  const Range groups = split(round_up(c().d_ff, kLanes) / kLanes, thread, threads());
  s.listed = 0;
  if (!predicted && input_rows(l, Site::GateUp).data) {
    const Outputs gates{b.gate.get(), stride};
    multiply_inputs(thread, l, Site::GateUp, acts, &gates);
    m.team.barrier();
  } else {
    m.k.panel(panel.type, panel.data, panel.cols, groups.first, groups.last, acts, n, b.gate.get(), stride);
  }
  add_bias(predicted ? layer.fc2_bias : layer.gate_bias, groups.first, groups.last);
  for (int g = groups.first; g < groups.last; ++g)
    list_group(s, layer, g * kLanes, predicted && !layer.hot.empty() ? layer.hot[g] : 0, sink);
}

void Pass::ffn_rows(int thread, int l) {
  Counts& sum = counts(thread);
  LayerStats& stats = sum.layers[l];
  const LayerStats found = work_rows(m, b, thread, m.layers[l], stream(thread).norm.acts, n, position, sum.site(Site::Down));
  stats.fired += found.fired;
  stats.predicted += found.predicted;
}

// Computes the gates that the predictor left out, only to count those that would have fired.
void Pass::count_missed(int thread, int l) {
  const Layer& layer = m.layers[l];
  const uint64_t all = n == 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
  const Range r = split(c().d_ff, thread, threads());
  for (int neuron = r.first; neuron < r.last; ++neuron) {
    int tokens[kMaxBlock];
    float gate[kMaxBlock];
    Prefetches none;
    const int count = set_bits(all & ~b.masks[neuron], tokens);
    const uint8_t* row = layer.bundle(neuron) + layer.gate_row.at;
    m.k.row_dot(layer.gate_row.type, &row, 1, stream(thread).norm.acts, tokens, count, gate, none);
    const float bias = layer.gate_bias.empty() ? 0 : layer.gate_bias[neuron], threshold = layer.thresholds()[neuron];
    for (int j = 0; j < count; ++j) {
      gate[j] += bias;
      counts(thread).layers[l].missed += fire(c().rule, gate[j], threshold);
    }
  }
}

}  // namespace hotcold

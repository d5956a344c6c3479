// The feed-forward layers: dense, or over the rows of the neurons that fire.
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>

#include "pass.h"

namespace hotcold {
namespace {

constexpr int kListed = 4;  // row groups whose scores are computed before their neurons are listed
constexpr size_t kEarly = 256 << 10;  // bytes of rows that a thread asks for while it still lists; L2 holds them
constexpr int kChunk = 64;  // neurons worked on together; their rows fit the L2 cache
constexpr int kSide = 4;    // gate rows computed side by side, after which the ups of those that fire are asked for

// ReLU passes what is positive, FATReLU what reaches its threshold.
float firing_threshold(const Layer& layer) { return std::max(layer.activation_threshold, FLT_MIN); }

// gate = gelu(gate) * up, the exact GELU. Plain C++: such a model runs in dense mode only.
void gelu_mul(float* gate, const float* up, int n) {
  for (int i = 0; i < n; ++i) gate[i] = 0.5f * gate[i] * (1 + std::erf(gate[i] * 0.70710678f)) * up[i];
}

int set_bits(uint64_t mask, int* out) {
  int n = 0;
  for (; mask; mask &= mask - 1) out[n++] = std::countr_zero(mask);
  return n;
}

// Walks over this thread's even share of all threads' lists, as if they were one.
class Share {
 public:
  Share(const std::vector<std::unique_ptr<ThreadScratch>>& all, int thread) : all_(all) {
    int total = 0;
    for (const auto& s : all) total += s->listed;
    const Range r = split(total, thread, int(all.size()));
    left_ = r.last - r.first;
    for (at_ = r.first; left_ && at_ >= all_[list_]->listed; ++list_) at_ -= all_[list_]->listed;
  }
  // Copies up to kChunk neurons; returns how many.
  int take(int* neurons) {
    int n = 0;
    for (; n < kChunk && left_; --left_, ++n) {
      while (at_ == all_[list_]->listed) ++list_, at_ = 0;
      neurons[n] = all_[list_]->list[at_++];
    }
    return n;
  }

 private:
  const std::vector<std::unique_ptr<ThreadScratch>>& all_;
  int list_ = 0, at_ = 0, left_ = 0;
};

// The neurons of a chunk that fired, with the tokens they fired for: those of neuron f are [begin[f], begin[f + 1]).
struct Fired {
  int count = 0;
  int neuron[kChunk], begin[kChunk + 1] = {};
  int token[kChunk * kMaxBlock];
  float a[kChunk * kMaxBlock];  // act(gate), then times up

  int end() const { return begin[count]; }
  // Closes a neuron whose tokens were written from end() on.
  void close(int n, int tokens) {
    neuron[count] = n;
    begin[count + 1] = begin[count] + tokens;
    ++count;
  }
};

}  // namespace

void Pass::ffn(int thread, int l) {
  const Layer& layer = m.layers[l];
  Stream& s = stream(thread);
  const Acts &x = s.x.acts, &norm = s.norm.acts;
  each_token(thread, [&](int t) {
    norm_token(s, t, layer.ffn_norm, t);
    if (c().mode != Mode::Dense) m.k.arrange(norm, t);
    if (c().mode == Mode::Predicted) m.k.quantise(x, t, 0, x.blocks());
  });
  if (c().mode == Mode::Dense) return ffn_dense(thread, l);
  if (c().mode == Mode::Exact) list_fired(thread, l);
  else list_predicted(thread, l);
  m.team.barrier();
  ffn_rows(thread, l);
  if (m.audit && c().mode == Mode::Predicted) count_missed(thread, l);
  ask_for(thread, after(l));
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
  m.k.panel(layer.gate.type, layer.gate.data, c().d_model, first, last, s.norm.acts, n, b.gate.get(), stride, b.scratch[thread]->asks);
  if (c().gated) m.k.panel(layer.up.type, layer.up.data, c().d_model, first, last, s.norm.acts, n, b.up.get(), stride, b.scratch[thread]->asks);
  add_gate_bias(layer, first, last);
  const float threshold = firing_threshold(layer);
  LayerStats& stats = b.scratch[thread]->stats[l];
  int64_t fired = 0;
  for (int t = 0; t < n; ++t) {
    float *gate = &b.gate[size_t(t) * stride], *up = &b.up[size_t(t) * stride];
    const int from = first * kLanes, to = last * kLanes;
    if (c().activation == Activation::Silu) m.k.silu_mul(gate + from, up + from, to - from);
    else if (c().activation == Activation::Gelu) gelu_mul(gate + from, up + from, to - from);
    else fired += m.k.relu_mul(gate + from, up + from, to - from, threshold, c().activation == Activation::Drelu);
    std::copy(gate + from, gate + to, a.f + size_t(t) * a.width + from);
    m.k.quantise(a, t, blocks.first, blocks.last);
  }
  // SiLU and GELU are never zero: all fire. Every neuron is computed here, which is what `predicted` counts.
  const int64_t all = int64_t(n) * (std::min(last * kLanes, c().d_ff) - std::min(first * kLanes, c().d_ff));
  stats.fired += can_be_zero(c().activation) ? fired : all;
  stats.predicted += all;
  ask_for(thread, layer.down);
  m.team.barrier();
  const int out_stride = round_up(c().d_model, kLanes);
  multiply(thread, layer.down, a, b.out.get(), out_stride);
  ask_for(thread, after(l));
  m.team.barrier();
  add_to_stream(thread, b.out.get(), out_stride, layer.down_bias);
}

// Adds the bias to the gates of the row groups [first, last), all tokens.
void Pass::add_gate_bias(const Layer& layer, int first, int last) {
  if (layer.gate_bias.empty()) return;
  const int from = first * kLanes, count = (last - first) * kLanes;
  for (int t = 0; t < n; ++t) m.k.add(&b.gate[size_t(t) * Model::Buffers::ff_stride(c()) + from], &layer.gate_bias[from], count);
}

// Lists the neurons of one group of 16 whose score reaches the threshold for any token, and for which. `always` and, for
// the first token of the block, `always_first` are bits of neurons that are listed whatever their score.
void Pass::list_group(ThreadScratch& s, int first, const float* scores, int stride, float threshold, uint32_t always,
                      uint32_t always_first) {
  const uint32_t valid = first + kLanes <= c().d_ff ? 0xFFFF : (1u << (c().d_ff - first)) - 1;
  if (n == 1) {
    uint32_t on = (m.k.at_least(scores, threshold) | always | always_first) & valid;
    if (m.audit)
      for (int i = 0; i < kLanes; ++i) b.masks[first + i] = on >> i & 1;
    for (; on; on &= on - 1) s.list[s.listed++] = first + std::countr_zero(on);
    return;
  }
  uint64_t masks[kLanes] = {};
  uint32_t any = 0;
  for (int t = 0; t < n; ++t) {
    uint32_t on = (m.k.at_least(scores + size_t(t) * stride, threshold) | always | (t ? 0 : always_first)) & valid;
    any |= on;
    for (; on; on &= on - 1) masks[std::countr_zero(on)] |= uint64_t(1) << t;
  }
  std::copy(masks, masks + kLanes, &b.masks[first]);
  for (; any; any &= any - 1) s.list[s.listed++] = first + std::countr_zero(any);
}

void Pass::list_fired(int thread, int l) {
  const Layer& layer = m.layers[l];
  list_neurons(thread, l, layer.gate, stream(thread).norm.acts, firing_threshold(layer));
  const Range groups = split(round_up(c().d_ff, kLanes) / kLanes, thread, threads());
  const int mine = std::min(groups.last * kLanes, c().d_ff) - std::min(groups.first * kLanes, c().d_ff);
  b.scratch[thread]->stats[l].predicted += int64_t(n) * mine;  // no neuron is left out unseen
}

void Pass::list_predicted(int thread, int l) {
  const Layer& layer = m.layers[l];
  Stream& st = stream(thread);
  const Acts& hidden = st.hidden.acts;
  const int rank = layer.fc1.rows, hidden_stride = round_up(rank, kLanes);
  multiply(thread, layer.fc1, st.x.acts, b.hidden.get(), hidden_stride);
  ask_for(thread, layer.fc2);
  m.team.barrier();
  each_token(thread, [&](int t) {
    for (int i = 0; i < rank; ++i) hidden.f[size_t(t) * hidden.width + i] = std::max(b.hidden[size_t(t) * hidden_stride + i], 0.0f);
    m.k.quantise(hidden, t, 0, hidden.blocks());
  });
  list_neurons(thread, l, layer.fc2, hidden, layer.predictor_threshold);
}

// Lists this thread's neurons whose scores (gates, or logits of the predictor) reach the threshold. The rows of the first
// ones are asked for while the scores of the others are still computed.
void Pass::list_neurons(int thread, int l, const Panel& panel, const Acts& acts, float threshold) {
  const Layer& layer = m.layers[l];
  const bool predicted = c().mode == Mode::Predicted;
  ThreadScratch& s = *b.scratch[thread];
  const int stride = Model::Buffers::ff_stride(c());
  // The first token of a context becomes the attention sink of all others (arXiv 2402.17762): a neuron missed there
  // costs every later token, and computing all of it costs one token.
  const uint32_t sink = predicted && position == 0 ? 0xFFFF : 0;
  const size_t from = predicted ? layer.gate_row.at : 0, bytes = predicted ? layer.gate_row.bytes : layer.bundle_stride;
  const int early = n == 1 ? int(kEarly / bytes) : 0;
  const Range groups = split(round_up(c().d_ff, kLanes) / kLanes, thread, threads());
  s.listed = s.asked = 0;
  s.asks.clear();
  for (int g0 = groups.first; g0 < groups.last; g0 += kListed) {
    const int g1 = std::min(g0 + kListed, groups.last);
    m.k.panel(panel.type, panel.data, panel.cols, g0, g1, acts, n, b.gate.get(), stride, b.scratch[thread]->asks);
    if (!predicted) add_gate_bias(layer, g0, g1);
    for (int g = g0; g < g1; ++g)
      list_group(s, g * kLanes, &b.gate[g * kLanes], stride, threshold, predicted && !layer.hot.empty() ? layer.hot[g] : 0, sink);
    for (; s.asked < std::min(s.listed, early); ++s.asked) s.asks.add(layer.bundle(s.list[s.asked]) + from, bytes);
  }
}

// This thread's share of the listed neurons, in three phases per chunk - gates, ups, downs - so that every row is asked
// for about one phase before it is used.
class RowWork {
 public:
  RowWork(Model& m, Model::Buffers& b, int thread, const Layer& layer, const Acts& norm, int n)
      : m_(m), b_(b), s_(*b.scratch[thread]), layer_(layer), norm_(norm), n_(n), y_stride_(round_up(m.config.d_model, 128)), asks_(s_.asks) {
    std::memset(s_.y.get(), 0, sizeof(float) * y_stride_ * n);
  }

  LayerStats run(int thread) {
    Share share(b_.scratch, thread);
    int current[kChunk], next[kChunk];
    int n_current = share.take(current);
    while (n_current) {
      fired_.count = 0;
      if (predicted()) gates_by_row(current, n_current);
      else gates_known(current, n_current);
      stats_.fired += fired_.end();
      const bool early = !predicted() && done_ + n_current <= s_.asked;  // in exact mode downs are asked for with ups
      for (int f = 0; f < fired_.count && !early; ++f) ask(fired_.neuron[f], layer_.down_row);
      done_ += n_current;
      const int n_next = share.take(next);
      for (int i = 0; i < n_next; ++i)
        if (done_ + i >= s_.asked) ask(next[i], first_row());
      ups();
      downs();
      std::copy(next, next + n_next, current);
      n_current = n_next;
    }
    for (int t = 0; t < n_; ++t) flush(t);
    return stats_;
  }

 private:
  bool predicted() const { return layer_.gate_row.bytes > 0; }
  const uint8_t* row(int neuron, const RowKind& kind) const { return layer_.bundle(neuron) + kind.at; }
  const RowKind& first_row() const { return predicted() ? layer_.gate_row : layer_.after_gate(); }
  void ask(int neuron, const RowKind& kind) { asks_.add(row(neuron, kind), kind.bytes); }
  int tokens_of(int neuron, int* tokens) const {
    if (n_ > 1) return set_bits(b_.masks[neuron], tokens);
    tokens[0] = 0;
    return 1;
  }

  // Exact mode: only neurons that fired are listed, and their gates were computed before.
  void gates_known(const int* neurons, int count) {
    const int stride = Model::Buffers::ff_stride(m_.config);
    for (int i = 0; i < count; ++i) {
      int* tokens = fired_.token + fired_.end();
      const int n = tokens_of(neurons[i], tokens);
      for (int j = 0; j < n; ++j) fired_.a[fired_.end() + j] = b_.gate[size_t(tokens[j]) * stride + neurons[i]];
      fired_.close(neurons[i], n);
    }
  }

  // Predicted mode: a predicted neuron whose gate does not fire costs this row and no other.
  void gates_by_row(const int* neurons, int count) {
    const uint8_t* rows[kChunk];
    float gate[kSide];
    for (int i = 0; i < count; ++i) rows[i] = row(neurons[i], layer_.gate_row);
    const int zero = 0;
    const float threshold = firing_threshold(layer_);
    for (int i = 0; i < count; ++i) {
      int wanted[kMaxBlock];
      const int n = tokens_of(neurons[i], wanted);
      stats_.predicted += n;
      float many[kMaxBlock];
      if (n_ > 1) m_.k.row_dot(layer_.gate_row.type, rows + i, 1, norm_, wanted, n, many, asks_);
      else if (i % kSide == 0)
        m_.k.row_dot(layer_.gate_row.type, rows + i, std::min(kSide, count - i), norm_, &zero, 1, gate, asks_);
      float* values = n_ == 1 ? gate + i % kSide : many;
      for (int j = 0; j < n && !layer_.gate_bias.empty(); ++j) values[j] += layer_.gate_bias[neurons[i]];
      const int at = fired_.end();
      int kept = 0;
      for (int j = 0; j < n; ++j)
        if (values[j] >= threshold) {
          fired_.a[at + kept] = values[j];
          fired_.token[at + kept++] = wanted[j];
        }
      if (!kept) continue;
      ask(neurons[i], layer_.after_gate());
      fired_.close(neurons[i], kept);
    }
  }

  void ups() {
    if (!m_.config.gated) return;
    const bool clip = m_.config.activation == Activation::Drelu;
    const uint8_t* rows[kChunk];
    float up[kChunk * kMaxBlock];
    for (int f = 0; f < fired_.count; ++f) {
      rows[f] = row(fired_.neuron[f], layer_.up_row);
      const int at = fired_.begin[f];
      if (n_ > 1)
        m_.k.row_dot(layer_.up_row.type, rows + f, 1, norm_, fired_.token + at, fired_.begin[f + 1] - at, up + at, asks_);
    }
    if (n_ == 1) m_.k.row_dot(layer_.up_row.type, rows, fired_.count, norm_, fired_.token, 1, up, asks_);
    for (int i = 0; i < fired_.end(); ++i) fired_.a[i] *= clip ? std::max(up[i], 0.0f) : up[i];
  }

  void downs() {
    for (int f = 0; f < fired_.count; ++f) {
      const uint8_t* down = row(fired_.neuron[f], layer_.down_row);
      for (int i = fired_.begin[f]; i < fired_.begin[f + 1]; ++i) {
        DownQueue& queue = s_.queues[fired_.token[i]];
        queue.row[queue.count] = down;
        queue.a[queue.count] = fired_.a[i];
        if (++queue.count == 16) flush(fired_.token[i]);
      }
    }
  }

  void flush(int t) {
    DownQueue& queue = s_.queues[t];
    if (queue.count)
      m_.k.down(layer_.down_row.type, queue.row, queue.a, queue.count, m_.config.d_model, &s_.y[size_t(t) * y_stride_],
                asks_);
    queue.count = 0;
  }

  Model& m_;
  Model::Buffers& b_;
  ThreadScratch& s_;
  const Layer& layer_;
  const Acts& norm_;
  const int n_, y_stride_;
  int done_ = 0;  // neurons of finished chunks
  LayerStats stats_;
  Fired fired_;
  Asks& asks_;
};

void Pass::ffn_rows(int thread, int l) {
  RowWork work(m, b, thread, m.layers[l], stream(thread).norm.acts, n);
  const LayerStats counts = work.run(thread);
  LayerStats& stats = b.scratch[thread]->stats[l];
  stats.fired += counts.fired;
  stats.predicted += counts.predicted;
}

// Computes the gates that the predictor left out, only to count those that would have fired.
void Pass::count_missed(int thread, int l) {
  const Layer& layer = m.layers[l];
  const uint64_t all = n == 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
  const Range r = split(c().d_ff, thread, threads());
  for (int neuron = r.first; neuron < r.last; ++neuron) {
    int tokens[kMaxBlock];
    float gate[kMaxBlock];
    Asks asks;
    const int count = set_bits(all & ~b.masks[neuron], tokens);
    const uint8_t* row = layer.bundle(neuron) + layer.gate_row.at;
    m.k.row_dot(layer.gate_row.type, &row, 1, stream(thread).norm.acts, tokens, count, gate, asks);
    const float bias = layer.gate_bias.empty() ? 0 : layer.gate_bias[neuron];
    for (int j = 0; j < count; ++j) b.scratch[thread]->stats[l].missed += gate[j] + bias >= firing_threshold(layer);
  }
}

}  // namespace hotcold

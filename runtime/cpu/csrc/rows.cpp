// Neurons in chunks, and each chunk in three phases - gates, ups, downs - so that every row is asked for about one phase
// before it is used. Downs are taken 16 at a time; what remains waits for the next chunk.
#include "rows.h"

#include <cmath>
#include <cstring>

namespace hotcold {
namespace {

constexpr int kChunk = 32;  // neurons worked on together: their rows and the next ones' fit the caches
constexpr int kSide = 4;    // gate rows computed side by side, after which the ups of those that fire wait to be asked for
constexpr int kDowns = 16;  // down rows that the kernel adds up at a time

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

// What both kinds of work share: where rows are, and the walk over chunks.
struct RowWork {
  const Model& m;
  Model::Buffers& b;
  const Layer& layer;
  const Acts& norm;
  ThreadScratch& s;
  int position;             // of the first token
  InputStats& down_inputs;  // counted where has_rule()
  LayerStats stats;

  // Whether a fired neuron's value is large enough for its down row to be read: what its rule for inputs of down says.
  bool has_rule() const { return !layer.site(Site::Down).least.empty(); }
  bool counts(int neuron, float a, int token) const {
    return position + token == 0 || std::abs(a) >= layer.site(Site::Down).least[neuron];
  }

  bool predicted() const { return layer.gate_row.bytes > 0; }
  const uint8_t* row(int neuron, const RowKind& kind) const { return layer.bundle(neuron) + kind.at; }
  const RowKind& first_row() const { return predicted() ? layer.gate_row : layer.after_gate(); }
  void prefetch(int neuron, const RowKind& kind) { s.prefetches.add(row(neuron, kind), kind.bytes); }
  void down(const uint8_t* const* rows, const float* a, int count, int token) {
    m.k.down(layer.down_row.type, rows, a, count, m.config.d_model, &s.y[size_t(token) * round_up(m.config.d_model, 128)], s.prefetches);
  }
};

// One token.
class Single : RowWork {
 public:
  explicit Single(const RowWork& work) : RowWork(work) {}

  LayerStats run(int thread) {
    Share share(b.scratch, thread);
    int current[kChunk], next[kChunk];
    int n = share.take(current);
    // No chunk before the first asks for it; it can ask for what it does not begin with.
    for (int i = kSide; i < n; ++i) prefetch(current[i], first_row());
    s.prefetches.close();
    for (int n_next; n; n = n_next) {
      n_next = share.take(next);
      int fired = predicted() ? compute_gates(current, n) : look_up_gates(current, n);
      for (int f = 0; m.config.gated && !has_rule() && f < fired; ++f) prefetch(fired_[f], layer.down_row);
      for (int i = 0; i < n_next; ++i) prefetch(next[i], first_row());
      s.prefetches.close();
      if (m.config.gated) times_ups(fired);
      if (has_rule()) fired = leave_out(fired);
      add_downs(fired);
      std::copy(next, next + n_next, current);
    }
    if (waiting_) down(down_, a_, waiting_, 0);
    return stats;
  }

 private:
  // Only neurons that fired are listed, and their gates were computed before.
  int look_up_gates(const int* neurons, int n) {
    std::copy(neurons, neurons + n, fired_);
    for (int i = 0; i < n; ++i) a_[waiting_ + i] = b.gate[neurons[i]];
    stats.fired += n;
    return n;
  }

  // A predicted neuron whose gate does not fire costs this row and no other.
  int compute_gates(const int* neurons, int n) {
    const uint8_t* rows[kChunk];
    float gate[kSide];
    for (int i = 0; i < n; ++i) rows[i] = row(neurons[i], layer.gate_row);
    const int zero = 0;
    const Thresholds thresholds = layer.thresholds();
    int fired = 0;
    for (int i = 0; i < n; i += kSide) {
      const int side = std::min(kSide, n - i);
      m.k.row_dot(layer.gate_row.type, rows + i, side, norm, &zero, 1, gate, s.prefetches);
      for (int j = 0; j < side; ++j) {
        const int neuron = neurons[i + j];
        float value = layer.gate_bias.empty() ? gate[j] : gate[j] + layer.gate_bias[neuron];
        if (!fire(m.config.rule, value, thresholds[neuron])) continue;
        prefetch(neuron, layer.after_gate());
        a_[waiting_ + fired] = value;
        fired_[fired++] = neuron;
      }
    }
    stats.predicted += n;
    stats.fired += fired;
    return fired;
  }

  void times_ups(int fired) {
    const uint8_t* rows[kChunk];
    float up[kChunk], *a = a_ + waiting_;
    for (int f = 0; f < fired; ++f) rows[f] = row(fired_[f], layer.up_row);
    const int zero = 0;
    m.k.row_dot(layer.up_row.type, rows, fired, norm, &zero, 1, up, s.prefetches);
    const float least = m.config.rule.clips_up() ? 0.0f : -FLT_MAX;
    for (int f = 0; f < fired; ++f) a[f] *= std::max(up[f], least);
  }

  int leave_out(int fired) {
    float* a = a_ + waiting_;
    int kept = 0;
    for (int f = 0; f < fired; ++f) {
      if (!counts(fired_[f], a[f], 0)) continue;
      prefetch(fired_[f], layer.down_row);
      a[kept] = a[f];
      fired_[kept++] = fired_[f];
    }
    s.prefetches.close();
    down_inputs.kept += kept;
    return kept;
  }

  void add_downs(int fired) {
    for (int f = 0; f < fired; ++f) down_[waiting_ + f] = row(fired_[f], layer.down_row);
    waiting_ += fired;
    int at = 0;
    for (; at + kDowns <= waiting_; at += kDowns) down(down_ + at, a_ + at, kDowns, 0);
    std::copy(down_ + at, down_ + waiting_, down_);
    std::copy(a_ + at, a_ + waiting_, a_);
    waiting_ -= at;
  }

  int fired_[kChunk];
  int waiting_ = 0;  // downs of earlier chunks, at the front of:
  const uint8_t* down_[kDowns + kChunk];
  float a_[kDowns + kChunk];  // values, then times up
};

// The neurons of a chunk that fired, with the tokens they fired for: those of neuron f are [begin[f], begin[f + 1]).
struct Fired {
  int count = 0;
  int neuron[kChunk], begin[kChunk + 1] = {};
  int token[kChunk * kMaxBlock];
  float a[kChunk * kMaxBlock];  // values, then times up

  int end() const { return begin[count]; }
  // Closes a neuron whose tokens were written from end() on.
  void close(int n, int tokens) {
    neuron[count] = n;
    begin[count + 1] = begin[count] + tokens;
    ++count;
  }
};

// Several tokens: a neuron's rows are read once for all tokens that it is listed for.
class Several : RowWork {
 public:
  explicit Several(const RowWork& work) : RowWork(work) {}

  LayerStats run(int thread, int tokens) {
    Share share(b.scratch, thread);
    int current[kChunk], next[kChunk];
    for (int n = share.take(current), n_next; n; n = n_next) {
      fired_.count = 0;
      if (predicted()) compute_gates(current, n);
      else look_up_gates(current, n);
      stats.fired += fired_.end();
      for (int f = 0; m.config.gated && !has_rule() && f < fired_.count; ++f) prefetch(fired_.neuron[f], layer.down_row);
      n_next = share.take(next);
      for (int i = 0; i < n_next; ++i) prefetch(next[i], first_row());
      s.prefetches.close();
      if (m.config.gated) times_ups();
      add_downs();
      std::copy(next, next + n_next, current);
    }
    for (int t = 0; t < tokens; ++t) flush(t);
    return stats;
  }

 private:
  void look_up_gates(const int* neurons, int n) {
    const int stride = Model::Buffers::ff_stride(m.config);
    for (int i = 0; i < n; ++i) {
      int* tokens = fired_.token + fired_.end();
      const int count = set_bits(b.masks[neurons[i]], tokens);
      for (int j = 0; j < count; ++j) fired_.a[fired_.end() + j] = b.gate[size_t(tokens[j]) * stride + neurons[i]];
      fired_.close(neurons[i], count);
    }
  }

  void compute_gates(const int* neurons, int n) {
    const Thresholds thresholds = layer.thresholds();
    for (int i = 0; i < n; ++i) {
      const uint8_t* gate_row = row(neurons[i], layer.gate_row);
      int wanted[kMaxBlock];
      float gate[kMaxBlock];
      const int count = set_bits(b.masks[neurons[i]], wanted), at = fired_.end();
      const float bias = layer.gate_bias.empty() ? 0 : layer.gate_bias[neurons[i]];
      m.k.row_dot(layer.gate_row.type, &gate_row, 1, norm, wanted, count, gate, s.prefetches);
      stats.predicted += count;
      int kept = 0;
      for (int j = 0; j < count; ++j) {
        float value = gate[j] + bias;
        if (!fire(m.config.rule, value, thresholds[neurons[i]])) continue;
        fired_.a[at + kept] = value;
        fired_.token[at + kept++] = wanted[j];
      }
      if (!kept) continue;
      prefetch(neurons[i], layer.after_gate());
      fired_.close(neurons[i], kept);
    }
  }

  void times_ups() {
    const float least = m.config.rule.clips_up() ? 0.0f : -FLT_MAX;
    float up[kMaxBlock];
    for (int f = 0; f < fired_.count; ++f) {
      const uint8_t* up_row = row(fired_.neuron[f], layer.up_row);
      const int at = fired_.begin[f], count = fired_.begin[f + 1] - at;
      m.k.row_dot(layer.up_row.type, &up_row, 1, norm, fired_.token + at, count, up, s.prefetches);
      for (int j = 0; j < count; ++j) fired_.a[at + j] *= std::max(up[j], least);
    }
  }

  void add_downs() {
    for (int f = 0; f < fired_.count; ++f) {
      const uint8_t* down_row = row(fired_.neuron[f], layer.down_row);
      for (int i = fired_.begin[f]; i < fired_.begin[f + 1]; ++i) {
        if (has_rule() && !counts(fired_.neuron[f], fired_.a[i], fired_.token[i])) continue;
        down_inputs.kept += has_rule();
        DownQueue& queue = s.queues[fired_.token[i]];
        queue.row[queue.count] = down_row;
        queue.a[queue.count] = fired_.a[i];
        if (++queue.count == kDowns) flush(fired_.token[i]);
      }
    }
  }

  void flush(int t) {
    DownQueue& queue = s.queues[t];
    if (queue.count) down(queue.row, queue.a, queue.count, t);
    queue.count = 0;
  }

  Fired fired_;
};

}  // namespace

LayerStats work_rows(const Model& m, Model::Buffers& b, int thread, const Layer& layer, const Acts& norm, int n, int position,
                     InputStats& down) {
  ThreadScratch& s = *b.scratch[thread];
  s.prefetches.clear();
  std::memset(s.y.get(), 0, sizeof(float) * round_up(m.config.d_model, 128) * n);
  if (thread == 0 && !layer.site(Site::Down).least.empty()) down.seen += int64_t(n) * m.config.d_ff;
  const RowWork work{m, b, layer, norm, s, position, down, {}};
  return n == 1 ? Single(work).run(thread) : Several(work).run(thread, n);
}

}  // namespace hotcold

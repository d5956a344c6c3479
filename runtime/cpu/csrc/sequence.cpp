#include "sequence.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "buffers.h"
#include "pass.h"

namespace hotcold {

Sequence::Sequence(const Model& m, int n) : model(m), n_ctx(n) {
  for (int t = 0; t < m.team.size(); ++t) counts_.emplace_back(m.config.n_layers);
}

// First of all whether this is a forked process: there a hold may be another thread's that is not here to end it.
Sequence::Hold::Hold(Sequence& s) : s_(s) {
  s.model.team.check_process();
  if (s.held_.test_and_set(std::memory_order_acquire)) throw Busy();
}

void Sequence::cache() {
  if (keys_.get()) return;
  const Config& c = model.config;
  const size_t heads = size_t(c.n_layers) * c.n_kv_heads;
  values_ = Block<uint16_t>(heads * n_ctx * c.head_dim);
  keys_ = Block<uint16_t>(heads * tiles() * c.head_dim * kLanes);
}

void Sequence::forward(const int32_t* tokens, int n, bool all_logits, float* logits) {
  const Use use(*this);
  if (n > n_ctx - position()) throw std::invalid_argument("the context is full");
  Model::Buffers& b = model.buffers(n_ctx);
  cache();
  const int vocab = model.config.n_vocab, stride = round_up(vocab, kLanes);
  for (int done = 0; done < n;) {
    const int block = std::min(kMaxBlock, n - done);
    const int wanted = all_logits ? block : done + block == n ? 1 : 0;
    Pass pass{model, b, *this, tokens + done, block, position(), wanted};
    pass.prepare();
    model.team.run([&](int thread) { pass.run(thread); });
    for (int i = 0; i < wanted; ++i)
      std::memcpy(logits + size_t(all_logits ? done + i : 0) * vocab, &b.logits[size_t(i) * stride], vocab * sizeof(float));
    done += block;
    position_.store(position() + block, std::memory_order_relaxed);
    tokens_run_ += block;
  }
}

void Sequence::set_position(int position) {
  const Hold hold(*this);
  if (position < 0 || position > n_ctx) throw std::invalid_argument("no such position");
  position_.store(position, std::memory_order_relaxed);
}

void Sequence::set_audit(bool on) {
  const Hold hold(*this);
  audit_.store(on, std::memory_order_relaxed);
}

Sequence::Stats Sequence::stats() {
  const Hold hold(*this);
  Stats sum{tokens_run_, std::vector<LayerStats>(model.config.n_layers)};
  for (const Counts& c : counts_) {
    for (int i = 0; i < kSites; ++i) {
      sum.inputs[i].bytes += c.inputs[i].bytes;
      sum.inputs[i].seen += c.inputs[i].seen;
      sum.inputs[i].kept += c.inputs[i].kept;
    }
    for (size_t l = 0; l < sum.layers.size(); ++l) {
      sum.layers[l].fired += c.layers[l].fired;
      sum.layers[l].predicted += c.layers[l].predicted;
      sum.layers[l].missed += c.layers[l].missed;
    }
  }
  return sum;
}

void Sequence::reset_stats() {
  const Hold hold(*this);
  tokens_run_ = 0;
  for (Counts& c : counts_) {
    std::fill_n(c.layers.get(), model.config.n_layers, LayerStats{});
    c.inputs = {};
  }
}

}  // namespace hotcold

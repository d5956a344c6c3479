// Parts of a model: some layers, or some neurons of a layer, for an engine that computes the rest on another device.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "pass.h"

namespace hotcold {

void Pass::run_layers(int thread, int first, int last, float* x) {
  const int d = c().d_model;
  const Acts& stream_x = stream(thread).x.acts;
  if (first < last) prefetch(thread, m.layers[first].q);
  each_token(thread, [&](int t) { std::memcpy(stream_x.f + size_t(t) * stream_x.width, x + size_t(t) * d, d * sizeof(float)); });
  for (int l = first; l < last; ++l) layer(thread, l);
  // One token: every thread has the stream, and the caller's reads nothing before all have finished.
  if (n > 1 || thread == 0)
    each_token(thread, [&](int t) { std::memcpy(x + size_t(t) * d, stream_x.f + size_t(t) * stream_x.width, d * sizeof(float)); });
}

void Pass::run_neurons(int thread, int l, const float* normed, const Neurons& neurons, float* y) {
  const int d = c().d_model;
  const Acts& norm = stream(thread).norm.acts;
  ThreadScratch& mine = *b.scratch[thread];
  const Range share = split(neurons.count, thread, threads());
  std::copy(neurons.index + share.first, neurons.index + share.last, mine.list.get());
  mine.listed = share.last - share.first;
  mine.prefetches.clear();
  if (n > 1)
    for (int i = share.first; i < share.last; ++i) b.masks[neurons.index[i]] = neurons.tokens[i];
  each_token(thread, [&](int t) {
    std::memcpy(norm.f + size_t(t) * norm.width, normed + size_t(t) * d, d * sizeof(float));
    m.k.quantize(norm, t, 0, norm.blocks(), mine.prefetches);
    m.k.arrange(norm, t, mine.prefetches);
  });
  m.team.barrier();
  ffn_rows(thread, l);
  m.team.barrier();
  const int stride = round_up(d, 128);
  const Range outputs = split(d, thread, threads(), kLanes);
  for (int t = 0; t < n; ++t)
    for (int i = outputs.first; i < outputs.last; ++i) {
      float sum = 0;
      for (const auto& scratch : b.scratch) sum += scratch->y[size_t(t) * stride + i];
      y[size_t(t) * d + i] = sum;
    }
}

void Sequence::run_layers(float* x, int n, int first, int last, int first_position) {
  const Use use(*this);
  if (first_position < 0 || first_position + n > n_ctx) throw std::invalid_argument("the context is full");
  Model::Buffers& b = model.buffers(n_ctx);
  cache();
  for (int done = 0; done < n; done += kMaxBlock) {
    const int block = std::min(kMaxBlock, n - done);
    Pass pass{model, b, *this, nullptr, block, first_position + done, 0};
    pass.prepare();
    model.team.run([&](int thread) { pass.run_layers(thread, first, last, x + size_t(done) * model.config.d_model); });
  }
}

int64_t Sequence::run_neurons(int l, const float* normed, int n, const int32_t* index, const uint64_t* tokens, int count,
                              float* y) {
  const Use use(*this);
  const auto fired = [&] {
    int64_t sum = 0;
    for (const Counts& c : counts_) sum += c.layers[l].fired;
    return sum;
  };
  const int64_t before = fired();
  Pass pass{model, model.buffers(0), *this, nullptr, n, 0, 0};
  model.team.run([&](int thread) { pass.run_neurons(thread, l, normed, {index, tokens, count}, y); });
  return fired() - before;
}

}  // namespace hotcold

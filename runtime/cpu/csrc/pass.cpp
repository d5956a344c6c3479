#include "pass.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace hotcold {
namespace {

constexpr size_t kNext = 64 << 10;    // bytes of a panel that are asked for before it is read
constexpr size_t kPiece = 128 << 10;  // bytes of a panel, at least, that are handed from thread to thread

// x [n] -> y = (x - mean) / sqrt(variance + eps) * weight + bias. Not one of the kernels: no Llama has it, and it is a
// thousandth of a layer's work.
void layer_norm(const float* x, const NormWeights& w, int n, float eps, float* y) {
  double sum = 0, squares = 0;
  for (int i = 0; i < n; ++i) sum += x[i];
  const float mean = float(sum / n);
  for (int i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(float(squares / n) + eps);
  for (int i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * w.weight[i] + w.bias[i];
}

}  // namespace

void Pass::prepare() {
  const int half = int(m.rope_frequency.size());
  for (int t = 0; t < n; ++t)
    for (int i = 0; i < half; ++i) {
      const double angle = double(position + t) * m.rope_frequency[i];
      b.cosine[t * half + i] = m.rope_scale * float(std::cos(angle));
      b.sine[t * half + i] = m.rope_scale * float(std::sin(angle));
    }
}

void Pass::run(int thread) {
  prefetch(thread, m.layers[0].q);
  embed(thread);
  for (int l = 0; l < c().n_layers; ++l) layer(thread, l);
  if (wanted) logits(thread);
}

void Pass::layer(int thread, int l) {
  attention(thread, l);
  ffn(thread, l);
  if (c().parallel) add_to_stream(thread, b.attention.get(), round_up(c().d_model, kLanes), m.layers[l].o_bias);
}

void Pass::multiply(int thread, const Panel& p, const Acts& acts, int count, float* out, int stride) {
  prefetches(thread).clear();
  const int least = 1 + int(kPiece / panel_group_bytes(p.type, p.cols));
  m.team.share(thread, round_up(p.rows, kLanes) / kLanes, least, [&](int first, int last) {
    m.k.panel(p.type, p.data, p.cols, first, last, acts, count, out, stride);
  });
}

void Pass::prefetch(int thread, const Panel& p, int unit) const {
  prefetches(thread).clear();
  if (!p.data) return;
  const Range groups = split(round_up(p.rows, kLanes) / kLanes, thread, threads(), unit);
  const size_t group = panel_group_bytes(p.type, p.cols), bytes = std::min(kNext, (groups.last - groups.first) * group);
  prefetches(thread).add_run(p.data + groups.first * group, bytes);
  prefetches(thread).feed(kAhead / 256);
}

void Pass::embed(int thread) {
  Stream& s = stream(thread);
  each_token(thread, [&](int t) {
    float *x = s.x.acts.f + size_t(t) * s.x.acts.width, *learned = s.norm.acts.f + size_t(t) * s.norm.acts.width;
    panel_row(m.embedding.type, m.embedding.data, c().d_model, tokens[t], x);
    if (!m.positions.data) return;
    panel_row(m.positions.type, m.positions.data, c().d_model, position + t, learned);
    m.k.add(x, learned, c().d_model);
  });
}

void Pass::norm_token(int thread, int t, const NormWeights& weights, int to) {
  Stream& s = stream(thread);
  const Acts &x = s.x.acts, &norm = s.norm.acts;
  const float* from = x.f + size_t(t) * x.width;
  float* normed = norm.f + size_t(to) * norm.width;
  if (c().layer_norm) layer_norm(from, weights, c().d_model, c().norm_eps, normed);
  else m.k.rms_norm(from, weights.weight.data(), c().d_model, c().norm_eps, normed, prefetches(thread));
  m.k.quantize(norm, to, 0, norm.blocks(), prefetches(thread));
}

void Pass::add_to_stream(int thread, const float* out, int stride, const std::vector<float>& bias) {
  const Acts& x = stream(thread).x.acts;
  each_token(thread, [&](int t) {
    m.k.add(x.f + size_t(t) * x.width, out + size_t(t) * stride, c().d_model);
    if (!bias.empty()) m.k.add(x.f + size_t(t) * x.width, bias.data(), c().d_model);
  });
}

void Pass::logits(int thread) {
  Stream& s = stream(thread);
  const int first = n - wanted, stride = round_up(c().n_vocab, kLanes);
  each_token(thread, [&](int t) {
    if (t < first) return;
    norm_token(thread, t, m.output_norm, t - first);
  });
  multiply(thread, m.head, s.norm.acts, wanted, b.logits.get(), stride);
}

}  // namespace hotcold

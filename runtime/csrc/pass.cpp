#include "pass.h"

#include <cmath>
#include <cstring>

namespace hotcold {

void Pass::prepare() {
  const int half = int(m.rope_frequency.size());
  for (int t = 0; t < n; ++t)
    for (int i = 0; i < half; ++i) {
      const double angle = double(position + t) * m.rope_frequency[i];
      b.cosine[t * half + i] = float(std::cos(angle));
      b.sine[t * half + i] = float(std::sin(angle));
    }
}

void Pass::run(int thread) {
  embed(thread);
  for (int l = 0; l < c().n_layers; ++l) {
    attention(thread, l);
    ffn(thread, l);
  }
  if (wanted) logits(thread);
}

void Pass::multiply(int thread, const Panel& p, const Acts& acts, float* out, int stride) {
  const Range groups = split(round_up(p.rows, kLanes) / kLanes, thread, threads());
  m.k.panel(p.type, p.data, p.cols, groups.first, groups.last, acts, n, out, stride);
}

void Pass::embed(int thread) {
  Stream& s = stream(thread);
  each_token(thread, [&](int t) {
    panel_row(m.embedding.type, m.embedding.data, c().d_model, tokens[t], s.x.acts.f + size_t(t) * s.x.acts.width);
  });
}

void Pass::norm_token(Stream& s, int t, const std::vector<float>& weight, int to) {
  const Acts &x = s.x.acts, &norm = s.norm.acts;
  m.k.rms_norm(x.f + size_t(t) * x.width, weight.data(), c().d_model, c().norm_eps, norm.f + size_t(to) * norm.width);
  m.k.quantise(norm, to, 0, norm.blocks());
}

void Pass::logits(int thread) {
  Stream& s = stream(thread);
  const int first = n - wanted, stride = round_up(c().n_vocab, kLanes);
  each_token(thread, [&](int t) {
    if (t < first) return;
    norm_token(s, t, m.output_norm, t - first);
  });
  const Range groups = split(stride / kLanes, thread, threads());
  m.k.panel(m.head.type, m.head.data, c().d_model, groups.first, groups.last, s.norm.acts, wanted, b.logits.get(), stride);
}

}  // namespace hotcold

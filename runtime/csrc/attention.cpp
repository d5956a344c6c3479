// Attention of a block: projections, rotary positions, the f16 cache, and softmax(q k) v over it.
#include <algorithm>
#include <cmath>

#include "pass.h"

namespace hotcold {

uint16_t* Pass::keys(int l, int kv_head) const {
  const size_t tile_floats = size_t(c().head_dim) * kLanes;
  return b.keys.get() + (size_t(l) * c().n_kv_heads + kv_head) * Model::Buffers::tiles(c()) * tile_floats;
}

uint16_t* Pass::values(int l, int kv_head) const {
  return b.values.get() + (size_t(l) * c().n_kv_heads + kv_head) * c().n_ctx * c().head_dim;
}

void Pass::attention(int thread, int l) {
  const Layer& layer = m.layers[l];
  Stream& s = stream(thread);
  const Acts& norm = s.norm.acts;
  each_token(thread, [&](int t) { norm_token(s, t, layer.attn_norm, t); });
  multiply(thread, layer.q, norm, b.q.get(), layer.q.rows);
  multiply(thread, layer.k, norm, b.kk.get(), layer.k.rows);
  multiply(thread, layer.v, norm, b.v.get(), layer.v.rows);
  m.team.barrier();
  rope_and_store(thread, l);
  m.team.barrier();
  if (n == 1) attend_one(thread, l);
  else attend_block(thread, l);
  const int stride = round_up(c().d_model, kLanes);
  // In a parallel block the FFN still has to read the stream as it is.
  float* out = c().parallel ? b.attention.get() : b.out.get();
  multiply(thread, layer.o, s.heads.acts, out, stride);
  m.team.barrier();
  if (!c().parallel) add_to_stream(thread, out, stride, layer.o_bias);
}

// Rotates the pairs (i, i + half) of a head: the NEOX order, to which all models are brought at load.
void Pass::rope(float* head, int t) const {
  const int half = int(m.rope_frequency.size());
  const float *cosine = &b.cosine[size_t(t) * half], *sine = &b.sine[size_t(t) * half];
  for (int i = 0; i < half; ++i) {
    const float x = head[i], y = head[i + half];
    head[i] = x * cosine[i] - y * sine[i];
    head[i + half] = x * sine[i] + y * cosine[i];
  }
}

// Bias, norm and rotation of one query or key head; `h` is its number among those of its kind.
void Pass::finish_head(float* head, int t, int h, const std::vector<float>& bias, const std::vector<float>& norm) const {
  const int dim = c().head_dim;
  if (!bias.empty()) m.k.add(head, &bias[size_t(h) * dim], dim);
  if (!norm.empty()) m.k.rms_norm(head, norm.data(), dim, c().norm_eps, head);
  rope(head, t);
}

void Pass::rope_and_store(int thread, int l) {
  const Layer& layer = m.layers[l];
  const int heads = c().n_heads, kv = c().n_kv_heads, dim = c().head_dim, units = heads + 2 * kv;
  const float scale = 1.0f / std::sqrt(float(dim));
  alignas(64) uint16_t half[512];
  const Range r = split(n * units, thread, threads());
  for (int u = r.first; u < r.last; ++u) {
    const int t = u / units, h = u % units, p = position + t;
    if (h < heads) {
      float* q = &b.q[(size_t(t) * heads + h) * dim];
      finish_head(q, t, h, layer.q_bias, layer.q_norm);
      for (int i = 0; i < dim; ++i) q[i] *= scale;
    } else if (h < heads + kv) {
      float* key = &b.kk[(size_t(t) * kv + h - heads) * dim];
      finish_head(key, t, h - heads, layer.k_bias, layer.k_norm);
      m.k.to_f16(key, dim, half);
      uint16_t* tile = keys(l, h - heads) + size_t(p / kLanes) * dim * kLanes + p % kLanes;
      for (int i = 0; i < dim; ++i) tile[i * kLanes] = half[i];
    } else {
      const int v = h - heads - kv;
      float* value = &b.v[(size_t(t) * kv + v) * dim];
      if (!layer.v_bias.empty()) m.k.add(value, &layer.v_bias[size_t(v) * dim], dim);
      m.k.to_f16(value, dim, values(l, v) + size_t(p) * dim);
    }
  }
}

// The first position that a query at `position` sees.
int Pass::first_seen(int l, int position) const {
  const int window = m.layers[l].window;
  return window ? std::max(0, position + 1 - window) : 0;
}

// One token: every thread takes all heads over its share of the positions; the shares are then merged by their maxima.
void Pass::attend_one(int thread, int l) {
  const int group = c().n_heads / c().n_kv_heads, dim = c().head_dim, stride = round_up(c().n_ctx, kLanes);
  ThreadScratch& mine = *b.scratch[thread];
  const int from = first_seen(l, position), skipped = from / kLanes;
  Range tiles = split(position / kLanes + 1 - skipped, thread, threads());
  tiles = {tiles.first + skipped, tiles.last + skipped};
  const int first = std::max(tiles.first * kLanes, from), last = std::min(tiles.last * kLanes, position + 1);
  for (int h = 0; h < c().n_heads; ++h) mine.partial_sum[h] = 0;
  for (int kv = 0; kv < c().n_kv_heads && first < last; ++kv) {
    const int h0 = kv * group;
    float* scores = mine.scores.get();
    m.k.scores(&b.q[size_t(h0) * dim], group, dim, keys(l, kv), tiles.first, tiles.last, scores, stride);
    for (int g = 0; g < group; ++g)
      mine.partial_sum[h0 + g] = m.k.softmax(scores + size_t(g) * stride, first, last, &mine.partial_max[h0 + g]);
    m.k.values(scores, stride, group, dim, values(l, kv), first, last, &mine.partial[size_t(h0) * dim]);
  }
  m.team.barrier();
  const Acts& heads = stream(thread).heads.acts;
  for (int h = 0; h < c().n_heads; ++h) {
    float max = -3e38f, sum = 0;
    for (const auto& s : b.scratch)
      if (s->partial_sum[h] > 0) max = std::max(max, s->partial_max[h]);
    for (const auto& s : b.scratch)
      if (s->partial_sum[h] > 0) sum += s->partial_sum[h] * std::exp(s->partial_max[h] - max);
    float* out = heads.f + size_t(h) * dim;
    std::fill(out, out + dim, 0.0f);
    for (const auto& s : b.scratch) {
      if (!(s->partial_sum[h] > 0)) continue;
      const float weight = std::exp(s->partial_max[h] - max) / sum;
      for (int i = 0; i < dim; ++i) out[i] += weight * s->partial[size_t(h) * dim + i];
    }
  }
  m.k.quantise(heads, 0, 0, heads.blocks());
}

// A block: every (token, key-value head) is one unit over all earlier positions.
void Pass::attend_block(int thread, int l) {
  const int kv_heads = c().n_kv_heads, group = c().n_heads / kv_heads, dim = c().head_dim;
  const int stride = round_up(c().n_ctx, kLanes);
  const Acts& heads = stream(thread).heads.acts;
  float* scores = b.scratch[thread]->scores.get();
  // Strided, so that the later tokens, which see more positions, are shared out evenly.
  for (int u = thread; u < n * kv_heads; u += threads()) {
    const int t = u / kv_heads, kv = u % kv_heads, last = position + t + 1, h0 = kv * group;
    const int first = first_seen(l, last - 1);
    float* out = heads.f + size_t(t) * heads.width + size_t(h0) * dim;
    m.k.scores(&b.q[(size_t(t) * c().n_heads + h0) * dim], group, dim, keys(l, kv), first / kLanes, (last + kLanes - 1) / kLanes, scores,
               stride);
    float sum[kMaxGroup], max;
    for (int g = 0; g < group; ++g) sum[g] = m.k.softmax(scores + size_t(g) * stride, first, last, &max);
    m.k.values(scores, stride, group, dim, values(l, kv), first, last, out);
    for (int i = 0; i < group * dim; ++i) out[i] /= sum[i / dim];
  }
  m.team.barrier();
  each_token(thread, [&](int t) { m.k.quantise(heads, t, 0, heads.blocks()); });
}

}  // namespace hotcold

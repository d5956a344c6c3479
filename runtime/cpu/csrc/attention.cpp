// Attention of a block: projections, rotary positions, the f16 cache, and softmax(q k) v over it.
#include <algorithm>
#include <cmath>

#include "pass.h"

namespace hotcold {
namespace {

// The beginning of a run of keys or values; the kernel that reads it asks for the rest.
void prefetch_run(Prefetches& prefetches, const uint16_t* run, int n) {
  if (n) prefetches.add_run(reinterpret_cast<const uint8_t*>(run), std::min<size_t>(n * sizeof(uint16_t), kAhead));
}

}  // namespace

uint16_t* Pass::keys(int l, int kv_head) const {
  const size_t tile_floats = size_t(c().head_dim) * kLanes;
  return seq.keys_.get() + (size_t(l) * c().n_kv_heads + kv_head) * seq.tiles() * tile_floats;
}

uint16_t* Pass::values(int l, int kv_head) const {
  return seq.values_.get() + (size_t(l) * c().n_kv_heads + kv_head) * seq.n_ctx * c().head_dim;
}

void Pass::attention(int thread, int l) {
  const Layer& layer = m.layers[l];
  Stream& s = stream(thread);
  const Acts& norm = s.norm.acts;
  each_token(thread, [&](int t) {
    norm_token(thread, t, layer.attn_norm, t);
    leave_out_inputs(thread, l, Site::Qkv, norm, t);
  });
  const int q_rows = c().n_heads * c().head_dim, kv_rows = c().n_kv_heads * c().head_dim;
  const Outputs qkv[] = {{b.q.get(), q_rows}, {b.kk.get(), kv_rows}, {b.v.get(), kv_rows}};
  if (input_rows(l, Site::Qkv).data) {
    multiply_inputs(thread, l, Site::Qkv, norm, qkv);
  } else {
    multiply(thread, layer.q, norm, b.q.get(), q_rows);
    multiply(thread, layer.k, norm, b.kk.get(), kv_rows);
    multiply(thread, layer.v, norm, b.v.get(), kv_rows);
  }
  if (n == 1) prefetch_keys(thread, l);
  m.team.barrier();
  if (n == 1) attend_one(thread, l);
  else attend_block(thread, l);
  const int stride = round_up(c().d_model, kLanes);
  // In a parallel block the FFN still has to read the stream as it is.
  float* out = c().parallel ? b.attention.get() : b.out.get();
  if (leaves_out(l, Site::O)) each_token(thread, [&](int t) { leave_out_inputs(thread, l, Site::O, s.heads.acts, t); });
  if (input_rows(l, Site::O).data) {
    const Outputs o{out, stride};
    multiply_inputs(thread, l, Site::O, s.heads.acts, &o);
  } else {
    multiply(thread, layer.o, s.heads.acts, out, stride);
  }
  if (c().mode == Mode::Predicted) prefetch(thread, layer.fc1);
  else prefetch(thread, layer.gate, c().mode == Mode::Dense ? kBlock / kLanes : 1);
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
  Prefetches none;
  if (!norm.empty()) m.k.rms_norm(head, norm.data(), dim, c().norm_eps, head, none);
  rope(head, t);
}

// Query heads of one key-value head and token, ready to meet keys, into `out` [group, dim].
void Pass::finish_queries(int l, int t, int kv_head, float* out) const {
  const Layer& layer = m.layers[l];
  const int group = c().n_heads / c().n_kv_heads, dim = c().head_dim;
  const float scale = 1.0f / std::sqrt(float(dim));
  std::copy_n(&b.q[(size_t(t) * c().n_heads + kv_head * group) * dim], group * dim, out);
  for (int g = 0; g < group; ++g) finish_head(out + g * dim, t, kv_head * group + g, layer.q_bias, layer.q_norm);
  for (int i = 0; i < group * dim; ++i) out[i] *= scale;
}

// Puts the key and value of token t into the cache.
void Pass::store(int l, int t, int kv_head) const {
  const Layer& layer = m.layers[l];
  const int dim = c().head_dim, p = position + t;
  const size_t at = (size_t(t) * c().n_kv_heads + kv_head) * dim;
  alignas(64) uint16_t half[512];
  finish_head(&b.kk[at], t, kv_head, layer.k_bias, layer.k_norm);
  m.k.to_f16(&b.kk[at], dim, half);
  uint16_t* tile = keys(l, kv_head) + size_t(p / kLanes) * dim * kLanes + p % kLanes;
  for (int i = 0; i < dim; ++i) tile[i * kLanes] = half[i];
  if (!layer.v_bias.empty()) m.k.add(&b.v[at], &layer.v_bias[size_t(kv_head) * dim], dim);
  m.k.to_f16(&b.v[at], dim, values(l, kv_head) + size_t(p) * dim);
}

// The first position that a query at `position` sees.
int Pass::first_seen(int l, int position) const {
  const int window = m.layers[l].window;
  return window ? std::max(0, position + 1 - window) : 0;
}

// Prefetches the keys that attend_one will read first, and for the tiles that it stores new keys into, which touches all lines
// of a tile: said before the barrier that it waits at.
void Pass::prefetch_keys(int thread, int l) const {
  const int skipped = first_seen(l, position) / kLanes, tiles = position / kLanes + 1 - skipped;
  const Range units = split(c().n_kv_heads * tiles, thread, threads());
  const int per_tile = c().head_dim * kLanes, first_tile = units.first % tiles;
  for (int u = units.first; u < units.last; ++u) {
    if (u % tiles != tiles - 1) continue;
    const uint16_t* tile = keys(l, u / tiles) + size_t(position / kLanes) * per_tile;
    for (int i = 0; i < per_tile; i += 64 / sizeof(uint16_t)) prefetch_line(tile + i);
  }
  Prefetches first;
  prefetch_run(first, keys(l, units.first / tiles) + size_t(skipped + first_tile) * per_tile,
              std::min(units.last - units.first, tiles - first_tile) * per_tile);
  first.feed(kAhead / 256);
}

// One token: the tiles of all key-value heads are shared out evenly, and where a head is shared by threads its parts are
// merged by their maxima. Whoever has a head's last tile stores the new key and value first, so that nobody waits.
void Pass::attend_one(int thread, int l) {
  const int kv_heads = c().n_kv_heads, group = c().n_heads / kv_heads, dim = c().head_dim, stride = round_up(seq.n_ctx, kLanes);
  ThreadScratch& mine = *b.scratch[thread];
  Prefetches cache;
  const int from = first_seen(l, position), skipped = from / kLanes, tiles = position / kLanes + 1 - skipped;
  const Range units = split(kv_heads * tiles, thread, threads());
  std::fill_n(mine.partial_sum.get(), c().n_heads, 0.0f);
  for (int u = units.first; u < units.last;) {
    const int kv = u / tiles, first_tile = u % tiles, last_tile = std::min(tiles, first_tile + units.last - u), h0 = kv * group;
    const int first = std::max((skipped + first_tile) * kLanes, from), last = std::min((skipped + last_tile) * kLanes, position + 1);
    u += last_tile - first_tile;
    prefetch_run(cache, values(l, kv) + size_t(first) * dim, (last - first) * dim);
    finish_queries(l, 0, kv, mine.queries.get());
    if (last_tile == tiles) store(l, 0, kv);
    float* scores = mine.scores.get();
    m.k.scores(mine.queries.get(), group, dim, keys(l, kv), skipped + first_tile, skipped + last_tile, scores, stride, cache);
    for (int g = 0; g < group; ++g)
      mine.partial_sum[h0 + g] = m.k.softmax(scores + size_t(g) * stride, first, last, &mine.partial_max[h0 + g]);
    if (u < units.last) prefetch_run(cache, keys(l, kv + 1) + size_t(skipped) * kLanes * dim, tiles * kLanes * dim);
    m.k.values(scores, stride, group, dim, values(l, kv), first, last, &mine.partial[size_t(h0) * dim], cache);
  }
  prefetch(thread, m.layers[l].o);
  m.team.barrier();
  const Acts& heads = stream(thread).heads.acts;
  for (int h = 0; h < c().n_heads; ++h) merge(h, heads.f + size_t(h) * dim, mine.prefetches);
  m.k.quantize(heads, 0, 0, heads.blocks(), mine.prefetches);
}

// Brings together the threads' parts of the output of head h.
void Pass::merge(int h, float* out, Prefetches& prefetches) const {
  const int dim = c().head_dim;
  float max = -3e38f, sum = 0;
  for (const auto& s : b.scratch)
    if (s->partial_sum[h] > 0) max = std::max(max, s->partial_max[h]);
  for (const auto& s : b.scratch)
    if (s->partial_sum[h] > 0) sum += s->partial_sum[h] * std::exp(s->partial_max[h] - max);
  std::fill(out, out + dim, 0.0f);
  for (const auto& s : b.scratch) {
    if (!(s->partial_sum[h] > 0)) continue;
    const float weight = std::exp(s->partial_max[h] - max) / sum;
    for (int i = 0; i < dim; ++i) out[i] += weight * s->partial[size_t(h) * dim + i];
    prefetches.feed(4);
  }
}

// A block: a unit is one key-value head and a few tokens, whose queries meet each key and value together.
void Pass::attend_block(int thread, int l) {
  const int kv_heads = c().n_kv_heads;
  const Range stored = split(n * kv_heads, thread, threads());
  for (int u = stored.first; u < stored.last; ++u) store(l, u / kv_heads, u % kv_heads);
  m.team.barrier();
  const int side = tokens_side_by_side(c());
  // Strided, so that the later tokens, which see more positions, are shared out evenly.
  for (int u = thread; u < (n + side - 1) / side * kv_heads; u += threads())
    attend_tokens(thread, l, u / kv_heads * side, std::min(n, (u / kv_heads + 1) * side), u % kv_heads);
  prefetch(thread, m.layers[l].o);
  m.team.barrier();
  const Acts& heads = stream(thread).heads.acts;
  each_token(thread, [&](int t) { m.k.quantize(heads, t, 0, heads.blocks(), prefetches(thread)); });
}

void Pass::attend_tokens(int thread, int l, int first_token, int last_token, int kv) {
  const int group = c().n_heads / c().n_kv_heads, dim = c().head_dim, stride = round_up(seq.n_ctx, kLanes);
  ThreadScratch& mine = *b.scratch[thread];
  Prefetches none;
  const int rows = (last_token - first_token) * group;
  const int first = first_seen(l, position + first_token), last = position + last_token;
  for (int t = first_token; t < last_token; ++t)
    finish_queries(l, t, kv, mine.queries.get() + size_t(t - first_token) * group * dim);
  float *scores = mine.scores.get(), sum[kMaxGroup], max;
  m.k.scores(mine.queries.get(), rows, dim, keys(l, kv), first / kLanes, (last + kLanes - 1) / kLanes, scores, stride, none);
  for (int r = 0; r < rows; ++r) {
    float* row = scores + size_t(r) * stride;
    const int p = position + first_token + r / group, seen_from = first_seen(l, p);
    sum[r] = m.k.softmax(row, seen_from, p + 1, &max);
    std::fill(row + first, row + seen_from, 0.0f);
    std::fill(row + p + 1, row + last, 0.0f);
  }
  float* out = mine.attended.get();
  m.k.values(scores, stride, rows, dim, values(l, kv), first, last, out, none);
  const Acts& heads = stream(thread).heads.acts;
  for (int r = 0; r < rows; ++r) {
    float* to = heads.f + size_t(first_token + r / group) * heads.width + size_t(kv * group + r % group) * dim;
    for (int i = 0; i < dim; ++i) to[i] = out[size_t(r) * dim + i] / sum[r];
  }
}

}  // namespace hotcold

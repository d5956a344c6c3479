// Working memory of a model, which all of its sequences compute in, one after the other.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "block.h"
#include "model.h"

namespace hotcold {

// Acts with their storage.
struct ActsBuffer {
  ActsBuffer() = default;
  ActsBuffer(int n, int tokens, bool lanes) {
    acts.n = n;
    acts.width = padded(n);
    const size_t width = acts.width, blocks = acts.blocks(), lane_width = acts.lane_width();
    acts.f = (f = Block<float>(width * tokens)).get();
    acts.q = (q = Block<int8_t>(width * tokens)).get();
    acts.d = (d = Block<float>(blocks * tokens)).get();
    acts.negative_sum = (sum = Block<int32_t>(blocks * tokens)).get();
    if (!lanes) return;
    acts.lane_q = (lane_q = Block<int8_t>(width * tokens)).get();
    acts.lane_d = (lane_d = Block<float>(lane_width * tokens)).get();
    acts.lane_sum = (lane_sum = Block<int32_t>(lane_width * tokens)).get();
  }
  Acts acts;
  Block<float> f, d, lane_d;
  Block<int8_t> q, lane_q;
  Block<int32_t> sum, lane_sum;
};

// What every thread needs in full: private with one token, shared (index 0) with several.
struct Stream {
  Stream(const Config& c, int rank, int tokens)
      : x(c.d_model, tokens, false),
        norm(c.d_model, tokens, true),
        heads(c.n_heads * c.head_dim, tokens, false),
        hidden(rank, tokens, false) {}
  ActsBuffer x;       // residual stream; quantized for the predictor
  ActsBuffer norm;    // normed input of attention, FFN or head
  ActsBuffer heads;   // attention output
  ActsBuffer hidden;  // predictor hidden state
};

// Rows of up to 16 fired neurons waiting for the down kernel, for one token.
struct DownQueue {
  const uint8_t* row[16];
  float a[16];
  int count = 0;
};

// Tokens of a block whose queries meet a key or value together: enough to use each for four queries or more.
inline int tokens_side_by_side(const Config& c) { return c.n_heads / c.n_kv_heads >= 4 ? 1 : 4; }

// Outputs of a matrix held by input that a block of tokens is computed for at a time: rows can be cut at multiples of it,
// as scales lie in groups of 16.
constexpr int kMaxOutputs = 512;
static_assert(kMaxOutputs % (kLanes * kBlock) == 0);

struct ThreadScratch {
  // `input_width`: outputs of matrices that are held by input, 0 where none are.
  ThreadScratch(const Config& c, int tokens, int input_width)
      : queries(size_t(query_rows(c)) * c.head_dim),
        attended(size_t(query_rows(c)) * c.head_dim),
        partial(size_t(c.n_heads) * c.head_dim),
        partial_max(c.n_heads),
        partial_sum(c.n_heads),
        y(size_t(round_up(c.d_model, 128)) * tokens),
        list(c.d_ff),
        sums(input_width ? std::max(input_width, kMaxOutputs * tokens) : 0),
        inputs(input_width ? std::max({c.d_model, c.n_heads * c.head_dim, c.d_ff}) : 0),
        queues(tokens) {}
  static int query_rows(const Config& c) { return c.n_heads / c.n_kv_heads * tokens_side_by_side(c); }

  Block<float> scores;  // of queries, as long as the longest context so far
  Block<float> queries, attended, partial, partial_max, partial_sum;
  Block<float> y;  // [tokens, round_up(d_model, 128)], this thread's share of the FFN output
  Block<int32_t> list;
  int listed = 0;
  Block<float> sums;      // this thread's part of what inputs add up to
  Block<int32_t> inputs;  // those that count, ascending
  std::vector<DownQueue> queues;
  // Apart from what is above: the owner writes this while other threads read that.
  alignas(64) Prefetches prefetches;
  alignas(64) char pad[64];
};

struct Model::Buffers {
  Buffers(const Config& c, int threads, int rank, int input_width)
      : intermediate(c.d_ff, kMaxBlock, false),
        q(size_t(c.n_heads) * c.head_dim * kMaxBlock),
        kk(size_t(c.n_kv_heads) * c.head_dim * kMaxBlock),
        v(size_t(c.n_kv_heads) * c.head_dim * kMaxBlock),
        out(size_t(round_up(c.d_model, kLanes)) * kMaxBlock),
        attention(c.parallel ? size_t(round_up(c.d_model, kLanes)) * kMaxBlock : 0),
        gate(size_t(ff_stride(c)) * kMaxBlock),
        up(size_t(ff_stride(c)) * kMaxBlock),
        hidden(size_t(round_up(rank, kLanes)) * kMaxBlock),
        logits(size_t(round_up(c.n_vocab, kLanes)) * kMaxBlock),
        masks(c.d_ff + kLanes),
        cosine(size_t(c.head_dim / 2) * kMaxBlock),
        sine(size_t(c.head_dim / 2) * kMaxBlock) {
    streams.reserve(threads);
    streams.emplace_back(c, rank, kMaxBlock);
    for (int t = 1; t < threads; ++t) streams.emplace_back(c, rank, 1);
    for (int t = 0; t < threads; ++t) scratch.emplace_back(std::make_unique<ThreadScratch>(c, kMaxBlock, input_width));
    // An FFN without up is one whose up gives 1; the dense mode reads it so.
    if (!c.gated) std::fill_n(up.get(), size_t(ff_stride(c)) * kMaxBlock, 1.0f);
  }
  static int ff_stride(const Config& c) { return round_up(c.d_ff, 64); }
  // Makes room for the scores of `positions`; not while a pass is under way.
  void reserve_scores(const Config& c, int positions) {
    if (positions <= positions_) return;
    const size_t size = size_t(ThreadScratch::query_rows(c)) * round_up(positions, kLanes);
    for (auto& s : scratch) s->scores = Block<float>(size);
    positions_ = positions;
  }

  std::vector<Stream> streams;
  std::vector<std::unique_ptr<ThreadScratch>> scratch;
  ActsBuffer intermediate;  // dense mode: act(gate) * up
  Block<float> q, kk, v, out, attention, gate, up, hidden, logits;
  Block<uint64_t> masks;  // per neuron: bits of the tokens it is computed for
  Block<float> cosine, sine;

 private:
  int positions_ = 0;  // that there are scores for
};

}  // namespace hotcold

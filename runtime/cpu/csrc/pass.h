// One block of tokens through all layers. run() is executed by every thread of the team.
#pragma once
#include "buffers.h"
#include "sequence.h"

namespace hotcold {

// Neurons to compute, ascending, and with several tokens for which of them (bit t: token t).
struct Neurons {
  const int32_t* index;
  const uint64_t* tokens;
  int count;
};

// Sets the smallest of x [n], padded with zeros, to zero: `share` of them or, as it need not be exact, a little fewer.
void leave_out_smallest(const Kernels& k, float* x, int n, double share);

struct Pass {
  const Model& m;
  Model::Buffers& b;
  Sequence& seq;
  const int32_t* tokens;
  int n;         // tokens of the block, at most kMaxBlock
  int position;  // of the first token
  int wanted;    // logits: of all tokens (n), the last (1) or none (0)

  void prepare();  // rope table
  void run(int thread);
  // Layers [first, last) on the residual stream x [n, d_model], in place.
  void run_layers(int thread, int first, int last, float* x);
  // y [n, d_model] = the FFN of layer l over some of its neurons; normed [n, d_model] is its input.
  void run_neurons(int thread, int l, const float* normed, const Neurons& neurons, float* y);

  // Outputs of a site's matrices, of all tokens, from inputs of which some are 0.
  struct Outputs {
    float* data;
    int stride;
  };
  // out[p] = part p of the matrices times each token of acts.f; other threads' outputs may be missing until the next barrier.
  void multiply_inputs(int thread, int l, Site which, const Acts& acts, const Outputs* out);

 private:
  const Config& c() const { return m.config; }
  int threads() const { return m.team.size(); }
  Stream& stream(int thread) const { return b.streams[n == 1 ? thread : 0]; }

  // Calls step(token) for the tokens of this thread and leaves all tokens ready for every thread.
  template <class Step>
  void each_token(int thread, Step step);
  // This thread's rows of a panel and some of slower threads', for all tokens or `count`; other rows may still be missing
  // until the next barrier. A row is the same whoever computes it.
  void multiply(int thread, const Panel& panel, const Acts& acts, float* out, int stride) { multiply(thread, panel, acts, n, out, stride); }
  void multiply(int thread, const Panel& panel, const Acts& acts, int count, float* out, int stride);
  // Prefetches the beginning of this thread's rows, and leaves more of them in asks(thread), for what is done before they are
  // multiplied: said before a barrier, at which memory would be idle. `unit`: groups of rows that one thread multiplies.
  void prefetch(int thread, const Panel& panel, int unit = 1) const;
  Prefetches& prefetches(int thread) const { return b.scratch[thread]->prefetches; }
  Counts& counts(int thread) const { return seq.counts_[thread]; }

  const InputRows& input_rows(int l, Site which) const { return m.layers[l].site(which).rows; }
  // Whether a site's inputs have to go through leave_out_inputs.
  bool leaves_out(int l, Site which) const { return input_rows(l, which).data || !m.layers[l].site(which).least.empty(); }
  // Sets inputs [first, last) of token t that do not count to zero, unless it is the first of the context; by the layer's rule
  // or, without one, the smallest of them, the model's share. `counted`: whether this is the thread that keeps count of them.
  void leave_out_inputs(int thread, int l, Site which, const Acts& acts, int t, int first, int last, bool counted);
  // The same for all inputs of a token that each_token has given to this thread, and quantizes what is left.
  void leave_out_inputs(int thread, int l, Site which, const Acts& acts, int t);
  void multiply_inputs_one(int thread, const InputRows& rows, const Acts& acts, const Outputs* out, int64_t& bytes);
  void multiply_inputs_block(int thread, const InputRows& rows, const Acts& acts, const Outputs* out, int64_t& bytes);
  void multiply_inputs_piece(ThreadScratch& s, const InputRows& rows, const InputRows::Part& part, int first_output,
                             const Acts& acts, const Outputs& out);

  // Norms the residual stream of token t into place `to` of the normed activations, and quantizes it.
  void norm_token(int thread, int t, const NormWeights& weights, int to);
  // Adds rows of `out`, and a bias if there is one, to the residual stream of this thread's tokens.
  void add_to_stream(int thread, const float* out, int stride, const std::vector<float>& bias);
  void embed(int thread);
  void layer(int thread, int l);
  void attention(int thread, int l);
  void finish_queries(int l, int t, int kv_head, float* out) const;
  void store(int l, int t, int kv_head) const;
  void prefetch_keys(int thread, int l) const;
  void attend_one(int thread, int l);
  void merge(int h, float* out, Prefetches& prefetches) const;
  void attend_block(int thread, int l);
  void attend_tokens(int thread, int l, int first_token, int last_token, int kv_head);
  void rope(float* head, int t) const;
  void finish_head(float* head, int t, int h, const std::vector<float>& bias, const std::vector<float>& norm) const;
  int first_seen(int l, int position) const;
  uint16_t* keys(int l, int kv_head) const;
  uint16_t* values(int l, int kv_head) const;

  void ffn(int thread, int l);
  const Panel& after(int l) const;
  void ffn_dense(int thread, int l);
  void add_bias(const std::vector<float>& bias, int first, int last);
  void list_fired(int thread, int l);
  void list_neurons(int thread, int l, const Panel& scores, const Acts& acts);
  void list_predicted(int thread, int l);
  void list_group(ThreadScratch& s, const Layer& layer, int first_neuron, uint32_t always, uint32_t always_first);
  void ffn_rows(int thread, int l);
  void count_missed(int thread, int l);

  void logits(int thread);
};

template <class Step>
void Pass::each_token(int thread, Step step) {
  if (n == 1) return step(0);
  const Range r = split(n, thread, threads());
  for (int t = r.first; t < r.last; ++t) step(t);
  m.team.barrier();
}

}  // namespace hotcold

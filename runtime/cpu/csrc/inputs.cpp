// Inputs that are too small to count, and matrices held by input, of which the rows of such inputs are not read at all
// (TEAL, arXiv 2408.14690). What counts says a threshold per input, from the model's rule (hotcold/model/inputs.py); or each
// token leaves out the same share of its own inputs, so that nothing has to be calibrated.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "pass.h"

namespace hotcold {
namespace {

constexpr int kSide = 16;  // inputs that the kernel adds up at a time

// The size of the smallest input to keep, so that `keep` of them are, or up to a 256th of all more.
float size_of_smallest_kept(const Kernels& k, const float* x, int n, int keep) {
  const int width = padded(n);
  float most = 0;
  for (int i = 0; i < n; ++i) most = std::max(most, std::abs(x[i]));
  // Halving between bit patterns is halving between logarithms: sizes spread over orders of magnitude.
  uint32_t high = std::bit_cast<uint32_t>(most), low = 0;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const int count = k.count_at_least(x, width, std::bit_cast<float>(middle));
    if (count >= keep) low = middle;
    else high = middle;
    if (count >= keep && count - keep <= n / 256) break;
  }
  return std::bit_cast<float>(low);
}

// Plain C++: a thousandth of what reading the rows takes. NaN does not count.
void leave_out_below(float* x, const float* least, int first, int last) {
  for (int i = first; i < last; ++i) x[i] = std::abs(x[i]) >= least[i] ? x[i] : 0.0f;
}

// Pieces of kMaxOutputs outputs, the last one of fewer.
int pieces_of(const InputRows::Part& part) { return round_up(part.outputs, kMaxOutputs) / kMaxOutputs; }

}  // namespace

void leave_out_smallest(const Kernels& k, float* x, int n, double share) {
  const int keep = n - int(share * n);
  k.keep_at_least(x, padded(n), size_of_smallest_kept(k, x, n, keep));
}

void Pass::leave_out_inputs(int thread, int l, Site which, const Acts& acts, int t, int first, int last, bool counted) {
  const InputSite& site = m.layers[l].site(which);
  float* x = acts.f + size_t(t) * acts.width;
  last = std::min(last, acts.n);
  // Position 0 is what all later tokens lean on (see list_neurons).
  if (position + t > 0) {
    if (site.least.empty()) leave_out_smallest(m.k, x, acts.n, m.input_sparsity);
    else leave_out_below(x, site.least.data(), first, last);
  }
  if (!counted || first >= last) return;
  InputStats& stats = counts(thread).site(which);
  stats.seen += last - first;
  stats.kept += last - first - std::count(x + first, x + last, 0.0f);
}

void Pass::leave_out_inputs(int thread, int l, Site which, const Acts& acts, int t) {
  if (!leaves_out(l, which)) return;
  leave_out_inputs(thread, l, which, acts, t, 0, acts.n, n > 1 || thread == 0);
  // Rows by input read floats; panels, and rows by neuron beside the gates by input, read what is quantized.
  const bool read = !input_rows(l, which).data || (which == Site::GateUp && c().mode != Mode::Dense);
  if (read) m.k.quantize(acts, t, 0, acts.blocks(), prefetches(thread));
}

void Pass::multiply_inputs(int thread, int l, Site which, const Acts& acts, const Outputs* out) {
  int64_t& bytes = counts(thread).site(which).bytes;
  if (n == 1) multiply_inputs_one(thread, input_rows(l, which), acts, out, bytes);
  else multiply_inputs_block(thread, input_rows(l, which), acts, out, bytes);
}

// One token: each thread adds up its share of the inputs that count, then its share of all threads' sums.
void Pass::multiply_inputs_one(int thread, const InputRows& rows, const Acts& acts, const Outputs* out, int64_t& bytes) {
  ThreadScratch& s = *b.scratch[thread];
  int32_t* kept = s.inputs.get();
  int count = 0;
  for (int i = 0; i < rows.inputs; ++i) {
    kept[count] = i;
    count += acts.f[i] != 0;
  }
  if (thread == 0) bytes += int64_t(count) * rows.bytes;
  const Range mine = split(count, thread, threads());
  const auto prefetch_group = [&](int first) {
    for (int i = first; i < std::min(first + kSide, mine.last); ++i) s.prefetches.add(rows.row(kept[i]), rows.bytes);
    s.prefetches.close();
  };
  std::memset(s.sums.get(), 0, rows.width() * sizeof(float));
  s.prefetches.clear();
  prefetch_group(mine.first);
  for (int first = mine.first; first < mine.last; first += kSide) {
    const uint8_t* row[kSide];
    float a[kSide];
    const int side = std::min(kSide, mine.last - first);
    for (int i = 0; i < side; ++i) a[i] = acts.f[kept[first + i]];
    prefetch_group(first + kSide);
    for (const InputRows::Part& part : rows.parts) {
      for (int i = 0; i < side; ++i) row[i] = rows.row(kept[first + i]) + part.row.at;
      m.k.down(part.row.type, row, a, side, part.outputs, s.sums.get() + part.first, s.prefetches);
    }
  }
  m.team.barrier();
  for (size_t p = 0; p < rows.parts.size(); ++p) {
    const Range own = split(rows.parts[p].outputs, thread, threads(), kLanes);
    const int from = rows.parts[p].first + own.first, count = own.last - own.first;
    float* to = out[p].data + own.first;
    std::memset(to, 0, count * sizeof(float));
    for (const auto& other : b.scratch) m.k.add(to, other->sums.get() + from, count);
  }
}

// Several tokens: some outputs at a time, of all tokens, so that a row is read once for all of them.
void Pass::multiply_inputs_block(int thread, const InputRows& rows, const Acts& acts, const Outputs* out, int64_t& bytes) {
  ThreadScratch& s = *b.scratch[thread];
  for (int t = thread; t < n; t += threads()) {
    const float* x = acts.f + size_t(t) * acts.width;
    bytes += int64_t(rows.inputs - std::count(x, x + rows.inputs, 0.0f)) * rows.bytes;
  }
  int pieces = 0;
  for (const InputRows::Part& part : rows.parts) pieces += pieces_of(part);
  m.team.share(thread, pieces, 1, [&](int first, int last) {
    for (int piece = first; piece < last; ++piece) {
      int p = 0, at = piece;  // piece `at` of part p
      for (; at >= pieces_of(rows.parts[p]); ++p) at -= pieces_of(rows.parts[p]);
      multiply_inputs_piece(s, rows, rows.parts[p], at * kMaxOutputs, acts, out[p]);
    }
  });
}

void Pass::multiply_inputs_piece(ThreadScratch& s, const InputRows& rows, const InputRows::Part& part, int first_output,
                                 const Acts& acts, const Outputs& out) {
  const int outputs = std::min(kMaxOutputs, part.outputs - first_output);
  const size_t at = part.row.at + down_bytes(part.row.type, first_output);
  float* sums = s.sums.get();
  std::memset(sums, 0, size_t(n) * kMaxOutputs * sizeof(float));
  s.prefetches.clear();
  for (int i = 0; i < rows.inputs; i += kSide) {
    const uint8_t* row[kSide];
    const int side = std::min(kSide, rows.inputs - i);
    for (int j = 0; j < side; ++j) row[j] = rows.row(i + j) + at;
    for (int j = i + kSide; j < std::min(i + 2 * kSide, rows.inputs); ++j)
      s.prefetches.add(rows.row(j) + at, down_bytes(part.row.type, outputs));
    s.prefetches.close();
    for (int t = 0; t < n; ++t)
      m.k.down(part.row.type, row, acts.f + size_t(t) * acts.width + i, side, outputs, sums + size_t(t) * kMaxOutputs, s.prefetches);
  }
  for (int t = 0; t < n; ++t)
    std::copy_n(sums + size_t(t) * kMaxOutputs, outputs, out.data + size_t(t) * out.stride + first_output);
}

}  // namespace hotcold

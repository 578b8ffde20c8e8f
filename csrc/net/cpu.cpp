// Plans a net's forward and backward pass for one instruction set, packs the weights, and cuts the batch into tiles;
// the loops themselves are in cpu_kernel.cpp.
#include "net/cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>

#include "common/threads.h"
#include "net/winograd.h"

namespace mmebm {
namespace {

// Products that are summed one after the other before the sum is put aside: in one run of 1,024 the rounding errors are
// up to five times those of torch, which sums in 16 lanes (measured for langevin_mlp).
constexpr int64_t PART = 128;

// Bytes of a first-level cache, and bytes a cycle that come from the second: 49 and 51 where rows did not fit, measured
// on one processor (Sapphire Rapids).
constexpr int64_t FIRST_LEVEL = 32 << 10;
constexpr double SECOND_LEVEL = 50.0;

// What taking one row to or from one point of a tile costs, in products: by runs that are not on record, about 4 with
// AVX2 and 7 with AVX-512 on an EPYC, 13 on Sapphire Rapids. From 5 to 12 the chains of benchmarks/bench_net_chain.py
// changed by no more than 4 %, but for the residual one with AVX2, which took 13 % more with 12.
constexpr int64_t TRANSFORM = 8;
// Weights that are worth another thread's while: an estimate, not a measurement.
constexpr int64_t SHARED_WEIGHTS = 1 << 16;
// Rows of a chunk of tiles at their points: what a second-level cache of 512 KB has room for beside the weights.
constexpr int64_t CHUNK = 2048;

// Zeros that begin a cache line, in the last call's memory where it is large enough: pages that are new each time took
// about as long as three steps of 8 chains, in runs that are not on record.
class Zeros {
 public:
  explicit Zeros(int64_t n) : block_(last_.exchange(nullptr)) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(float) + LINE;
    if (block_ && block_->bytes >= bytes) {
      memset(data(), 0, bytes - LINE);
      return;
    }
    block_.reset();
    block_.reset(new Block{bytes, {calloc(bytes, 1), free}});
    if (!block_->memory) throw std::bad_alloc();
  }
  Zeros(const Zeros&) = delete;
  ~Zeros() {
    if (block_->bytes <= KEPT) delete last_.exchange(block_.release());
  }
  float* data() const {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(block_->memory.get()) + LINE - 1) / LINE * LINE);
  }

 private:
  struct Block {
    size_t bytes;
    std::unique_ptr<void, void (*)(void*)> memory;
  };
  static constexpr size_t LINE = 64, KEPT = size_t{64} << 20;
  static std::atomic<Block*> last_;
  std::unique_ptr<Block> block_;
};

std::atomic<Zeros::Block*> Zeros::last_{nullptr};

[[noreturn]] void refuse(const char* what) { throw std::invalid_argument(what); }

struct Dims {
  int64_t channels = 0, height = 0, width = 0;

  bool operator==(const Dims& o) const {
    return channels == o.channels && height == o.height && width == o.width;
  }
  int64_t elements() const { return channels * height * width; }
};

// A node of the plan: what NetNode points to, while it grows.
struct Work {
  NetKind kind = NetKind::input;
  const NetSpec* spec = nullptr;
  std::vector<int32_t> xs;  // positions among the works
  Dims dims;
  int32_t activation = -1;
  float slope = 0.0f;
  bool fused = false;      // the activation is another node's, applied in place
  bool alias = false;      // an input that is the state's own rows
  bool relayout = false;   // a map that changes nothing but the order in memory
  bool needed = false;     // the gradient in it is needed
  bool merged = false;     // a sum whose layers add to its value themselves
  int32_t into = -1;       // of a layer: that sum
  std::vector<NetRead> reads;
  NetNode node;
};

class Planner {
 public:
  Planner(const Planner&) = delete;
  // `members`: how many threads may share a tile's work.
  Planner(const ChainJob& job, const std::vector<NetSpec>& specs, const NetLoops& loops, int64_t members)
      : job_(job), specs_(specs), loops_(loops), members_(members) {
    resolve();
    lay_out();
    fuse();
    merge_sums();
    mark_needed();
    borders();
    allocate();
    connect();
    finish();
  }

  const NetPlan& plan() const { return plan_; }

  // Packs the weights, which no tile may run before.
  void pack_weights(int threads) const {
    const auto one = [this](int64_t i) { packing_[static_cast<size_t>(i)](); };
    for_each_tile(static_cast<int64_t>(packing_.size()), weights_ < SHARED_WEIGHTS ? 1 : threads, one);
  }

 private:
  // -- nodes: views go, layouts are chosen, relayouts come in

  void resolve() {
    root_.resize(specs_.size());
    for (size_t i = 0; i < specs_.size(); ++i) {
      const NetSpec& s = specs_[i];
      for (const int32_t x : s.xs) {
        if (x < 0 || static_cast<size_t>(x) >= i) refuse("a node reads a later one");
      }
      if (s.kind != NetNodeKind::input && s.xs.empty()) refuse("a node reads nothing");
      root_[i] = static_cast<int32_t>(i);
      if (s.kind == NetNodeKind::view) {
        if (s.elements() != specs_[static_cast<size_t>(s.xs[0])].elements()) refuse("a view changes the elements");
        root_[i] = root_[static_cast<size_t>(s.xs[0])];
      }
    }
    // what a convolution wants its input to look like, back through views and elementwise nodes
    std::vector<Dims> want(specs_.size());
    for (size_t i = specs_.size(); i-- > 0;) {
      const NetSpec& s = specs_[i];
      const auto pass_on = [&](int32_t x, const Dims& dims) {
        Dims& there = want[static_cast<size_t>(root_[static_cast<size_t>(x)])];
        if (there.channels == 0 && dims.channels != 0) there = dims;
      };
      switch (s.kind) {
        case NetNodeKind::conv: {
          const NetSpec& x = specs_[static_cast<size_t>(s.xs[0])];
          pass_on(s.xs[0], {x.channels, x.height, x.width});
          break;
        }
        case NetNodeKind::activation:
        case NetNodeKind::add:
        case NetNodeKind::affine:
        case NetNodeKind::product:
          for (const int32_t x : s.xs) pass_on(x, want[i]);
          break;
        case NetNodeKind::norm: pass_on(s.xs[0], want[i]); break;
        default: break;
      }
    }
    for (size_t i = 0; i < specs_.size(); ++i) {
      if (want[i].channels == 0) continue;
      if (want[i].elements() != specs_[i].elements()) want[i] = Dims();
    }
    want_ = want;
  }

  Dims natural(size_t i) const {
    if (want_[i].channels != 0) return want_[i];
    const NetSpec& s = specs_[i];
    if (s.kind == NetNodeKind::input) return {s.elements(), 1, 1};
    return {s.channels, s.height, s.width};
  }

  int32_t relayout(int32_t x, const Dims& dims) {
    if (works_[static_cast<size_t>(x)].dims == dims) return x;
    Work w;
    w.kind = NetKind::map;
    w.relayout = true;
    w.xs = {x};
    w.dims = dims;
    works_.push_back(w);
    return static_cast<int32_t>(works_.size()) - 1;
  }

  void lay_out() {
    std::vector<int32_t> place(specs_.size(), -1);
    for (size_t i = 0; i < specs_.size(); ++i) {
      const NetSpec& s = specs_[i];
      if (s.kind == NetNodeKind::view) {
        place[i] = place[static_cast<size_t>(s.xs[0])];
        continue;
      }
      Work w;
      w.spec = &s;
      for (const int32_t x : s.xs) w.xs.push_back(place[static_cast<size_t>(x)]);
      const auto first = [&] { return works_[static_cast<size_t>(w.xs[0])].dims; };
      switch (s.kind) {
        case NetNodeKind::input:
          w.kind = NetKind::input;
          w.dims = natural(i);
          w.alias = w.dims.height == 1 && w.dims.width == 1;
          break;
        case NetNodeKind::conv: {
          w.kind = NetKind::product_sum;
          w.dims = {s.channels, s.height, s.width};
          const NetSpec& x = specs_[static_cast<size_t>(s.xs[0])];
          w.xs[0] = relayout(w.xs[0], {x.channels, x.height, x.width});
          break;
        }
        case NetNodeKind::linear:
          w.kind = NetKind::product_sum;
          w.dims = natural(i);
          break;
        case NetNodeKind::map:
          w.kind = NetKind::map;
          w.dims = natural(i);
          break;
        case NetNodeKind::logsumexp:
          w.kind = NetKind::logsumexp;
          w.dims = natural(i);
          break;
        case NetNodeKind::norm:
          w.kind = NetKind::norm;
          w.dims = first();
          break;
        default:
          w.kind = s.kind == NetNodeKind::activation ? NetKind::activation
                   : s.kind == NetNodeKind::add      ? NetKind::add
                   : s.kind == NetNodeKind::affine   ? NetKind::affine
                                                     : NetKind::product;
          w.dims = first();
          for (int32_t& x : w.xs) x = relayout(x, w.dims);
          if (w.kind == NetKind::activation) {
            w.activation = s.function;
            w.slope = s.slope;
          }
      }
      if (w.dims.elements() != s.elements()) refuse("the sizes of nodes do not fit together");
      works_.push_back(w);
      place[i] = static_cast<int32_t>(works_.size()) - 1;
    }
    last_ = place[specs_.size() - 1];
    if (works_[static_cast<size_t>(last_)].dims.elements() != 1) refuse("the energy has more than one element");
  }

  // An activation that alone reads a node becomes part of it.
  void fuse() {
    std::vector<int32_t> users(works_.size(), 0), to(works_.size());
    for (const Work& w : works_) {
      for (const int32_t x : w.xs) ++users[static_cast<size_t>(x)];
    }
    ++users[static_cast<size_t>(last_)];
    for (size_t i = 0; i < works_.size(); ++i) {
      Work& w = works_[i];
      to[i] = static_cast<int32_t>(i);
      for (int32_t& x : w.xs) x = to[static_cast<size_t>(x)];
      if (w.kind != NetKind::activation) continue;
      Work& before = works_[static_cast<size_t>(w.xs[0])];
      const bool takes = before.kind == NetKind::product_sum || before.kind == NetKind::map ||
                         before.kind == NetKind::add || before.kind == NetKind::affine;
      if (!takes || before.fused || users[static_cast<size_t>(w.xs[0])] != 1) continue;
      before.activation = w.activation;
      before.slope = w.slope;
      before.fused = true;
      to[i] = w.xs[0];
      users[static_cast<size_t>(w.xs[0])] = users[i];
      w.xs.clear();
      w.kind = NetKind::input;  // nothing is left of it
      w.spec = nullptr;
    }
    last_ = to[static_cast<size_t>(last_)];
    // close the gaps
    std::vector<int32_t> now(works_.size(), -1);
    std::vector<Work> rest;
    for (size_t i = 0; i < works_.size(); ++i) {
      if (!works_[i].spec && !works_[i].relayout) continue;
      for (int32_t& x : works_[i].xs) x = now[static_cast<size_t>(x)];
      now[i] = static_cast<int32_t>(rest.size());
      rest.push_back(works_[i]);
    }
    works_ = rest;
    last_ = now[static_cast<size_t>(last_)];
  }

  // A plain sum of layers that nothing else reads: each adds to the sum's value.
  void merge_sums() {
    std::vector<int32_t> users(works_.size(), 0);
    for (const Work& w : works_) {
      for (const int32_t x : w.xs) ++users[static_cast<size_t>(x)];
    }
    for (size_t i = 0; i < works_.size(); ++i) {
      Work& w = works_[i];
      if (w.kind != NetKind::add || w.spec->shift) continue;
      bool plain = true;
      for (size_t k = 0; k < w.xs.size(); ++k) {
        const Work& x = works_[static_cast<size_t>(w.xs[k])];
        plain = plain && x.kind == NetKind::product_sum && !x.fused && users[static_cast<size_t>(w.xs[k])] == 1 &&
                w.spec->coefficients.at(k) == 1.0f && x.dims == w.dims;
      }
      if (!plain) continue;
      w.merged = true;
      for (const int32_t x : w.xs) works_[static_cast<size_t>(x)].into = static_cast<int32_t>(i);
    }
  }

  // Where a work's value is.
  size_t slot(size_t i) const { return works_[i].into < 0 ? i : static_cast<size_t>(works_[i].into); }

  void mark_needed() {
    for (Work& w : works_) {
      if (w.kind == NetKind::input) {
        w.needed = job_.gradient != nullptr;
        for (int64_t i = 0; i < job_.tensor_count; ++i) {
          const ChainTensor& t = job_.tensors[i];
          const int64_t begin = w.spec->start, end = begin + w.spec->elements();
          w.needed = w.needed || (t.moving && t.begin < end && begin < t.begin + t.width);
        }
      }
      for (const int32_t x : w.xs) w.needed = w.needed || works_[static_cast<size_t>(x)].needed;
    }
  }

  // -- values and their borders

  static int64_t divide_down(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

  // How far the taps of a direct convolution reach over the borders of what it reads: from an output of `outputs`.
  static int64_t direct_reach(int64_t outputs, int64_t inputs, int64_t kernel, int64_t stride, int64_t padding,
                              int64_t dilation) {
    const int64_t after = (outputs - 1) * stride + (kernel - 1) * dilation - padding - (inputs - 1);
    return std::max<int64_t>({padding, after, 0});
  }

  // The same of a scattered one: the gradient of a direct one with `outputs` in the place of its inputs.
  static int64_t scattered_reach(int64_t outputs, int64_t inputs, int64_t kernel, int64_t stride, int64_t padding,
                                 int64_t dilation) {
    const int64_t before = -divide_down(padding - (kernel - 1) * dilation, stride);
    const int64_t after = divide_down(outputs - 1 + padding, stride) - (inputs - 1);
    return std::max<int64_t>({before, after, 0});
  }

  void borders() {
    values_.resize(works_.size());
    for (size_t i = 0; i < works_.size(); ++i) {
      values_[i].channels = works_[i].dims.channels;
      values_[i].height = works_[i].dims.height;
      values_[i].width = works_[i].dims.width;
    }
    for (size_t i = 0; i < works_.size(); ++i) {
      const Work& w = works_[i];
      if (!w.spec || w.spec->kind != NetNodeKind::conv) continue;
      NetValue &in = values_[static_cast<size_t>(w.xs[0])], &out = values_[slot(i)];
      const NetSpec& s = *w.spec;
      const auto reaches = [&](int axis, int64_t ins, int64_t outs, int64_t& in_border, int64_t& out_border) {
        const int64_t kernel = s.sizes[2 + axis], stride = s.stride[axis], pad = s.padding[axis];
        const int64_t dilation = s.dilation[axis];
        const int64_t in_reach = s.transposed ? scattered_reach(outs, ins, kernel, stride, pad, dilation)
                                              : direct_reach(outs, ins, kernel, stride, pad, dilation);
        const int64_t out_reach = s.transposed ? direct_reach(ins, outs, kernel, stride, pad, dilation)
                                               : scattered_reach(ins, outs, kernel, stride, pad, dilation);
        in_border = std::max(in_border, in_reach);
        out_border = std::max(out_border, out_reach);
      };
      reaches(0, in.height, out.height, in.border_y, out.border_y);
      reaches(1, in.width, out.width, in.border_x, out.border_x);
    }
    for (size_t i = 0; i < works_.size(); ++i) {
      if (values_[i].border_x + values_[i].border_y > 0) works_[i].alias = false;
    }
  }

  int64_t take(int64_t rows) {
    const int64_t begin = rows_;
    rows_ += rows;
    if (rows_ > INT32_MAX / 2) throw std::bad_alloc();
    return begin;
  }

  void allocate() {
    plan_.state = take(job_.inputs);
    plan_.grad = take(job_.inputs);
    plan_.old = take(job_.freeze ? job_.inputs : 0);
    plan_.energy = take(1);
    plan_.dead = take(1);
    plan_.row = take(1);
    plan_.observed = take(job_.observed ? (job_.inputs + 3) / 4 : 0);
    for (size_t i = 0; i < works_.size(); ++i) {
      const Work& w = works_[i];
      if (w.kind != NetKind::input) continue;
      const int64_t start = w.spec->start;
      if (start < 0 || start + w.spec->elements() > job_.inputs) refuse("an input lies outside the state");
      if (!w.alias) continue;
      values_[i].value = plan_.state + start;
      values_[i].grad = w.needed ? plan_.grad + start : static_cast<int32_t>(i) == last_ ? take(1) : -1;
    }
    share(lives());
  }

  // From when to when rows hold what is read again. Node i runs at the time i and its backward pass at 2 n - i.
  struct Life {
    int64_t begin, end, *rows;
    const NetValue* shape;
  };

  std::vector<Life> lives() {
    const auto n = static_cast<int64_t>(works_.size());
    std::vector<int64_t> first(works_.size(), n), last(works_.size(), -1), reader(works_.size(), -1);
    std::vector<bool> kept(works_.size(), false);  // the backward pass reads the value
    kept[static_cast<size_t>(last_)] = true;
    for (int64_t i = 0; i < n; ++i) {
      const Work& w = works_[static_cast<size_t>(i)];
      const size_t own = slot(static_cast<size_t>(i));
      first[own] = std::min(first[own], i);
      last[own] = i;
      for (const int32_t x : w.xs) {
        const size_t read = slot(static_cast<size_t>(x));
        last[read] = reader[read] = i;
        kept[read] = kept[read] || w.kind == NetKind::product;
      }
      kept[own] = kept[own] || (w.kind == NetKind::product && w.spec->divide);
    }
    std::vector<Life> out;
    for (size_t i = 0; i < works_.size(); ++i) {
      const Work& w = works_[i];
      NetValue& v = values_[i];
      if (w.into >= 0 || w.alias) continue;
      const bool energy = static_cast<int32_t>(i) == last_;
      out.push_back({first[i], kept[i] ? 2 * n : last[i], &v.value, &v});
      if (w.activation >= 0) out.push_back({first[i], 2 * n - first[i], &v.slope, &v});
      if (!w.needed && !energy) continue;
      // what nobody reads has a gradient of zeros that nobody writes
      const int64_t begin = energy ? n : reader[i] < 0 ? 0 : 2 * n - reader[i];
      out.push_back({begin, energy || reader[i] >= 0 ? 2 * n - first[i] : INT64_MAX, &v.grad, &v});
    }
    return out;
  }

  // Rows for each life, those of an ended one where there are some: fewer fit into a cache that more would not. Only of
  // the same shape and borders, for nothing writes to a border.
  void share(std::vector<Life> lives) {
    std::stable_sort(lives.begin(), lives.end(), [](const Life& a, const Life& b) { return a.begin < b.begin; });
    std::vector<const Life*> last;  // of each lot of rows
    for (const Life& life : lives) {
      const Life** found = nullptr;
      for (const Life*& other : last) {
        const bool free = other->end < life.begin && other->shape->alike(*life.shape);
        if (free && (!found || other->end > (*found)->end)) found = &other;  // the one that was in use last
      }
      *life.rows = found ? *(*found)->rows : take(life.shape->rows());
      if (found) {
        *found = &life;
      } else {
        last.push_back(&life);
      }
    }
  }

  // Where element `e`, in row-major order, lies in a value.
  static int64_t row_of(const NetValue& v, int64_t e) {
    const int64_t area = v.height * v.width, c = e / area, at = e % area;
    return v.at(at / v.width, at % v.width) + c;
  }

  // -- passes

  template <class T>
  T* own(std::deque<std::vector<T>>& store, std::vector<T> values) {
    store.push_back(std::move(values));
    return store.back().data();
  }

  // Segments of consecutive rows from the rows in the order in which they are summed.
  std::vector<NetSegment> segments_of(const std::vector<int64_t>& rows) {
    std::vector<NetSegment> out;
    int64_t summed = 0;
    for (const int64_t row : rows) {
      if (!out.empty() && summed < PART && out.back().offset + out.back().length == row) {
        ++out.back().length;
        ++summed;
        continue;
      }
      const bool part = summed == PART;
      if (part) summed = 0;
      out.push_back({row, 1, part});
      ++summed;
    }
    return out;
  }

  // Rows that the first `count` positions of a pass read, each counted once.
  static int64_t touched(const NetPass& pass, int64_t count) {
    std::vector<std::pair<int64_t, int64_t>> spans;
    for (int64_t p = 0; p < std::min(count, pass.positions); ++p) {
      for (int64_t i = 0; i < pass.segment_count; ++i) {
        const int64_t begin = pass.from[p] + pass.segments[i].offset;
        spans.push_back({begin, begin + pass.segments[i].length});
      }
    }
    std::sort(spans.begin(), spans.end());
    int64_t rows = 0, end = INT64_MIN;
    for (const auto& [from, to] : spans) {
      rows += std::max<int64_t>(0, to - std::max(from, end));
      end = std::max(end, to);
    }
    return rows;
  }

  int64_t registers_of(int64_t positions) const { return (positions + loops_.together - 1) / loops_.together; }

  // The block of positions x outputs that costs least: products, loads and broadcasts two a cycle, the sums' latency,
  // and what comes from the second-level cache because it does not fit into the first.
  void choose_block(NetPass& pass) const {
    const auto from_second = [](int64_t bytes, int64_t all) {
      return all > FIRST_LEVEL ? static_cast<double>(bytes) / SECOND_LEVEL : 0.0;
    };
    const int64_t weights = pass.outputs * pass.depth * static_cast<int64_t>(sizeof(float));
    double least = 1e300;
    for (int64_t p = 1; p <= loops_.most_registers * loops_.together; ++p) {
      const int64_t read = touched(pass, p) * loops_.lanes * static_cast<int64_t>(sizeof(float));
      const double rows = from_second(read, read);
      for (int64_t j = 1; j <= loops_.most_outputs && registers_of(p) * j <= loops_.registers; ++j) {
        const NetSplit ps = NetSplit::of(pass.positions, p), js = NetSplit::of(pass.outputs, j);
        double cost = 0.0;
        for (int big_p = 0; big_p < 2; ++big_p) {
          for (int big_j = 0; big_j < 2; ++big_j) {
            const int64_t tall = big_p ? ps.larger : ps.parts - ps.larger;
            const int64_t broad = big_j ? js.larger : js.parts - js.larger;
            const double np = static_cast<double>(ps.size + big_p), nj = static_cast<double>(js.size + big_j);
            const double row = std::max({static_cast<double>(registers_of(ps.size + big_p)) * nj / 2, (np + nj) / 2, 4.0});
            const double packed = from_second(weights * (js.size + big_j) / pass.outputs, weights);
            cost += static_cast<double>(tall * broad) *
                    (static_cast<double>(pass.depth) * row + 2 * np * nj + 16 + rows + packed);
          }
        }
        if (cost <= least) {  // of equal ones the one with more positions
          least = cost;
          pass.block_positions = p;
          pass.block_outputs = j;
        }
      }
    }
  }

  // Weight of output j and depth k: weight[outputs[j] + depth[k]]; the bias of output j: bias[biases[j]]. Where the
  // weights are packed, which is a job for later or, without `weight`, for the caller.
  float* add_pass(std::vector<NetPass>& passes, NetPass pass, const std::vector<int64_t>& rows, const float* weight,
                  std::vector<int64_t> outputs, std::vector<int64_t> depth, const float* bias,
                  const std::vector<int64_t>& biases) {
    std::vector<NetSegment> segments = segments_of(rows);
    pass.segment_count = static_cast<int64_t>(segments.size());
    pass.whole = std::none_of(segments.begin(), segments.end(), [](const NetSegment& s) { return s.part; });
    pass.segments = own(segments_, std::move(segments));
    pass.outputs = static_cast<int64_t>(outputs.size());
    pass.depth = static_cast<int64_t>(depth.size());
    if (pass.positions == 0 || pass.outputs == 0) return nullptr;
    if (pass.block_positions == 0) choose_block(pass);
    // one more, for they may be read two at a time
    float* const packed = own(numbers_, std::vector<float>(static_cast<size_t>(pass.outputs * pass.depth) + 1));
    pass.weight = packed;
    weights_ += pass.outputs * pass.depth;
    if (weight) {
      const NetSplit split = NetSplit::of(pass.outputs, pass.block_outputs);
      packing_.push_back([=, outputs = std::move(outputs), depth = std::move(depth)] {
        pack(packed, weight, outputs, depth, split);
      });
    }
    if (bias) {
      std::vector<float> own_bias;
      for (const int64_t j : biases) own_bias.push_back(bias[j]);
      pass.bias = own(numbers_, std::move(own_bias));
    }
    passes.push_back(pass);
    return packed;
  }

  static void pack(float* to, const float* weight, const std::vector<int64_t>& outputs,
                   const std::vector<int64_t>& depth, const NetSplit& split) {
    for (int64_t i = 0, j = 0; i < split.parts; j += split.part(i), ++i) {
      const int64_t count = split.part(i);
      const float* from[16];
      bool together = true;  // in memory
      for (int64_t n = 0; n < count; ++n) {
        from[n] = weight + outputs[static_cast<size_t>(j + n)];
        together = together && from[n] == from[0] + n;
      }
      for (const int64_t k : depth) {
        if (together) {
          memcpy(to, from[0] + k, sizeof(float) * static_cast<size_t>(count));
        } else {
          for (int64_t n = 0; n < count; ++n) to[n] = from[n][k];
        }
        to += count;
      }
    }
  }

  // The outputs of a convolution, or one class of them modulo the stride: the rows where the first reads and writes, and
  // how many it is to the next line and position.
  struct Grid {
    int64_t height, width, from, from_y, from_x, to, to_y, to_x;
  };

  // What the passes and tiles of a layer, or of its gradient, grow from.
  struct Products {
    std::vector<NetPass> passes;
    std::vector<NetWinograd> tiles;
  };

  // A convolution's weight is (a, b, kh, kw) with a in groups; direct: sums over b (and the kernel) give a.
  void direct(const NetSpec& s, const NetValue& in, int64_t in_rows, const NetValue& out, int64_t out_rows,
              const float* bias, Products& products) {
    const auto axis = [&](int i, int64_t unit) {
      Axis taps{{}, unit, s.stride[i]};
      for (int64_t k = 0; k < s.sizes[2 + i]; ++k) taps.taps.push_back({k * s.dilation[i] * unit, k});
      return taps;
    };
    const Grid grid = {out.height, out.width, in.at(-s.padding[0], -s.padding[1]), s.stride[0] * in.pitch(),
                       s.stride[1] * in.channels, out.at(0, 0), out.pitch(), out.channels};
    const int64_t a = s.sizes[0] / s.groups, b = s.sizes[1], area = s.sizes[2] * s.sizes[3];
    convolve(s, grid, axis(0, in.pitch()), axis(1, in.channels), {s.weight, bias, a, b, b * area, area, s.sizes[3]},
             in_rows, out_rows, products);
  }

  // Scattered: sums over a give b; the outputs fall into classes modulo the stride, each with its own taps.
  void scattered(const NetSpec& s, const NetValue& in, int64_t in_rows, const NetValue& out, int64_t out_rows,
                 const float* bias, Products& products) {
    const int64_t a = s.sizes[0] / s.groups, b = s.sizes[1], area = s.sizes[2] * s.sizes[3];
    const auto axis = [&](int i, int64_t first, int64_t unit, int64_t& start) {
      Axis taps{{}, unit, 1};
      for (int64_t k = s.sizes[2 + i]; k-- > 0;) {  // what is read from low to high
        const int64_t at = first + s.padding[i] - k * s.dilation[i];
        const int64_t place = divide_down(at, s.stride[i]);
        if (place * s.stride[i] != at) continue;
        if (taps.taps.empty()) start = place;
        taps.taps.push_back({(place - start) * unit, k});
      }
      return taps;
    };
    for (int64_t y0 = 0; y0 < std::min(s.stride[0], out.height); ++y0) {
      for (int64_t x0 = 0; x0 < std::min(s.stride[1], out.width); ++x0) {
        int64_t y = 0, x = 0;
        const Axis ys = axis(0, y0, in.pitch(), y), xs = axis(1, x0, in.channels, x);
        const Grid grid = {(out.height - y0 + s.stride[0] - 1) / s.stride[0],
                           (out.width - x0 + s.stride[1] - 1) / s.stride[1],
                           in.at(y, x),
                           in.pitch(),
                           in.channels,
                           out.at(y0, x0),
                           s.stride[0] * out.pitch(),
                           s.stride[1] * out.channels};
        convolve(s, grid, ys, xs, {s.weight, bias, b, a, area, b * area, s.sizes[3]}, in_rows, out_rows, products);
      }
    }
  }

  void convolve(const NetSpec& s, const Grid& grid, const Axis& ys, const Axis& xs, const Weights& w, int64_t in_rows,
                int64_t out_rows, Products& products) {
    if (s.tiles && s.groups == 1 && tiles_pay(grid, ys, xs, w)) {
      return tiled(grid, ys, xs, w, in_rows, out_rows, products.tiles);
    }
    std::vector<int32_t> from, to;
    for (int64_t y = 0; y < grid.height; ++y) {
      for (int64_t x = 0; x < grid.width; ++x) {
        from.push_back(static_cast<int32_t>(grid.from + y * grid.from_y + x * grid.from_x));
        to.push_back(static_cast<int32_t>(grid.to + y * grid.to_y + x * grid.to_x));
      }
    }
    NetPass pass;
    pass.positions = static_cast<int64_t>(from.size());
    pass.from = own(positions_, std::move(from));
    pass.to = own(positions_, std::move(to));
    std::vector<int64_t> rows, outputs, depth, biases;
    for (const auto& [y, ky] : ys.taps) {
      for (const auto& [x, kx] : xs.taps) {
        for (int64_t c = 0; c < w.inputs; ++c) {
          rows.push_back(y + x + c);
          depth.push_back(c * w.input_step + ky * w.line + kx);
        }
      }
    }
    for (int64_t j = 0; j < w.outputs; ++j) {
      outputs.push_back(j * w.output_step);
      biases.push_back(j);
    }
    for (int64_t g = 0; g < s.groups; ++g) {
      pass.in = in_rows + g * w.inputs;
      pass.out = out_rows + g * w.outputs;
      add_pass(products.passes, pass, rows, w.from + g * s.sizes[0] / s.groups * s.sizes[1] * s.sizes[2] * s.sizes[3],
               outputs, depth, w.bias ? w.bias + g * w.outputs : nullptr, biases);
    }
  }

  // -- Winograd's tiles

  // Whether tiles pay, the same for every instruction set, so that all agree bit for bit.
  static bool tiles_pay(const Grid& grid, const Axis& ys, const Axis& xs, const Weights& w) {
    const int64_t r = ys.each();
    if (r != xs.each() || (r != 2 && r != 3)) return false;
    const int64_t inputs = ys.phases * xs.phases * w.inputs, products = inputs * w.outputs;
    const int64_t at = points(cut(grid.height, r), r) * points(cut(grid.width, r), r);
    return at * (products + TRANSFORM * (inputs + w.outputs)) < grid.height * grid.width * r * r * products;
  }

  void tiled(const Grid& grid, const Axis& ys, const Axis& xs, const Weights& weights, int64_t in_rows,
             int64_t out_rows, std::vector<NetWinograd>& tiles) {
    NetWinograd w;
    w.taps = ys.each();
    w.in = in_rows;
    w.out = out_rows;
    w.channels = weights.inputs;
    w.outputs = weights.outputs;
    w.in_pitch = grid.from_y;
    w.in_step = grid.from_x;
    w.out_pitch = grid.to_y;
    w.out_step = grid.to_x;
    std::vector<int32_t> phases;
    for (int64_t y = 0; y < ys.phases; ++y) {
      for (int64_t x = 0; x < xs.phases; ++x) phases.push_back(static_cast<int32_t>(y * ys.unit + x * xs.unit));
    }
    w.phase_count = static_cast<int64_t>(phases.size());
    w.phases = own(positions_, std::move(phases));
    if (weights.bias) w.bias = own(numbers_, std::vector<float>(weights.bias, weights.bias + w.outputs));
    std::vector<NetWinograd> kinds;
    for (const Cut& y : cut(grid.height, w.taps)) {
      for (const Cut& x : cut(grid.width, w.taps)) kinds.push_back(tiles_of(w, grid, y, x));
    }
    std::vector<std::vector<float*>> packed;
    for (NetWinograd& kind : kinds) packed.push_back(add_points(kind));
    tiles.insert(tiles.end(), kinds.begin(), kinds.end());
    packing_.push_back([=, kinds = std::move(kinds)] { pack_at_points(kinds, packed, ys, xs, weights); });
  }

  NetWinograd tiles_of(NetWinograd w, const Grid& grid, const Cut& rows, const Cut& columns) {
    w.height = rows.size;
    w.width = columns.size;
    std::vector<int32_t> from, to;
    for (int64_t i = 0; i < rows.count; ++i) {
      for (int64_t k = 0; k < columns.count; ++k) {
        const int64_t y = rows.first + i * rows.size, x = columns.first + k * columns.size;
        from.push_back(static_cast<int32_t>(grid.from + y * grid.from_y + x * grid.from_x));
        to.push_back(static_cast<int32_t>(grid.to + y * grid.to_y + x * grid.to_x));
      }
    }
    w.tiles = static_cast<int64_t>(from.size());
    w.from = own(positions_, std::move(from));
    w.to = own(positions_, std::move(to));
    // blocks of 4 positions, or of a multiple, leave none over
    w.chunk = std::max<int64_t>(4, CHUNK / (w.point_count() * (w.inputs() + w.outputs)) / 4 * 4);
    w.chunk = std::min(w.chunk, (w.tiles + members_ - 1) / members_);
    // room for an odd number of tiles, and an odd number of rows: the points of a tile must not meet in few of a cache's
    // sets, and the channels of most layers are a power of two
    w.in_point = (w.chunk | 1) * w.inputs() | 1;
    w.out_point = (w.chunk | 1) * w.outputs | 1;
    plan_.scratch = std::max(plan_.scratch, w.rows());
    return w;
  }

  // The pass of each point; where its weights are to be.
  std::vector<float*> add_points(NetWinograd& w) {
    std::vector<int64_t> read;
    std::vector<int32_t> starts[2];
    for (int64_t i = 0; i < w.inputs(); ++i) read.push_back(i);
    const std::vector<int64_t> outputs(static_cast<size_t>(w.outputs));
    for (int64_t t = 0; t < w.chunk; ++t) {
      starts[0].push_back(static_cast<int32_t>(t * w.inputs()));
      starts[1].push_back(static_cast<int32_t>(t * w.outputs));
    }
    NetPass pass;
    pass.positions = w.chunk;
    pass.from = own(positions_, std::move(starts[0]));
    pass.to = own(positions_, std::move(starts[1]));
    std::vector<NetPass> passes;
    std::vector<float*> packed;
    for (int64_t f = 0; f < w.point_count(); ++f) {
      pass.in = f * w.in_point;
      packed.push_back(add_pass(passes, pass, read, nullptr, outputs, read, nullptr, {}));
      pass.block_positions = passes[0].block_positions;  // of all the same
      pass.block_outputs = passes[0].block_outputs;
    }
    w.points = own(passes_, std::move(passes));
    return packed;
  }

  // The rows inside a value's border, line by line, with the row-major element each holds.
  struct Line {
    int64_t row;
    std::vector<int64_t> elements;
  };

  static std::vector<Line> lines_of(const NetValue& v) {
    std::vector<Line> lines;
    for (int64_t y = 0; y < v.height; ++y) {
      if (lines.empty() || v.border_x > 0) lines.push_back({v.at(y, 0), {}});
      for (int64_t x = 0; x < v.width; ++x) {
        for (int64_t c = 0; c < v.channels; ++c) lines.back().elements.push_back((c * v.height + y) * v.width + x);
      }
    }
    return lines;
  }

  // out = weight in (+ bias), or with `transposed` the gradient; weight (outputs, inputs) of the layer.
  void dense(const float* weight, int64_t inputs, bool transposed, const NetValue& in, int64_t in_rows,
             const NetValue& out, int64_t out_rows, const float* bias, std::vector<NetPass>& passes) {
    std::vector<int64_t> rows, depth;
    for (const Line& line : lines_of(in)) {
      for (size_t i = 0; i < line.elements.size(); ++i) {
        rows.push_back(line.row + static_cast<int64_t>(i));
        depth.push_back(line.elements[i] * (transposed ? inputs : 1));
      }
    }
    for (const Line& line : lines_of(out)) {
      std::vector<int64_t> outputs;
      for (const int64_t e : line.elements) outputs.push_back(e * (transposed ? 1 : inputs));
      NetPass pass;
      pass.positions = 1;
      pass.from = own(positions_, std::vector<int32_t>{0});
      pass.to = own(positions_, std::vector<int32_t>{static_cast<int32_t>(line.row)});
      pass.in = in_rows;
      pass.out = out_rows;
      add_pass(passes, pass, rows, weight, outputs, depth, bias, line.elements);
    }
  }

  // -- maps

  // Element e of `out` from (node, element, weight) each; forward, and back to every node that is read.
  struct Link {
    int64_t out, in;
    size_t read;
    float weight;
  };

  // Sums by row: rows[e] is the sum of terms[start[e]] to terms[start[e + 1] - 1].
  struct Sums {
    std::vector<int64_t> rows, start;
    std::vector<NetTerm> terms;
  };

  // `place` gives the sum (or -1 for none) and the term of a link.
  template <class Place>
  static Sums sums_of(std::vector<int64_t> rows, const std::vector<Link>& links, const Place& place) {
    Sums sums;
    sums.rows = std::move(rows);
    sums.start.assign(sums.rows.size() + 1, 0);
    NetTerm term;
    for (const Link& l : links) {
      const int64_t e = place(l, term);
      if (e >= 0) ++sums.start[static_cast<size_t>(e) + 1];
    }
    for (size_t e = 0; e < sums.rows.size(); ++e) sums.start[e + 1] += sums.start[e];
    std::vector<int64_t> next = sums.start;
    sums.terms.resize(static_cast<size_t>(sums.start.back()));
    for (const Link& l : links) {
      const int64_t e = place(l, term);
      if (e >= 0) sums.terms[static_cast<size_t>(next[static_cast<size_t>(e)]++)] = term;
    }
    return sums;
  }

  // Rows that move along with each other become one run.
  NetRuns runs_of(const Sums& sums) {
    const auto [low, high] = std::minmax_element(sums.rows.begin(), sums.rows.end());
    std::vector<int32_t> order(static_cast<size_t>(*high - *low + 1), -1);  // by rows, with gaps
    for (size_t e = 0; e < sums.rows.size(); ++e) {
      order[static_cast<size_t>(sums.rows[e] - *low)] = static_cast<int32_t>(e);
    }
    std::vector<NetRun> runs;
    std::vector<NetTerm> terms;
    terms.reserve(sums.terms.size());
    for (const int32_t at : order) {
      if (at < 0) continue;
      const auto e = static_cast<size_t>(at);
      const NetTerm* own_terms = sums.terms.data() + sums.start[e];
      const int64_t count = sums.start[e + 1] - sums.start[e];
      bool along = !runs.empty() && runs.back().out + runs.back().count == sums.rows[e] && runs.back().terms == count;
      for (int64_t k = 0; along && k < count; ++k) {
        const NetTerm& first = terms[static_cast<size_t>(runs.back().first + k)];
        along = first.in + runs.back().count == own_terms[k].in && first.weight == own_terms[k].weight;
      }
      if (along) {
        ++runs.back().count;
        continue;
      }
      runs.push_back({static_cast<int32_t>(sums.rows[e]), 1, static_cast<int32_t>(count),
                      static_cast<int64_t>(terms.size())});
      terms.insert(terms.end(), own_terms, own_terms + count);
    }
    NetRuns out;
    out.count = static_cast<int64_t>(runs.size());
    out.products = static_cast<int64_t>(sums.terms.size());
    out.runs = own(runs_, std::move(runs));
    out.terms = own(terms_, std::move(terms));
    return out;
  }

  void connect_map(Work& w, const NetValue& out, const std::vector<Link>& links, const std::vector<NetValue>& ins) {
    const auto rows_of = [](const NetValue& v, int64_t begin) {
      std::vector<int64_t> rows(static_cast<size_t>(v.elements()));
      for (int64_t e = 0; e < v.elements(); ++e) rows[static_cast<size_t>(e)] = begin + row_of(v, e);
      return rows;
    };
    w.node.runs = runs_of(sums_of(rows_of(out, out.value), links, [&](const Link& l, NetTerm& term) {
      const NetValue& in = ins[l.read];
      term = {static_cast<int32_t>(in.value + row_of(in, l.in)), l.weight};
      return l.out;
    }));
    for (size_t k = 0; k < w.reads.size(); ++k) {
      if (!w.reads[k].needed) continue;
      const NetValue& in = ins[k];
      w.reads[k].back = runs_of(sums_of(rows_of(in, in.grad), links, [&](const Link& l, NetTerm& term) {
        term = {static_cast<int32_t>(out.grad + row_of(out, l.out)), l.weight};
        return l.read == k ? l.in : int64_t{-1};
      }));
    }
  }

  void connect_map(Work& w, const NetValue& out) {
    std::vector<NetValue> ins;
    std::vector<int64_t> starts = {0};
    for (const int32_t x : w.xs) {
      ins.push_back(values_[static_cast<size_t>(x)]);
      starts.push_back(starts.back() + ins.back().elements());
    }
    std::vector<Link> links;
    const NetSpec* s = w.spec;
    links.reserve(static_cast<size_t>(out.elements() * (w.relayout ? 1 : s->terms)));
    for (int64_t e = 0; e < out.elements(); ++e) {
      if (w.relayout) {
        links.push_back({e, e, 0, 1.0f});
        continue;
      }
      for (int64_t k = 0; k < s->terms; ++k) {
        const int64_t i = s->index[e * s->terms + k];
        if (i < -1 || i >= starts.back()) refuse("an index of a map is out of range");
        if (i < 0) continue;
        size_t read = 0;
        while (i >= starts[read + 1]) ++read;
        links.push_back({e, i - starts[read], read, s->index_weight ? s->index_weight[e * s->terms + k] : 1.0f});
      }
    }
    connect_map(w, out, links, ins);
  }

  NetConstant constant(const float* from, bool per_chain, const NetValue& v) {
    NetConstant c;
    if (!from) return c;
    std::vector<int32_t> order;
    for (const Line& line : lines_of(v)) {
      for (const int64_t e : line.elements) order.push_back(static_cast<int32_t>(e));
    }
    if (per_chain) {
      c.chains = from;
      c.rows = take(v.elements());
      c.order = own(positions_, std::move(order));
    } else {
      std::vector<float> numbers;
      for (const int32_t e : order) numbers.push_back(from[e]);
      c.numbers = own(numbers_, std::move(numbers));
    }
    return c;
  }

  // -- what each node needs

  void connect() {
    std::vector<bool> written(works_.size(), false);
    std::vector<std::pair<size_t, size_t>> final(works_.size(), {SIZE_MAX, 0});  // who writes a gradient last
    for (size_t i = works_.size(); i-- > 0;) {
      Work& w = works_[i];
      for (size_t k = 0; k < w.xs.size() && !w.merged; ++k) {
        const auto x = static_cast<size_t>(w.xs[k]);
        NetRead read;
        read.value = w.xs[k];
        read.needed = works_[x].needed && w.needed;
        if (w.kind == NetKind::add) read.coefficient = w.spec->coefficients.at(k);
        if (read.needed) {
          read.store = !written[x];
          written[x] = true;
          final[x] = {i, k};
        }
        w.reads.push_back(read);
      }
    }
    for (size_t i = 0; i < works_.size(); ++i) {
      Work& w = works_[i];
      if (!w.fused || !w.needed) continue;
      const auto [by, k] = final[i];
      if (by != SIZE_MAX && works_[by].kind != NetKind::norm && works_[by].kind != NetKind::logsumexp) {
        works_[by].reads[k].times = true;
      } else {
        w.node.multiply = true;
      }
    }
    // what a merged sum would do its last layer does
    for (const Work& w : works_) {
      if (!w.merged) continue;
      const int32_t first = *std::min_element(w.xs.begin(), w.xs.end());
      for (const int32_t x : w.xs) works_[static_cast<size_t>(x)].node.accumulate = x != first;
      Work& last = works_[static_cast<size_t>(*std::max_element(w.xs.begin(), w.xs.end()))];
      last.activation = w.activation;
      last.slope = w.slope;
      last.node.multiply = w.node.multiply;
    }
    for (size_t i = 0; i < works_.size(); ++i) {
      Work& w = works_[i];
      if (w.merged) continue;
      const NetValue& out = values_[slot(i)];
      NetNode& n = w.node;
      n.kind = w.kind;
      n.out = static_cast<int32_t>(slot(i));
      n.activation = w.activation;
      n.slope = w.slope;
      switch (w.kind) {
        case NetKind::input: connect_input(w, out); break;
        case NetKind::product_sum: connect_products(w, out); break;
        case NetKind::map: connect_map(w, out); break;
        case NetKind::add: n.shift = constant(w.spec->shift, w.spec->shift_per_chain, out); break;
        case NetKind::affine:
          n.scale = constant(w.spec->scale, w.spec->scale_per_chain, out);
          n.shift = constant(w.spec->shift, w.spec->shift_per_chain, out);
          break;
        case NetKind::norm: connect_norm(w, out); break;
        case NetKind::logsumexp: connect_logsumexp(w, out); break;
        case NetKind::product: n.divide = w.spec->divide; break;
        case NetKind::activation: break;
      }
      n.reads = own(reads_, w.reads);
      n.read_count = static_cast<int32_t>(w.reads.size());
      if (!w.alias) nodes_.push_back(n);
    }
  }

  void connect_input(Work& w, const NetValue& out) {
    if (w.alias) return;
    NetValue state;
    state.channels = w.spec->elements();
    state.value = plan_.state + w.spec->start;
    state.grad = plan_.grad + w.spec->start;
    NetRead read;
    read.needed = w.needed;
    read.store = true;
    w.reads = {read};
    std::vector<Link> links;
    links.reserve(static_cast<size_t>(out.elements()));
    for (int64_t e = 0; e < out.elements(); ++e) links.push_back({e, e, 0, 1.0f});
    connect_map(w, out, links, {state});
  }

  void connect_products(Work& w, const NetValue& out) {
    const NetSpec& s = *w.spec;
    const NetValue& in = values_[static_cast<size_t>(w.xs[0])];
    Products forward, backward;
    if (s.kind == NetNodeKind::linear) {
      dense(s.weight, in.elements(), false, in, in.value, out, out.value, s.bias, forward.passes);
      if (w.reads[0].needed) dense(s.weight, in.elements(), true, out, out.grad, in, in.grad, nullptr, backward.passes);
    } else if (s.transposed) {
      scattered(s, in, in.value, out, out.value, s.bias, forward);
      if (w.reads[0].needed) direct(s, out, out.grad, in, in.grad, nullptr, backward);
    } else {
      direct(s, in, in.value, out, out.value, s.bias, forward);
      if (w.reads[0].needed) scattered(s, out, out.grad, in, in.grad, nullptr, backward);
    }
    w.node.forward = owned(std::move(forward));
    w.node.backward = owned(std::move(backward));
  }

  NetProducts owned(Products products) {
    NetProducts out;
    out.pass_count = static_cast<int64_t>(products.passes.size());
    out.passes = own(passes_, std::move(products.passes));
    out.tile_count = static_cast<int64_t>(products.tiles.size());
    out.tiles = own(winograds_, std::move(products.tiles));
    return out;
  }

  void connect_norm(Work& w, const NetValue& out) {
    const NetValue& in = values_[static_cast<size_t>(w.xs[0])];
    const int64_t groups = w.spec->groups;
    if (groups < 1 || out.elements() % groups != 0) refuse("a norm does not cut its elements in equal groups");
    const int64_t length = out.elements() / groups;
    std::vector<int32_t> index;
    for (int64_t g = 0; g < groups; ++g) {
      for (const NetValue* v : {&in, &out}) {
        for (int64_t i = 0; i < length; ++i) index.push_back(static_cast<int32_t>(row_of(*v, g * length + i)));
      }
    }
    w.node.index = own(positions_, std::move(index));
    w.node.groups = groups;
    w.node.length = length;
    w.node.eps = w.spec->eps;
    w.node.scratch = take(groups + out.elements());
  }

  void connect_logsumexp(Work& w, const NetValue& out) {
    const NetValue& in = values_[static_cast<size_t>(w.xs[0])];
    const NetSpec& s = *w.spec;
    std::vector<int32_t> index;
    for (int64_t i = 0; i < out.elements() * s.terms; ++i) {
      if (s.index[i] < 0 || s.index[i] >= in.elements()) refuse("an index of a logsumexp is out of range");
      index.push_back(static_cast<int32_t>(row_of(in, s.index[i])));
    }
    for (int64_t e = 0; e < out.elements(); ++e) index.push_back(static_cast<int32_t>(row_of(out, e)));
    w.node.index = own(positions_, std::move(index));
    w.node.groups = out.elements();
    w.node.length = s.terms;
    w.node.scratch = take(out.elements() * s.terms);
  }

  void finish() {
    plan_.values = values_.data();
    plan_.value_count = static_cast<int64_t>(values_.size());
    plan_.nodes = nodes_.data();
    plan_.node_count = static_cast<int64_t>(nodes_.size());
    plan_.rows = rows_;
    plan_.last = last_;
  }

  const ChainJob& job_;
  const std::vector<NetSpec>& specs_;
  const NetLoops& loops_;
  const int64_t members_;
  std::vector<int32_t> root_;
  std::vector<Dims> want_;
  std::vector<Work> works_;
  std::vector<NetValue> values_;
  std::vector<NetNode> nodes_;
  std::deque<std::vector<float>> numbers_;
  std::deque<std::vector<int32_t>> positions_;
  std::deque<std::vector<NetSegment>> segments_;
  std::deque<std::vector<NetPass>> passes_;
  std::deque<std::vector<NetWinograd>> winograds_;
  std::deque<std::vector<NetRun>> runs_;
  std::deque<std::vector<NetTerm>> terms_;
  std::deque<std::vector<NetRead>> reads_;
  std::vector<std::function<void()>> packing_;
  NetPlan plan_;
  int64_t rows_ = 0, weights_ = 0;
  int32_t last_ = 0;
};

// Tiles of one width: all chains from `first` on, or `count` tiles of them.
struct Part {
  const NetLoops* loops;
  int64_t first, count;
};

// A tile of half as many chains takes about so much of the time: .64 to .69 for the nets of benchmarks/bench_net_chain.py
// on an EPYC (Zen 5), 8 for 16, and about as much with AVX2, 4 for 8 (Zen 3), in runs that are not on record.
constexpr double NARROW = 0.67;

// Wide vectors, and narrow ones for a rest of the batch that fits into them or where there are more threads than tiles.
std::vector<Part> parts_of(int64_t chains, Isa isa, int threads) {
  const NetLoops& wide = net_loops(isa);
  const int64_t tiles = (chains + wide.lanes - 1) / wide.lanes;
#if defined(MMEBM_X86)
  if (isa != Isa::generic) {
    const NetLoops& narrow = isa == Isa::avx512 ? net_loops_narrow512 : net_loops_narrow256;  // bit for bit the same
    const int64_t halves = (chains + narrow.lanes - 1) / narrow.lanes;
    const auto turns = [threads](int64_t count) { return static_cast<double>((count + threads - 1) / threads); };
    if (turns(halves) * NARROW < turns(tiles)) return {{&narrow, 0, halves}};
    if (chains % wide.lanes > 0 && chains % wide.lanes <= narrow.lanes) {
      const Part rest = {&narrow, (tiles - 1) * wide.lanes, 1};
      return tiles == 1 ? std::vector<Part>{rest} : std::vector<Part>{{&wide, 0, tiles - 1}, rest};
    }
  }
#endif
  (void)threads;
  return {{&wide, 0, tiles}};
}

// Vectors' products of one evaluation, about.
int64_t products_of(const std::vector<NetSpec>& nodes) {
  int64_t products = 0;
  for (const NetSpec& s : nodes) {
    if (s.kind != NetNodeKind::conv && s.kind != NetNodeKind::linear) continue;
    const auto read = s.xs.empty() ? nodes.size() : static_cast<size_t>(s.xs[0]);
    if (read >= nodes.size()) continue;  // the planner refuses it
    const NetSpec& x = nodes[read];
    const bool linear = s.kind == NetNodeKind::linear;
    const int64_t taps = linear ? x.elements() : s.sizes[1] * s.sizes[2] * s.sizes[3];
    products += 2 * (s.transposed ? x.elements() : s.elements()) * taps;  // there and back
  }
  return products;
}

}  // namespace

void run_net(ChainJob job, const std::vector<NetSpec>& nodes, Isa isa, int threads) {
  // Threads that share a tile. A net with few products is not worth it: of that each tile is the work of one thread.
  const int64_t members = std::clamp<int64_t>(products_of(nodes) / (4 * NET_SHARED), 1, std::max(threads, 1));
  const std::vector<Part> parts = parts_of(job.chains, isa, members > 1 ? 1 : std::max(threads, 1));
  std::deque<Planner> planners;
  int64_t total = 0, size = 0, scratch = 0;
  for (const Part& part : parts) {
    const Planner& planner = planners.emplace_back(job, nodes, *part.loops, members);
    planner.pack_weights(threads);
    const NetPlan& plan = planner.plan();
    total += part.count;
    size = std::max(size, plan.rows * part.loops->lanes);
    scratch = std::max(scratch, plan.scratch * part.loops->lanes);
  }
  threads = static_cast<int>(std::clamp<int64_t>(total * members, 1, std::max(threads, 1)));
  const int64_t lines = 64 / sizeof(float) - 1;  // a cache's
  size = (size + lines) & ~lines;
  scratch = (scratch + lines) & ~lines;
  const int64_t arenas = std::min<int64_t>(threads, total);
  const Zeros zeros(size * arenas + scratch * threads);
  float* const scratches = zeros.data() + size * arenas;
  const std::unique_ptr<Team[]> teams(new Team[static_cast<size_t>(total)]);
  std::atomic<int64_t> next{0}, leaders{0}, present{0};
  on_threads(threads, [&] {
    float *const own = scratches + present.fetch_add(1) * scratch, *arena = nullptr;
    size_t before = 0;  // the part that the arena was used for
    for (int64_t tile; (tile = next.fetch_add(1)) < total;) {
      int64_t at = tile;
      size_t i = 0;
      for (; at >= parts[i].count; ++i) at -= parts[i].count;
      if (!arena) {
        arena = zeros.data() + leaders.fetch_add(1) * size;
      } else if (before != i) {  // else borders are as they were: zero
        memset(arena, 0, sizeof(float) * static_cast<size_t>(size));
      }
      before = i;
      Team& team = teams[static_cast<size_t>(tile)];
      const NetLoops& loops = *parts[i].loops;
      const NetRoom room = {arena, own, members > 1 ? &team : nullptr};
      loops.tile(job, planners[i].plan(), parts[i].first + at * loops.lanes, room);
      team.close();
    }
    // No tile is left to take: help where the fewest do
    while (members > 1) {
      Team* least = nullptr;
      for (int64_t tile = 0; tile < total; ++tile) {
        Team& team = teams[static_cast<size_t>(tile)];
        if (!team.closed() && (!least || team.helpers() < least->helpers())) least = &team;
      }
      if (!least || !least->help(own)) return;
    }
  });
}

}  // namespace mmebm

// Binding of the convolutions. Python has made the form of the weights, which is trusted beyond its
// sizes.
#include "conv/bindings.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "common/isa.hpp"
#include "common/scratch.hpp"
#include "common/tensor.hpp"
#include "conv/conv.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

using Pair = std::pair<int64_t, int64_t>;  // vertical, horizontal
using Shape = std::array<int64_t, 4>;  // images, channels, height, width

constexpr int64_t kSmall = 1 << 16;  // multiplications below which a second thread does not pay

// The bias of a sum's channel, if any, and a clamp.
struct OwnedEpilogue {
  std::optional<Tensor> bias;
  float low, high;

  Epilogue view(int64_t channels) const {
    return {bias ? bias->data<const float>("bias", {channels}) : nullptr, low, high};
  }
};

struct DepthwiseConv {
  DepthwiseConv(const Tensor& weight_, int64_t stride_, const OwnedEpilogue& epilogue_)
      : weight(weight_),
        epilogue(epilogue_),
        stride(stride_) {
    if (stride != 1 && stride != 2) throw std::invalid_argument("conv: stride is 1 or 2");
    address = weight.data<const float>("weight", {channels(), 1, 3, 3});
    view = epilogue.view(channels());
  }
  int64_t channels() const { return weight.size(0); }

  Tensor weight;
  OwnedEpilogue epilogue;
  int64_t stride;
  const float* address;
  Epilogue view;
};

// The kept weights of a matrix (out, depth): see Kept, and ops/conv/reference.py.
class ConvWeights {
 public:
  ConvWeights(const Tensor& values, const Tensor& columns, const Tensor& counts, const Tensor& rows,
              int64_t out, int64_t depth, bool tiled)
      : count(values.count()),
        owners_{values.owner(), columns.owner(), counts.owner(), rows.owner()} {
    if (out < 0 || depth < 0 || depth > 1 << 16) throw std::invalid_argument("conv: bad matrix");
    const int64_t tiles = (out + kTileRows - 1) / kTileRows;
    view = {values.data<const float>("values", {count}),
            columns.data<const uint16_t>("columns", {columns.count()}),
            counts.data<const int32_t>("counts", {tiled ? tiles * kTileCounts : out}),
            rows.data<const int32_t>("rows", {tiled ? 0 : out}),
            out,
            depth,
            tiled};
    int64_t weights = 0, places = 0;
    for (int64_t k = 0; k < counts.count(); ++k) {
      places += view.counts[k];
      weights += view.counts[k] * (tiled ? __builtin_popcountll(k % kTileCounts) : 1);
    }
    if (weights != count || places != columns.count())
      throw std::invalid_argument("conv: counts do not add up to the weights");
  }

  int64_t count;
  Kept view{};

 private:
  std::array<nb::object, 4> owners_;
};

// A depthwise convolution, a sparse one, or both in this order.
class ConvStage {
 public:
  ConvStage(const std::optional<ConvWeights>& weights, Pair kernel, Pair stride, Pair padding,
            const OwnedEpilogue& epilogue, const std::optional<DepthwiseConv>& depthwise)
      : weights_(weights),
        depthwise_(depthwise),
        epilogue_(epilogue),
        kernel_(kernel),
        stride_(stride),
        padding_(padding) {
    if (!weights && !depthwise) throw std::invalid_argument("conv: a stage without weights");
    const bool sizes = kernel.first >= 1 && kernel.second >= 1 && padding.first >= 0 &&
                       padding.second >= 0 && stride.first >= 1;
    if (!sizes || (stride.second != 1 && stride.second != 2))
      throw std::invalid_argument("conv: bad window");
    const int64_t taps = kernel.first * kernel.second;
    if (weights && (weights->view.depth % taps || (depthwise && taps != 1)))
      throw std::invalid_argument("conv: the weights do not fit the window");
    if (weights) view_ = epilogue_.view(weights->view.out);
    if (weights && depthwise && depthwise->channels() != weights->view.depth)
      throw std::invalid_argument("conv: a depthwise convolution of other channels");
    if (!depthwise) return;
    kernel_ = {3, 3}, padding_ = {1, 1}, stride_ = {depthwise->stride, depthwise->stride};
  }

  int64_t channels() const {
    if (depthwise_) return depthwise_->channels();
    return weights_->view.depth / (kernel_.first * kernel_.second);
  }

  Shape output(const Shape& x) const {
    const Geometry s = geometry(x);
    const bool fits =
        x[1] == channels() && s.kernel_y <= x[2] + 2 * s.pad_y && s.kernel_x <= x[3] + 2 * s.pad_x;
    if (!fits) refuse(x);
    return {x[0], weights_ ? weights_->view.out : x[1], s.out_height(), s.out_width()};
  }

  // x of this shape, y as `output` says.
  void run(const Shape& shape, const float* x, float* y, int threads,
           const ConvKernels& run) const {
    Conv c{geometry(shape), nullptr, {}, weights_ ? &weights_->view : nullptr, view_};
    if (depthwise_) c.depthwise = depthwise_->address, c.between = depthwise_->view;
    const int64_t pixels = shape[0] * c.shape.out_height() * c.shape.out_width();
    if (pixels * (weights_ ? weights_->count : 9 * channels()) < kSmall) threads = 1;
    const Layout l = conv_layout(c, threads);
    thread_local std::vector<float> scratch;
    run.run(c, x, y, aligned(scratch, threads * ((l.floats(c) + 15) / 16 * 16)), threads);
  }

 private:
  Geometry geometry(const Shape& x) const {
    return {x[0],           x[1],          x[2],           x[3],           kernel_.first,
            kernel_.second, stride_.first, stride_.second, padding_.first, padding_.second};
  }

  [[noreturn]] void refuse(const Shape& x) const {
    std::string found;
    for (const int64_t size : x) found += (found.empty() ? "(" : ", ") + std::to_string(size);
    throw std::invalid_argument("images " + found + ") do not fit a convolution of " +
                                std::to_string(channels()) + " channels");
  }

  std::optional<ConvWeights> weights_;
  std::optional<DepthwiseConv> depthwise_;
  OwnedEpilogue epilogue_;
  Epilogue view_{};
  Pair kernel_, stride_, padding_;
};

// Stages one after the other. Results between them lie in two buffers that stay with the chain: new
// memory for every result would cost more than small layers do. Concurrent runs have their own.
class ConvChain {
 public:
  explicit ConvChain(std::vector<ConvStage> stages) : stages_(std::move(stages)) {
    if (stages_.empty()) throw std::invalid_argument("conv: a chain without stages");
  }

  // Of the result for such images.
  Shape shape(const Tensor& x) const {
    Shape found = of(x);
    for (const ConvStage& stage : stages_) found = stage.output(found);
    return found;
  }

  void run(const Tensor& x, const Tensor& y, int threads, int isa) {
    if (threads < 1) throw std::invalid_argument("conv: no thread");
    const auto& table = kernels<ConvKernels>(isa);
    Shape shape = of(x);
    const Shape last = this->shape(x);
    const float* source = x.data<const float>("x", {shape[0], shape[1], shape[2], shape[3]});
    float* result = y.data<float>("y", {last[0], last[1], last[2], last[3]});
    if (y.count() == 0) return;
    std::unique_ptr<Buffers> buffers = take();
    for (size_t k = 0; k < stages_.size(); ++k) {
      const Shape next = stages_[k].output(shape);
      float* target = result;
      if (k + 1 < stages_.size())
        target = aligned((*buffers)[k % 2], next[0] * next[1] * next[2] * next[3]);
      stages_[k].run(shape, source, target, threads, table);
      source = target, shape = next;
    }
    const std::lock_guard<std::mutex> guard(mutex_);
    idle_.push_back(std::move(buffers));
  }

 private:
  using Buffers = std::array<std::vector<float>, 2>;

  static Shape of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

  std::unique_ptr<Buffers> take() {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (idle_.empty()) return std::make_unique<Buffers>();
    std::unique_ptr<Buffers> found = std::move(idle_.back());
    idle_.pop_back();
    return found;
  }

  std::vector<ConvStage> stages_;
  std::vector<std::unique_ptr<Buffers>> idle_;
  std::mutex mutex_;
};

}  // namespace

void bind_conv(nb::module_& m) {
  nb::class_<OwnedEpilogue>(m, "ConvEpilogue")
      .def("__init__", [](OwnedEpilogue* self, const std::optional<Tensor>& bias, float low,
                          float high) { new (self) OwnedEpilogue{bias, low, high}; });
  nb::class_<DepthwiseConv>(m, "DepthwiseConv")
      .def(nb::init<const Tensor&, int64_t, const OwnedEpilogue&>());
  nb::class_<ConvWeights>(m, "ConvWeights")
      .def(nb::init<const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                    bool>());
  nb::class_<ConvStage>(m, "ConvStage")
      .def(nb::init<const std::optional<ConvWeights>&, Pair, Pair, Pair, const OwnedEpilogue&,
                    const std::optional<DepthwiseConv>&>());
  nb::class_<ConvChain>(m, "ConvChain")
      .def(nb::init<std::vector<ConvStage>>())
      .def("shape", &ConvChain::shape)
      .def("run", &ConvChain::run, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace gossamer

#include "common/tensor.hpp"

#include <nanobind/ndarray.h>

#include <stdexcept>

namespace nb = nanobind;

namespace gossamer {
namespace {

// The beginning of DLPackExchangeAPI (dlpack.h 1.3), which types of tensors offer in a capsule.
struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* older;
  void *allocate, *share, *to_python;
  int (*borrow)(void* object, nb::dlpack::dltensor* view);
};

const ExchangeApi* look_up(PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  const void* found = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  Py_XDECREF(capsule);
  if (!found) PyErr_Clear();
  const auto* api = static_cast<const ExchangeApi*>(found);
  while (api && api->major != 1) api = api->older;
  return api;
}

// Of the last few types that were asked for. They are kept, lest another comes to lie at an
// address.
const ExchangeApi* exchange_api(PyObject* type) {
  struct Known {
    PyObject* type;
    const ExchangeApi* api;
  };
  static Known known[4] = {};
  static unsigned next = 0;
  for (const Known& entry : known)
    if (entry.type == type) return entry.api;
  Known& entry = known[next++ % 4];
  Py_INCREF(type);
  PyObject* before = entry.type;
  entry = {type, look_up(type)};
  Py_XDECREF(before);
  return entry.api;
}

Type type_of(nb::dlpack::dtype dtype) {
  const auto code = static_cast<nb::dlpack::dtype_code>(dtype.code);
  using Code = nb::dlpack::dtype_code;
  if (dtype.lanes != 1) return Type::other;
  const auto is = [&](Code wanted, int bits) { return code == wanted && dtype.bits == bits; };
  if (is(Code::Float, 32)) return Type::float32;
  if (is(Code::Float, 64)) return Type::float64;
  if (is(Code::Bfloat, 16)) return Type::bfloat16;
  if (is(Code::Int, 8)) return Type::int8;
  if (is(Code::Int, 32)) return Type::int32;
  if (is(Code::Int, 64)) return Type::int64;
  if (is(Code::UInt, 8)) return Type::uint8;
  if (is(Code::UInt, 16)) return Type::uint16;
  if (is(Code::Bool, 8)) return Type::boolean;
  return Type::other;
}

const char* name_of(Type type) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "int8",    "int32",
                                   "int64",   "uint8",   "uint16",   "boolean", "another type"};
  return names[static_cast<int>(type)];
}

std::string text(const int64_t* sizes, size_t count) {
  std::string found = "(";
  for (size_t k = 0; k < count; ++k)
    found += (k ? ", " : "") + (sizes[k] == kAny ? "*" : std::to_string(sizes[k]));
  return found + ")";
}

}  // namespace

void Tensor::take_shape(int axes, const int64_t* shape, const int64_t* strides) {
  axes_ = axes, count_ = 1, last_ = axes ? shape[axes - 1] : 1;
  contiguous_ = true;
  for (int k = axes; k-- > 0;) {
    if (k < kAxes) shape_[k] = shape[k], strides_[k] = strides ? strides[k] : count_;
    if (strides && shape[k] != 1 && strides[k] != count_) contiguous_ = false;
    count_ *= shape[k];
  }
  contiguous_ |= count_ == 0;
  stride_ = axes == 0 ? 0 : strides ? strides[0] : count_ / (shape[0] ? shape[0] : 1);
  rows_apart_ = axes == 2 && (contiguous_ || shape[1] == 1 || strides[1] == 1);
}

bool Tensor::read(nb::handle object) noexcept {
  if (const ExchangeApi* api = exchange_api(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())))) {
    nb::dlpack::dltensor view;
    if (api->borrow(object.ptr(), &view)) {
      PyErr_Clear();
      return false;
    }
    owner_ = nb::borrow(object);
    take_shape(view.ndim, view.shape, view.strides);
    data_ = static_cast<char*>(view.data) + view.byte_offset;
    type_ = type_of(view.dtype);
    on_cpu_ = view.device.device_type == nb::device::cpu::value;
    return view.data || !count_;  // fake tensors have no memory
  }
  try {  // numpy, and torch before 2.10, which exports nothing that may want a gradient
    owner_ = nb::borrow(object);
    if (nb::hasattr(object, "detach")) owner_ = owner_.attr("detach")();
    nb::ndarray<nb::ro> array;
    if (!nb::try_cast(owner_, array, false)) return false;
    take_shape(static_cast<int>(array.ndim()), array.shape_ptr(), array.stride_ptr());
    data_ = const_cast<void*>(array.data());
    type_ = type_of(array.dtype());
    on_cpu_ = array.device_type() == nb::device::cpu::value;
    return true;
  } catch (...) {
    PyErr_Clear();
    return false;
  }
}

void Tensor::refuse(const char* name, const std::string& expected) const {
  std::string found = std::string(name_of(type_)) + " with " + std::to_string(count_) + " numbers";
  if (axes_ <= kAxes) found = std::string(name_of(type_)) + " " + text(shape_.data(), axes_);
  if (!contiguous_) found += ", not contiguous";
  if (!on_cpu_) found += ", not on the CPU";
  throw std::invalid_argument(std::string(name) + " is " + found + "; expected " + expected);
}

void* Tensor::checked(const char* name, Type type, std::initializer_list<int64_t> shape) const {
  bool fits = type == type_ && on_cpu_ && contiguous_ && axes_ == static_cast<int>(shape.size());
  const int64_t* have = shape_.data();
  for (const int64_t size : shape) {
    if (!fits) break;
    fits = size == kAny || size == *have;
    ++have;
  }
  if (!fits) refuse(name, std::string(name_of(type)) + " " + text(shape.begin(), shape.size()));
  return data_;
}

void* Tensor::checked_rows(const char* name, Type type, int64_t width) const {
  if (type != type_ || !on_cpu_ || !contiguous_ || axes_ < 1 || last_ != width)
    refuse(name, std::string(name_of(type)) + " (..., " + std::to_string(width) + ")");
  return data_;
}

float* Tensor::scratch(const char* name, int64_t count) const {
  const bool fits = type_ == Type::float32 && on_cpu_ && contiguous_ && count_ >= count;
  if (!fits || reinterpret_cast<uintptr_t>(data_) % 64)
    refuse(name, "at least " + std::to_string(count) + " float32 on a 64-byte boundary");
  return static_cast<float*>(data_);
}

float* Tensor::strided(const char* name, int64_t rows, int64_t cols, int64_t* stride) const {
  const bool sizes = axes_ == 2 && shape_[0] == rows && shape_[1] == cols;
  if (type_ != Type::float32 || !on_cpu_ || !sizes || !rows_apart_)
    refuse(name, "float32 (" + std::to_string(rows) + ", " + std::to_string(cols) + ")");
  *stride = stride_;
  return static_cast<float*>(data_);
}

const void* Tensor::heads(const char* name, std::initializer_list<int64_t> shape,
                          int64_t (&strides)[3]) const {
  bool fits = (type_ == Type::float32 || is_bf16()) && on_cpu_ && axes_ == 4 &&
              (strides_[3] == 1 || shape_[3] <= 1 || !count_);
  const int64_t* have = shape_.data();
  for (const int64_t size : shape) fits = fits && size == *have++;
  if (!fits) refuse(name, "float32 or bfloat16 " + text(shape.begin(), shape.size()));
  for (int k = 0; k < 3; ++k) strides[k] = strides_[k];
  return data_;
}

void* Tensor::floats(const char* name, std::initializer_list<int64_t> shape) const {
  return checked(name, is_bf16() ? Type::bfloat16 : Type::float32, shape);
}

void* Tensor::float_rows(const char* name, int64_t width) const {
  return checked_rows(name, is_bf16() ? Type::bfloat16 : Type::float32, width);
}

}  // namespace gossamer

// Arrays at the door: torch tensors, numpy arrays and all else that speaks DLPack, with their types
// and shapes, which every kernel's binding checks before it takes an address.
//
// nb::ndarray goes through a Python method, 2.3 us for each tensor of torch; a call of a small
// layer takes no longer than that. The C interface of DLPack 1.3 takes 0.05 us and borrows the
// memory.
#pragma once
#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

namespace gossamer {

enum class Type { float32, float64, bfloat16, int8, int32, int64, uint8, uint16, boolean, other };

template <class T>
constexpr Type kTypeOf = std::is_same_v<T, float>      ? Type::float32
                         : std::is_same_v<T, double>   ? Type::float64
                         : std::is_same_v<T, int8_t>   ? Type::int8
                         : std::is_same_v<T, int32_t>  ? Type::int32
                         : std::is_same_v<T, int64_t>  ? Type::int64
                         : std::is_same_v<T, uint8_t>  ? Type::uint8
                         : std::is_same_v<T, uint16_t> ? Type::uint16
                         : std::is_same_v<T, bool>     ? Type::boolean
                                                       : Type::other;

constexpr int64_t kAny = -1;  // a size that is not checked

class Tensor {
 public:
  // False, without a Python error, where the object is no array or has no memory.
  bool read(nanobind::handle object) noexcept;

  const nanobind::object& owner() const { return owner_; }  // whoever keeps it keeps the memory
  Type type() const { return type_; }
  bool is_bf16() const { return type_ == Type::bfloat16; }
  int64_t count() const { return count_; }
  int64_t size(int axis) const { return axis < axes_ && axis < kAxes ? shape_[axis] : 0; }

  // The address of a contiguous array on the CPU of this type and shape; throws
  // std::invalid_argument, with `name`, for any other.
  template <class T>
  T* data(const char* name, std::initializer_list<int64_t> shape) const {
    return static_cast<T*>(checked(name, kTypeOf<std::remove_const_t<T>>, shape));
  }
  // The same for any number of axes before the last.
  template <class T>
  T* rows(const char* name, int64_t width) const {
    return static_cast<T*>(checked_rows(name, kTypeOf<std::remove_const_t<T>>, width));
  }
  // The same for at least `count` numbers of any shape, on a 64-byte boundary.
  float* scratch(const char* name, int64_t count) const;
  // A matrix whose rows may lie apart; `stride` is their distance.
  float* strided(const char* name, int64_t rows, int64_t cols, int64_t* stride) const;

  // Four axes of this shape, of float32 or bfloat16, whose last is contiguous and whose others may
  // lie apart; `strides` are their distances, in numbers.
  const void* heads(const char* name, std::initializer_list<int64_t> shape,
                    int64_t (&strides)[3]) const;

  // Of float32 or bfloat16, as `is_bf16` says.
  void* floats(const char* name, std::initializer_list<int64_t> shape) const;
  void* float_rows(const char* name, int64_t width) const;
  uint16_t* bfloats(const char* name, std::initializer_list<int64_t> shape) const {
    return static_cast<uint16_t*>(checked(name, Type::bfloat16, shape));
  }

 private:
  static constexpr int kAxes = 4;  // of more axes only the last is known, and the count
  void take_shape(int axes, const int64_t* shape, const int64_t* strides);
  void* checked(const char* name, Type type, std::initializer_list<int64_t> shape) const;
  void* checked_rows(const char* name, Type type, int64_t width) const;
  [[noreturn]] void refuse(const char* name, const std::string& expected) const;

  nanobind::object owner_;
  void* data_ = nullptr;
  std::array<int64_t, kAxes> shape_{}, strides_{};
  int64_t count_ = 0, last_ = 1, stride_ = 0;  // stride: of the first axis, in numbers
  int axes_ = 0;
  Type type_ = Type::other;
  bool on_cpu_ = false, contiguous_ = false, rows_apart_ = false;
};

}  // namespace gossamer

NAMESPACE_BEGIN(NB_NAMESPACE)
NAMESPACE_BEGIN(detail)

template <>
struct type_caster<gossamer::Tensor> {
  NB_TYPE_CASTER(gossamer::Tensor, const_name("Tensor"))
  bool from_python(handle src, uint8_t, cleanup_list*) noexcept { return value.read(src); }
};

NAMESPACE_END(detail)
NAMESPACE_END(NB_NAMESPACE)

// SPDX-License-Identifier: Apache-2.0
// The structures are DLPack 1's (dmlc.github.io/dlpack): a published C layout, so no header of any
// tensor library is needed.
#include "bind_tensors.h"

#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "core/check.h"
#include "core/span.h"

namespace py = pybind11;

namespace hift {
namespace {

struct DlDevice {
  std::int32_t type;
  std::int32_t index;
};
constexpr std::int32_t kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3;

struct DlType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
constexpr std::uint8_t kDlFloat = 2, kDlBfloat = 4;

struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t dims;
  DlType type;
  std::int64_t* shape;
  std::int64_t* strides;  // elements
  std::uint64_t byte_offset;
};

struct DlExchange {
  struct {
    std::uint32_t major, minor;
    void* previous;
  } header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DlTensor* out);  // borrowed; may be null
  void* current_stream;
};

/// A tensor's elements, in a row from `data` on.
struct Flat {
  std::int64_t data;
  std::int64_t count;
  std::int64_t dtype;  // a DType
};

/// Whether `t` is on the device, of a type that is offered, and row-major without gaps.
bool flatten(const DlTensor& t, int device, Flat* flat) {
  const bool host = t.device.type == kDlCpu || t.device.type == kDlCudaHost;
  if (device < 0 ? !host : t.device.type != kDlCuda || t.device.index != device) return false;
  if (t.type.lanes != 1) return false;
  if (t.type.code == kDlFloat && t.type.bits == 32) {
    flat->dtype = static_cast<std::int64_t>(DType::kFloat32);
  } else if (t.type.code == kDlBfloat && t.type.bits == 16) {
    flat->dtype = static_cast<std::int64_t>(DType::kBFloat16);
  } else if (t.type.code == kDlFloat && t.type.bits == 16) {
    flat->dtype = static_cast<std::int64_t>(DType::kFloat16);
  } else {
    return false;
  }
  std::int64_t count = 1;
  bool in_a_row = true;
  for (std::int32_t d = t.dims - 1; d >= 0; --d) {
    in_a_row = in_a_row && (t.shape[d] == 1 || t.strides == nullptr || t.strides[d] == count);
    count *= t.shape[d];
  }
  flat->data = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset);
  flat->count = count;
  return in_a_row || count == 0;
}

}  // namespace

std::int64_t integer(PyObject* tuple, Py_ssize_t at) {
  const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, at));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

py::object plain_rows(const py::capsule& exchange, const py::tuple& types, const py::list& wanted,
                      const py::list& rules, const std::array<std::int64_t, 3>& ways, int device) {
  const auto* api = exchange.get_pointer<DlExchange>();
  if (api->header.major != 1 || api->tensor_from_object == nullptr) return py::none();
  static PyObject* const name = PyUnicode_InternFromString("grad");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const auto look = [&](PyObject* object, Flat* flat) {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    bool known = false;
    for (const py::handle& t : types) known = known || t.ptr() == type;
    if (!known) return false;
    DlTensor tensor;
    if (api->tensor_from_object(object, &tensor) != 0) {
      PyErr_Clear();  // it has no elements in a row: Python says what is wrong with it, if anything
      return false;
    }
    if (!flatten(tensor, device, flat)) return false;
    if (flat->data == 0 && flat->count > 0) return false;
    // An imaginary part may be lazily negated, which DLPack cannot say; only with one element is
    // it row-major.
    if (flat->count != 1) return true;
    const auto negated =
        py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, is_neg));
    if (!negated) throw py::error_already_set();
    return negated.ptr() == Py_False;
  };
  std::vector<std::int64_t> rule_of;
  for (const py::handle& rule : rules) rule_of.push_back(rule.cast<std::int64_t>());
  Rows rows;
  rows.all.reserve(wanted.size());
  for (const py::handle& row : wanted) {
    const Py_ssize_t size = PyTuple_Check(row.ptr()) ? PyTuple_GET_SIZE(row.ptr()) : 0;
    check_argument(size == 4 || size == 5, "a parameter's row is a tuple of four, or of five");
    PyObject* const param = PyTuple_GET_ITEM(row.ptr(), 0);
    const auto grad = size == 5 ? py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(row.ptr(), 4))
                                : py::reinterpret_steal<py::object>(PyObject_GetAttr(param, name));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;
    Flat p, g;
    const std::int64_t count = integer(row.ptr(), 2), hyper = integer(row.ptr(), 3);
    if (!look(param, &p) || !look(grad.ptr(), &g)) return py::none();
    if (p.count != count || g.count != count) return py::none();
    if (g.dtype != p.dtype && g.dtype != static_cast<std::int64_t>(DType::kFloat32)) {
      return py::none();
    }
    const std::int64_t way = ways[p.dtype];
    if (way < 0) return py::none();
    check_argument(hyper >= 0 && hyper < static_cast<std::int64_t>(rule_of.size()), "hypers ",
                   hyper, " are not among the ", rule_of.size(), " of this step");
    const std::int64_t kind = rule_of[hyper] | p.dtype << 8 | g.dtype << 12 | way << 16;
    rows.all.push_back({integer(row.ptr(), 1), p.data, g.data, kind, hyper});
  }
  return py::cast(std::move(rows));
}

}  // namespace hift

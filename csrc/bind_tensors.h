// SPDX-License-Identifier: Apache-2.0
// Addresses, types and sizes of many tensors in one call, by DLPack's C exchange interface, which
// recent torch offers. A tensor whose elements do not simply lie in a row is left to Python.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <vector>

namespace hift {

/// One parameter's part in a step: its item, addresses, `kind` (rule | parameter's dtype << 8 |
/// gradient's dtype << 12 | how weights are kept << 16) and the index of its hypers.
struct Row {
  std::int64_t item, param, grad, kind, hyper;
};

/// Rows that need not become Python's tuples on their way from `plain_rows` to a step.
struct Rows {
  std::vector<Row> all;
};

/// Item `at` of a tuple as an integer. Throws Python's own error where it is none.
std::int64_t integer(PyObject* tuple, Py_ssize_t at);

/// The rows of a step, as `Engine.step` takes them, or None if any tensor needs a closer look.
///
/// `exchange` is the `__dlpack_c_exchange_api__` capsule of the `types`; tensors of any other type,
/// a subclass too, need a closer look. `wanted` is a list of (parameter, item, elements, index of
/// its hypers); parameters whose `grad` is None are left out. `rules[h]` is the rule's number for
/// hypers h, `ways[d]` how weights of DType d are kept, -1 where they are not. `device` is a CUDA
/// device's index, or -1 for the host. No tensor is kept.
pybind11::object plain_rows(const pybind11::capsule& exchange, const pybind11::tuple& types,
                            const pybind11::list& wanted, const pybind11::list& rules,
                            const std::array<std::int64_t, 3>& ways, int device);

}  // namespace hift

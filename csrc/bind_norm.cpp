// SPDX-License-Identifier: Apache-2.0
// A row of a step has the gradient's address and, in its kind, the gradient's type; how many
// elements there are comes beside the rows.
#include "bind_norm.h"

#include <pybind11/stl.h>

#include <vector>

#include "bind_tensors.h"
#include "core/check.h"
#include "cpu/norm.h"
#if HIFT_CUDA
#include "cuda/norm.h"
#endif

namespace py = pybind11;

namespace hift {
namespace {

template <class T>
T* pointer(std::int64_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<Gradient> gradients_of(const Rows& rows, const std::vector<std::int64_t>& counts) {
  check_argument(rows.all.size() == counts.size(), rows.all.size(), " rows have ", counts.size(),
                 " counts");
  std::vector<Gradient> gradients(counts.size());
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    gradients[i].data = pointer<const void>(rows.all[i].grad);
    gradients[i].count = counts[i];
    gradients[i].dtype = static_cast<DType>(rows.all[i].kind >> 12 & 0xf);
  }
  return gradients;
}

Clip clip_of(float limit, std::int64_t grad_scale, std::int64_t norm, std::int64_t coefficient) {
  check_argument(norm != 0 && coefficient != 0, "a norm or its coefficient has a null address");
  return {pointer<const float>(grad_scale), limit, pointer<float>(norm),
          pointer<float>(coefficient)};
}

}  // namespace

void bind_norm(py::module_& m) {
  m.attr("norm_block") = kNormBlock;
  m.def(
      "sum_of_squares",
      [](const Rows& rows, const std::vector<std::int64_t>& counts, std::int64_t total,
         int threads) {
        const std::vector<Gradient> gradients = gradients_of(rows, counts);
        check_argument(total != 0, "the total has a null address");
        py::gil_scoped_release release;
        *pointer<double>(total) = cpu::sum_of_squares(gradients.data(), gradients.size(), threads);
      },
      py::arg("rows"), py::arg("counts"), py::arg("total"), py::arg("threads"));
  m.def(
      "write_clip",
      [](std::int64_t total, float limit, std::int64_t grad_scale, std::int64_t norm,
         std::int64_t coefficient) {
        check_argument(total != 0, "the total has a null address");
        cpu::write_clip(*pointer<const double>(total),
                        clip_of(limit, grad_scale, norm, coefficient));
      },
      py::arg("total"), py::arg("limit"), py::arg("grad_scale"), py::arg("norm"),
      py::arg("coefficient"));
#if HIFT_CUDA
  m.def(
      "cuda_sum_of_squares",
      [](const Rows& rows, const std::vector<std::int64_t>& counts, std::int64_t sums,
         std::int64_t total, int device, std::int64_t stream) {
        const std::vector<Gradient> gradients = gradients_of(rows, counts);
        py::gil_scoped_release release;
        cuda::sum_of_squares(gradients.data(), gradients.size(), pointer<double>(sums),
                             pointer<double>(total), device, pointer<void>(stream));
      },
      py::arg("rows"), py::arg("counts"), py::arg("sums"), py::arg("total"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "cuda_write_clip",
      [](std::int64_t total, float limit, std::int64_t grad_scale, std::int64_t norm,
         std::int64_t coefficient, int device, std::int64_t stream) {
        check_argument(total != 0, "the total has a null address");
        cuda::write_clip(pointer<const double>(total),
                         clip_of(limit, grad_scale, norm, coefficient), device,
                         pointer<void>(stream));
      },
      py::arg("total"), py::arg("limit"), py::arg("grad_scale"), py::arg("norm"),
      py::arg("coefficient"), py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace hift

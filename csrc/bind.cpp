// SPDX-License-Identifier: Apache-2.0
// The Python face of the extension: addresses, counts and stream handles come in as integers. Only
// this file and bind_tensors know Python. The interpreter lock is released wherever work is done.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "bind_tensors.h"
#include "core/check.h"
#include "cpu/step.h"
#include "engine.h"
#if HIFT_CUDA
#include "cuda/step.h"
#endif

namespace py = pybind11;

namespace {

using hift::DType;
using hift::integer;
using hift::Scaling;
using hift::Span;
using hift::Update;

/// Bytes of a slab that keep it alive: what a tensor's storage is made of.
struct Bytes {
  std::shared_ptr<hift::Slab> owner;
  std::byte* data;
  std::int64_t size;
};

DType dtype_of(long code) {
  hift::check_argument(code >= 0 && code < 3, "dtype code ", code,
                       " is not one of 0 (float32), 1 (bfloat16), 2 (float16)");
  return static_cast<DType>(code);
}

/// `kind` packs a rule's number and two dtype codes: rule | parameter << 8 | gradient << 12.
template <class T>
void unpack(T& to, std::int64_t kind) {
  to.rule = static_cast<std::int32_t>(kind & 0xff);
  to.param_dtype = dtype_of(kind >> 8 & 0xf);
  to.grad_dtype = dtype_of(kind >> 12);
}

/// Rows (item, parameter address, gradient address, kind, row of `hypers`); a row of hypers is the
/// gradient's factor (1, or -1 to maximize), then the rule's hyper-parameters in C++ order.
std::vector<Update> updates_of(const py::list& rows,
                               const std::vector<std::vector<float>>& hypers) {
  std::vector<Update> updates(rows.size());
  for (std::size_t i = 0; i < updates.size(); ++i) {
    PyObject* row = PyList_GET_ITEM(rows.ptr(), static_cast<Py_ssize_t>(i));
    hift::check_argument(PyTuple_Check(row) && PyTuple_GET_SIZE(row) == 5,
                         "an update is a tuple of five integers");
    Update& u = updates[i];
    u.item = integer(row, 0);
    u.param = reinterpret_cast<void*>(integer(row, 1));
    u.grad = reinterpret_cast<const void*>(integer(row, 2));
    unpack(u, integer(row, 3));
    const auto h = static_cast<std::size_t>(integer(row, 4));
    hift::check_argument(h < hypers.size() && !hypers[h].empty(), "row ", h,
                         " of hypers is absent or empty");
    hift::check_argument(hypers[h].size() <= 1 + u.hyper.size(), "row ", h, " of hypers has ",
                         hypers[h].size(), " numbers; at most ", 1 + u.hyper.size(), " are used");
    u.grad_factor = hypers[h][0];
    u.hypers = static_cast<int>(hypers[h].size()) - 1;
    std::copy(hypers[h].begin() + 1, hypers[h].end(), u.hyper.begin());
  }
  return updates;
}

/// Rows (parameter address, gradient address, count, kind, (state address, ...), (gradient factor,
/// hyper, ...)).
std::vector<Span> spans_of(const py::list& rows) {
  std::vector<Span> spans;
  for (const py::handle& row : rows) {
    const auto t = py::cast<py::tuple>(row);
    hift::check_argument(t.size() == 6, "a span is a tuple of six");
    Span s;
    s.param = reinterpret_cast<void*>(t[0].cast<std::int64_t>());
    s.grad = reinterpret_cast<const void*>(t[1].cast<std::int64_t>());
    s.count = t[2].cast<std::int64_t>();
    unpack(s, t[3].cast<std::int64_t>());
    const auto states = t[4].cast<std::vector<std::int64_t>>();
    const auto hyper = t[5].cast<std::vector<float>>();
    const hift::RuleEntry& rule = hift::cpu::rule(s.rule);
    hift::check_argument(static_cast<int>(states.size()) == rule.states, "rule ", rule.name,
                         " takes ", rule.states, " state streams, not ", states.size());
    hift::check_argument(static_cast<int>(hyper.size()) == rule.hypers + 1, "rule ", rule.name,
                         " takes 1 + ", rule.hypers, " numbers, not ", hyper.size());
    for (std::size_t i = 0; i < states.size(); ++i)
      s.state[i] = reinterpret_cast<float*>(states[i]);
    s.grad_factor = hyper[0];
    std::copy(hyper.begin() + 1, hyper.end(), s.hyper);
    spans.push_back(s);
  }
  return spans;
}

Scaling scaling_of(std::int64_t grad_scale, std::int64_t clip, std::int64_t found_inf) {
  Scaling s;
  s.grad_scale = reinterpret_cast<const float*>(grad_scale);
  s.clip = reinterpret_cast<const float*>(clip);
  s.found_inf = reinterpret_cast<const float*>(found_inf);
  return s;
}

py::dict build_info() {
  py::dict info;
  info["version"] = HIFT_VERSION;
  info["compiler"] = HIFT_COMPILER;
  info["cuda_built"] = HIFT_CUDA != 0;
  info["cuda_archs"] = HIFT_CUDA_ARCHS;
  info["nvcc_version"] = HIFT_NVCC_VERSION;
  info["isas"] = hift::cpu::instruction_sets();
  info["isa"] = hift::cpu::instruction_set();
  return info;
}

py::dict cuda_info() {
  py::dict info;
#if HIFT_CUDA
  const hift::cuda::DeviceInfo found = hift::cuda::device_info();
  info["driver"] = found.driver_version;
  info["runtime"] = found.runtime_version;
  info["devices"] = found.device_count;
  info["error"] = found.error;
#else
  info["driver"] = 0;
  info["runtime"] = 0;
  info["devices"] = 0;
  info["error"] = "built without CUDA";
#endif
  return info;
}

/// Where parameters of CUDA device `device` are updated, or those of the host (-1).
/// `allocate(bytes)` gives the address of a ring on the device.
std::unique_ptr<hift::Compute> compute(int device, const py::object& allocate) {
  if (device < 0) return hift::make_host_compute();
  return hift::make_cuda_compute(device, [allocate](std::int64_t bytes) {
    const py::gil_scoped_acquire gil;
    return reinterpret_cast<void*>(allocate(bytes).cast<std::int64_t>());
  });
}

void bind_engine(py::module_& m) {
  using hift::Engine;
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](const std::vector<std::pair<std::int64_t, float>>& streams,
                       const std::string& store, std::int64_t page_bytes, std::int64_t staging,
                       int readers, int writers, int device, const py::object& allocate) {
             std::vector<hift::Stream> all;
             for (const auto& [element_bytes, fill] : streams) {
               std::uint32_t bits;
               std::memcpy(&bits, &fill, sizeof bits);
               all.push_back({element_bytes, bits});
             }
             const hift::EngineOptions options{store, page_bytes, staging, readers, writers};
             return std::make_shared<Engine>(std::move(all), options, compute(device, allocate));
           }),
           py::arg("streams"), py::arg("store"), py::arg("page_bytes"), py::arg("staging"),
           py::arg("readers"), py::arg("writers"), py::arg("device") = -1,
           py::arg("allocate") = py::none())
      .def("add_groups", &Engine::add_groups, py::call_guard<py::gil_scoped_release>())
      .def(
          "step",
          [](Engine& engine, int group, const py::list& rows,
             const std::vector<std::vector<float>>& hypers, std::int64_t grad_scale,
             std::int64_t clip, std::int64_t found_inf, int threads, int next,
             std::int64_t stream) {
            const std::vector<Update> updates = updates_of(rows, hypers);
            hift::StepReport report;
            {
              py::gil_scoped_release release;
              report = engine.step(group, updates, scaling_of(grad_scale, clip, found_inf), threads,
                                   next, reinterpret_cast<void*>(stream));
            }
            return py::make_tuple(report.moved.bytes_in, report.moved.bytes_out,
                                  report.moved.wait_ms, report.moved.transfer_ms, report.update_ms,
                                  report.step_ms);
          },
          py::arg("group"), py::arg("rows"), py::arg("hypers"), py::arg("grad_scale"),
          py::arg("clip"), py::arg("found_inf"), py::arg("threads"), py::arg("next"),
          py::arg("stream") = 0)
      .def(
          "read",
          [](Engine& engine, int group, std::int64_t item, int stream, std::int64_t begin,
             std::int64_t count, std::int64_t to) {
            engine.read(group, item, stream, begin, count, reinterpret_cast<std::byte*>(to));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "write",
          [](Engine& engine, int group, std::int64_t item, int stream, std::int64_t begin,
             std::int64_t count, std::int64_t from) {
            engine.write(group, item, stream, begin, count,
                         reinterpret_cast<const std::byte*>(from));
          },
          py::call_guard<py::gil_scoped_release>())
      .def("view",
           [](Engine& engine, int group, std::int64_t item, int stream,
              std::int64_t count) -> py::object {
             std::shared_ptr<hift::Slab> owner;
             std::byte* data;
             {
               py::gil_scoped_release release;
               data = engine.address(group, item, stream, &owner);
             }
             if (data == nullptr) return py::none();
             return py::cast(
                 Bytes{std::move(owner), data, count * engine.streams()[stream].element_bytes});
           })
      .def("parts", &Engine::parts, py::call_guard<py::gil_scoped_release>())
      .def("prefetch", &Engine::prefetch, py::call_guard<py::gil_scoped_release>())
      .def("flush", &Engine::flush, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("store_bytes", &Engine::store_bytes)
      .def_property_readonly("staging_bytes", &Engine::staging_bytes)
      .def_property_readonly("touched_bytes", &Engine::touched_bytes)
      .def_property_readonly("description", &Engine::description)
      .def_property_readonly("folder", &Engine::folder);
}

}  // namespace

PYBIND11_MODULE(_hift_ext, m) {
  m.doc() = "The compiled half of hift_ext. Not a public interface: use hift_ext.";
  m.attr("__version__") = HIFT_VERSION;
  // A code of errno makes it OSError, so that a full disk is `error.errno == errno.ENOSPC`.
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const std::system_error& error) {
      const py::tuple args = py::make_tuple(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, args.ptr());
    }
  });
  py::class_<Bytes>(m, "Bytes", py::buffer_protocol()).def_buffer([](Bytes& b) {
    return py::buffer_info(b.data, 1, py::format_descriptor<std::uint8_t>::format(), b.size);
  });

  m.def("plain_rows", &hift::plain_rows, py::arg("exchange"), py::arg("types"), py::arg("wanted"),
        py::arg("rules"), py::arg("device"));
  m.def("build_info", &build_info);
  m.def("cuda_info", &cuda_info);
  m.def("use_instruction_set", &hift::cpu::use_instruction_set, py::arg("name"));
  m.def("rules", [] {
    py::dict rules;
    for (int i = 0; i < hift::cpu::rule_count(); ++i) {
      const hift::RuleEntry& rule = hift::cpu::rule(i);
      rules[rule.name] = py::make_tuple(i, rule.states, rule.hypers);
    }
    return rules;
  });
  m.def(
      "step_spans",
      [](const py::list& rows, std::int64_t grad_scale, std::int64_t clip, std::int64_t found_inf,
         int threads) {
        const std::vector<Span> spans = spans_of(rows);
        py::gil_scoped_release release;
        hift::cpu::step(spans.data(), spans.size(), scaling_of(grad_scale, clip, found_inf),
                        threads);
      },
      py::arg("rows"), py::arg("grad_scale") = 0, py::arg("clip") = 0, py::arg("found_inf") = 0,
      py::arg("threads") = 1);
#if HIFT_CUDA
  m.def(
      "cuda_step_spans",
      [](const py::list& rows, std::int64_t grad_scale, std::int64_t clip, std::int64_t found_inf,
         int device, std::int64_t stream) {
        const std::vector<Span> spans = spans_of(rows);
        py::gil_scoped_release release;
        hift::cuda::step(spans.data(), spans.size(), scaling_of(grad_scale, clip, found_inf),
                         device, reinterpret_cast<void*>(stream));
      },
      py::arg("rows"), py::arg("grad_scale"), py::arg("clip"), py::arg("found_inf"),
      py::arg("device"), py::arg("stream"));
#endif
  bind_engine(m);
}

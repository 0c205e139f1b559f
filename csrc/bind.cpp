// SPDX-License-Identifier: Apache-2.0
// The Python face of the extension: addresses, counts and stream handles come in as integers. Only
// the bind*.cpp files know Python. The interpreter lock is released wherever work is done.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "bind_norm.h"
#include "bind_probe.h"
#include "bind_tensors.h"
#include "core/check.h"
#include "core/precision.h"
#include "cpu/codes.h"
#include "cpu/step.h"
#include "engine.h"
#if HIFT_CUDA
#include "cuda/step.h"
#endif

namespace py = pybind11;

namespace {

using hift::DType;
using hift::integer;
using hift::Row;
using hift::Rows;
using hift::Scaling;
using hift::Span;
using hift::Update;

/// Bytes of a slab that keep it alive: what a tensor's storage is made of.
struct Bytes {
  std::shared_ptr<hift::Slab> owner;
  std::byte* data;
  std::int64_t size;
};

/// The key of a row's random numbers, and the elements of its parameter before the item's.
using Draw = std::pair<std::uint64_t, std::int64_t>;

DType dtype_of(long code) {
  hift::check_argument(code >= 0 && code < 3, "dtype code ", code,
                       " is not one of 0 (float32), 1 (bfloat16), 2 (float16)");
  return static_cast<DType>(code);
}

/// `kind` packs a rule's number, two dtype codes and how weights are kept: rule | parameter << 8 |
/// gradient << 12 | weights << 16.
template <class T>
void unpack(T& to, std::int64_t kind) {
  to.rule = static_cast<std::int32_t>(kind & 0xff);
  to.param_dtype = dtype_of(kind >> 8 & 0xf);
  to.grad_dtype = dtype_of(kind >> 12 & 0xf);
  to.weights = static_cast<hift::Weights>(kind >> 16);
}

/// Rows as Python writes them: tuples of the five fields.
Rows rows_of(const py::list& tuples) {
  Rows rows;
  for (const py::handle& tuple : tuples) {
    PyObject* row = tuple.ptr();
    hift::check_argument(PyTuple_Check(row) && PyTuple_GET_SIZE(row) == 5,
                         "an update is a tuple of five integers");
    rows.all.push_back(
        {integer(row, 0), integer(row, 1), integer(row, 2), integer(row, 3), integer(row, 4)});
  }
  return rows;
}

/// A row of hypers is the gradient's factor (1, or -1 to maximize), then the rule's
/// hyper-parameters in C++ order. `draws`, if there are any, holds each row's key of random numbers
/// and its elements before the item's.
std::vector<Update> updates_of(const Rows& rows, const std::vector<std::vector<float>>& hypers,
                               const std::vector<Draw>& draws) {
  hift::check_argument(draws.empty() || draws.size() == rows.all.size(), draws.size(),
                       " draws for ", rows.all.size(), " rows");
  std::vector<Update> updates(rows.all.size());
  for (std::size_t i = 0; i < updates.size(); ++i) {
    const Row& row = rows.all[i];
    Update& u = updates[i];
    if (!draws.empty()) std::tie(u.key, u.shard) = draws[i];
    u.item = row.item;
    u.param = reinterpret_cast<void*>(row.param);
    u.grad = reinterpret_cast<const void*>(row.grad);
    unpack(u, row.kind);
    const auto h = static_cast<std::size_t>(row.hyper);
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
/// hyper, ...)), and where numbers are kept in another way (state type, (scale address, ...),
/// master address, stochastic state, key, elements of the parameter before).
std::vector<Span> spans_of(const py::list& rows) {
  std::vector<Span> spans;
  for (const py::handle& row : rows) {
    const auto t = py::cast<py::tuple>(row);
    hift::check_argument(t.size() == 6 || t.size() == 7, "a span is a tuple of six or seven");
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
    for (std::size_t i = 0; i < states.size(); ++i) s.state[i] = reinterpret_cast<void*>(states[i]);
    s.grad_factor = hyper[0];
    std::copy(hyper.begin() + 1, hyper.end(), s.hyper);
    if (t.size() == 7) {
      const auto kept = t[6].cast<py::tuple>();
      hift::check_argument(kept.size() == 6, "how a span is kept is a tuple of six");
      s.state_type = static_cast<hift::StateType>(kept[0].cast<int>());
      const auto scales = kept[1].cast<std::vector<std::int64_t>>();
      hift::check_argument(scales.empty() || scales.size() == states.size(), scales.size(),
                           " scales for ", states.size(), " state streams");
      for (std::size_t i = 0; i < scales.size(); ++i)
        s.scale[i] = reinterpret_cast<float*>(scales[i]);
      s.master = reinterpret_cast<void*>(kept[2].cast<std::int64_t>());
      s.stochastic_state = kept[3].cast<bool>();
      s.key = kept[4].cast<std::uint64_t>();
      s.shard = kept[5].cast<std::int64_t>();
    }
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

/// Tells the caller, before any line of Python can be interrupted, that the update was made.
void note_done(const py::object& done) {
  if (!done.is_none()) py::cast<py::list>(done).append(true);
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

/// Tuples (kind, group, page, bytes, begin, end), times in seconds of time.perf_counter(), and how
/// many were lost.
std::pair<py::list, std::int64_t> taken_intervals(hift::Engine& engine) {
  const auto seconds = [](hift::Clock::time_point at) {
    return std::chrono::duration<double>(at.time_since_epoch()).count();
  };
  const auto [intervals, lost] = engine.intervals().take();
  py::list tuples;
  for (const hift::Interval& i : intervals) {
    tuples.append(py::make_tuple(static_cast<int>(i.kind), i.group, i.page, i.bytes,
                                 seconds(i.begin), seconds(i.end)));
  }
  return {tuples, lost};
}

void bind_engine(py::module_& m) {
  using hift::Engine;
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(
          py::init(
              [](const std::vector<std::tuple<std::int64_t, std::uint32_t, std::int64_t>>& streams,
                 int states, int state_type, bool master, const std::string& store,
                 std::int64_t page_bytes, std::int64_t staging, int readers, int writers,
                 int device, const py::object& allocate) {
                std::vector<hift::Stream> all;
                for (const auto& [value_bytes, fill, run] : streams) {
                  all.push_back({value_bytes, fill, run});
                }
                const hift::EngineOptions options{store,   page_bytes,
                                                  staging, readers,
                                                  writers, static_cast<hift::StateType>(state_type),
                                                  states,  master};
                return std::make_shared<Engine>(std::move(all), options, compute(device, allocate));
              }),
          py::arg("streams"), py::arg("states"), py::arg("state_type"), py::arg("master"),
          py::arg("store"), py::arg("page_bytes"), py::arg("staging"), py::arg("readers"),
          py::arg("writers"), py::arg("device") = -1, py::arg("allocate") = py::none())
      .def("add_groups", &Engine::add_groups, py::call_guard<py::gil_scoped_release>())
      .def(
          "step",
          [](Engine& engine, int group, const Rows& rows,
             const std::vector<std::vector<float>>& hypers, std::int64_t grad_scale,
             std::int64_t clip, std::int64_t found_inf, int threads, int next, std::int64_t stream,
             const py::object& done, const std::vector<Draw>& draws, bool stochastic_state) {
            const std::vector<Update> updates = updates_of(rows, hypers, draws);
            hift::StepReport report;
            {
              py::gil_scoped_release release;
              report = engine.step(group, updates, scaling_of(grad_scale, clip, found_inf), threads,
                                   next, reinterpret_cast<void*>(stream), stochastic_state);
            }
            note_done(done);
            return py::make_tuple(report.moved.bytes_in, report.moved.bytes_out,
                                  report.moved.wait_ms, report.moved.transfer_ms, report.update_ms,
                                  report.step_ms);
          },
          py::arg("group"), py::arg("rows"), py::arg("hypers"), py::arg("grad_scale"),
          py::arg("clip"), py::arg("found_inf"), py::arg("threads"), py::arg("next"),
          py::arg("stream") = 0, py::arg("done") = py::none(),
          py::arg("draws") = std::vector<Draw>(), py::arg("stochastic_state") = false)
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
             return py::cast(Bytes{std::move(owner), data, engine.streams()[stream].bytes(count)});
           })
      .def("parts", &Engine::parts, py::call_guard<py::gil_scoped_release>())
      .def("places",
           [](Engine& engine, int group, std::int64_t item) {
             std::vector<std::tuple<std::int64_t, bool, std::vector<std::int64_t>>> tuples;
             for (const auto& p : engine.places(group, item))
               tuples.emplace_back(p.elements, p.touched, p.offsets);
             return tuples;
           })
      .def("prefetch", &Engine::prefetch, py::call_guard<py::gil_scoped_release>())
      .def("flush", &Engine::flush, py::call_guard<py::gil_scoped_release>())
      .def("keep_intervals",
           [](Engine& engine, std::int64_t most) { engine.intervals().keep(most); })
      .def("take_intervals", &taken_intervals)
      .def_property_readonly("store_bytes", &Engine::store_bytes)
      .def_property_readonly("staging_bytes", &Engine::staging_bytes)
      .def_property_readonly("page_bytes", &Engine::page_bytes)
      .def_property_readonly("touched_bytes", &Engine::touched_bytes)
      .def_property_readonly("description", &Engine::description)
      .def_property_readonly("file", &Engine::file)
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

  py::class_<Rows>(m, "Rows")
      .def(py::init(&rows_of))
      .def("__len__", [](const Rows& rows) { return rows.all.size(); })
      .def("__getitem__", [](const Rows& rows, std::size_t at) {
        if (at >= rows.all.size()) throw py::index_error();
        const Row& row = rows.all[at];
        return py::make_tuple(row.item, row.param, row.grad, row.kind, row.hyper);
      });
  py::implicitly_convertible<py::list, Rows>();
  m.def("plain_rows", &hift::plain_rows, py::arg("exchange"), py::arg("types"), py::arg("wanted"),
        py::arg("rules"), py::arg("ways"), py::arg("device"));
  m.def("visit_key", &hift::generic::visit_key, py::arg("seed"), py::arg("param"),
        py::arg("visit"));
  m.def(
      "decode",
      [](std::int64_t codes, std::int64_t scales, std::int64_t count, bool is_signed,
         std::int64_t to) {
        hift::cpu::decode(reinterpret_cast<const std::uint8_t*>(codes),
                          reinterpret_cast<const float*>(scales), count, is_signed,
                          reinterpret_cast<float*>(to));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "encode",
      [](std::int64_t from, std::int64_t count, bool is_signed, std::int64_t codes,
         std::int64_t scales) {
        hift::cpu::encode(reinterpret_cast<const float*>(from), count, is_signed,
                          reinterpret_cast<std::uint8_t*>(codes), reinterpret_cast<float*>(scales));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("build_info", &build_info);
  m.def("cuda_info", &cuda_info);
  m.def("use_instruction_set", &hift::cpu::use_instruction_set, py::arg("name"));
  m.def("rules", [] {
    py::dict rules;
    for (int i = 0; i < hift::cpu::rule_count(); ++i) {
      const hift::RuleEntry& rule = hift::cpu::rule(i);
      rules[rule.name] = py::make_tuple(i, rule.states, rule.hypers, rule.non_negative);
    }
    return rules;
  });
  m.def(
      "step_spans",
      [](const py::list& rows, std::int64_t grad_scale, std::int64_t clip, std::int64_t found_inf,
         int threads, const py::object& done) {
        const std::vector<Span> spans = spans_of(rows);
        {
          py::gil_scoped_release release;
          hift::cpu::step(spans.data(), spans.size(), scaling_of(grad_scale, clip, found_inf),
                          threads);
        }
        note_done(done);
      },
      py::arg("rows"), py::arg("grad_scale") = 0, py::arg("clip") = 0, py::arg("found_inf") = 0,
      py::arg("threads") = 1, py::arg("done") = py::none());
#if HIFT_CUDA
  m.def(
      "cuda_step_spans",
      [](const py::list& rows, std::int64_t grad_scale, std::int64_t clip, std::int64_t found_inf,
         int device, std::int64_t stream, const py::object& done) {
        const std::vector<Span> spans = spans_of(rows);
        {
          py::gil_scoped_release release;
          hift::cuda::step(spans.data(), spans.size(), scaling_of(grad_scale, clip, found_inf),
                           device, reinterpret_cast<void*>(stream));
        }
        note_done(done);
      },
      py::arg("rows"), py::arg("grad_scale"), py::arg("clip"), py::arg("found_inf"),
      py::arg("device"), py::arg("stream"), py::arg("done") = py::none());
#endif
  bind_engine(m);
  hift::bind_norm(m);
  hift::bind_probe(m);
}

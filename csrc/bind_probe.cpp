// SPDX-License-Identifier: Apache-2.0
// The probe's copies and a device's facts in Python. Whatever waits for the device does so without
// the interpreter's lock.
#include "bind_probe.h"

#if HIFT_CUDA
#include "cuda/probe.h"
#endif

namespace py = pybind11;

namespace hift {

#if HIFT_CUDA
void bind_probe(py::module_& m) {
  using cuda::Bus;
  const auto release = py::call_guard<py::gil_scoped_release>();
  const auto address = [](std::int64_t number) { return reinterpret_cast<std::byte*>(number); };
  py::class_<Bus>(m, "Bus")
      .def(py::init([address](std::int64_t source, std::int64_t target, std::int64_t near,
                              std::int64_t far, std::int64_t bytes, int device) {
             return std::make_unique<Bus>(address(source), address(target), address(near),
                                          address(far), bytes, device);
           }),
           py::arg("source"), py::arg("target"), py::arg("near"), py::arg("far"), py::arg("bytes"),
           py::arg("device"), release)
      .def(
          "copy",
          [](Bus& bus, int path, std::int64_t bytes) {
            bus.copy(static_cast<cuda::Path>(path), bytes);
          },
          py::arg("path"), py::arg("bytes"), release)
      .def("start", &Bus::start, release)
      .def("stop", &Bus::stop, release)
      .def_property_readonly(
          "stream", [](const Bus& bus) { return reinterpret_cast<std::int64_t>(bus.stream()); })
      .def_property_readonly(
          "mapped_source",
          [](const Bus& bus) { return reinterpret_cast<std::int64_t>(bus.mapped_source()); })
      .def_property_readonly("mapped_target", [](const Bus& bus) {
        return reinterpret_cast<std::int64_t>(bus.mapped_target());
      });
  m.def(
      "cuda_device",
      [](int device) {
        const cuda::DeviceFacts facts = cuda::device_facts(device);
        py::dict found;
        found["pci"] = facts.pci;
        found["copy_engines"] = facts.copy_engines;
        found["clock_hz"] = facts.clock_hz;
        found["memory_hz"] = facts.memory_hz;
        found["bus_bits"] = facts.bus_bits;
        return found;
      },
      py::arg("device"));
}
#else
void bind_probe(py::module_& /*m*/) {}
#endif

}  // namespace hift

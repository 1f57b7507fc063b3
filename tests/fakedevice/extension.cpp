// The fake device as a backend of torch: registration, and the functions that its Python module calls.
#define AT_PER_OPERATOR_HEADERS  // including all of ATen would take a quarter of a minute

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Generator.h>
#include <torch/library.h>

#include "kernels.h"

namespace {

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &fake::empty);
  m.impl("empty_strided", &fake::empty_strided);
  m.impl("as_strided", &fake::as_strided);
  m.impl("view", &fake::view);
  m.impl("_reshape_alias", &fake::reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("set_.source_Storage_storage_offset", &fake::set_storage);
  m.impl("resize_", &fake::resize_);
  m.impl("copy_", &fake::copy_);
  m.impl("_copy_from", &fake::copy_from);
  m.impl("_copy_from_and_resize", &fake::copy_from_and_resize);
  m.impl("_to_cpu", &fake::to_cpu);
  m.impl("record_stream", &fake::record_stream);
  m.impl("_has_compatible_shallow_copy_type", &fake::compatible);
  m.impl("normal_", &fake::normal_);
  m.impl("uniform_", &fake::uniform_);
  m.impl("exponential_", &fake::exponential_);
  m.impl("bernoulli_.float", &fake::bernoulli_);
  m.impl("bernoulli_.Tensor", &fake::bernoulli_tensor_);
  m.impl("native_dropout", &fake::native_dropout);
  m.impl("random_", &fake::random_);
  m.impl("random_.to", &fake::random_to_);
  m.impl("random_.from", &fake::random_from_);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fake::fallback>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (const char* name : {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "scaled_dot_product_attention"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fake::lowered>());
  }
  for (const char* name : {"layer_norm", "cross_entropy_loss", "nll_loss", "mse_loss"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fake::raised>());
  }
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, fake::Guard)

fake::DeviceMemory device_memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &device_memory)

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new fake::Hooks());
  return true;
}();

}  // namespace

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using fake::Lock;
  m.def("device_count", &fake::device_count);
  m.def("initialised", &fake::initialised);
  m.def("current_device", [] { return fake::current_device(); });
  m.def("set_device", [](int index) { fake::Guard().setDevice(fake::of(index)); });
  m.def("synchronize", [](int index) { fake::Guard().synchronizeDevice(static_cast<c10::DeviceIndex>(index)); });
  m.def("memory", [](int index) {
    auto& arena = fake::device(index).arena;
    return std::make_tuple(arena.total(), arena.used(), arena.peak);
  });
  m.def("reset_peak", [](int index) {
    auto& arena = fake::device(index).arena;
    arena.peak = arena.used();
  });
  m.def("pin", [](uintptr_t address, size_t bytes) { fake::pin(reinterpret_cast<char*>(address), bytes); });
  m.def("unpin", [](uintptr_t address) { fake::unpin(reinterpret_cast<char*>(address)); });
  m.def("late_copies", [] { return fake::machine().late_copies; });
  m.def("fail", [](int index, const std::string& why) {
    Lock held(fake::machine().lock);
    fake::device(index).failure = why;
  });
  m.def("default_generator", [](int index) {
    return py::reinterpret_steal<py::object>(THPGenerator_initDefaultGenerator(fake::default_generator(index)));
  });
}

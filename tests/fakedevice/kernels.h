// Operations: copies, views, draws, and the CPU's kernels for everything else, run on the shadow of the device's memory.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>

#include "runtime.h"

namespace at::autocast {
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);  // its header includes all of ATen
}

namespace fake {

inline bool on_fake(const at::Tensor& tensor) { return tensor.defined() && tensor.is_privateuseone(); }

inline size_t reach(const at::Tensor& tensor) {
  return at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize());
}

// Returns a tensor of the CPU over the memory that kernels see. It does not keep the memory alive.
inline at::Tensor shadow(const at::Tensor& tensor) {
  if (!on_fake(tensor)) return tensor;
  void* memory = tensor.numel() ? device(tensor.get_device()).arena.shadow(tensor.data_ptr()) : nullptr;
  auto found = at::for_blob(memory, tensor.sizes())
                   .strides(tensor.strides())
                   .options(tensor.options().device(at::kCPU))
                   .resizeable_storage()  // by operations with out=
                   .allocator(c10::GetAllocator(c10::DeviceType::CPU))
                   .make_tensor();
  if (tensor.is_conj()) found._set_conj(true);
  if (tensor.is_neg()) found._set_neg(true);
  return found;
}

inline void use(FakeDevice& on, int64_t stream, const at::Tensor& tensor, bool writes) {
  if (tensor.numel()) on.access(stream, tensor.data_ptr(), reach(tensor), writes);
}

// Begins a kernel on the current stream of a device: what the stream has to do before is done now.
inline std::pair<FakeDevice*, int64_t> launch(int index) {
  auto& on = device(index);
  const auto stream = current_stream(index);
  on.begin(stream);
  on.drain(stream);
  return {&on, stream};
}

inline void copy_late(FakeDevice& on, int64_t stream, const at::Tensor& from, const at::Tensor& to) {
  const auto number = on.begin(stream);
  auto source = shadow(from), target = shadow(to);
  if (!on_fake(to) && to.is_non_overlapping_and_dense()) std::memset(target.data_ptr(), 0xA5, target.numel() * target.itemsize());
  on.streams[stream].queue.push_back({number, [source, target]() mutable {
    at::AutoDispatchBelowAutograd below;
    target.copy_(source);
  }});
  ++machine().late_copies;
}

inline void copy_kernel(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (!to.numel()) return;
  Lock held(machine().lock);
  const int index = on_fake(to) ? to.get_device() : from.get_device();
  const bool between = on_fake(from) && on_fake(to) && from.get_device() != to.get_device();
  const auto& host = on_fake(to) ? from : to;
  const bool late = non_blocking && !(on_fake(from) && on_fake(to)) && is_pinned(host.data_ptr(), reach(host));
  if (between) {
    auto& other = device(from.get_device());
    const auto stream = current_stream(other.index);
    other.begin(stream);
    other.drain_all();
    use(other, stream, from, false);
  }
  if (late) {
    auto& on = device(index);
    const auto stream = current_stream(index);
    copy_late(on, stream, from, to);
    use(on, stream, on_fake(from) ? from : to, on_fake(to));
    return;
  }
  auto [on, stream] = launch(index);
  if (on_fake(from) && !between) use(*on, stream, from, false);
  if (on_fake(to)) use(*on, stream, to, true);
  shadow(to).copy_(shadow(from));
  if (!on_fake(to)) on->host_waits(stream);  // it returns with the values
}

inline at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
  if (self.is_same(from)) return self;
  copy_kernel(from.sizes() == self.sizes() ? from : from.expand(self.sizes()), self, non_blocking);
  return self;
}

inline at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  copy_kernel(from, to, non_blocking);
  return to;
}

inline const at::Tensor& resize_(
    const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const auto bytes = c10::multiply_integers(size) * self.itemsize() + self.storage_offset() * self.itemsize();
  auto storage = self.storage();
  if (bytes > storage.nbytes()) {
    c10::DeviceGuard guard(self.device());
    auto memory = storage.allocator()->allocate(bytes);
    Lock held(machine().lock);
    auto [on, stream] = launch(self.get_device());
    if (storage.nbytes()) std::memcpy(on->arena.shadow(memory.get()), on->arena.shadow(storage.data()), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(memory));
    storage.set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format.has_value() && *format != at::MemoryFormat::Preserve) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

// The CPU's results of the fallback. What was written in place is in its place already.
inline at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  const bool there = !to.numel() || (on_fake(to) && from.numel() && from.data_ptr() == shadow(to).data_ptr());
  if (from.sizes() == to.sizes() && there) return to;
  if (from.sizes() != to.sizes()) resize_(to, from.sizes(), std::nullopt);
  copy_kernel(from, to, false);
  return to;
}

inline std::vector<at::Tensor> to_cpu(at::TensorList tensors) {
  std::vector<at::Tensor> found;
  for (const auto& each : tensors) found.push_back(shadow(each));
  return found;
}

inline at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> on,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(on.value_or(of(current_device())));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), c10::GetAllocator(c10::DeviceType::PrivateUse1), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}

inline at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> on, std::optional<bool>) {
  c10::DeviceGuard guard(on.value_or(of(current_device())));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), c10::GetAllocator(c10::DeviceType::PrivateUse1),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

inline at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> at;
  if (offset) at = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}

inline at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

inline at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

inline at::Tensor& set_storage(at::Tensor& self, at::Storage from, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::cpu::set_(self, from, offset.guard_int(__FILE__, __LINE__), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

inline void record_stream(at::Tensor& self, at::Stream stream) { Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream); }

inline bool compatible(const at::Tensor&, const at::Tensor&) { return true; }

inline void collect(const c10::IValue& value, std::vector<at::Tensor>& into) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) into.push_back(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& each : value.toListRef()) collect(each, into);
  }
}

// Runs any operation with the CPU's kernel.
inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Lock held(machine().lock);
  const auto& schema = op.schema();
  // It would draw from the host's generator.
  TORCH_CHECK(!op.hasTag(at::Tag::nondeterministic_seeded), schema.name(), " draws random numbers, and the fake device has no kernel for it");
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  std::vector<std::pair<at::Tensor, bool>> used;
  int index = -1;
  for (size_t place = 0; place < arguments.size(); ++place) {
    std::vector<at::Tensor> found;
    collect(arguments[place], found);
    const auto* alias = schema.arguments()[place].alias_info();
    for (auto& each : found) {
      if (on_fake(each) && index < 0) index = each.get_device();
      used.emplace_back(each, alias && alias->isWrite());
    }
    if (arguments[place].isDevice() && index < 0) index = arguments[place].toDevice().index();
  }
  if (index < 0) index = current_device();
  const bool indexes = schema.name().rfind("aten::index", 0) == 0 || schema.name().rfind("aten::_index", 0) == 0;
  for (const auto& [each, writes] : used) {
    const bool elsewhere = on_fake(each) ? each.get_device() != index : each.dim() > 0 && !indexes;
    TORCH_CHECK(
        !elsewhere, "Expected all tensors to be on the same device, but ", schema.name(), " got tensors on ", of(index).str(), " and ", each.device().str());
  }
  c10::DeviceGuard guard(of(index));
  auto [on, stream] = launch(index);
  for (const auto& [each, writes] : used) {
    if (on_fake(each)) use(*on, stream, each, writes);
  }
  at::native::cpu_fallback(op, stack);
}

// Runs a kernel that draws: with a generator of the host that the device's generator makes for it.
template <typename F>
at::Tensor& draw(at::Tensor& self, const std::optional<at::Generator>& given, F act) {
  Lock held(machine().lock);
  auto [on, stream] = launch(self.get_device());
  use(*on, stream, self, true);
  const auto& generator = given.has_value() && given->defined() ? *given : default_generator(self.get_device());
  TORCH_CHECK(generator.device().is_privateuseone(), "Expected a generator of ", self.device().str(), ", not of ", generator.device().str());
  auto memory = shadow(self);
  act(memory, static_cast<Random*>(generator.unsafeGetGeneratorImpl())->draw());
  return self;
}

// Casts what an operation gets, under autocast. (torch's own macros for this take ten seconds to compile.)
inline void cast(const c10::OperatorHandle& op, torch::jit::Stack* stack, at::ScalarType dtype) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastPrivateUse1);
  const auto count = op.schema().arguments().size();
  for (size_t place = stack->size() - count; place < stack->size(); ++place) {
    auto& value = (*stack)[place];
    if (value.isTensor() && on_fake(value.toTensor()) && value.toTensor().is_floating_point() && value.toTensor().scalar_type() != at::kDouble) {
      value = value.toTensor().to(dtype);
    }
  }
  op.callBoxed(stack);
}

inline void lowered(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  cast(op, stack, at::autocast::get_autocast_dtype(c10::DeviceType::PrivateUse1));
}

inline void raised(const c10::OperatorHandle& op, torch::jit::Stack* stack) { cast(op, stack, at::kFloat); }

using Given = std::optional<at::Generator>;

inline at::Tensor& normal_(at::Tensor& self, double mean, double deviation, Given given) {
  return draw(self, given, [&](at::Tensor& memory, at::Generator own) { memory.normal_(mean, deviation, own); });
}
inline at::Tensor& uniform_(at::Tensor& self, double from, double to, Given given) {
  return draw(self, given, [&](at::Tensor& memory, at::Generator own) { memory.uniform_(from, to, own); });
}
inline at::Tensor& exponential_(at::Tensor& self, double rate, Given given) {
  return draw(self, given, [&](at::Tensor& memory, at::Generator own) { memory.exponential_(rate, own); });
}
inline at::Tensor& bernoulli_(at::Tensor& self, double share, Given given) {
  return draw(self, given, [&](at::Tensor& memory, at::Generator own) { memory.bernoulli_(share, own); });
}
inline at::Tensor& bernoulli_tensor_(at::Tensor& self, const at::Tensor& share, Given given) {
  return draw(self, given, [&](at::Tensor& memory, at::Generator own) { memory.bernoulli_(shadow(share), own); });
}
inline at::Tensor& random_(at::Tensor& self, Given given) {
  return draw(self, given, [&](at::Tensor& memory, at::Generator own) { memory.random_(own); });
}
inline at::Tensor& random_to_(at::Tensor& self, int64_t to, Given given) {
  return draw(self, given, [&](at::Tensor& memory, at::Generator own) { memory.random_(to, own); });
}
inline at::Tensor& random_from_(at::Tensor& self, int64_t from, std::optional<int64_t> to, Given given) {
  return draw(self, given, [&](at::Tensor& memory, at::Generator own) { memory.random_(from, to, own); });
}

inline std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double rate, std::optional<bool> train) {
  auto mask = at::empty(input.sizes(), input.options().dtype(at::kBool));
  if (train.has_value() && !*train) return {input.clone(), mask.fill_(true)};
  mask.bernoulli_(1 - rate);
  return {input.mul(mask).mul(rate == 1 ? 0.0 : 1 / (1 - rate)), mask};
}

}  // namespace fake

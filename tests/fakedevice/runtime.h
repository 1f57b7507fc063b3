// What torch asks of a device: guard, allocators, generator and hooks.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/GeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "streams.h"

namespace fake {

using Lock = std::lock_guard<std::recursive_mutex>;

inline c10::Device of(int index) { return c10::Device(c10::DeviceType::PrivateUse1, static_cast<c10::DeviceIndex>(index)); }

inline c10::Stream stream_of(int index, int64_t id) { return c10::Stream(c10::Stream::UNSAFE, of(index), id); }

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device other) const override {
    const auto before = getDevice();
    setDevice(other);
    return before;
  }
  c10::Device getDevice() const override { return of(current_device()); }
  void setDevice(c10::Device other) const override {
    if (!other.has_index()) return;
    TORCH_CHECK(other.index() < device_count(), "fake device ", int(other.index()), " does not exist; there are ", device_count());
    current_device() = other.index();
  }
  void uncheckedSetDevice(c10::Device other) const noexcept override {
    if (other.has_index()) current_device() = other.index();
  }
  c10::Stream getStream(c10::Device on) const override { return stream_of(index(on), current_stream(index(on))); }
  c10::Stream getDefaultStream(c10::Device on) const override { return stream_of(index(on), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device on, bool) const override { return getNewStream(on, 0); }
  c10::Stream getNewStream(c10::Device on, int) const override {
    Lock held(machine().lock);
    const auto id = ++machine().streams_made;
    device(index(on)).streams[id];
    return stream_of(index(on), id);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    current_stream(stream.device_index()) = stream.id();
    return before;
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    Lock held(machine().lock);
    if (!*event) *event = new Event();
    device(stream.device_index()).record(*static_cast<Event*>(*event), stream.id());
  }
  void block(void* event, const c10::Stream& stream) const override {
    Lock held(machine().lock);
    if (event) device(stream.device_index()).wait(stream.id(), *static_cast<Event*>(event));
  }
  bool queryEvent(void* event) const override {  // asking does not make late copies run
    Lock held(machine().lock);
    const auto* found = static_cast<Event*>(event);
    if (!found || found->device < 0) return true;
    const auto& queue = device(found->device).streams[found->stream].queue;
    return queue.empty() || queue.front().number > found->number;
  }
  void synchronizeEvent(void* event) const override {
    Lock held(machine().lock);
    const auto* found = static_cast<Event*>(event);
    if (!found || found->device < 0) return;
    auto& on = device(found->device);
    on.check();
    on.drain(found->stream, found->number);
    merge(on.host, found->clock);
  }
  bool queryStream(const c10::Stream& stream) const override {
    Lock held(machine().lock);
    return device(stream.device_index()).streams[stream.id()].queue.empty();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Lock held(machine().lock);
    auto& on = device(stream.device_index());
    on.check();
    on.host_waits(stream.id());
  }
  void synchronizeDevice(c10::DeviceIndex on) const override {
    Lock held(machine().lock);
    device(on < 0 ? current_device() : on).check();
    device(on < 0 ? current_device() : on).drain_all();
  }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const override {
    Lock held(machine().lock);
    device(stream.device_index()).arena.block(memory.get()).first->recorded.push_back(stream.id());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count()); }
  double elapsedTime(void* from, void* to, c10::DeviceIndex) const override {
    return std::chrono::duration<double, std::milli>(static_cast<Event*>(to)->at - static_cast<Event*>(from)->at).count();
  }

 private:
  static int index(c10::Device on) { return on.has_index() ? on.index() : current_device(); }
};

struct DeviceMemory final : public c10::DeviceAllocator {
  static void give_back(void* address) {
    if (!address || machine().process != getpid()) return;
    Lock held(machine().lock);
    for (auto& each : machine().devices) {
      if (each->arena.holds(address)) return each->release(address);
    }
  }
  c10::DataPtr allocate(size_t bytes) override {
    Lock held(machine().lock);
    auto& on = device(current_device());
    on.check();
    void* address = bytes ? on.arena.allocate(bytes) : nullptr;
    return {address, address, &give_back, of(on.index)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "the fake device does not copy raw memory"); }
  bool initialized() override { return initialised(); }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& memory, c10::Stream stream) override {
    Lock held(machine().lock);
    device(stream.device_index()).arena.block(memory.get()).first->recorded.push_back(stream.id());
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex on) override { device(on).arena.peak = device(on).arena.used(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex on) override {
    const auto& arena = device(on).arena;
    return {arena.total() - arena.used(), arena.total()};
  }
};

inline void pin(char* address, size_t bytes) {
  Lock held(machine().lock);
  machine().pinned[address] = bytes;
}

inline void unpin(char* address) {
  Lock held(machine().lock);
  machine().pinned.erase(address);
}

struct PinnedMemory final : public c10::Allocator {
  static void give_back(void* address) {
    if (!address) return;
    unpin(static_cast<char*>(address));
    std::free(address);
  }
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(from_environment("FAKE_DEVICE_PINS", 1), "the fake device may not pin ", bytes, " bytes");
    void* address = bytes ? std::aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT) : nullptr;
    if (address) pin(static_cast<char*>(address), bytes);
    return {address, address, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

// Counter-based, as generators of other devices are: the n-th draw depends on the seed and on n. Its state is both, 16 bytes.
struct Random final : public c10::GeneratorImpl {
  explicit Random(int index) : c10::GeneratorImpl(of(index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  uint64_t given = 0, drawn = 0;

  void set_current_seed(uint64_t seed) override { given = seed, drawn = 0; }
  void set_offset(uint64_t offset) override { drawn = offset; }
  uint64_t get_offset() const override { return drawn; }
  uint64_t current_seed() const override { return given; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom(true));
    return given;
  }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.device_type() == c10::DeviceType::CPU && state.numel() == 16, "the state of a fake generator is 16 bytes");
    std::memcpy(&given, state.data(), 8);
    std::memcpy(&drawn, static_cast<const char*>(state.data()) + 8, 8);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::empty({16}, at::kByte);
    std::memcpy(state.data_ptr(), &given, 8);
    std::memcpy(static_cast<char*>(state.data_ptr()) + 8, &drawn, 8);
    return state.getIntrusivePtr();
  }
  Random* clone_impl() const override {
    auto* found = new Random(device().index());
    found->given = given, found->drawn = drawn;
    return found;
  }
  // Returns a generator of the host for one kernel.
  at::Generator draw() {
    uint64_t mixed = given + 0x9E3779B97F4A7C15ull * ++drawn;
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ull;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBull;
    return at::make_generator<at::CPUGeneratorImpl>(mixed ^ (mixed >> 31));
  }
};

inline const at::Generator& default_generator(int index) {
  static std::map<int, at::Generator> all;
  Lock held(machine().lock);
  if (!all.count(index)) all[index] = at::make_generator<Random>(index);
  return all[index];
}

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(device_count()); }
  void setCurrentDevice(c10::DeviceIndex on) const override { Guard().setDevice(of(on)); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device()); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex on) const override { return Guard().exchangeDevice(of(on)).index(); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex on) const override { return Guard().exchangeDevice(of(on)).index(); }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return initialised(); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedMemory found;
    return &found;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex on) const override { return default_generator(on < 0 ? current_device() : on); }
  at::Generator getNewGenerator(c10::DeviceIndex on) const override { return at::make_generator<Random>(on < 0 ? current_device() : on); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    TORCH_CHECK(bytes <= storage.nbytes(), "the fake device does not enlarge storages");
  }
};

}  // namespace fake

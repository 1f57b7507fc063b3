// Streams, events, and the order of operations.
//
// Kernels run when they are launched. Copies that are asked to be non-blocking are late: they are queued, and run only when something waits for
// them: a later kernel of their stream, an event or a stream that is waited for. So a missing wait of the host shows: the memory is not there yet.
// A missing wait between streams is found by the order of operations (vector clocks): an access that is not ordered after a conflicting access by
// another stream is an error, whatever would have happened.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DeviceType.h>
#include <c10/core/Stream.h>

#include <chrono>
#include <deque>
#include <functional>
#include <set>

#include "arena.h"

namespace fake {

using Clock = std::map<int64_t, uint64_t>;  // of each stream, the last operation that is ordered before

inline void merge(Clock& clock, const Clock& other) {
  for (const auto& [stream, number] : other) clock[stream] = std::max(clock[stream], number);
}

struct Queued {
  uint64_t number;
  std::function<void()> act;
};

struct StreamState {
  std::deque<Queued> queue;
  uint64_t number = 0;
  Clock clock;
};

struct Event {
  int device = -1;
  int64_t stream = 0;
  uint64_t number = 0;
  Clock clock;
  std::chrono::steady_clock::time_point at;
};

class FakeDevice {
 public:
  explicit FakeDevice(int index) : index(index), arena(index) { streams[0]; }

  const int index;
  Arena arena;
  std::map<int64_t, StreamState> streams;
  Clock host;  // what the host has waited for
  std::string failure;  // once set, every operation fails: a sticky error

  void check() const {
    if (!failure.empty()) throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 700, "fake device " + std::to_string(index) + ": " + failure);
  }

  // Runs what is queued in a stream, up to an operation.
  void drain(int64_t id, uint64_t until = UINT64_MAX) {
    auto& stream = streams[id];
    while (!stream.queue.empty() && stream.queue.front().number <= until) {
      auto next = std::move(stream.queue.front());
      stream.queue.pop_front();
      next.act();
    }
  }

  void drain_all() {
    for (auto& [id, stream] : streams) host_waits(id);
  }

  // The host waits for all operations of a stream.
  void host_waits(int64_t id) {
    drain(id);
    merge(host, streams[id].clock);
  }

  // Begins an operation of a stream; returns its number.
  uint64_t begin(int64_t id) {
    check();
    auto& stream = streams[id];
    merge(stream.clock, host);
    return stream.clock[id] = ++stream.number;
  }

  // Notes that the operation under way of a stream uses memory. Throws if that is not ordered after what other streams do with it.
  void access(int64_t id, const void* address, size_t bytes, bool writes) {
    if (!bytes) return;
    const auto [block, start] = arena.block(address);
    const size_t stop = start + bytes;
    auto& stream = streams[id];
    for (const auto& each : block->accesses) {
      const bool conflicts = (writes || each.writes) && each.stream != id && each.start < stop && start < each.stop;
      if (conflicts && stream.clock[each.stream] < each.number) {
        TORCH_CHECK(
            false, "fake device ", index, ": stream ", id, writes ? " writes to" : " reads", " memory that stream ", each.stream,
            each.writes ? " has written to" : " has read", ", without having waited for it");
      }
    }
    auto& all = block->accesses;
    all.erase(
        std::remove_if(
            all.begin(), all.end(),
            [&](const Access& each) {
              const bool inside = each.start >= start && each.stop <= stop;
              return inside && (writes || (each.stream == id && !each.writes)) && (each.stream == id || stream.clock[each.stream] >= each.number);
            }),
        all.end());
    all.push_back({start, stop, id, stream.number, writes});
  }

  void record(Event& event, int64_t id) {
    const auto number = begin(id);
    event = {index, id, number, streams[id].clock, std::chrono::steady_clock::now()};
  }

  void wait(int64_t id, const Event& event);
  void release(void* address);
};

struct Machine {
  std::recursive_mutex lock;
  std::vector<std::unique_ptr<FakeDevice>> devices;
  std::map<char*, size_t> pinned;
  pid_t process = 0;
  int64_t streams_made = 0;
  size_t late_copies = 0;
};

inline Machine& machine() {
  static Machine* found = new Machine();  // never destroyed: tensors may outlive it
  return *found;
}

inline int device_count() { return static_cast<int>(from_environment("FAKE_DEVICES", 4)); }

inline bool initialised() { return !machine().devices.empty(); }

// Returns a device. The first use in a process makes the context; a context does not survive a fork, as on other devices.
inline FakeDevice& device(int index) {
  auto& all = machine();
  std::lock_guard<std::recursive_mutex> held(all.lock);
  if (all.devices.empty()) {
    for (int each = 0; each < device_count(); ++each) all.devices.push_back(std::make_unique<FakeDevice>(each));
    all.process = getpid();
  }
  TORCH_CHECK(all.process == getpid(), "the fake device was initialised before this process was forked, and cannot be used in it");
  TORCH_CHECK(index >= 0 && index < static_cast<int>(all.devices.size()), "fake device ", index, " does not exist; there are ", all.devices.size());
  return *all.devices[index];
}

inline void FakeDevice::wait(int64_t id, const Event& event) {
  if (event.device < 0) return;
  auto& stream = streams[id];
  const auto number = begin(id);
  if (event.device == index) merge(stream.clock, event.clock);
  const auto other = event;
  auto act = [other] { device(other.device).drain(other.stream, other.number); };
  if (stream.queue.empty()) act();
  else stream.queue.push_back({number, act});
}

inline void FakeDevice::release(void* address) {
  const auto recorded = arena.block(address).first->recorded;
  for (const auto id : recorded) drain(id);
  arena.release(address);
}

inline bool is_pinned(const void* address, size_t bytes = 1) {
  auto& all = machine();
  std::lock_guard<std::recursive_mutex> held(all.lock);
  auto found = all.pinned.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
  if (found == all.pinned.begin()) return false;
  --found;
  return static_cast<const char*>(address) + bytes <= found->first + found->second;
}

inline int& current_device() {
  static thread_local int found = 0;
  return found;
}

inline int64_t& current_stream(int index) {
  static thread_local std::map<int, int64_t> found;
  return found[index];
}

}  // namespace fake

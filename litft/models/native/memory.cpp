// Memory of tensors on a CPU: an arena of address space from which blocks are cut, best fit first, and into which they
// melt again when they are freed. Pages once touched stay, so no step asks the kernel for them anew; and a freed block
// serves the next tensor of its size, which glibc's aligned allocations don't do (they ask for a little more).

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kSpace = size_t{1} << 42;  // 4 TiB of addresses; memory is taken as it is touched
constexpr size_t kSmall = size_t{1} << 15;  // below it malloc is as good
constexpr size_t kGrain = size_t{1} << 12;
constexpr size_t kAlignment = 64;

class Arena {
 public:
  bool reserve() {
    if (base_ != nullptr) return true;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* space = mmap(nullptr, kSpace, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (space == MAP_FAILED) return false;
    madvise(space, kSpace, MADV_DONTDUMP);
    base_ = top_ = static_cast<char*>(space);
    return true;
  }

  void* take(size_t bytes) {
    bytes = (bytes + kGrain - 1) / kGrain * kGrain;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto fit = by_size_.lower_bound({bytes, nullptr});
    if (fit != by_size_.end()) {
      const auto [size, start] = *fit;
      remove(start, size);
      if (size > bytes) add(start + bytes, size - bytes);
      live_[start] = bytes;
      return start;
    }
    char* start = top_;
    if (!by_place_.empty()) {  // a free block that ends at the top grows
      const auto [place, size] = *by_place_.rbegin();
      if (place + size == top_) {
        remove(place, size);
        start = place;
      }
    }
    if (start + bytes > base_ + kSpace) throw std::bad_alloc();
    top_ = start + bytes;
    live_[start] = bytes;
    return start;
  }

  // False for a block that isn't the arena's.
  bool give_back(void* block) {
    auto* start = static_cast<char*>(block);
    if (start < base_ || start >= base_ + kSpace) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = live_.find(start);
    size_t size = found->second;
    live_.erase(found);
    auto next = by_place_.lower_bound(start);
    if (next != by_place_.begin()) {
      const auto [place, before] = *std::prev(next);
      if (place + before == start) {
        remove(place, before);
        start = place;
        size += before;
      }
    }
    next = by_place_.lower_bound(start + size);
    if (next != by_place_.end() && next->first == start + size) {
      const size_t after = next->second;
      remove(start + size, after);
      size += after;
    }
    add(start, size);
    return true;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  void add(char* start, size_t size) {
    by_size_.insert({size, start});
    by_place_[start] = size;
  }
  void remove(char* start, size_t size) {
    by_size_.erase({size, start});
    by_place_.erase(start);
  }

  char* base_ = nullptr;
  char* top_ = nullptr;
  std::mutex mutex_;
  std::set<std::pair<size_t, char*>> by_size_;
  std::map<char*, size_t> by_place_;
  std::unordered_map<void*, size_t> live_;
};

Arena& arena() {
  static auto* one = new Arena();  // never destroyed: tensors outlive statics
  return *one;
}

void give_back(void* block) {
  if (block != nullptr && !arena().give_back(block)) std::free(block);
}

class ArenaAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = nullptr;
    if (bytes >= kSmall) {
      block = arena().take(bytes);
    } else if (bytes > 0 && posix_memalign(&block, kAlignment, bytes) != 0) {
      throw std::bad_alloc();
    }
    return {block, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// Serve all tensors from now on; false where the address space can't be had.
extern "C" bool litft_use_arena() {
  if (!arena().reserve()) return false;
  static bool used = false;
  if (used) return true;
  used = true;
  // a process forked while another thread is in the arena would find it locked for ever
  pthread_atfork([] { arena().lock(); }, [] { arena().unlock(); }, [] { arena().unlock(); });
  c10::SetCPUAllocator(new ArenaAllocator(), 1);
  return true;
}

#undef _FORTIFY_SOURCE  // which takes a jump to another stack for a mistake
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>

// A thread that failed is left where it stands, with what it holds.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

namespace hsaid::emulator {

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

enum class Waits { kNo, kForBlock, kForWarp, kDone };

// A stack that is not running, and where on it to go on: where its context says, if it has never run.
struct Place {
  ucontext_t context;
  jmp_buf left;
  bool has_run = false;

  // Swapping contexts takes a system call, for the mask of signals; only so do sanitizers know what is going on.
  static void swap(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.context, &to.context);
#else
    from.has_run = true;
    if (_setjmp(from.left)) return;
    if (to.has_run) _longjmp(to.left, 1);
    setcontext(&to.context);
#endif
  }
};

struct Fiber {
  Place place;
  std::unique_ptr<char[]> stack;
  Waits waits;
  float lane_value;
  void* sanitizer_stack;
};

// Who touched a word of shared memory last. Barriers are counted by epochs: `block` those of the block, `warp` those of
// the thread's warp, the block's among them.
struct Word {
  int writer = -1, writer_block = 0, writer_warp = 0;
  // Readers since the block's epoch `reader_block`: kMany stands for several.
  int reader = -1, reader_in_warp = -1, reader_block = -1, reader_warp = 0;
};
constexpr int kMany = -2;

struct Access {
  int first, words;
  bool write;
};

struct Machine {
  Device device;
  std::vector<Fiber> fibers;
  Place scheduler;
  void* scheduler_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_bytes = 0;
  const std::function<void()>* body = nullptr;
  dim3 grid{1};
  uint3 block{};
  int threads = 0, current = 0, block_epoch = 0;
  std::vector<int> warp_epoch;
  std::unique_ptr<float4[]> shared;
  std::vector<Word> words;
  std::vector<std::vector<Access>> accesses;  // of each thread since its warp last waited
  std::string error;

  // --- threads

  void switch_to_fiber(int number) {
    current = number;
    Fiber& fiber = fibers[number];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_stack, fiber.stack.get(), kStackBytes);
#endif
    Place::swap(scheduler, fiber.place);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_stack, nullptr, nullptr);
#endif
  }
  void switch_to_scheduler(Waits waits) {
    Fiber& fiber = fibers[current];
    fiber.waits = waits;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(waits == Waits::kDone ? nullptr : &fiber.sanitizer_stack, scheduler_bottom,
                                   scheduler_bytes);
#endif
    Place::swap(fiber.place, scheduler);
    entered();
  }
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fibers[current].sanitizer_stack, &scheduler_bottom, &scheduler_bytes);
#endif
  }
  [[noreturn]] void fail(const std::string& what) {
    if (error.empty()) error = "thread " + std::to_string(current) + ": " + what;
    switch_to_scheduler(Waits::kDone);
    std::abort();  // a failed thread is never run again
  }

  [[gnu::noinline]] static void prepare(Fiber& fiber) {
    ucontext_t& context = fiber.place.context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, [] { instance().thread_main(); }, 0);
    fiber.place.has_run = false;
  }
  void start_block(int count, int shared_bytes) {
    threads = count;
    block_epoch = 0;
    warp_epoch.assign((count + kWarp - 1) / kWarp, 0);
    accesses.assign(count, {});
    words.assign(shared_bytes / 4, {});
    shared.reset(new float4[(shared_bytes + 15) / 16]);
    fibers.resize(count);
    for (Fiber& fiber : fibers) {
      if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
      fiber.waits = Waits::kNo;
      fiber.sanitizer_stack = nullptr;
      prepare(fiber);
    }
  }
  void thread_main() {
    entered();
    try {
      (*body)();
    } catch (const std::exception& e) {
      if (error.empty()) error = e.what();
    }
    switch_to_scheduler(Waits::kDone);
  }

  // Runs threads until all are done, or one failed.
  void run_block() {
    for (;;) {
      bool ran = false;
      for (int i = 0; i < threads; ++i) {
        const int number = device.last_thread_first ? threads - 1 - i : i;
        if (fibers[number].waits != Waits::kNo) continue;
        switch_to_fiber(number);
        ran = true;
        if (!error.empty()) return;
      }
      if (!ran && !release()) return;
    }
  }

  bool all(int from, int to, Waits waits) const {
    return std::all_of(fibers.begin() + from, fibers.begin() + to, [&](const Fiber& f) { return f.waits == waits; });
  }
  // Lets threads pass a barrier that all have reached; false where nobody is left.
  bool release() {
    bool released = false;
    for (int warp = 0; warp * kWarp < threads; ++warp) {
      const int from = warp * kWarp, to = std::min(threads, from + kWarp);
      if (!all(from, to, Waits::kForWarp)) continue;
      count_wavefronts(from, to);
      ++warp_epoch[warp];
      for (int i = from; i < to; ++i) fibers[i].waits = Waits::kNo;
      released = true;
    }
    if (released) return true;
    if (all(0, threads, Waits::kDone)) {
      for (int from = 0; from < threads; from += kWarp) count_wavefronts(from, std::min(threads, from + kWarp));
      return false;
    }
    if (!all(0, threads, Waits::kForBlock)) {
      int counts[4] = {};
      for (const Fiber& f : fibers) ++counts[(int)f.waits];
      error = "barrier not reached by all: " + std::to_string(counts[1]) + " threads wait for the block, " +
              std::to_string(counts[2]) + " for their warp, " + std::to_string(counts[3]) + " are done";
      return false;
    }
    for (int from = 0; from < threads; from += kWarp) count_wavefronts(from, std::min(threads, from + kWarp));
    ++block_epoch;
    for (int& epoch : warp_epoch) ++epoch;
    for (Fiber& f : fibers) f.waits = Waits::kNo;
    return true;
  }

  // --- shared memory

  bool ordered(int thread, int block_then, int warp_then) const {
    return thread == current || block_then < block_epoch ||
           (thread / kWarp == current / kWarp && warp_then < warp_epoch[current / kWarp]);
  }
  void touch(int i, bool write) {
    Word& w = words[i];
    const int warp = current / kWarp, epoch = warp_epoch[warp];
    const auto race = [&](const char* before, int other) {
      fail("shared float " + std::to_string(i) + (write ? " written" : " read") + " that thread" +
           (other == kMany ? "s before" : " " + std::to_string(other)) + " " + before +
           ", without a barrier in between");
    };
    if (w.writer >= 0 && !ordered(w.writer, w.writer_block, w.writer_warp)) race("wrote", w.writer);
    if (!write) {
      if (w.writer < 0) fail("shared float " + std::to_string(i) + " read before it was written");
      if (w.reader_block < block_epoch) {
        w.reader = current;
        w.reader_in_warp = warp;
      } else {
        if (w.reader_in_warp != warp) w.reader_in_warp = kMany;
        w.reader = w.reader == current || w.reader_warp < epoch ? current : kMany;
      }
      w.reader_block = block_epoch;
      w.reader_warp = epoch;
      return;
    }
    if (w.reader_block == block_epoch) {
      if (w.reader_in_warp != warp) race("read", w.reader);
      if (w.reader != current && w.reader_warp == epoch) race("read", w.reader);
    }
    w.writer = current;
    w.writer_block = block_epoch;
    w.writer_warp = epoch;
  }

  // The k-th accesses of a warp's lanes are one instruction where all lanes made equally many of the same kind.
  void count_wavefronts(int from, int to) {
    if (!device.count_wavefronts) return;
    const size_t count = accesses[from].size();
    bool alike = to - from == kWarp;
    for (int t = from; t < to; ++t) alike = alike && accesses[t].size() == count;
    for (size_t k = 0; alike && k < count; ++k) {
      const Access& one = accesses[from][k];
      bool same = true;
      for (int t = from; t < to; ++t)
        same = same && accesses[t][k].words == one.words && accesses[t][k].write == one.write;
      if (!same) break;
      const int lanes = kWarp / one.words;  // that a wavefront can serve
      for (int group = from; group < to; group += lanes) {
        std::vector<int> banks[32];
        for (int t = group; t < group + lanes; ++t)
          for (int j = 0; j < one.words; ++j) {
            const int word = accesses[t][k].first + j;
            auto& bank = banks[word % 32];
            if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
          }
        size_t most = 1;
        for (const auto& bank : banks) most = std::max(most, bank.size());
        device.wavefronts += (int64_t)most;
        ++device.least_wavefronts;
      }
      ++device.shared_accesses;
    }
    for (int t = from; t < to; ++t) accesses[t].clear();
  }

  static Machine& instance() {
    static Machine machine;
    return machine;
  }
};

Machine& machine() { return Machine::instance(); }

}  // namespace

Device& device() { return machine().device; }
unsigned thread_index() { return (unsigned)machine().current; }
uint3 block_index() { return machine().block; }
unsigned grid_width() { return machine().grid.x; }
void sync_block() { machine().switch_to_scheduler(Waits::kForBlock); }
void sync_warp() { machine().switch_to_scheduler(Waits::kForWarp); }

float exchange_lanes(float value, unsigned from_lane) {
  Machine& m = machine();
  m.fibers[m.current].lane_value = value;
  sync_warp();
  const float other = m.fibers[m.current / kWarp * kWarp + (int)(from_lane % kWarp)].lane_value;
  sync_warp();
  return other;
}

void* shared_access(int first, int words, bool write) {
  Machine& m = machine();
  if (first < 0 || (size_t)(first + words) > m.words.size())
    m.fail("shared floats " + std::to_string(first) + " to " + std::to_string(first + words - 1) + " of " +
           std::to_string(m.words.size()));
  if (first % words)
    m.fail("a vector of " + std::to_string(words) + " floats at shared float " + std::to_string(first));
  for (int i = first; i < first + words; ++i) m.touch(i, write);
  if (m.device.count_wavefronts) m.accesses[m.current].push_back({first, words, write});
  return (float*)m.shared.get() + first;
}

void run(const char* name, dim3 grid, int threads, int shared_bytes, const std::function<void()>& body) {
  Machine& m = machine();
  if (m.device.idle) return;
  const std::string what = std::string(name) + ", grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                           ", " + std::to_string(threads) + " threads, " + std::to_string(shared_bytes) + " bytes";
  m.device.launches.push_back(what);
  if (threads < 1 || threads > 1024 || grid.x < 1 || grid.y < 1 || grid.y > 65535)
    throw std::runtime_error(what + ": no device can run this");
  if (shared_bytes > m.device.shared_bytes)
    throw std::runtime_error(what + " of shared memory: the device has " + std::to_string(m.device.shared_bytes));
  m.body = &body;
  m.grid = grid;
  m.error.clear();
  const int64_t blocks = (int64_t)grid.x * grid.y;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t number = m.device.last_block_first ? blocks - 1 - i : i;
    if (grid.x > m.device.only_block && m.device.only_block >= 0 && number % grid.x != m.device.only_block) continue;
    m.block = {(unsigned)(number % grid.x), (unsigned)(number / grid.x), 0};
    m.start_block(threads, shared_bytes);
    m.run_block();
    if (!m.error.empty())
      throw std::runtime_error(what + ", block " + std::to_string(m.block.x) + ", " + std::to_string(m.block.y) + ": " +
                               m.error);
  }
}

}  // namespace hsaid::emulator

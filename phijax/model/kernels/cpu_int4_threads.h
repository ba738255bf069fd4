// Threads for cpu_int4.cc that stay awake for a moment: at one token a step there is a call every hundred microseconds,
// and waking a thread that sleeps takes tens of them. (XLA's own pool is open to us, and was half as fast.)

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Items in phases: a phase begins when all of the one before is done.
struct Work {
  struct Phase {
    int count = 0;
    std::atomic<int> next{0}, done{0};
  };
  std::function<void(int phase, int item)> item;
  std::vector<Phase> phases;

  Work(const std::vector<int>& counts, std::function<void(int, int)> f) : item(std::move(f)), phases(counts.size()) {
    for (size_t i = 0; i < counts.size(); ++i) phases[i].count = counts[i];
  }

  // Returns when everything is done. Who comes late finds nothing left to do, and calls nothing.
  void take_part() {
    for (size_t number = 0; number < phases.size(); ++number) {
      Phase& phase = phases[number];
      for (int i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < phase.count;) {
        item(static_cast<int>(number), i);
        phase.done.fetch_add(1, std::memory_order_release);
      }
      for (int turn = 0; phase.done.load(std::memory_order_acquire) < phase.count; ++turn) {
        turn < 20000 ? pause() : std::this_thread::yield();
      }
    }
  }
};

class Threads {
 public:
  // As many as XLA computes with; they live as long as the process.
  static Threads& all(int64_t count) {
    static Threads* threads = new Threads(std::max<int64_t>(count, 1) - 1);
    return *threads;
  }

  int count() const { return helpers_ + 1; }

  // item(phase, i) for i below counts[phase]. Two calls at once: the second one's caller works alone.
  void run(const std::vector<int>& counts, std::function<void(int, int)> item) {
    auto work = std::make_shared<Work>(counts, std::move(item));
    std::unique_lock<std::mutex> alone(callers_, std::try_to_lock);
    if (alone.owns_lock() && helpers_ > 0 && *std::max_element(counts.begin(), counts.end()) > 1) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        work_ = work;
        number_.fetch_add(1, std::memory_order_release);
      }
      awaken_.notify_all();
    }
    work->take_part();
  }

 private:
  static constexpr auto kAwake = std::chrono::microseconds(300);

  explicit Threads(int helpers) : helpers_(helpers) {
    for (int i = 0; i < helpers; ++i) std::thread([this] { help(); }).detach();
  }

  void help() {
    for (uint64_t seen = 0;;) {
      const auto until = std::chrono::steady_clock::now() + kAwake;
      for (int turn = 1; number_.load(std::memory_order_acquire) == seen; ++turn) {
        pause();
        if (turn % 64 == 0 && std::chrono::steady_clock::now() > until) break;
      }
      std::shared_ptr<Work> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        awaken_.wait(lock, [&] { return number_.load(std::memory_order_relaxed) != seen; });
        seen = number_.load(std::memory_order_relaxed);
        work = work_;
      }
      work->take_part();
    }
  }

  const int helpers_;
  std::mutex callers_, mutex_;
  std::condition_variable awaken_;
  std::atomic<uint64_t> number_{0};
  std::shared_ptr<Work> work_;
};

}  // namespace

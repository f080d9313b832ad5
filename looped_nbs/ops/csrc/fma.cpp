// How many floating-point operations a second the registers can do: a loop of multiply-adds that touches no memory.
// The sum of what each thread reaches in its best window.
#include <chrono>

#include "lanes.h"

namespace {

template <class T> double rate(int threads, double seconds) {
  constexpr int W = NBS_REGISTER_BYTES / sizeof(T), Chains = 12, Rounds = 1 << 14;
  using Clock = std::chrono::steady_clock;
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    V<T, W> x[Chains], a, b;
    for (int i = 0; i < W; i++) {  // no two lanes alike, or a compiler would count them once
      a[i] = T(0.999) - i * T(0.001);
      b[i] = i + 1;
    }
    for (int c = 0; c < Chains; c++) x[c] = b + T(c);
    double best = 0;  // of many short windows: a thread that is interrupted loses a window, not the result
    const auto start = Clock::now();
    for (auto before = start; std::chrono::duration<double>(before - start).count() < seconds;) {
      for (int round = 0; round < Rounds; round++) {
#pragma GCC unroll 12
        for (int c = 0; c < Chains; c++) x[c] = x[c] * a + b;
      }
      const auto now = Clock::now();
      best = std::fmax(best, 2.0 * W * Chains * Rounds / std::chrono::duration<double>(now - before).count());
      before = now;
    }
    for (int c = 1; c < Chains; c++) x[0] += x[c];
    total += std::isfinite(sum<T, W>(x[0])) ? best : 0;  // the result is used, so it must be computed
  }
  return total;
}

}  // namespace

NBS_EXPORT double fma_rate_float32(int threads, double seconds) { return rate<float>(threads, seconds); }
NBS_EXPORT double fma_rate_float64(int threads, double seconds) { return rate<double>(threads, seconds); }

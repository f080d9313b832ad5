// How many floating-point operations a second the registers can do: a loop of multiply-adds that touches no memory.
#include <chrono>

#include "lanes.h"

namespace {

template <class T> double rate(int threads, double seconds) {
  constexpr int W = NBS_REGISTER_BYTES / sizeof(T), Chains = 12, Rounds = 4096;
  double operations = 0, took = 0;
#pragma omp parallel num_threads(threads) reduction(+ : operations) reduction(max : took)
  {
    V<T, W> x[Chains], a = {}, b = {};
    for (int i = 0; i < W; i++) {  // no two lanes alike, or a compiler would count them once
      a[i] = T(0.999) - i * T(0.001);
      b[i] = i + 1;
    }
    for (int c = 0; c < Chains; c++) x[c] = b + T(c);
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int round = 0; round < Rounds; round++) {
#pragma GCC unroll 12
        for (int c = 0; c < Chains; c++) x[c] = x[c] * a + b;
      }
      operations += 2.0 * W * Chains * Rounds;
      took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    } while (took < seconds);
    for (int c = 1; c < Chains; c++) x[0] += x[c];
    if (!std::isfinite(sum<T, W>(x[0]))) operations = 0;  // the result is used, so it must be computed
  }
  return operations / took;
}

}  // namespace

NBS_EXPORT double fma_rate_float32(int threads, double seconds) { return rate<float>(threads, seconds); }
NBS_EXPORT double fma_rate_float64(int threads, double seconds) { return rate<double>(threads, seconds); }

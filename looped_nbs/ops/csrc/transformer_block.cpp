// A pre-norm transformer block on the CPU, forwards and backwards: parts of kPart tokens pass through all that is done to each
// token by itself while their numbers are in the cache; attention takes one head of as many sequences as a register has
// lanes, or of one sequence. Sums over all tokens are taken in an order that does not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "gates.h"
#include "products.h"
#include "sweeps.h"

namespace {

constexpr int kPart = 64, kCache = 1 << 19, kRoom = 1 << 24;  // tokens of a part; bytes; numbers
enum Parameter {
  kGain1, kShift1, kIn, kInBias, kOut, kOutBias, kGain2, kShift2, kWide, kWideBias, kNarrow, kNarrowBias, kParameters
};
enum Flag { kCausal = 1, kItself = 2, kGelu = 4 };

// One number of 32 bits, or a register of them
template <class U> NBS_SHARED U mixed(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Numbers of one place by which dropout multiplies: a function of the seed, the token and the column alone.
template <class T> struct Dropout {
  uint32_t low, high, limit;
  T scale;

  Dropout(int64_t seed, int site, double p)
      : low(uint32_t(seed)), high(uint32_t(uint64_t(seed) >> 32) + uint32_t(site)), limit(uint32_t(p * 4294967296.0)),
        scale(T(1 / (1 - p))) {}

  uint32_t key(int64_t row) const { return mixed(high ^ mixed(low + uint32_t(row))); }

  template <int W> NBS_SHARED V<T, W> factors(uint32_t key, int column) const {
    typedef V<uint32_t, W> U;
    U x;
    for (int i = 0; i < W; i++) x[i] = uint32_t(i);
    x = mixed((x + uint32_t(column)) * 0x9e3779b9u + key);
    return __builtin_convertvector(x >= limit, V<T, W>) * -scale;
  }
};

// Call f(first, n) for registers of n numbers; n is that of a whole register but for the last.
template <class T, class F> NBS_SHARED void registers(int n, const F& f) {
  int i = 0;
  for (; i + kLane<T> <= n; i += kLane<T>) f(i, kLane<T>);
  if (i < n) f(i, n - i);
}

template <class T> struct Call {
  int batch, time, time_k, d, heads, d_ff, flags, threads;
  int64_t seed;
  T eps, scale;
  double p, p_inner;
  const T *h, *source, *w[kParameters], *turned[4];  // turned: kIn, kOut, kWide, kNarrow as (inner, columns)

  static constexpr int W = kLane<T>;
  bool itself() const { return flags & kItself; }
  bool gelu() const { return flags & kGelu; }
  int keys() const { return itself() ? time : time_k; }
  int64_t rows() const { return int64_t(batch) * time; }
  int64_t key_rows() const { return int64_t(batch) * keys(); }
  // Do sequences share registers? Not if lanes would be idle, or their keys and values leave the cache.
  bool together() const { return batch >= W / 2 && int64_t(keys()) * (d / heads) * 2 * NBS_REGISTER_BYTES <= kCache; }
};

// What the backward pass needs of the forward pass, of some rows.
template <class T> struct Kept {
  T *qkv, *kv, *read, *middle, *inner, *wide;  // wide: what GELU is taken of, where it is
  int64_t q_row, kv_row;

  Kept(const Call<T>& c, T* from, int64_t rows, int64_t key_rows) {
    q_row = c.itself() ? 3 * c.d : c.d;
    kv_row = c.itself() ? 3 * c.d : 2 * c.d;
    qkv = from, from += rows * q_row;
    kv = c.itself() ? qkv + c.d : from, from += c.itself() ? 0 : key_rows * kv_row;
    read = from, from += rows * c.d;
    middle = from, from += rows * c.d;
    inner = from, from += c.gelu() ? rows * c.d_ff : 0;
    wide = from;
  }
};

template <class T> NBS_SHARED void statistics(const T* x, int n, T eps, T& mean, T& rate) {
  constexpr int W = kLane<T>;
  V<T, W> sums = {}, squares = {};
  T total = 0, square = 0;
  int i = 0;
  for (; i + W <= n; i += W) sums += load<T, W>(x + i);
  for (; i < n; i++) total += x[i];
  mean = (total + sum<T, W>(sums)) / n;
  for (i = 0; i + W <= n; i += W) {
    const V<T, W> away = load<T, W>(x + i) - mean;
    squares += away * away;
  }
  for (; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  rate = T(1) / std::sqrt((square + sum<T, W>(squares)) / n + eps);
}

template <class T> void norm(T* to, const T* x, const T* gain, const T* shift, int rows, int n, T eps) {
  constexpr int W = kLane<T>;
  for (int row = 0; row < rows; row++, x += n, to += n) {
    T mean, rate;
    statistics(x, n, eps, mean, rate);
    registers<T>(n, [&](int i, int few) __attribute__((always_inline)) {
      V<T, W> y = (get<T, W>(x + i, 1, few) - mean) * rate * get<T, W>(gain + i, 1, few);
      if (shift) y += get<T, W>(shift + i, 1, few);
      put<T, W>(to + i, 1, y, few);
    });
  }
}

// Add to `to` what the gradient of a norm gives its input; add the gradients of gain and shift to `sums`.
template <class T> void norm_backward(T* to, const T* grad, const T* x, const T* gain, int rows, int n, T eps, T* sums) {
  constexpr int W = kLane<T>;
  for (int row = 0; row < rows; row++, x += n, to += n, grad += n) {
    T mean, rate;
    statistics(x, n, eps, mean, rate);
    V<T, W> level = {}, slope = {};
    registers<T>(n, [&](int i, int few) __attribute__((always_inline)) {
      V<T, W> g = get<T, W>(grad + i, 1, few), away = (get<T, W>(x + i, 1, few) - mean) * rate;
      put<T, W>(sums + i, 1, get<T, W>(sums + i, 1, few) + g * away, few);
      put<T, W>(sums + n + i, 1, get<T, W>(sums + n + i, 1, few) + g, few);
      g *= get<T, W>(gain + i, 1, few);
      level += g, slope += g * away;  // beyond the last number the gradient is zero
    });
    const T flat = sum<T, W>(level) / n, steep = sum<T, W>(slope) / n;
    registers<T>(n, [&](int i, int few) __attribute__((always_inline)) {
      const V<T, W> away = (get<T, W>(x + i, 1, few) - mean) * rate;
      const V<T, W> g = get<T, W>(grad + i, 1, few) * get<T, W>(gain + i, 1, few);
      put<T, W>(to + i, 1, get<T, W>(to + i, 1, few) + (g - flat - away * steep) * rate, few);
    });
  }
}

// One head of one sequence: keys and values lie as columns, padded to registers of W numbers.
template <class T, int W> struct Head {
  int d, padded, keys, width;
  std::vector<T> room;
  T *k, *v, *dk, *dv, *p, *dp, *q, *out;

  Head(int d, int keys)
      : d(d), padded(round_up(d, W)), keys(keys), width(round_up(keys, W)),
        room(size_t(4 * padded + 2) * width + 2 * padded + 64 / sizeof(T)) {
    T* next = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
    for (T** part : {&k, &v, &dk, &dv}) *part = next, next += padded * width;
    for (T** part : {&p, &dp}) *part = next, next += width;
    for (T** part : {&q, &out}) *part = next, next += padded;
  }

  void columns(T* to, const T* from, int64_t row) {
    for (int t = 0; t < keys; t++, from += row)
      for (int e = 0; e < d; e++) to[e * width + t] = from[e];
  }

  // y[t] = the sum over e of u[e] M[e][t]
  NBS_SHARED void combine(T* y, const T* u, const T* M, int registers) {
    tiles(registers, [=](auto size, int first) __attribute__((always_inline)) {
      constexpr int n = decltype(size)::value;
      V<T, W> x[n] = {};
      for (int e = 0; e < d; e++)
        for (int i = 0; i < n; i++) x[i] += u[e] * load<T, W>(M + e * width + (first + i) * W);
      store_tile<T, W, n>(y + first * W, x);
    });
  }

  // y[e] = the sum over t of M[e][t] u[t]
  NBS_SHARED void measure(T* y, const T* M, const T* u, int registers) {
    sum_rows<T, W, 1>(&y, false, padded, [&](int e, V<T, W>* total) __attribute__((always_inline)) {
      total[0] = products<T, W>(M + e * width, u, registers * W);
    });
  }

  NBS_SHARED void weights(const T* query, T scale, int n) {
    for (int e = 0; e < d; e++) q[e] = query[e] * scale;
    combine(p, q, k, (n + W - 1) / W);
    softmax<T, W>(p, round_up(n, W), n);
  }

  NBS_SHARED void answer(T* to, const T* query, T scale, int n) {
    weights(query, scale, n);
    measure(out, v, p, (n + W - 1) / W);
    copy(to, out, d);
  }

  NBS_SHARED void backward(T* dq, const T* query, const T* grad, T scale, int n) {
    const int some = (n + W - 1) / W;
    weights(query, scale, n);
    combine(dp, grad, v, some);
    softmax_backward<T, W>(dp, p, some * W);
    measure(out, k, dp, some);
    for (int e = 0; e < d; e++) dq[e] = out[e] * scale;
    for (int e = 0; e < d; e++)
      for (int i = 0; i < some * W; i += W) {
        T *to_k = dk + e * width + i, *to_v = dv + e * width + i;
        store<T, W>(to_k, load<T, W>(to_k) + q[e] * load<T, W>(dp + i));
        store<T, W>(to_v, load<T, W>(to_v) + grad[e] * load<T, W>(p + i));
      }
  }
};

// Call f(Size<W>) with registers of W numbers that suit the number of keys.
template <class T, class F> void with_lanes(int keys, const F& f) {
  constexpr int most = kLane<T>, few = most < 4 ? most : 4, some = most < 8 ? most : 8;
  if (keys <= few) return f(Size<few>{});
  if (keys <= some) return f(Size<some>{});
  return f(Size<most>{});
}

template <class T> NBS_SHARED int visible(const Call<T>& c, int t) {
  return c.flags & kCausal ? c.keys() - c.time + t + 1 : c.keys();
}

// One head of W sequences, one in each lane.
template <class T> struct Lane {
  static constexpr int W = kLane<T>, kTogether = 8;
  typedef V<T, W> L;
  int d, keys, sequences;
  std::vector<T> room;
  L *k, *v, *dk, *dv, *p, *dp, *q, *g, *out;

  Lane(int d, int keys, int sequences)
      : d(d), keys(keys), sequences(sequences), room((int64_t(4 * keys + 3) * d + 2 * keys + 1) * W) {
    L* next = reinterpret_cast<L*>((reinterpret_cast<uintptr_t>(room.data()) + sizeof(L) - 1) / sizeof(L) * sizeof(L));
    for (L** part : {&k, &v, &dk, &dv}) *part = next, next += keys * d;
    for (L** part : {&p, &dp}) *part = next, next += keys;
    for (L** part : {&q, &g, &out}) *part = next, next += d;
  }

  // Rows of d numbers of each sequence to registers, and back; sequences lie `apart`.
  NBS_SHARED void gather(L* to, const T* from, int64_t apart) {
    T* lanes = reinterpret_cast<T*>(to);
    for (int s = 0; s < sequences; s++, from += apart)
      for (int e = 0; e < d; e++) lanes[e * W + s] = from[e];
  }
  NBS_SHARED void scatter(T* to, const L* from, int64_t apart) {
    const T* lanes = reinterpret_cast<const T*>(from);
    for (int s = 0; s < sequences; s++, to += apart)
      for (int e = 0; e < d; e++) to[e] = lanes[e * W + s];
  }

  // Call f(Size<n>, first) for groups of n of `count` things.
  template <int n = kTogether, class F> static NBS_SHARED void groups(int count, const F& f, int first = 0) {
    for (; count >= n; count -= n, first += n) f(Size<n>{}, first);
    if constexpr (n > 1) groups<n / 2>(count, f, first);
  }

  // y[j] = the sum over e of u[e] M[j][e], for the first n keys
  NBS_SHARED void compare(L* y, const L* u, const L* M, int n) {
    groups(n, [=](auto size, int first) __attribute__((always_inline)) {
      constexpr int some = decltype(size)::value;
      L x[some] = {};
      for (int e = 0; e < d; e++)
        for (int i = 0; i < some; i++) x[i] += u[e] * M[(first + i) * d + e];
      for (int i = 0; i < some; i++) y[first + i] = x[i];
    });
  }

  // y[e] = the sum over j of u[j] M[j][e], times scale
  NBS_SHARED void mix(L* y, const L* u, const L* M, int n, const L& scale) {
    groups(d, [=](auto size, int first) __attribute__((always_inline)) {
      constexpr int some = decltype(size)::value;
      L x[some] = {};
      for (int j = 0; j < n; j++)
        for (int i = 0; i < some; i++) x[i] += u[j] * M[j * d + first + i];
      for (int i = 0; i < some; i++) y[first + i] = x[i] * scale;
    });
  }

  // M[j][e] += u[j] v[e]
  NBS_SHARED void spread(L* M, const L* u, const L* v, int n) {
    for (int j = 0; j < n; j++)
      for (int e = 0; e < d; e++) M[j * d + e] += u[j] * v[e];
  }

  // p[j]: weights before they are divided by their sum, whose inverse is returned
  NBS_SHARED L weights(const T* query, int64_t apart, T scale, int n) {
    gather(q, query, apart);
    for (int e = 0; e < d; e++) q[e] *= scale * T(kLog2E);
    compare(p, q, k, n);
    L high = p[0], total = {};
    for (int j = 1; j < n; j++) high = p[j] > high ? p[j] : high;
    for (int j = 0; j < n; j++) total += p[j] = two_to<T, W>(p[j] - high);
    return T(1) / total;
  }

  void read(const T* keys_from, const T* values_from, int64_t row, int64_t apart) {
    for (int t = 0; t < keys; t++) {
      gather(k + t * d, keys_from + t * row, apart);
      gather(v + t * d, values_from + t * row, apart);
    }
  }

  NBS_SHARED void answer(T* to, int64_t to_apart, const T* query, int64_t apart, T scale, int n) {
    const L whole = weights(query, apart, scale, n);
    mix(out, p, v, n, whole);
    scatter(to, out, to_apart);
  }

  NBS_SHARED void backward(T* dq, const T* query, int64_t apart, const T* grad, int64_t grad_apart, T scale, int n) {
    const L whole = weights(query, apart, scale, n);
    gather(g, grad, grad_apart);
    compare(dp, g, v, n);
    L mean = {};
    for (int j = 0; j < n; j++) mean += (p[j] *= whole) * dp[j];
    for (int j = 0; j < n; j++) dp[j] = p[j] * (dp[j] - mean) * scale;
    mix(out, dp, k, n, L{} + T(1));
    scatter(dq, out, apart);
    gather(q, query, apart);
    spread(dk, dp, q, n);
    spread(dv, p, g, n);
  }

  void write(T* dkeys, T* dvalues, int64_t row, int64_t apart) {
    for (int t = 0; t < keys; t++) {
      scatter(dkeys + t * row, dk + t * d, apart);
      scatter(dvalues + t * row, dv + t * d, apart);
    }
  }
};

// One head (from column `at` on) of sequences from b on
template <class T> void attend(const Call<T>& c, const Kept<T>& kept, int b, int sequences, int at) {
  const int d = c.d / c.heads;
  const int64_t q_apart = c.time * kept.q_row, k_apart = c.keys() * kept.kv_row, apart = int64_t(c.time) * c.d;
  const T *q = kept.qkv + b * q_apart + at, *k = kept.kv + b * k_apart + at;
  T* to = kept.read + b * apart + at;
  if (c.together()) {
    Lane<T> lane(d, c.keys(), sequences);
    lane.read(k, k + c.d, kept.kv_row, k_apart);
    for (int t = 0; t < c.time; t++)
      lane.answer(to + t * c.d, apart, q + t * kept.q_row, q_apart, c.scale, visible(c, t));
    return;
  }
  with_lanes<T>(c.keys(), [&](auto size) {
    Head<T, decltype(size)::value> head(d, c.keys());
    head.columns(head.k, k, kept.kv_row);
    head.columns(head.v, k + c.d, kept.kv_row);
    for (int t = 0; t < c.time; t++) head.answer(to + t * c.d, q + t * kept.q_row, c.scale, visible(c, t));
  });
}

// dq and dkv lie as the queries, keys and values do
template <class T>
void attend_backward(const Call<T>& c, const Kept<T>& kept, T* dq, T* dkv, const T* grad, int b, int sequences, int at) {
  const int d = c.d / c.heads;
  const int64_t q_apart = c.time * kept.q_row, k_apart = c.keys() * kept.kv_row, apart = int64_t(c.time) * c.d;
  const T *q = kept.qkv + b * q_apart + at, *k = kept.kv + b * k_apart + at, *g = grad + b * apart + at;
  dq += b * q_apart + at, dkv += b * k_apart + at;
  if (c.together()) {
    Lane<T> lane(d, c.keys(), sequences);
    lane.read(k, k + c.d, kept.kv_row, k_apart);
    for (int t = 0; t < c.time; t++)
      lane.backward(dq + t * kept.q_row, q + t * kept.q_row, q_apart, g + t * c.d, apart, c.scale, visible(c, t));
    lane.write(dkv, dkv + c.d, kept.kv_row, k_apart);
    return;
  }
  with_lanes<T>(c.keys(), [&](auto size) {
    Head<T, decltype(size)::value> head(d, c.keys());
    head.columns(head.k, k, kept.kv_row);
    head.columns(head.v, k + c.d, kept.kv_row);
    for (int t = 0; t < c.time; t++)
      head.backward(dq + t * kept.q_row, q + t * kept.q_row, g + t * c.d, c.scale, visible(c, t));
    for (int t = 0; t < c.keys(); t++, dkv += kept.kv_row)
      for (int e = 0; e < d; e++) dkv[e] = head.dk[e * head.width + t], dkv[c.d + e] = head.dv[e * head.width + t];
  });
}

// to = from + dropout(x + bias)
template <class T>
void residual(T* to, const T* from, const T* x, const T* bias, const Dropout<T>& drop, int64_t first, int rows, int n) {
  constexpr int W = kLane<T>;
  for (int row = 0; row < rows; row++, to += n, from += n, x += n) {
    const uint32_t key = drop.key(first + row);
    registers<T>(n, [&](int i, int few) __attribute__((always_inline)) {
      V<T, W> y = get<T, W>(x + i, 1, few);
      if (bias) y += get<T, W>(bias + i, 1, few);
      if (drop.limit) y *= drop.template factors<W>(key, i);
      put<T, W>(to + i, 1, get<T, W>(from + i, 1, few) + y, few);
    });
  }
}

// GELU by way of tanh, and its derivative
template <class T, int W> NBS_SHARED V<T, W> gelu(const V<T, W>& x, V<T, W>& slope) {
  constexpr T root = T(0.7978845608028653559), cube = T(0.044715);  // the root of 2 / pi
  const V<T, W> square = x * x, t = hyperbolic<T, W>(root * x * (T(1) + cube * square));
  slope = T(.5) * (T(1) + t + x * (T(1) - t * t) * root * (T(1) + 3 * cube * square));
  return T(.5) * x * (T(1) + t);
}

// to = dropout(f(x + bias)), with f = relu or GELU; x gets the bias
template <class T>
void activate(T* to, T* x, const T* bias, bool by_gelu, const Dropout<T>& drop, int64_t first, int rows, int n) {
  constexpr int W = kLane<T>;
  for (int row = 0; row < rows; row++, x += n, to += n) {
    const uint32_t key = drop.key(first + row);
    registers<T>(n, [&](int i, int few) __attribute__((always_inline)) {
      V<T, W> y = get<T, W>(x + i, 1, few), slope;
      if (bias) y += get<T, W>(bias + i, 1, few);
      if (by_gelu) {
        put<T, W>(x + i, 1, y, few);
        y = gelu<T, W>(y, slope);
      } else {
        y = y < 0 ? V<T, W>{} : y;
      }
      if (drop.limit) y *= drop.template factors<W>(key, i);
      put<T, W>(to + i, 1, y, few);
    });
  }
}

template <class T> void dropped(T* to, const T* from, const Dropout<T>& drop, int64_t first, int rows, int n) {
  constexpr int W = kLane<T>;
  for (int row = 0; row < rows; row++, to += n, from += n) {
    const uint32_t key = drop.key(first + row);
    registers<T>(n, [&](int i, int few) __attribute__((always_inline)) {
      V<T, W> y = get<T, W>(from + i, 1, few);
      if (drop.limit) y *= drop.template factors<W>(key, i);
      put<T, W>(to + i, 1, y, few);
    });
  }
}

template <class T> void fill_rows(T* to, int64_t row, const T* bias, int rows, int n) {
  for (int i = 0; i < rows; i++, to += row)
    if (bias) copy(to, bias, n);
    else std::fill(to, to + n, T(0));
}

template <class T> using In = Matrix<const T>;

template <class T> struct Block : Call<T> {
  using Call<T>::W;
  explicit Block(const Call<T>& call) : Call<T>(call) {}

  Dropout<T> drop(int site, double p) const { return Dropout<T>(this->seed, site, p); }

  // Call f(first, n) for parts of some rows, shared among the threads.
  template <class F> static NBS_SHARED void parts(int64_t rows, const F& f) {
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < rows; first += kPart) f(first, int(std::min<int64_t>(kPart, rows - first)));
  }

  // Call f(b, sequences, at) for all heads of all sequences, shared among the threads.
  template <class F> NBS_SHARED void heads_of(const F& f) const {
    const int some = this->together() ? W : 1, d = this->d / this->heads;
#pragma omp for schedule(dynamic) collapse(2)
    for (int b = 0; b < this->batch; b += some)
      for (int head = 0; head < this->heads; head++) f(b, std::min(some, this->batch - b), head * d);
  }

  void forward(T* out, T* keep) const {
    const int d = this->d, d_ff = this->d_ff, mine = this->itself() ? 3 * d : d;
    const Kept<T> kept(*this, keep, this->rows(), this->key_rows());
    const T* bias = this->w[kInBias];
#pragma omp parallel num_threads(this->threads) if (this->threads > 1)
    {
      static thread_local std::vector<T> room;
      if (int64_t(room.size()) < 2 * kPart * int64_t(d)) room.resize(2 * kPart * int64_t(d));
      T *x = room.data(), *y = x + kPart * int64_t(d);
      parts(this->rows(), [&](int64_t at, int n) {
        norm(x, this->h + at * d, this->w[kGain1], this->w[kShift1], n, d, this->eps);
        fill_rows(kept.qkv + at * mine, mine, bias, n, mine);
        product<T>({kept.qkv + at * mine, mine}, {x, d}, {this->turned[0], 3 * d}, n, mine, d, true);
      });
      if (!this->itself()) parts(this->key_rows(), [&](int64_t at, int n) {
        norm(x, this->source + at * d, this->w[kGain1], this->w[kShift1], n, d, this->eps);
        fill_rows(kept.kv + at * 2 * d, 2 * d, moved(bias, d), n, 2 * d);
        product<T>({kept.kv + at * 2 * d, 2 * d}, {x, d}, {this->turned[0] + d, 3 * d}, n, 2 * d, d, true);
      });
      heads_of([&](int b, int sequences, int at) { attend<T>(*this, kept, b, sequences, at); });
      parts(this->rows(), [&](int64_t at, int n) {
        T *middle = kept.middle + at * d, *inner = kept.inner + at * d_ff;
        product<T>({y, d}, {kept.read + at * d, d}, {this->turned[1], d}, n, d, d);
        residual(middle, this->h + at * d, y, this->w[kOutBias], drop(0, this->p), at, n, d);
        norm(x, middle, this->w[kGain2], this->w[kShift2], n, d, this->eps);
        T* wide = this->gelu() ? kept.wide + at * d_ff : inner;
        product<T>({wide, d_ff}, {x, d}, {this->turned[2], d_ff}, n, d_ff, d);
        activate(inner, wide, this->w[kWideBias], this->gelu(), drop(1, this->p_inner), at, n, d_ff);
        product<T>({y, d}, {inner, d_ff}, {this->turned[3], d}, n, d, d_ff);
        residual(out + at * d, middle, y, this->w[kNarrowBias], drop(2, this->p), at, n, d);
      });
    }
  }

  void backward(T* keep, const T* grad, T* dh, T* dsource, T* const* dw) const {
    const int d = this->d, d_ff = this->d_ff, mine = this->itself() ? 3 * d : d;
    const int64_t rows = this->rows(), key_rows = this->itself() ? 0 : this->key_rows();
    const int64_t shares = (rows + kPart - 1) / kPart, shares_k = (key_rows + kPart - 1) / kPart;
    static thread_local std::vector<T> room;
    const int64_t needed = rows * (5 * d + d_ff + mine) + key_rows * 3 * d + (shares + shares_k) * 4 * d;
    if (int64_t(room.size()) < needed) room.resize(needed);
    T* next = room.data();
    const auto take = [&](int64_t n) { return next += n, next - n; };
    T *x = take(rows * d), *x2 = take(rows * d), *dz = take(rows * d), *dy = take(rows * d), *dread = take(rows * d);
    T *du = take(rows * d_ff), *dq = take(rows * mine), *x_k = take(key_rows * d);
    T *dkv = this->itself() ? dq + d : take(key_rows * 2 * d), *sums = take((shares + shares_k) * 4 * d);
    std::fill(sums, next, T(0));
    const Kept<T> kept(*this, keep, rows, this->key_rows());
#pragma omp parallel num_threads(this->threads) if (this->threads > 1)
    {
      static thread_local std::vector<T> own;
      if (int64_t(own.size()) < kPart * int64_t(d)) own.resize(kPart * int64_t(d));
      T* g = own.data();
      parts(rows, [&](int64_t at, int n) {
        T *down = dh + at * d, *wide = du + at * d_ff, *middle = kept.middle + at * d;
        dropped(dz + at * d, grad + at * d, drop(2, this->p), at, n, d);
        product<T>({wide, d_ff}, {dz + at * d, d}, {this->w[kNarrow], d_ff}, n, d_ff, d);
        if (this->gelu()) bend(wide, kept.wide + at * d_ff, at, n);
        else open(wide, kept.inner + at * d_ff, n * d_ff);
        product<T>({g, d}, {wide, d_ff}, {this->w[kWide], d}, n, d, d_ff);
        copy(down, grad + at * d, n * d);
        norm_backward(down, g, middle, this->w[kGain2], n, d, this->eps, sums + at / kPart * 4 * d + 2 * d);
        norm(x2 + at * d, middle, this->w[kGain2], this->w[kShift2], n, d, this->eps);
        dropped(dy + at * d, down, drop(0, this->p), at, n, d);
        product<T>({dread + at * d, d}, {dy + at * d, d}, {this->w[kOut], d}, n, d, d);
      });
      heads_of([&](int b, int some, int at) { attend_backward<T>(*this, kept, dq, dkv, dread, b, some, at); });
      parts(rows, [&](int64_t at, int n) {
        product<T>({g, d}, {dq + at * mine, mine}, {this->w[kIn], d}, n, d, mine);
        norm_backward(dh + at * d, g, this->h + at * d, this->w[kGain1], n, d, this->eps, sums + at / kPart * 4 * d);
        norm(x + at * d, this->h + at * d, this->w[kGain1], this->w[kShift1], n, d, this->eps);
      });
      parts(key_rows, [&](int64_t at, int n) {
        const T* source = this->source + at * d;
        T *down = dsource + at * d, *own_sums = sums + (shares + at / kPart) * 4 * d;
        product<T>({g, d}, {dkv + at * 2 * d, 2 * d}, {this->w[kIn] + d * d, d}, n, d, 2 * d);
        std::fill(down, down + int64_t(n) * d, T(0));
        norm_backward(down, g, source, this->w[kGain1], n, d, this->eps, own_sums);
        norm(x_k + at * d, source, this->w[kGain1], this->w[kShift1], n, d, this->eps);
      });
      weights(dw[kNarrow], dw[kNarrowBias], {dz, d}, {kept.inner, d_ff}, d, d_ff, rows);
      weights(dw[kWide], dw[kWideBias], {du, d_ff}, {x2, d}, d_ff, d, rows);
      weights(dw[kOut], dw[kOutBias], {dy, d}, {kept.read, d}, d, d, rows);
      weights(dw[kIn], dw[kInBias], {dq, mine}, {x, d}, mine, d, rows);
      if (key_rows) weights(dw[kIn] + d * d, moved(dw[kInBias], d), {dkv, 2 * d}, {x_k, d}, 2 * d, d, key_rows);
    }
    const Parameter norms[] = {kGain1, kShift1, kGain2, kShift2};
    for (int i = 0; i < 4; i++) {
      T* to = dw[norms[i]];
      if (!to) continue;
      std::fill(to, to + d, T(0));
      for (int64_t share = 0; share < shares + shares_k; share++)
        for (int j = 0; j < d; j++) to[j] += sums[(share * 4 + i) * d + j];
    }
    if (needed > kRoom) std::vector<T>().swap(room);  // too much to be kept for the next call
  }

  // Where the inner layer was shut, by relu or by dropout, no gradient passes.
  void open(T* grad, const T* inner, int n) const {
    const T scale = T(1 / (1 - this->p_inner));
    registers<T>(n, [&](int i, int few) __attribute__((always_inline)) {
      const V<T, W> g = get<T, W>(grad + i, 1, few) * scale;
      put<T, W>(grad + i, 1, get<T, W>(inner + i, 1, few) > 0 ? g : V<T, W>{}, few);
    });
  }

  // Back through GELU and the dropout behind it.
  void bend(T* grad, const T* x, int64_t first, int rows) const {
    const Dropout<T> inner = drop(1, this->p_inner);
    for (int row = 0; row < rows; row++, grad += this->d_ff, x += this->d_ff) {
      const uint32_t key = inner.key(first + row);
      registers<T>(this->d_ff, [&](int i, int few) __attribute__((always_inline)) {
        V<T, W> slope;
        gelu<T, W>(get<T, W>(x + i, 1, few), slope);
        if (inner.limit) slope *= inner.template factors<W>(key, i);
        put<T, W>(grad + i, 1, get<T, W>(grad + i, 1, few) * slope, few);
      });
    }
  }

  // Gradients of a linear map from those of its results (rows x n) and from what it was given (rows x m).
  void weights(T* dw, T* bias, const Matrix<T>& grad, const Matrix<T>& x, int n, int m, int64_t rows) const {
    constexpr int P = kPanel<T>;
#pragma omp for schedule(dynamic) nowait
    for (int j = 0; j < m; j += P)
      panel<T>({dw + j, m}, {grad.data, 1, grad.row}, {x.data + j, x.row}, n, std::min(P, m - j), rows, false);
    if (!bias) return;
#pragma omp for schedule(dynamic) nowait
    for (int j = 0; j < n; j += P) {
      const int some = std::min(P, n - j);
      std::fill(bias + j, bias + j + some, T(0));
      for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < some; i++) bias[j + i] += grad.data[row * grad.row + j + i];
    }
  }
};

template <class T> Call<T> call(const int64_t* n, const double* x, T* const* p) {
  Call<T> c = {int(n[0]), int(n[1]), int(n[2]), int(n[3]), int(n[4]), int(n[5]), int(n[6]), int(n[7]), n[8],
               T(x[0]), T(x[1]), x[2], x[3], p[0], p[1], {}, {}};
  for (int i = 0; i < kParameters; i++) c.w[i] = p[2 + i];
  for (int i = 0; i < 4; i++) c.turned[i] = p[2 + kParameters + i];
  return c;
}

template <class T> void forward(const int64_t* n, const double* x, T* const* p) {
  Block<T>(call(n, x, p)).forward(p[6 + kParameters], p[7 + kParameters]);
}

// after the arguments: kept, grad, dh, dsource, gradients of parameters
template <class T> void backward(const int64_t* n, const double* x, T* const* p) {
  T* const* more = p + 6 + kParameters;
  Block<T>(call(n, x, p)).backward(more[0], more[1], more[2], more[3], more + 4);
}

}  // namespace

#define NBS_BLOCK(direction, type, name) \
  NBS_EXPORT void transformer_block_##direction##_##name(const int64_t* n, const double* x, type* const* p) { \
    direction<type>(n, x, p); \
  }
NBS_BLOCK(forward, float, float32)
NBS_BLOCK(forward, double, float64)
NBS_BLOCK(backward, float, float32)
NBS_BLOCK(backward, double, float64)

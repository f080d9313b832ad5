// A pre-norm transformer block on the CPU, forwards and backwards. Sequences are cut into parts of about kPart tokens; a part
// passes through all steps while its numbers are in the cache. Sums over all tokens are taken in an order that does not
// depend on the number of threads.
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <vector>

#include "gates.h"
#include "products.h"
#include "sweeps.h"

namespace {

constexpr int kPart = 64, kSite = 3;  // tokens of a part; places where dropout acts
enum Parameter { kGain1, kShift1, kIn, kInBias, kOut, kOutBias, kGain2, kShift2, kWide, kWideBias, kNarrow, kNarrowBias, kParameters };
enum Flag { kCausal = 1, kItself = 2, kKeep = 4 };

NBS_SHARED uint32_t mixed(uint32_t x) {
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
    x = (x + uint32_t(column)) * 0x9e3779b9u + key;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x = x ^ (x >> 16);
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
  int keys() const { return itself() ? time : time_k; }
  int64_t rows() const { return int64_t(batch) * time; }
  int64_t key_rows() const { return int64_t(batch) * keys(); }
  int per_part() const { return std::max(1, kPart / std::max(time, keys())); }
  int parts() const { return (batch + per_part() - 1) / per_part(); }
  int widest() const { return std::max({3 * d, d_ff, kPanel<T>}); }
};

// What the backward pass needs of the forward pass, of some rows.
template <class T> struct Kept {
  T *qkv, *kv, *read, *middle, *inner;  // kv: none where the block reads itself
  int64_t q_row, kv_row;

  static int64_t numbers(const Call<T>& c, int64_t rows, int64_t key_rows) {
    return c.itself() ? rows * (5 * c.d + c.d_ff) : rows * (3 * c.d + c.d_ff) + key_rows * 2 * c.d;
  }

  Kept(const Call<T>& c, T* from, int64_t rows, int64_t key_rows) {
    q_row = c.itself() ? 3 * c.d : c.d;
    kv_row = c.itself() ? 3 * c.d : 2 * c.d;
    qkv = from, from += rows * q_row;
    kv = c.itself() ? qkv + c.d : from, from += c.itself() ? 0 : key_rows * kv_row;
    read = from, from += rows * c.d;
    middle = from, from += rows * c.d;
    inner = from;
  }

  void skip(const Call<T>& c, int64_t rows, int64_t key_rows) {
    qkv += rows * q_row, kv += key_rows * kv_row, read += rows * c.d, middle += rows * c.d, inner += rows * c.d_ff;
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

// Call f.template operator()<W>() with registers that suit the number of keys.
template <class T, class F> void with_lanes(int keys, const F& f) {
  constexpr int most = kLane<T>, few = most < 4 ? most : 4, some = most < 8 ? most : 8;
  if (keys <= few) return f(Size<few>{});
  if (keys <= some) return f(Size<some>{});
  return f(Size<most>{});
}

template <class T> NBS_SHARED int visible(const Call<T>& c, int t) {
  return c.flags & kCausal ? c.keys() - c.time + t + 1 : c.keys();
}

template <class T> void attend(const Call<T>& c, const Kept<T>& kept, int sequences) {
  const int d = c.d / c.heads;
  with_lanes<T>(c.keys(), [&](auto size) {
    Head<T, decltype(size)::value> head(d, c.keys());
    for (int b = 0; b < sequences; b++)
      for (int at = 0; at < c.d; at += d) {
        const T *q = kept.qkv + int64_t(b) * c.time * kept.q_row + at, *k = kept.kv + int64_t(b) * c.keys() * kept.kv_row + at;
        head.columns(head.k, k, kept.kv_row);
        head.columns(head.v, k + c.d, kept.kv_row);
        T* to = kept.read + int64_t(b) * c.time * c.d + at;
        for (int t = 0; t < c.time; t++, q += kept.q_row, to += c.d) head.answer(to, q, c.scale, visible(c, t));
      }
  });
}

// dq and dkv lie as the queries, keys and values do
template <class T> void attend_backward(const Call<T>& c, const Kept<T>& kept, T* dq, T* dkv, const T* grad, int sequences) {
  const int d = c.d / c.heads;
  with_lanes<T>(c.keys(), [&](auto size) {
    Head<T, decltype(size)::value> head(d, c.keys());
    for (int b = 0; b < sequences; b++)
      for (int at = 0; at < c.d; at += d) {
        const int64_t first = int64_t(b) * c.time * kept.q_row + at, keys = int64_t(b) * c.keys() * kept.kv_row + at;
        const T* g = grad + int64_t(b) * c.time * c.d + at;
        head.columns(head.k, kept.kv + keys, kept.kv_row);
        head.columns(head.v, kept.kv + keys + c.d, kept.kv_row);
        std::fill(head.dk, head.p, T(0));
        for (int t = 0; t < c.time; t++)
          head.backward(dq + first + t * kept.q_row, kept.qkv + first + t * kept.q_row, g + int64_t(t) * c.d, c.scale, visible(c, t));
        T* to = dkv + keys;
        for (int t = 0; t < c.keys(); t++, to += kept.kv_row)
          for (int e = 0; e < d; e++) to[e] = head.dk[e * head.width + t], to[c.d + e] = head.dv[e * head.width + t];
      }
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

// x = dropout(relu(x + bias))
template <class T> void rectify(T* x, const T* bias, const Dropout<T>& drop, int64_t first, int rows, int n) {
  constexpr int W = kLane<T>;
  for (int row = 0; row < rows; row++, x += n) {
    const uint32_t key = drop.key(first + row);
    registers<T>(n, [&](int i, int few) __attribute__((always_inline)) {
      V<T, W> y = get<T, W>(x + i, 1, few);
      if (bias) y += get<T, W>(bias + i, 1, few);
      y = y < 0 ? V<T, W>{} : y;
      if (drop.limit) y *= drop.template factors<W>(key, i);
      put<T, W>(x + i, 1, y, few);
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

  // Queries, keys and values of some sequences; `normed` and `normed_k` get what they are taken of.
  void project(const Kept<T>& kept, T* normed, T* normed_k, const T* h, const T* source, int rows, int key_rows) const {
    const int d = this->d;
    const T* bias = this->w[kInBias];
    norm(normed, h, this->w[kGain1], this->w[kShift1], rows, d, this->eps);
    const int mine = this->itself() ? 3 * d : d;
    fill_rows(kept.qkv, kept.q_row, bias, rows, mine);
    product<T>({kept.qkv, kept.q_row}, {normed, d}, {this->turned[0], 3 * d}, rows, mine, d, true);
    if (this->itself()) return;
    norm(normed_k, source, this->w[kGain1], this->w[kShift1], key_rows, d, this->eps);
    fill_rows(kept.kv, kept.kv_row, bias ? bias + d : bias, key_rows, 2 * d);
    product<T>({kept.kv, kept.kv_row}, {normed_k, d}, {this->turned[0] + d, 3 * d}, key_rows, 2 * d, d, true);
  }

  void forward(T* out, T* keep) const {
    const int d = this->d, d_ff = this->d_ff, n = this->per_part();
#pragma omp parallel num_threads(this->threads) if (this->threads > 1)
    {
      const int most = n * this->time, most_k = n * this->keys();
      static thread_local std::vector<T> room;
      const int64_t own = (2 * int64_t(most) + most_k) * d, needed = own + (keep ? 0 : Kept<T>::numbers(*this, most, most_k));
      if (int64_t(room.size()) < needed) room.resize(needed);
      T *x = room.data(), *y = x + int64_t(most) * d, *z = y + int64_t(most) * d;
#pragma omp for schedule(dynamic)
      for (int part = 0; part < this->parts(); part++) {
        const int b = part * n, sequences = std::min(n, this->batch - b);
        const int rows = sequences * this->time, key_rows = sequences * this->keys();
        const int64_t first = int64_t(b) * this->time, first_k = int64_t(b) * this->keys();
        Kept<T> kept(*this, keep ? keep : z + int64_t(most_k) * d, keep ? this->rows() : most, keep ? this->key_rows() : most_k);
        if (keep) kept.skip(*this, first, first_k);
        const T *h = this->h + first * d, *source = this->itself() ? nullptr : this->source + first_k * d;
        project(kept, x, z, h, source, rows, key_rows);
        attend<T>(*this, kept, sequences);
        product<T>({y, d}, {kept.read, d}, {this->turned[1], d}, rows, d, d);
        residual(kept.middle, h, y, this->w[kOutBias], drop(0, this->p), first, rows, d);
        norm(x, kept.middle, this->w[kGain2], this->w[kShift2], rows, d, this->eps);
        product<T>({kept.inner, d_ff}, {x, d}, {this->turned[2], d_ff}, rows, d_ff, d);
        rectify(kept.inner, this->w[kWideBias], drop(1, this->p_inner), first, rows, d_ff);
        product<T>({y, d}, {kept.inner, d_ff}, {this->turned[3], d}, rows, d, d_ff);
        residual(out + first * d, kept.middle, y, this->w[kNarrowBias], drop(2, this->p), first, rows, d);
      }
    }
  }

  void backward(T* keep, const T* grad, T* dh, T* dsource, T* const* dw) const {
    const int d = this->d, d_ff = this->d_ff, n = this->per_part(), parts = this->parts();
    const int64_t rows = this->rows(), key_rows = this->key_rows(), kv = this->itself() ? 0 : key_rows;
    static thread_local std::vector<T> room;
    const int64_t q_row = this->itself() ? 3 * d : d;
    const int64_t needed = rows * (4 * d + d_ff + q_row) + kv * 3 * d + int64_t(parts) * 4 * d;
    if (int64_t(room.size()) < needed) room.resize(needed);
    T *next = room.data(), *x = next, *x_k, *x2, *dz, *dy, *du, *dq, *dkv, *sums;
    next += rows * d, x_k = next, next += kv * d, x2 = next, next += rows * d, dz = next, next += rows * d;
    dy = next, next += rows * d, du = next, next += rows * d_ff, dq = next, next += rows * q_row;
    dkv = this->itself() ? dq + d : next, next += kv * 2 * d, sums = next;
    std::fill(sums, sums + int64_t(parts) * 4 * d, T(0));
    const Kept<T> all(*this, keep, rows, key_rows);
    const int64_t kv_row = all.kv_row;
#pragma omp parallel num_threads(this->threads) if (this->threads > 1)
    {
      static thread_local std::vector<T> mine;
      const int most = n * std::max(this->time, this->keys());
      if (int64_t(mine.size()) < int64_t(most) * d) mine.resize(int64_t(most) * d);
      T* g = mine.data();
#pragma omp for schedule(dynamic)
      for (int part = 0; part < parts; part++) {
        const int b = part * n, sequences = std::min(n, this->batch - b);
        const int some = sequences * this->time, some_k = sequences * this->keys();
        const int64_t at = int64_t(b) * this->time, at_k = int64_t(b) * this->keys();
        Kept<T> kept = all;
        kept.skip(*this, at, at_k);
        T *down = dh + at * d, *wide = du + at * d_ff, *own = sums + int64_t(part) * 4 * d;
        dropped(dz + at * d, grad + at * d, drop(2, this->p), at, some, d);
        product<T>({wide, d_ff}, {dz + at * d, d}, {this->w[kNarrow], d_ff}, some, d_ff, d);
        open(wide, kept.inner, some * d_ff);
        product<T>({g, d}, {wide, d_ff}, {this->w[kWide], d}, some, d, d_ff);
        copy(down, grad + at * d, some * d);
        norm_backward(down, g, kept.middle, this->w[kGain2], some, d, this->eps, own + 2 * d);
        norm(x2 + at * d, kept.middle, this->w[kGain2], this->w[kShift2], some, d, this->eps);
        dropped(dy + at * d, down, drop(0, this->p), at, some, d);
        product<T>({g, d}, {dy + at * d, d}, {this->w[kOut], d}, some, d, d);
        attend_backward<T>(*this, kept, dq + at * q_row, dkv + at_k * kv_row, g, sequences);
        product<T>({g, d}, {dq + at * q_row, q_row}, {this->w[kIn], d}, some, d, this->itself() ? 3 * d : d);
        norm_backward(down, g, this->h + at * d, this->w[kGain1], some, d, this->eps, own);
        norm(x + at * d, this->h + at * d, this->w[kGain1], this->w[kShift1], some, d, this->eps);
        if (this->itself()) continue;
        const T* source = this->source + at_k * d;
        product<T>({g, d}, {dkv + at_k * 2 * d, 2 * d}, {this->w[kIn] + d * d, d}, some_k, d, 2 * d);
        std::fill(dsource + at_k * d, dsource + (at_k + some_k) * d, T(0));
        norm_backward(dsource + at_k * d, g, source, this->w[kGain1], some_k, d, this->eps, own);
        norm(x_k + at_k * d, source, this->w[kGain1], this->w[kShift1], some_k, d, this->eps);
      }
      weights(dw[kNarrow], dw[kNarrowBias], {dz, d}, {all.inner, d_ff}, d, d_ff, rows);
      weights(dw[kWide], dw[kWideBias], {du, d_ff}, {x2, d}, d_ff, d, rows);
      weights(dw[kOut], dw[kOutBias], {dy, d}, {all.read, d}, d, d, rows);
      weights(dw[kIn], dw[kInBias], {dq, q_row}, {x, d}, this->itself() ? 3 * d : d, d, rows);
      T* bias = dw[kInBias];
      if (!this->itself()) weights(dw[kIn] + d * d, bias ? bias + d : bias, {dkv, 2 * d}, {x_k, d}, 2 * d, d, key_rows);
    }
    const Parameter norms[] = {kGain1, kShift1, kGain2, kShift2};
    for (int i = 0; i < 4; i++)
      for (int j = 0; T* to = dw[norms[i]]; j++) {
        if (j == d) break;
        to[j] = 0;
        for (int part = 0; part < parts; part++) to[j] += sums[(int64_t(part) * 4 + i) * d + j];
      }
  }

  // Where the inner layer was shut, by relu or by dropout, no gradient passes.
  void open(T* grad, const T* inner, int n) const {
    const T scale = T(1 / (1 - this->p_inner));
    registers<T>(n, [&](int i, int few) __attribute__((always_inline)) {
      const V<T, W> g = get<T, W>(grad + i, 1, few) * scale;
      put<T, W>(grad + i, 1, get<T, W>(inner + i, 1, few) > 0 ? g : V<T, W>{}, few);
    });
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

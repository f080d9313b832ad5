// Matrix products for the CPU kernels: tiles of kRows rows and two registers of columns stay in registers; the right factor
// is copied to panels of that width, so that it is read in the order in which it lies.
#pragma once
#include "lanes.h"

constexpr int kRows = NBS_REGISTERS / 4, kInner = 512;  // rows of a tile; terms of a sum for which a panel is packed
template <class T> constexpr int kLane = NBS_REGISTER_BYTES / sizeof(T);
template <class T> constexpr int kPanel = 2 * kLane<T>;

// A matrix in memory: where it begins, and how far rows and columns are apart.
template <class T> struct Matrix {
  T* data;
  int64_t row, column = 1;
  NBS_SHARED T* at(int64_t i, int64_t j = 0) const { return data + i * row + j * column; }
};

template <class T> NBS_SHARED void pack(T* to, const Matrix<const T>& b, int first, int inner, int columns) {
  constexpr int P = kPanel<T>;
  for (int k = 0; k < inner; k++, to += P) {
    const T* from = b.at(first + k);
    if (columns == P) copy(to, from, P);
    else for (int j = 0; j < P; j++) to[j] = j < columns ? from[j] : T(0);
  }
}

// c = or += a packed, for `Rows` rows
template <class T, int Rows>
NBS_SHARED void tile(const Matrix<T>& c, int columns, const Matrix<const T>& a, const T* packed, int inner, bool add) {
  constexpr int W = kLane<T>, P = kPanel<T>;
  V<T, W> x[Rows][2] = {};
  const T* from = a.data;
  for (int k = 0; k < inner; k++, packed += P, from += a.column) {
    const V<T, W> left = load<T, W>(packed), right = load<T, W>(packed + W);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) {
      const T factor = from[i * a.row];
      x[i][0] += factor * left;
      x[i][1] += factor * right;
    }
  }
  for (int i = 0; i < Rows; i++) {
    T* to = c.at(i);
    if (columns == P) {
      for (int n = 0; n < 2; n++) store<T, W>(to + n * W, add ? load<T, W>(to + n * W) + x[i][n] : x[i][n]);
    } else {
      T buffer[P];
      for (int n = 0; n < 2; n++) store<T, W>(buffer + n * W, x[i][n]);
      for (int j = 0; j < columns; j++) to[j] = add ? to[j] + buffer[j] : buffer[j];
    }
  }
}

template <class T, int Rows = kRows>
NBS_SHARED void tile_of(int rows, const Matrix<T>& c, int columns, const Matrix<const T>& a, const T* packed, int inner,
                        bool add) {
  if (rows == Rows) return tile<T, Rows>(c, columns, a, packed, inner, add);
  if constexpr (Rows > 1) tile_of<T, Rows - 1>(rows, c, columns, a, packed, inner, add);
}

// One panel of columns of c (rows x columns) = or += a (rows x inner) b (inner x columns).
template <class T>
inline void panel(const Matrix<T>& c, const Matrix<const T>& a, const Matrix<const T>& b, int rows, int columns, int inner,
                  bool add) {
  alignas(64) T packed[kInner * kPanel<T>];
  for (int first = 0; first < inner; first += kInner, add = true) {
    const int terms = inner - first < kInner ? inner - first : kInner;
    pack(packed, b, first, terms, columns);
    for (int i = 0; i < rows; i += kRows)
      tile_of<T>(rows - i < kRows ? rows - i : kRows, {c.at(i), c.row}, columns, {a.at(i, first), a.row, a.column}, packed,
                 terms, add);
  }
}

// c (rows x columns) = or += a (rows x inner) b (inner x columns)
template <class T>
inline void product(const Matrix<T>& c, const Matrix<const T>& a, const Matrix<const T>& b, int rows, int columns, int inner,
                    bool add = false) {
  for (int j = 0; j < columns; j += kPanel<T>) {
    const int some = columns - j < kPanel<T> ? columns - j : kPanel<T>;
    panel<T>({c.at(0, j), c.row}, a, {b.at(0, j), b.row}, rows, some, inner, add);
  }
}

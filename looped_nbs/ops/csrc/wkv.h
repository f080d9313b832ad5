// WKV: the arithmetic of one row of the state, for key e: V is a register of columns on the CPU and the one column of a
// thread on the GPU. Every row fades by its own factor w; k and r are numbers.
#pragma once
#include "tensors.h"

// Read with r, then fade and write.
template <class V, class T> NBS_SHARED void wkv_forward_row(V& state, T w, T k, const V& v, T r, V& y) {
  y += r * state;
  state = w * state + k * v;
}

// The same states a second time, for dr, which is to be summed over the columns.
template <class V, class T> NBS_SHARED void wkv_again_row(V& state, T w, T k, const V& v, const V& dy, V& dr) {
  dr += state * dy;
  state = w * state + k * v;
}

// From the gradient of the state after a step to that of the one before. dk is to be summed over the columns.
template <class V, class T> NBS_SHARED void wkv_backward_row(V& grad, T w, T k, const V& v, T r, const V& dy, V& dk, V& dv) {
  dk += grad * v;
  dv += k * grad;
  grad = w * grad + r * dy;
}

// What is left to do for keys, after sums over columns; V is a register of keys here. `product` is the sum over a row of the
// state after the step times its gradient, and becomes that of the state before; between the two lies the fading, so no state
// has to be kept. `rate` is -log w, above `most` of which nothing is left; `bonus` is the product of value and gradient, for the term with u.
template <class V, class T> NBS_SHARED void wkv_keys(V& product, const V& rate, T most, const V& r, const V& k, const V& u,
                                                     const V& bonus, V& dr, V& dk, V& dw, V& du) {
  const V faded = rate > most ? V{} : product - k * dk;
  dw = -rate * faded;
  product = faded + r * dr;
  dr += u * k * bonus;
  dk += u * r * bonus;
  du += r * k * bonus;
}

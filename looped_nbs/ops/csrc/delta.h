// Delta rule, the arithmetic of one row of the state: S += k (x) beta (v - k S), y = q S. V is a register of columns on
// the CPU and the one column of a thread on the GPU; k, q and beta are numbers.
#pragma once
#include "tensors.h"

// Reading: the old value at the key, and what the query finds before this step writes.
template <class V, class T> NBS_SHARED void delta_read_row(const V& state, T k, T q, V& old, V& y) {
  old += k * state;
  y += q * state;
}

template <class V, class T> NBS_SHARED void delta_write_row(V& state, T k, const V& write) { state += k * write; }

// What is written, once the sums over all rows are known; `kk` and `qk` are products of this step's key and query with
// the key of an earlier step of the same sweep, whose write the sums have not seen.
template <class V, class T> NBS_SHARED void delta_earlier(T kk, T qk, const V& write, V& old, V& y) {
  old += kk * write;
  y += qk * write;
}

template <class V, class T> NBS_SHARED void delta_finish(
    const V& v, const V& old, T beta, T qk, V& error, V& write, V& y) {
  error = v - old;
  write = beta * error;
  y += qk * write;
}

// Backwards: finish step t + 1 (dk and the reading part of its gradient), go back to the state after step t, and begin
// with t. dk and dq are to be summed over the columns, `a` over the rows.
template <class V, class T> NBS_SHARED void delta_backward_row(
    V& state, V& grad, T k_next, const V& write_next, const V& r_next, T k, T q, const V& dy, V& dk_next, V& dq, V& a) {
  state -= k_next * write_next;
  dk_next += grad * write_next;
  dk_next += state * r_next;
  dq += state * dy;
  grad += k_next * r_next;
  grad += q * dy;
  a += k * grad;
}

template <class V, class T> NBS_SHARED void delta_backward_finish(const V& a, T beta, V& dv, V& r) {
  dv = beta * a;
  r = -dv;
}

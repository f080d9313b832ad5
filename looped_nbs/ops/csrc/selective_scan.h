// Selective scan, one state of one channel: V is a register of channels on the CPU and a number on the GPU; T is a number.
#pragma once
#include "tensors.h"

constexpr int kChunk = 16;  // steps between the states that the forward pass keeps

// s = a s + drive b, read with c; drive is the input times the size of the step.
template <class V, class T> NBS_SHARED void selective_scan_forward(V& s, const V& a, const V& drive, T b, T c, V& y) {
  s = a * s + drive * b;
  y += s * c;
}

// `carry` is the gradient of the state that comes from later steps, and becomes that of the state before; g is that of what
// was read. Adds to the gradients of drive, of the size of the step, and of A; those of b and c are to be summed over
// channels.
template <class V, class T> NBS_SHARED void selective_scan_backward(
    V& carry, const V& a, const V& before, const V& after, const V& drive, const V& delta, const V& A, T b, T c, const V& g,
    V& ddrive, V& ddelta, V& dA, V& db, V& dc) {
  const V h = carry + g * c;
  carry = h * a;
  const V e = carry * before;
  ddrive += h * b;
  ddelta += e * A;
  dA += e * delta;
  db = h * drive;
  dc = g * after;
}

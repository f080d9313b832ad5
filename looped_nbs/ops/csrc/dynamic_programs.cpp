// Dynamic programs over batches of small problems. Where all problems of a batch have tables of one shape, each lane of
// a vector is a problem of its own; the others are words of bits. Rows end at the first -1.
#include <algorithm>
#include <vector>

#include "tensors.h"

namespace {

using Word = uint64_t;
constexpr int W = 32;  // problems side by side

int length(const int16_t* row, int width) {
  int n = 0;
  while (n < width && row[n] >= 0) n++;
  return n;
}

// Up to W rows of a matrix, place by place: at[t * W + lane], with `fill` where there is nothing.
struct Side {
  std::vector<int16_t> at;
  int ends[W], longest = 0;

  Side(const int16_t* from, int64_t rows, int width, int16_t fill) : at(size_t(width) * W, fill) {
    for (int w = 0; w < W; w++) {
      ends[w] = w < rows ? length(from + w * int64_t(width), width) : 0;
      longest = std::max(longest, ends[w]);
      for (int t = 0; t < ends[w]; t++) at[t * W + w] = from[w * int64_t(width) + t];
    }
  }
  const int16_t* operator[](int t) const { return &at[size_t(t) * W]; }
};

// The table of two strings row by row, `step` making a cell of those above, to the left and diagonally before it.
template <class Step>
void align(const int16_t* first, const int16_t* second, int64_t n, int a, int b, int border, int16_t* out, Step step) {
  std::vector<int16_t> row(size_t(b + 1) * W);
  for (int64_t start = 0; start < n; start += W) {
    const int64_t rows = std::min<int64_t>(W, n - start);
    const Side x(first + start * a, rows, a, -1), y(second + start * b, rows, b, -2);
    for (int j = 0; j <= b; j++)
      for (int w = 0; w < W; w++) row[size_t(j) * W + w] = int16_t(border * j);
    const auto finish = [&](int i) {
      for (int w = 0; w < rows; w++)
        if (x.ends[w] == i) out[start + w] = row[size_t(y.ends[w]) * W + w];
    };
    finish(0);
    for (int i = 1; i <= x.longest; i++) {
      int16_t before[W], left[W];
      const int16_t* here = x[i - 1];
      for (int w = 0; w < W; w++) {
        before[w] = row[w];
        row[w] = left[w] = int16_t(border * i);
      }
      for (int j = 1; j <= y.longest; j++) {
        int16_t* cell = &row[size_t(j) * W];
        const int16_t* there = y[j - 1];
        for (int w = 0; w < W; w++) {
          const int16_t above = cell[w];
          left[w] = step(before[w], above, left[w], here[w] == there[w]);
          before[w] = above;
          cell[w] = left[w];
        }
      }
      finish(i);
    }
  }
}

int16_t smaller(int16_t x, int16_t y) { return x < y ? x : y; }
int16_t larger(int16_t x, int16_t y) { return x > y ? x : y; }

// Number `slot` of attempt `attempt` of a problem, below m: a hash of where it is asked for, not of what came before.
struct Draws {
  Word key;
  int operator()(Word attempt, Word slot, int m) const {
    Word z = key + attempt * 0x9E3779B97F4A7C15u + slot * 0xD1342543DE82EF95u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return int(((z >> 32) * Word(m)) >> 32);
  }
};

// One attempt at a pair; false if it has to be drawn again. `second` has room for 2 L letters.
bool attempt_pair(const Draws& draw, Word attempt, int edits, int L, int used, int16_t* first, int16_t* second,
                  int& n) {
  const auto below = [&](int slot, int m) { return draw(attempt, slot, m); };
  int16_t letters[26];
  for (int i = 0; i < 26; i++) letters[i] = int16_t(i);
  const int kinds = below(0, used) + 3;
  for (int i = 0; i < kinds; i++) std::swap(letters[i], letters[i + below(1 + i, 26 - i)]);
  for (int i = 0; i < L; i++) first[i] = letters[below(32 + i, kinds)];
  if (below(27, 5) < 2) {
    n = L - 3 + below(28, 6);
    for (int i = 0; i < n; i++) second[i] = letters[below(32 + L + i, kinds)];
  } else {
    n = L;
    std::copy(first, first + L, second);
    for (int e = 0, slot = 32 + 2 * L + 3; e < edits; e++, slot += 3) {
      const int kind = below(slot, 3);
      const int16_t letter = letters[below(slot + 2, kinds)];
      if (kind == 0 && n > 2) {
        const int at = below(slot + 1, n);
        std::copy(second + at + 1, second + n, second + at);
        n--;
      } else if (kind == 1) {
        second[below(slot + 1, n)] = letter;
      } else {
        const int at = below(slot + 1, n + 1);
        std::copy_backward(second + at, second + n, second + n + 1);
        second[at] = letter;
        n++;
      }
    }
  }
  return n >= L - 3 && n < L + 3 && !(n == L && std::equal(first, first + L, second));
}

// Bit m of begins[i][A]: A derives letters i to m - 1; of ends[e][A]: A derives letters m to e - 1. A cell is an `and`
// for each rule, and what it holds is a set of nonterminals, 32 at most. `Words` is 1 where one word will do.
template <int Words>
int derives(const int16_t* binary, const int16_t* lexical, const int16_t* string, int rules, int words_of_one,
            int nonterminals, int many, std::vector<Word>& begins, std::vector<Word>& ends) {
  const int size = Words ? Words : many / 64 + 1;
  const size_t each = size_t(nonterminals) * size;
  begins.assign((many + 1) * each, 0);
  ends.assign((many + 1) * each, 0);
  const auto mark = [&](uint32_t set, int i, int e) {
    Word *one = &begins[i * each + e / 64], *two = &ends[e * each + i / 64];
    for (int A = 0; A < nonterminals; A++, one += size, two += size, set >>= 1) {
      *one |= Word(set & 1) << (e % 64);
      *two |= Word(set & 1) << (i % 64);
    }
  };
  for (int e = 1; e <= many; e++) {
    uint32_t set = 0;
    for (int q = 0; q < words_of_one; q++) set |= uint32_t(lexical[2 * q + 1] == string[e - 1]) << lexical[2 * q];
    mark(set, e - 1, e);
    for (int i = e - 2; i >= 0; i--) {
      set = 0;
      for (int r = 0; r < rules; r++) {
        const Word* one = &begins[i * each + binary[3 * r + 1] * size];
        const Word* two = &ends[e * each + binary[3 * r + 2] * size];
        Word split = 0;
        if (Words == 1) split = *one & *two;
        else for (int w = i / 64; w <= e / 64; w++) split |= one[w] & two[w];
        set |= uint32_t(split != 0) << binary[3 * r];
      }
      mark(set, i, e);
    }
  }
  return many > 0 && (begins[many / 64] >> (many % 64) & 1);
}

}  // namespace

// Weighted edit distance: gap 2, substitution 3, and `border` for each gap before the first letter.
NBS_EXPORT void edit_distance(const int16_t* first, const int16_t* second, int64_t n, int a, int b, int border,
                              int16_t* out) {
  align(first, second, n, a, b, border, out, [](int16_t before, int16_t above, int16_t left, bool same) {
    return smaller(int16_t(smaller(above, left) + 2), int16_t(before + (same ? 0 : 3)));
  });
}

NBS_EXPORT void common_subsequence(const int16_t* first, const int16_t* second, int64_t n, int a, int b, int16_t* out) {
  align(first, second, n, a, b, 0, out, [](int16_t before, int16_t above, int16_t left, bool same) {
    return larger(larger(above, left), int16_t(before + (same ? 1 : 0)));
  });
}

// best[l] is the longest increasing subsequence that ends at place l.
NBS_EXPORT void increasing_subsequence(const int16_t* sequence, int64_t n, int a, int16_t* out) {
  std::vector<int16_t> best(size_t(a) * W);
  for (int64_t start = 0; start < n; start += W) {
    const int64_t rows = std::min<int64_t>(W, n - start);
    const Side x(sequence + start * a, rows, a, -1);
    int16_t longest[W] = {};
    for (int l = 0; l < x.longest; l++) {
      int16_t most[W] = {};
      const int16_t* here = x[l];
      for (int i = 0; i < l; i++) {
        const int16_t *there = x[i], *known = &best[size_t(i) * W];
        for (int w = 0; w < W; w++) most[w] = larger(most[w], there[w] < here[w] ? known[w] : int16_t(0));
      }
      for (int w = 0; w < W; w++) {
        best[size_t(l) * W + w] = int16_t(most[w] + 1);
        longest[w] = larger(longest[w], l < x.ends[w] ? int16_t(most[w] + 1) : int16_t(0));
      }
    }
    std::copy(longest, longest + rows, out + start);
  }
}

// best[c] is the greatest value of items that weigh c at most.
NBS_EXPORT void knapsack(const int16_t* weights, const int16_t* values, const int16_t* capacity, int64_t n, int items,
                         int16_t* out) {
  std::vector<int16_t> best, next;
  for (int64_t row = 0; row < n; row++, weights += items, values += items) {
    const int room = capacity[row], many = length(weights, items);
    best.assign(room + 1, 0);
    next.resize(room + 1);
    for (int i = 0; i < many; i++) {
      const int w = weights[i];
      if (w > room) continue;
      std::copy(best.begin(), best.begin() + w, next.begin());
      for (int c = w; c <= room; c++) next[c] = larger(best[c], int16_t(best[c - w] + values[i]));
      best.swap(next);
    }
    out[row] = best[room];
  }
}

// Bit s says whether some of the numbers so far add up to s.
NBS_EXPORT void subset_sum(const int16_t* numbers, const int16_t* target, int64_t n, int count, int16_t* out) {
  std::vector<Word> sums;
  for (int64_t row = 0; row < n; row++, numbers += count) {
    const int words = target[row] / 64 + 1, many = length(numbers, count);
    sums.assign(words, 0);
    sums[0] = 1;
    for (int i = 0; i < many; i++) {
      const int jump = numbers[i] / 64, shift = numbers[i] % 64;
      for (int w = words - 1; w >= jump; w--) {
        const Word low = shift && w > jump ? sums[w - jump - 1] >> (64 - shift) : 0;
        sums[w] |= (sums[w - jump] << shift) | low;
      }
    }
    out[row] = sums[target[row] / 64] >> (target[row] % 64) & 1;
  }
}

NBS_EXPORT void cyk(const int16_t* binary, const int16_t* lexical, const int16_t* strings, int64_t n, int rules,
                    int words_of_one, int nonterminals, int width, int16_t* out) {
  std::vector<Word> begins, ends;
  for (int64_t row = 0; row < n; row++, binary += 3 * rules, lexical += 2 * words_of_one, strings += width) {
    const int many = length(strings, width);
    const auto solve = many < 64 ? derives<1> : derives<0>;
    out[row] = int16_t(solve(binary, lexical, strings, rules, words_of_one, nonterminals, many, begins, ends));
  }
}

// Pairs of strings for the edit distance, shorter first, padded with -1: first (n, L), second (n, L + 2).
NBS_EXPORT void edit_pairs(const Word* keys, int64_t n, int L, int used, int16_t* first, int16_t* second) {
  std::vector<int16_t> one(L), two(2 * L + 2);
  for (int64_t row = 0; row < n; row++) {
    const Draws draw{keys[row]};
    const int edits = draw(0, 29, L) + 1;
    int m = 0;
    for (Word attempt = 0; !attempt_pair(draw, attempt, edits, L, used, one.data(), two.data(), m);) attempt++;
    const int16_t *shorter = m < L ? two.data() : one.data(), *longer = m < L ? one.data() : two.data();
    std::fill(first + row * L, first + (row + 1) * L, int16_t(-1));
    std::fill(second + row * (L + 2), second + (row + 1) * (L + 2), int16_t(-1));
    std::copy(shorter, shorter + std::min(m, L), first + row * L);
    std::copy(longer, longer + std::max(m, L), second + row * (L + 2));
  }
}

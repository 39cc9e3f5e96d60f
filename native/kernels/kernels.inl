// The kernels, written once over the primitives of an instruction set.
//
// An instruction set's file defines, in an anonymous namespace of edgevl, what follows, and then
// includes this one. A register is whatever the instruction set computes with; kLanes / kWidth of
// them make a line of the layout.
//
//   kTokenBlock              tokens of a matrix tile
//   kWidth                   32-bit lanes of a register
//   kAccumulators            registers that a tile may keep sums in
//   Floats, Ints             kWidth float32 or int32; + - * / work on Floats
//   Bytes                    4 * kWidth int8, signed or not
//   Pairs                    2 * kWidth bfloat16, in the form that dot2 wants
//   kByteOffset              what bytes_int8 leaves added to the weights, 128 or 0
//   load, store              (pointer[, n]): a register, or only its first n lanes (others: zero)
//   splat, add               of float or int32; of two Floats or two Ints
//   subtract, shift_left     (Ints, Ints); (Ints, bits)
//   fma                      (a, b, c): a * b + c
//   larger, smaller          of two; where one of two Floats is NaN, the second
//   magnitude                Floats without the sign, as Ints: these compare as the floats do, and
//                            NaN is the largest
//   to_int, to_float         convert, to nearest even
//   nearest                  Floats rounded to whole ones
//   times_power_of_two       (Floats x, Floats n): x * 2^n, n whole, from -126 to 127
//   reciprocal               1 / x, to 3e-7, for x from 1 to 2^126; of infinity 0 or NaN
//   sum, largest             over the lanes
//   load_half, load_bf16     kWidth float16 or bfloat16 as Floats
//   store_bytes, store_bf16  the low byte of each lane; Floats rounded to nearest even
//   load_bytes, either       any register of bytes; bitwise or
//   low_nibbles, high_nibbles, bytes_int8, broadcast_bytes
//   crumbs<k>                twice the two bits 2 k and 2 k + 1 of each byte, k from 0 to 3
//   dot4                     (Ints sums, Bytes weights, Bytes signed activations)
//   load_pairs, broadcast_pairs
//   load_int8_pairs          kWidth int8 that are the first of each pair, then the second ones
//   dot2                     (Floats sums, Pairs, Pairs)
//   opaque                   makes the compiler forget what it knows about a register of bytes
//   kBothNibbles             whether both nibbles of a line are best multiplied together, by
//   dot8                     (Ints sums, Bytes low, Bytes high, Bytes x of low, Bytes x of high)
//   kLanesOfWords            whether the words of kWidth tokens are best loaded together, and
//                            multiplied by
//   dot4_lane<k>, dot2_lane<k>   as dot4 and dot2, with the k-th word
//   kBroadcastingDot         whether a word that is used once is best broadcast by the product, by
//   dot4                     (Ints sums, Bytes weights, pointer to the word)
//   kPairsOfTokens           whether tokens of a tile are best multiplied in pairs, by
//   add_int4_pairs, add_int8_pairs, add_split_pairs   as those below
//
// The files are compiled with flags of their own. Nothing here may therefore be visible outside of
// the file, or the linker could take it for a processor that lacks the instructions: everything is
// in the anonymous namespace, and no template of the standard library is used.

#if defined(EDGEVL_UNROLL)  // by the instruction set's file
#elif defined(__clang__)
#define EDGEVL_UNROLL _Pragma("clang loop unroll(full)")
#else
#define EDGEVL_UNROLL _Pragma("GCC unroll 64")
#endif
#define EDGEVL_INLINE inline __attribute__((always_inline))
#define EDGEVL_NOINLINE __attribute__((noinline))

namespace edgevl {
namespace {

constexpr int kRegisters = kLanes / kWidth;
constexpr int kRegisterBytes = 4 * kWidth;
constexpr int kTileLanes = 2 * kLanes;
/// A row's product in integers is summed up in so many chains, as one would wait for its own
/// latency. In floating point it is one, in the order of a tile: one token or several give the same
/// bits.
constexpr int kChains = kRegisters < 4 ? 4 / kRegisters : 1;

static_assert(kTokenBlock <= kMaxTokenBlock);

/// Registers of output lanes for so many tokens, of `most` (a power of two).
constexpr int registers_for(int tokens, int most) {
  int registers = most < 8 ? most : 8;
  while (registers > 1 && registers * tokens > kAccumulators) registers /= 2;
  return registers;
}

template <int N>
struct Count {
  static constexpr int value = N;
};

/// Calls body(Count<tokens>), for tokens from 1 to kTokenBlock.
template <int T = kTokenBlock, class Body>
EDGEVL_INLINE void with_count(int tokens, const Body& body) {
  if (tokens == T) {
    body(Count<T>());
  } else if constexpr (T > 1) {
    with_count<T - 1>(tokens, body);
  }
}

/// Calls body(i, count) for every register's worth of n elements; count is kWidth but for the last.
template <class Body>
EDGEVL_INLINE void sweep(int n, const Body& body) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, Count<kWidth>());
  if (i < n) body(i, n - i);
}

EDGEVL_INLINE Floats load(const float* x, Count<kWidth>) { return load(x); }
EDGEVL_INLINE void store(float* x, Floats value, Count<kWidth>) { store(x, value); }

EDGEVL_INLINE int smaller_of(int a, int b) { return a < b ? a : b; }
EDGEVL_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class Word>
EDGEVL_INLINE void copy(void* to, const void* from) {
  __builtin_memcpy(to, from, sizeof(Word));
}

// --- activations ---------------------------------------------------------------------------------

/// What numbers are multiplied with to get int8, and with what these mean the numbers again.
struct Scale {
  float inverse, value;
};

/// The scale of x [n]: its largest magnitude / 127.
EDGEVL_INLINE Scale scale_of(const float* x, int n) {
  Ints top = splat(0);
  sweep(n, [&](int i, auto lanes) { top = larger(top, magnitude(load(x + i, lanes))); });
  const int bits = largest(top);
  float most;
  copy<float>(&most, &bits);
  // The reciprocal of less would overflow.
  if (most <= 1e-30f) return {0.0f, 0.0f};
  // NaN ends here, and the scale carries it on.
  return {most > 0.0f ? 127.0f / most : 0.0f, most / 127.0f};
}

/// Four words of four tokens.
using Words = std::uint32_t __attribute__((vector_size(16)));

/// Four words, of eight: those of a, then those of b.
template <int i, int j, int k, int l>
EDGEVL_INLINE Words pick(Words a, Words b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i, j, k, l);
#else
  return __builtin_shuffle(a, b, Words{i, j, k, l});
#endif
}

/// words[k * step + t] = rows[t][k], for four words of four tokens.
EDGEVL_INLINE void put_transposed(const std::int8_t (&rows)[4][16], std::uint32_t* words,
                                  int step) {
  Words row[4];
  EDGEVL_UNROLL
  for (int t = 0; t < 4; ++t) copy<Words>(&row[t], rows[t]);
  const Words a = pick<0, 4, 1, 5>(row[0], row[1]), b = pick<0, 4, 1, 5>(row[2], row[3]);
  const Words c = pick<2, 6, 3, 7>(row[0], row[1]), d = pick<2, 6, 3, 7>(row[2], row[3]);
  const Words columns[] = {pick<0, 1, 4, 5>(a, b), pick<2, 3, 6, 7>(a, b), pick<0, 1, 4, 5>(c, d),
                           pick<2, 3, 6, 7>(c, d)};
  EDGEVL_UNROLL
  for (int k = 0; k < 4; ++k) copy<Words>(words + k * step, &columns[k]);
}

/// Quantizes the first `count` of `n` columns of T tokens, the other ones being zero, to n / 4
/// words that are `step` apart.
template <int T>
EDGEVL_INLINE void quantize_group(const float* x, std::size_t stride, int count, int n,
                                  std::uint32_t* words, int step, float* scales,
                                  std::int32_t* sums) {
  Floats inverse[T];
  Ints totals[T];
  EDGEVL_UNROLL
  for (int t = 0; t < T; ++t) {
    const Scale scale = scale_of(x + t * stride, count);
    inverse[t] = splat(scale.inverse);
    scales[t] = scale.value;
    totals[t] = splat(0);
  }
  constexpr int kStep = 16;
  for (int i = 0; i < n; i += kStep) {
    alignas(64) std::int8_t bytes[T][kStep];
    EDGEVL_UNROLL
    for (int t = 0; t < T; ++t) {
      EDGEVL_UNROLL
      for (int k = 0; k < kStep; k += kWidth) {
        const float* from = x + t * stride + i + k;
        const int here = count - i - k;
        const Floats value = here >= kWidth ? load(from)
                             : here > 0     ? load(from, here)
                                            : splat(0.0f);
        const Ints rounded = to_int(value * inverse[t]);
        totals[t] = add(totals[t], rounded);
        store_bytes(bytes[t] + k, rounded);
      }
    }
    std::uint32_t* to = words + i / 4 * step;
    if constexpr (T == 4) {
      if (n - i >= kStep) {
        put_transposed(bytes, to, step);
        continue;
      }
    }
    const int whole = smaller_of(kStep, n - i) / 4;
    EDGEVL_UNROLL
    for (int t = 0; t < T; ++t) {
      for (int k = 0; k < whole; ++k) copy<std::uint32_t>(to + k * step + t, bytes[t] + 4 * k);
    }
  }
  EDGEVL_UNROLL
  for (int t = 0; t < T; ++t) sums[t] = sum(totals[t]);
}

void quantize(const float* x, std::size_t stride, int cols, const Block& out) {
  for (int g = 0; g * out.group < out.cols; ++g) {
    const int first = g * out.group;
    const int left = cols - first;
    const int count = left < 0 ? 0 : smaller_of(left, out.group);
    std::uint32_t* words = out.words + std::size_t(first / 4) * out.tokens;
    float* scales = out.scales + g * out.tokens;
    std::int32_t* sums = out.sums + g * out.tokens;
    int t = 0;
    for (; t + 4 <= out.tokens; t += 4) {
      quantize_group<4>(x + t * stride + first, stride, count, out.group, words + t, out.tokens,
                        scales + t, sums + t);
    }
    for (; t < out.tokens; ++t) {
      quantize_group<1>(x + t * stride + first, stride, count, out.group, words + t, out.tokens,
                        scales + t, sums + t);
    }
  }
}

/// Rounds x [n] to bfloat16 and puts ceil(n / 2) pairs into words that are `step` apart.
EDGEVL_INLINE void round_row(const float* x, int n, std::uint32_t* words, int step) {
  sweep(n, [&](int i, auto lanes) {
    alignas(64) std::uint16_t halves[kWidth];
    store_bf16(halves, load(x + i, lanes));
    const int pairs = smaller_of(kWidth, n - i + 1) / 2;
    for (int k = 0; k < pairs; ++k) {
      copy<std::uint32_t>(words + std::size_t(i / 2 + k) * step, halves + 2 * k);
    }
  });
}

void round_rows(const float* x, std::size_t stride, int cols, const Block& out) {
  for (int t = 0; t < out.tokens; ++t) {
    round_row(x + t * stride, cols, out.words + t, out.tokens);
    for (int i = (cols + 1) / 2; i < out.cols / 2; ++i) {
      out.words[std::size_t(i) * out.tokens + t] = 0;
    }
  }
}

// --- sums over lines: the loops in which the time goes -------------------------------------------

/// How far ahead of the products a panel is fetched where several tokens are multiplied with every
/// line: processors hardly look far enough then. For one token they do better by themselves.
constexpr std::ptrdiff_t kAhead = 3072;

EDGEVL_INLINE void fetch(const std::uint8_t* from, std::ptrdiff_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) + ahead));
}

/// Reads every line of a stretch before what lies behind it is read. A stretch of 8 lines that is
/// left out costs a processor its stream: it then waits for the next lines (Zen 4: 0.72 of the
/// memory's bandwidth instead of all of it).
EDGEVL_INLINE void touch(const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kLineBytes) {
    static_cast<void>(*static_cast<const volatile std::uint8_t*>(from + at));
  }
}

template <int T, int R, class Sum>
EDGEVL_INLINE void clear(Sum (&sums)[T][R], Sum zero) {
  EDGEVL_UNROLL
  for (int t = 0; t < T; ++t) {
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) sums[t][r] = zero;
  }
}

/// sums[t][r] += weights[r] * the word of token t.
template <int T, int R>
EDGEVL_INLINE void add_products(Ints (&sums)[T][R], const Bytes (&weights)[R],
                                const std::uint32_t* words) {
  if constexpr (kLanesOfWords && T % kWidth == 0) {
    EDGEVL_UNROLL
    for (int t = 0; t < T; t += kWidth) {
      const Bytes x = load_bytes(reinterpret_cast<const std::uint8_t*>(words + t));
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) {
        sums[t][r] = dot4_lane<0>(sums[t][r], weights[r], x);
        sums[t + 1][r] = dot4_lane<1>(sums[t + 1][r], weights[r], x);
        sums[t + 2][r] = dot4_lane<2>(sums[t + 2][r], weights[r], x);
        sums[t + 3][r] = dot4_lane<3>(sums[t + 3][r], weights[r], x);
      }
    }
  } else if constexpr (kBroadcastingDot && T * R == 1) {
    sums[0][0] = dot4(sums[0][0], weights[0], words);
  } else {
    EDGEVL_UNROLL
    for (int t = 0; t < T; ++t) {
      const Bytes x = broadcast_bytes(words + t);
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) sums[t][r] = dot4(sums[t][r], weights[r], x);
    }
  }
}

/// Adds the products of weights of up to 4 bits with words [T], and of others with the next T.
template <int T, int R>
EDGEVL_INLINE void add_both(Ints (&sums)[T][R], const Bytes (&first)[R], const Bytes (&second)[R],
                            const std::uint32_t* words) {
  if constexpr (kBothNibbles) {
    EDGEVL_UNROLL
    for (int t = 0; t < T; ++t) {
      const Bytes x = broadcast_bytes(words + t), y = broadcast_bytes(words + T + t);
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) sums[t][r] = dot8(sums[t][r], first[r], second[r], x, y);
    }
  } else {
    add_products(sums, first, words);
    add_products(sums, second, words + T);
  }
}

/// Adds the products of the k-th and the next two bits of bytes.
template <int k, int T, int R>
EDGEVL_INLINE void add_crumbs(Ints (&sums)[T][R], const Bytes (&line)[R],
                              const std::uint32_t* words) {
  Bytes first[R], second[R];
  EDGEVL_UNROLL
  for (int r = 0; r < R; ++r) {
    first[r] = crumbs<k>(line[r]);
    second[r] = crumbs<k + 1>(line[r]);
  }
  add_both(sums, first, second, words);
}

/// Lines of kInt4; source[r] is the register's place in the first line, words are [2 * lines][T].
/// `ahead` bytes are fetched ahead.
template <int T, int R>
EDGEVL_INLINE void add_int4(Ints (&sums)[T][R], const std::uint8_t* const (&source)[R], int lines,
                            const std::uint32_t* words, std::ptrdiff_t ahead = kAhead) {
  for (int i = 0; i < lines; ++i, words += 2 * T) {
    Bytes low[R], high[R];
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (T > 1) fetch(source[r] + i * kLineBytes, ahead);
      const Bytes both = load_bytes(source[r] + i * kLineBytes);
      low[r] = low_nibbles(both);
      high[r] = high_nibbles(both);
    }
    add_both(sums, low, high, words);
  }
}

/// Lines of the upper parts of kSplit, doubled, likewise; words are [4 * lines][T].
template <int T, int R>
EDGEVL_INLINE void add_split(Ints (&sums)[T][R], const std::uint8_t* const (&source)[R], int lines,
                             const std::uint32_t* words, std::ptrdiff_t ahead = kAhead) {
  for (int i = 0; i < lines; ++i, words += 4 * T) {
    Bytes line[R];
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (T > 1) fetch(source[r] + i * kLineBytes, ahead);
      line[r] = load_bytes(source[r] + i * kLineBytes);
    }
    add_crumbs<0>(sums, line, words);
    add_crumbs<2>(sums, line, words + 2 * T);
  }
}

/// Lines of kInt8, likewise; words are [lines][T].
template <int T, int R>
EDGEVL_INLINE void add_int8(Ints (&sums)[T][R], const std::uint8_t* const (&source)[R], int lines,
                            const std::uint32_t* words, std::ptrdiff_t ahead = kAhead) {
  for (int i = 0; i < lines; ++i, words += T) {
    Bytes weights[R];
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (T > 1) fetch(source[r] + i * kLineBytes, ahead);
      weights[r] = bytes_int8(source[r] + i * kLineBytes);
    }
    add_products(sums, weights, words);
  }
}

/// Lines of bfloat16 pairs that are `stride` bytes apart. Words are kLineStep apart from line to
/// line, kTokenStep from token to token: [lines][T] by default. `ahead` bytes are fetched ahead.
/// What is not bfloat16 yet becomes it by kLoad.
template <int T, int R, int kLineStep = T, int kTokenStep = 1,
          Pairs (*kLoad)(const std::uint8_t*) = load_pairs>
EDGEVL_INLINE void add_bf16(Floats (&sums)[T][R], const std::uint8_t* const (&source)[R],
                            std::size_t stride, int lines, const std::uint32_t* words,
                            std::ptrdiff_t ahead = kAhead) {
  for (int i = 0; i < lines; ++i, words += kLineStep) {
    Pairs line[R];
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (T > 1) fetch(source[r] + i * stride, ahead);
      line[r] = kLoad(source[r] + i * stride);
    }
    if constexpr (kLanesOfWords && kTokenStep == 1 && T % kWidth == 0) {
      EDGEVL_UNROLL
      for (int t = 0; t < T; t += kWidth) {
        const Pairs x = load_pairs(reinterpret_cast<const std::uint8_t*>(words + t));
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) {
          sums[t][r] = dot2_lane<0>(sums[t][r], line[r], x);
          sums[t + 1][r] = dot2_lane<1>(sums[t + 1][r], line[r], x);
          sums[t + 2][r] = dot2_lane<2>(sums[t + 2][r], line[r], x);
          sums[t + 3][r] = dot2_lane<3>(sums[t + 3][r], line[r], x);
        }
      }
    } else {
      EDGEVL_UNROLL
      for (int t = 0; t < T; ++t) {
        const Pairs x = broadcast_pairs(words + t * kTokenStep);
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) sums[t][r] = dot2(sums[t][r], line[r], x);
      }
    }
  }
}

// --- matrix times one token ----------------------------------------------------------------------

/// Lines dealt out to kChains of sums, which are then added up into sums[0][kRegisters].
/// add_lines(chain, source, i) adds the products of line i.
template <class Add>
EDGEVL_INLINE void add_in_chains(Ints (&sums)[kChains][1][kRegisters], const std::uint8_t* from,
                                 int lines, const Add& add_lines) {
  int i = 0;
  for (; i + kChains <= lines; i += kChains) {
    EDGEVL_UNROLL
    for (int c = 0; c < kChains; ++c) {
      const std::uint8_t* source[kRegisters];
      EDGEVL_UNROLL
      for (int r = 0; r < kRegisters; ++r) {
        source[r] = from + std::size_t(i + c) * kLineBytes + r * kRegisterBytes;
      }
      add_lines(sums[c], source, i + c);
    }
  }
  for (; i < lines; ++i) {
    const std::uint8_t* source[kRegisters];
    EDGEVL_UNROLL
    for (int r = 0; r < kRegisters; ++r) {
      source[r] = from + std::size_t(i) * kLineBytes + r * kRegisterBytes;
    }
    add_lines(sums[0], source, i);
  }
  EDGEVL_UNROLL
  for (int c = 1; c < kChains; ++c) {
    EDGEVL_UNROLL
    for (int r = 0; r < kRegisters; ++r) sums[0][0][r] = add(sums[0][0][r], sums[c][0][r]);
  }
}

/// How the lines of a format with scales of groups are added up.
template <Format>
struct Lines {
  static constexpr int kColumns = 8;
  /// What their sums have too much where the activations' is x.
  static EDGEVL_INLINE Ints offset(Ints x) { return shift_left(x, 3); }
  template <int T, int R>
  static EDGEVL_INLINE void add(Ints (&sums)[T][R], const std::uint8_t* const (&source)[R],
                                int lines, const std::uint32_t* words, std::ptrdiff_t ahead) {
    if constexpr (kPairsOfTokens && T > 1) {
      add_int4_pairs(sums, source, lines, words);
    } else {
      add_int4(sums, source, lines, words, ahead);
    }
  }
};
template <>
struct Lines<Format::kSplit> {
  static constexpr int kColumns = 16;
  static EDGEVL_INLINE Ints offset(Ints x) { return edgevl::add(shift_left(x, 1), x); }
  template <int T, int R>
  static EDGEVL_INLINE void add(Ints (&sums)[T][R], const std::uint8_t* const (&source)[R],
                                int lines, const std::uint32_t* words, std::ptrdiff_t ahead) {
    if constexpr (kPairsOfTokens && T > 1) {
      add_split_pairs(sums, source, lines, words);
    } else {
      add_split(sums, source, lines, words, ahead);
    }
  }
};

template <Format kFormat>
void row_of_groups(const Matrix& matrix, const std::uint8_t* panel, const Block& x, float* out) {
  using Own = Lines<kFormat>;
  constexpr int kWords = Own::kColumns / 4;
  const int lines = matrix.group / Own::kColumns;
  const int groups = matrix.groups();
  const std::uint8_t* scales = panel;
  const std::uint8_t* source = panel + matrix.scale_bytes();
  const std::uint32_t* words = x.words;
  touch(scales, matrix.scale_bytes());
  Floats total[kRegisters];
  EDGEVL_UNROLL
  for (int r = 0; r < kRegisters; ++r) total[r] = splat(0.0f);
  for (int g = 0; g < groups; ++g) {
    Ints sums[kChains][1][kRegisters];
    EDGEVL_UNROLL
    for (auto& chain : sums) clear(chain, splat(0));
    add_in_chains(sums, source, lines, [&](auto& one, auto& from, int i) {
      Own::add(one, from, 1, words + kWords * i, kAhead);
    });
    const Ints offset = Own::offset(splat(x.sums[g]));
    const Floats scale = splat(x.scales[g]);
    EDGEVL_UNROLL
    for (int r = 0; r < kRegisters; ++r) {
      const Floats product = to_float(subtract(sums[0][0][r], offset)) * scale;
      total[r] = fma(product, load_half(scales + 2 * r * kWidth), total[r]);
    }
    scales += 2 * kLanes;
    source += std::size_t(lines) * kLineBytes;
    words += kWords * lines;
  }
  EDGEVL_UNROLL
  for (int r = 0; r < kRegisters; ++r) store(out + r * kWidth, total[r]);
}

void row_int8(const Matrix& matrix, const std::uint8_t* panel, const Block& x, float* out) {
  const int lines = matrix.group / 4;
  const int groups = matrix.groups();
  const std::uint8_t* source = panel + kLineBytes;
  const std::uint32_t* words = x.words;
  Floats weight_scales[kRegisters], total[kRegisters];
  EDGEVL_UNROLL
  for (int r = 0; r < kRegisters; ++r) {
    weight_scales[r] = load(reinterpret_cast<const float*>(panel) + r * kWidth);
    total[r] = splat(0.0f);
  }
  for (int g = 0; g < groups; ++g) {
    Ints sums[kChains][1][kRegisters];
    EDGEVL_UNROLL
    for (auto& chain : sums) clear(chain, splat(0));
    add_in_chains(sums, source, lines,
                  [&](auto& one, auto& from, int i) { add_int8(one, from, 1, words + i); });
    const Ints offset = shift_left(splat(x.sums[g]), kByteOffset == 0 ? 0 : 7);
    const Floats scale = splat(x.scales[g]);
    EDGEVL_UNROLL
    for (int r = 0; r < kRegisters; ++r) {
      const Ints exact = kByteOffset == 0 ? sums[0][0][r] : subtract(sums[0][0][r], offset);
      total[r] = fma(to_float(exact) * scale, weight_scales[r], total[r]);
    }
    source += std::size_t(lines) * kLineBytes;
    words += lines;
  }
  EDGEVL_UNROLL
  for (int r = 0; r < kRegisters; ++r) store(out + r * kWidth, total[r]);
}

void row_bf16(const Matrix& matrix, const std::uint8_t* panel, const Block& x, float* out) {
  Floats sums[1][kRegisters];
  clear(sums, splat(0.0f));
  const std::uint8_t* source[kRegisters];
  EDGEVL_UNROLL
  for (int r = 0; r < kRegisters; ++r) source[r] = panel + r * kRegisterBytes;
  add_bf16(sums, source, kLineBytes, matrix.cols / 2, x.words);
  EDGEVL_UNROLL
  for (int r = 0; r < kRegisters; ++r) store(out + r * kWidth, sums[0][r]);
}

// --- matrix times a block of tokens --------------------------------------------------------------

/// Registers of output lanes that so many tokens take at once: those of one panel where the tokens
/// are few, and reading the weights is what takes the time, as a processor follows one stream
/// better than two; those of both panels where there is enough to compute.
constexpr int tile_registers(int tokens) {
  return registers_for(tokens, tokens <= 8 ? kRegisters : 2 * kRegisters);
}

/// How far ahead a tile's weights are fetched: of two panels at once, those of the next two.
template <int R>
EDGEVL_INLINE std::ptrdiff_t tile_ahead(const Matrix& matrix) {
  return R > kRegisters ? 2 * static_cast<std::ptrdiff_t>(matrix.panel_bytes()) : kAhead;
}

/// Where the lanes of R registers lie, from register `first` of the two panels' on.
template <int R>
struct Place {
  const std::uint8_t* scales[R];
  const std::uint8_t* source[R];

  EDGEVL_INLINE Place(const Matrix& matrix, const std::uint8_t* panels, int first, int scale_size) {
    const std::size_t panel_bytes = matrix.panel_bytes();
    const std::size_t scale_bytes = matrix.scale_bytes();
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
      const std::uint8_t* panel = panels + (first + r) / kRegisters * panel_bytes;
      const int at = (first + r) % kRegisters;
      scales[r] = panel + at * kWidth * scale_size;
      source[r] = panel + scale_bytes + at * kRegisterBytes;
    }
  }
};

/// One group's int32 sums, scaled, into out: put there for the first group, added for the others.
template <int T, int R>
EDGEVL_INLINE void add_scaled(const Ints (&sums)[T][R], const Floats (&weight_scales)[R],
                              const float* token_scales, bool first, float* out) {
  EDGEVL_UNROLL
  for (int t = 0; t < T; ++t) {
    const Floats scale = splat(token_scales[t]);
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
      float* to = out + t * kTileLanes + r * kWidth;
      const Floats product = to_float(sums[t][r]) * scale;
      store(to, first ? product * weight_scales[r] : fma(product, weight_scales[r], load(to)));
    }
  }
}

/// Starts a group's sums with what takes off the offset of the weights.
template <int T, int R, class Offset>
EDGEVL_INLINE void start(Ints (&sums)[T][R], const std::int32_t* token_sums, const Offset& of) {
  EDGEVL_UNROLL
  for (int t = 0; t < T; ++t) {
    const Ints offset = subtract(splat(0), of(splat(token_sums[t])));
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) sums[t][r] = offset;
  }
}

template <Format kFormat, int T>
EDGEVL_NOINLINE void tile_of_groups(const Matrix& matrix, const std::uint8_t* panels,
                                    const Block& x, float* out) {
  using Own = Lines<kFormat>;
  constexpr int R = tile_registers(T);
  const int lines = matrix.group / Own::kColumns;
  const int groups = matrix.groups();
  for (int first = 0; first < 2 * kRegisters; first += R, out += R * kWidth) {
    Place<R> place(matrix, panels, first, 2);
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) touch(place.scales[r], matrix.scale_bytes());
    const std::uint32_t* words = x.words;
    for (int g = 0; g < groups; ++g) {
      Ints sums[T][R];
      start(sums, x.sums + g * T, Own::offset);
      Own::add(sums, place.source, lines, words, tile_ahead<R>(matrix));
      Floats scales[R];
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) {
        scales[r] = load_half(place.scales[r] + g * 2 * kLanes);
        place.source[r] += std::size_t(lines) * kLineBytes;
      }
      add_scaled(sums, scales, x.scales + g * T, g == 0, out);
      words += Own::kColumns / 4 * lines * T;
    }
  }
}

template <int T>
EDGEVL_NOINLINE void tile_int8_of(const Matrix& matrix, const std::uint8_t* panels, const Block& x,
                                  float* out) {
  constexpr int R = tile_registers(T);
  const int lines = matrix.group / 4;
  const int groups = matrix.groups();
  for (int first = 0; first < 2 * kRegisters; first += R, out += R * kWidth) {
    Place<R> place(matrix, panels, first, 4);
    const std::uint32_t* words = x.words;
    for (int g = 0; g < groups; ++g) {
      Ints sums[T][R];
      if constexpr (kByteOffset == 0) {
        clear(sums, splat(0));
      } else {
        start(sums, x.sums + g * T, [](Ints x) { return shift_left(x, 7); });
      }
      if constexpr (kPairsOfTokens && T > 1) {
        add_int8_pairs(sums, place.source, lines, words);
      } else {
        add_int8(sums, place.source, lines, words, tile_ahead<R>(matrix));
      }
      Floats scales[R];
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) {
        scales[r] = load(reinterpret_cast<const float*>(place.scales[r]));
        place.source[r] += std::size_t(lines) * kLineBytes;
      }
      add_scaled(sums, scales, x.scales + g * T, g == 0, out);
      words += lines * T;
    }
  }
}

template <int T>
EDGEVL_NOINLINE void tile_bf16_of(const Matrix& matrix, const std::uint8_t* panels, const Block& x,
                                  float* out) {
  constexpr int R = tile_registers(T);
  for (int first = 0; first < 2 * kRegisters; first += R, out += R * kWidth) {
    const Place<R> place(matrix, panels, first, 0);
    Floats sums[T][R];
    clear(sums, splat(0.0f));
    add_bf16(sums, place.source, kLineBytes, matrix.cols / 2, x.words, tile_ahead<R>(matrix));
    EDGEVL_UNROLL
    for (int t = 0; t < T; ++t) {
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) store(out + t * kTileLanes + r * kWidth, sums[t][r]);
    }
  }
}

template <Format kFormat>
void tile_of_groups(const Matrix& matrix, const std::uint8_t* panels, const Block& x, float* out) {
  with_count(x.tokens,
             [&](auto t) { tile_of_groups<kFormat, decltype(t)::value>(matrix, panels, x, out); });
}

void tile_int8(const Matrix& matrix, const std::uint8_t* panels, const Block& x, float* out) {
  with_count(x.tokens, [&](auto t) { tile_int8_of<decltype(t)::value>(matrix, panels, x, out); });
}

void tile_bf16(const Matrix& matrix, const std::uint8_t* panels, const Block& x, float* out) {
  with_count(x.tokens, [&](auto t) { tile_bf16_of<decltype(t)::value>(matrix, panels, x, out); });
}

// --- the lower parts of kSplit -------------------------------------------------------------------

float lower(const Matrix& matrix, int row, const float* x, int cols) {
  const std::uint8_t* scales = matrix.lower(row);
  const std::uint8_t* parts = scales + matrix.lower_scale_bytes();
  float scale[kWidth];
  float sums[kLanes] = {};
  int group = -1, left = 0;  // columns of the group
  const auto add_columns = [&](int c, const float* values) {
    if (left == 0) {
      ++group;
      left = matrix.group;
      if (group % kWidth == 0) store(scale, splat(0.5f) * load_half(scales + 2 * group));
    }
    left -= kLanes;
    const float half = scale[group % kWidth];
    const int bit = c / kLanes % 16 * 2;
    std::uint32_t words[kLanes];
    __builtin_memcpy(words, parts + c / 256 * kLineBytes, sizeof words);
    for (int l = 0; l < kLanes; ++l) {
      sums[l] += half * (float(std::int32_t(words[l] >> bit & 3)) - 1.5f) * values[l];
    }
  };
  int c = 0;
  for (; c + kLanes <= cols; c += kLanes) add_columns(c, x + c);
  if (c < cols) {
    float values[kLanes] = {};
    for (int l = 0; c + l < cols; ++l) values[l] = x[c + l];
    add_columns(c, values);
  }
  float total = 0;
  for (float each : sums) total += each;
  return total;
}

// --- attention -----------------------------------------------------------------------------------

/// Channels of a query that are multiplied at once; their words fit into the scratch.
constexpr int kQueryChannels = 128;

/// Where the pairs of a cache block lie, and how they are read.
template <CacheFormat>
struct Stored {
  static constexpr int kPairBytes = 4;
  static constexpr Pairs (*kLoad)(const std::uint8_t*) = load_pairs;
  static EDGEVL_INLINE const std::uint8_t* pairs(const std::uint32_t* block) {
    return reinterpret_cast<const std::uint8_t*>(block);
  }
};
template <>
struct Stored<CacheFormat::kInt8> {
  static constexpr int kPairBytes = 2;
  static constexpr Pairs (*kLoad)(const std::uint8_t*) = load_int8_pairs;
  static EDGEVL_INLINE const std::uint8_t* pairs(const std::uint32_t* block) {
    return reinterpret_cast<const std::uint8_t*>(block + kCacheBlock);
  }
  static EDGEVL_INLINE const float* scales(const std::uint32_t* block) {
    return reinterpret_cast<const float*>(block);
  }
};

// A position's bytes, half-words or words are stored one by one and nothing around them is touched,
// so that positions may be stored by several threads at once.
void store_key_bf16(const float* key, int head_dim, int position, std::uint32_t* block) {
  const int padded = round_up(head_dim, kLanes);
  std::uint32_t* words = block + position / kLanes * (padded / 2) * kLanes + position % kLanes;
  round_row(key, head_dim, words, kLanes);
}

EDGEVL_INLINE void store_half(const float* value, int head_dim, int position,
                              std::uint32_t* words) {
  sweep(head_dim, [&](int i, auto lanes) {
    alignas(64) std::uint16_t halves[kWidth];
    store_bf16(halves, load(value + i, lanes));
    const int count = smaller_of(kWidth, head_dim - i);
    char* to = reinterpret_cast<char*>(words + i) + 2 * (position % 2);
    for (int k = 0; k < count; ++k) copy<std::uint16_t>(to + 4 * k, halves + k);
  });
}

void store_values_bf16(const float* values, std::size_t stride, int count, int head_dim,
                       int position, std::uint32_t* block) {
  const int padded = round_up(head_dim, kLanes);
  for (int p = position; p < position + count; ++p, values += stride) {
    std::uint32_t* words = block + std::size_t(p / 2) * padded;
    if (p % 2 == 1 || p + 1 == position + count) {
      store_half(values, head_dim, p, words);
      continue;
    }
    const float* next = values + stride;
    sweep(head_dim, [&](int i, auto lanes) {
      alignas(64) std::uint16_t low[kWidth], high[kWidth];
      store_bf16(low, load(values + i, lanes));
      store_bf16(high, load(next + i, lanes));
      const int whole = smaller_of(kWidth, head_dim - i);
      for (int k = 0; k < whole; ++k) words[i + k] = low[k] | std::uint32_t(high[k]) << 16;
    });
    ++p;
    values = next;
  }
}

/// Quantizes x [n]: put(i, count, bytes) gets the int8 of every register's worth, and the scale
/// goes to its place in the block. An infinite one becomes NaN: a score of minus infinity would
/// hide it.
template <class Put>
EDGEVL_INLINE void store_int8(const float* x, int n, int position, std::uint32_t* block,
                              const Put& put) {
  const Scale found = scale_of(x, n);
  const float scale = found.value + (found.value - found.value);
  copy<float>(block + position, &scale);
  const Floats inverse = splat(found.inverse);
  sweep(n, [&](int i, auto lanes) {
    alignas(64) std::int8_t bytes[kWidth];
    store_bytes(bytes, to_int(load(x + i, lanes) * inverse));
    put(i, smaller_of(kWidth, n - i), bytes);
  });
}

void store_key_int8(const float* key, int head_dim, int position, std::uint32_t* block) {
  const int group = position / kLanes, lane = position % kLanes;
  auto* to = reinterpret_cast<std::int8_t*>(block + kCacheBlock) +
             group * round_up(head_dim, kLanes) * kLanes + lane / kWidth * 2 * kWidth +
             lane % kWidth;
  store_int8(key, head_dim, position, block, [&](int i, int count, const std::int8_t* bytes) {
    for (int k = 0; k < count; ++k) {
      to[(i + k) / 2 * 2 * kLanes + (i + k) % 2 * kWidth] = bytes[k];
    }
  });
}

void store_values_int8(const float* values, std::size_t stride, int count, int head_dim,
                       int position, std::uint32_t* block) {
  for (int p = position; p < position + count; ++p, values += stride) {
    auto* to = reinterpret_cast<std::int8_t*>(block + kCacheBlock) +
               p / 2 * round_up(head_dim, kLanes) * 2 + p % 2 * kWidth;
    store_int8(values, head_dim, p, block, [&](int i, int, const std::int8_t* bytes) {
      __builtin_memcpy(to + 2 * i, bytes, kWidth);  // channels are padded to whole registers
    });
  }
}

/// 2^x, for x from -126 (what is less counts as that) to 127; NaN stays NaN. What is beside a whole
/// power, 2^x for x in [-1/2, 1/2], is the polynomial of the coefficients, the highest first.
template <int N>
EDGEVL_INLINE Floats exp2_by(const float (&coefficients)[N], Floats x) {
  x = larger(splat(-126.0f), x);
  const Floats whole = nearest(x);
  const Floats part = x - whole;
  Floats y = splat(coefficients[0]);
  EDGEVL_UNROLL
  for (int i = 1; i < N; ++i) y = fma(y, part, splat(coefficients[i]));
  return times_power_of_two(y, whole);
}

/// 2^x to 2e-7. The polynomial is the best one of its degree: 9.2e-8, relative.
EDGEVL_INLINE Floats exp2(Floats x) {
  constexpr float kBest[] = {1.32647272e-3f, 9.67151264e-3f, 5.55073374e-2f,
                             2.40222421e-1f, 6.93146978e-1f, 1.0f};
  return exp2_by(kBest, x);
}

/// 2^x to 8e-5, likewise: half a step of what is rounded to a byte is 2e-3.
EDGEVL_INLINE Floats rough_exp2(Floats x) {
  constexpr float kBest[] = {5.51713231e-2f, 2.42611331e-1f, 6.93261089e-1f, 9.99928047e-1f};
  return exp2_by(kBest, x);
}

constexpr float kLog2E = 1.44269504088896341f;

/// How the words of weights lie, for each cache block: those of all rows together, where kWidth of
/// them are loaded at once; otherwise row by row, so that they can be stored as they come.
template <int T>
struct Weights {
  static constexpr int kWords = kCacheBlock / 2;
  static constexpr int kLineStep = kLanesOfWords ? T : 1;
  static constexpr int kRowStep = kLanesOfWords ? 1 : kWords;
};

/// The largest of n numbers.
EDGEVL_INLINE float largest_of(const float* x, int n) {
  Floats tops[4];
  EDGEVL_UNROLL
  for (auto& top : tops) top = splat(-__builtin_inff());
  int i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    EDGEVL_UNROLL
    for (int k = 0; k < 4; ++k) tops[k] = larger(load(x + i + k * kWidth), tops[k]);
  }
  for (; i + kWidth <= n; i += kWidth) tops[0] = larger(load(x + i), tops[0]);
  float most = largest(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
  for (; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

/// Weights of the first `visible` scores, not normalised; those of the positions up to `padded` are
/// zero. Returns the weights' sum. Only after that are weights of int8 values scaled for them.
template <int T, CacheFormat kFormat>
EDGEVL_INLINE float softmax(const float* scores, int visible, int padded, float scale,
                            const std::uint32_t* const* values, std::uint32_t* weights) {
  const int whole = visible & ~(kWidth - 1);
  const Floats factor = splat(scale * kLog2E);
  const Floats top = splat(largest_of(scores, visible));
  Floats total = splat(0.0f);
  const auto put = [&](int i, Floats weight) {
    std::uint32_t* words = weights + i / kCacheBlock * (T * kCacheBlock / 2) +
                           i % kCacheBlock / 2 * Weights<T>::kLineStep;
    if constexpr (Weights<T>::kLineStep == 1) {
      store_bf16(reinterpret_cast<std::uint16_t*>(words), weight);
    } else {
      alignas(64) std::uint16_t halves[kWidth];
      store_bf16(halves, weight);
      for (int k = 0; k < kWidth / 2; ++k) {
        copy<std::uint32_t>(words + k * Weights<T>::kLineStep, halves + 2 * k);
      }
    }
  };
  const auto scaled = [&](int i, Floats weight, auto lanes) {
    if constexpr (kFormat == CacheFormat::kInt8) {
      const float* scales = Stored<kFormat>::scales(values[i / kCacheBlock]) + i % kCacheBlock;
      return weight * load(scales, lanes);
    } else {
      return weight;
    }
  };
  const auto put_whole = [&](int i) {
    const Floats weight = exp2((load(scores + i) - top) * factor);
    total = total + weight;
    put(i, scaled(i, weight, Count<kWidth>()));
  };
  int i = 0;
  for (; i + kCacheBlock <= whole; i += kCacheBlock) {
    EDGEVL_UNROLL
    for (int k = 0; k < kCacheBlock; k += kWidth) put_whole(i + k);
  }
  for (; i < whole; i += kWidth) put_whole(i);
  for (; i < padded; i += kWidth) {
    Floats weight = splat(0.0f);
    if (i < visible) {
      alignas(64) float part[kWidth];
      store(part, exp2((load(scores + i, visible - i) - top) * factor));
      weight = load(part, visible - i);
      total = total + weight;
      weight = scaled(i, weight, visible - i);
    }
    put(i, weight);
  }
  return sum(total);
}

/// From a cache block to the one after it, in bytes; zero for the last of `blocks`.
EDGEVL_INLINE std::ptrdiff_t to_next(const std::uint32_t* const* block, int index, int blocks) {
  if (index + 1 >= blocks) return 0;
  return std::ptrdiff_t(reinterpret_cast<std::uintptr_t>(block[index + 1]) -
                        reinterpret_cast<std::uintptr_t>(block[index]));
}

/// scores[T][padded] = queries times keys, for `channels` channels from `channel` on; the last ones
/// bring the keys' scales.
template <int T, CacheFormat kFormat>
EDGEVL_INLINE void add_scores(const Attention& a, const std::uint32_t* queries, int channel,
                              int channels, int padded, float* scores) {
  constexpr int kBlockRegisters = kCacheBlock / kWidth;
  constexpr int R = registers_for(T, kBlockRegisters);
  constexpr int kPairBytes = Stored<kFormat>::kPairBytes;
  const std::size_t group_pairs = std::size_t(round_up(a.head_dim, kLanes)) / 2 * kLanes;
  for (int position = 0; position < padded; position += kCacheBlock) {
    const int index = position / kCacheBlock;
    const std::uint8_t* block =
        Stored<kFormat>::pairs(a.keys[index]) + channel / 2 * kLanes * kPairBytes;
    const std::ptrdiff_t ahead = to_next(a.keys, index, padded / kCacheBlock);
    for (int first = 0; first < kBlockRegisters; first += R) {
      const std::uint8_t* source[R];
      float* out = scores + position + first * kWidth;
      Floats sums[T][R];
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) {
        const int at = first + r;
        source[r] = block + (at / kRegisters * group_pairs + at % kRegisters * kWidth) * kPairBytes;
      }
      EDGEVL_UNROLL
      for (int t = 0; t < T; ++t) {
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) {
          const float* before = out + std::size_t(t) * padded + r * kWidth;
          sums[t][r] = channel == 0 ? splat(0.0f) : load(before);
        }
      }
      add_bf16<T, R, T, 1, Stored<kFormat>::kLoad>(sums, source, kLanes * kPairBytes, channels / 2,
                                                   queries, ahead);
      if constexpr (kFormat == CacheFormat::kInt8) {
        if (channel + channels == a.head_dim) {
          EDGEVL_UNROLL
          for (int r = 0; r < R; ++r) {
            const float* scales = Stored<kFormat>::scales(a.keys[index]);
            const Floats scale = load(scales + (first + r) * kWidth);
            EDGEVL_UNROLL
            for (int t = 0; t < T; ++t) sums[t][r] = sums[t][r] * scale;
          }
        }
      }
      EDGEVL_UNROLL
      for (int t = 0; t < T; ++t) {
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) store(out + std::size_t(t) * padded + r * kWidth, sums[t][r]);
      }
    }
  }
}

/// out = weights times values, normalised, for the channels from `channel` on, R registers of them
/// at a time.
template <int T, int R, CacheFormat kFormat>
EDGEVL_INLINE void mix_values(const Attention& a, const std::uint32_t* weights,
                              const float* inverse, int visible, int channel) {
  constexpr int kPairBytes = Stored<kFormat>::kPairBytes;
  const std::size_t row_bytes = round_up(a.head_dim, kLanes) * kPairBytes;
  for (; channel + (R - 1) * kWidth < a.head_dim; channel += R * kWidth) {
    Floats sums[T][R];
    clear(sums, splat(0.0f));
    for (int position = 0; position < visible; position += kCacheBlock) {
      const int index = position / kCacheBlock;
      const std::uint8_t* block = Stored<kFormat>::pairs(a.values[index]) + channel * kPairBytes;
      const std::uint8_t* source[R];
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) source[r] = block + r * kWidth * kPairBytes;
      const int positions = smaller_of(kCacheBlock, visible - position);
      add_bf16<T, R, Weights<T>::kLineStep, Weights<T>::kRowStep, Stored<kFormat>::kLoad>(
          sums, source, row_bytes, (positions + 1) / 2, weights + position / 2 * T,
          to_next(a.values, index, (visible + kCacheBlock - 1) / kCacheBlock));
    }
    EDGEVL_UNROLL
    for (int t = 0; t < T; ++t) {
      const Floats factor = splat(inverse[t]);
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) {
        const int at = channel + r * kWidth;
        const Floats mixed = sums[t][r] * factor;
        if (at + kWidth <= a.head_dim) {
          store(a.out[t] + at, mixed);
        } else {
          store(a.out[t] + at, mixed, a.head_dim - at);
        }
      }
    }
  }
  if constexpr (R > 1) mix_values<T, R / 2, kFormat>(a, weights, inverse, visible, channel);
}

/// Adds to scores[T][padded] what the biases that are not in the keys have in them.
template <int T>
EDGEVL_INLINE void add_biases(const Attention& a, int padded, float* scores) {
  constexpr int kSome = 32;  // pairs whose amplitudes are held at once
  constexpr int R = registers_for(T, kRegisters);
  const KeyBiases& b = a.biases;
  const int half = a.head_dim / 2;
  for (int from = 0; from < b.count; from += kSome) {
    const int count = smaller_of(kSome, b.count - from);
    float amplitudes[kSome][T][2];
    for (int i = 0; i < count; ++i) {
      const int pair = b.pairs[from + i];
      const float* value = b.values + 2 * (from + i);
      for (int t = 0; t < T; ++t) {
        const float x = a.query[t][pair], y = a.query[t][half + pair];
        // Fused by name: GCC 12 fuses such pairs where it makes vectors of them, and only there.
        amplitudes[i][t][0] = __builtin_fmaf(x, value[0], y * value[1]);
        amplitudes[i][t][1] = __builtin_fmaf(y, value[0], -(x * value[1]));
      }
    }
    for (int position = 0; position < padded; position += R * kWidth) {
      const float* lines =
          b.rotary + std::size_t(position / kLanes) * half * 2 * kLanes + position % kLanes;
      Floats sums[T][R];
      EDGEVL_UNROLL
      for (int t = 0; t < T; ++t) {
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) {
          sums[t][r] = load(scores + std::size_t(t) * padded + position + r * kWidth);
        }
      }
      for (int i = 0; i < count; ++i) {
        const float* line = lines + b.pairs[from + i] * 2 * kLanes;
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) {
          const Floats cos = load(line + r * kWidth), sin = load(line + kLanes + r * kWidth);
          EDGEVL_UNROLL
          for (int t = 0; t < T; ++t) {
            sums[t][r] = fma(splat(amplitudes[i][t][0]), cos, sums[t][r]);
            sums[t][r] = fma(splat(amplitudes[i][t][1]), sin, sums[t][r]);
          }
        }
      }
      EDGEVL_UNROLL
      for (int t = 0; t < T; ++t) {
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) {
          store(scores + std::size_t(t) * padded + position + r * kWidth, sums[t][r]);
        }
      }
    }
  }
}

template <int T, CacheFormat kFormat>
EDGEVL_NOINLINE void attend_of(const Attention& a) {
  int visible = 0;
  for (int t = 0; t < T; ++t) visible = a.visible[t] > visible ? a.visible[t] : visible;
  const int padded = round_up(visible, kCacheBlock);
  float* scores = a.scratch;
  auto* queries = reinterpret_cast<std::uint32_t*>(scores + std::size_t(T) * padded);
  auto* weights = queries + kMaxTokenBlock * (kQueryChannels / 2);
  for (int channel = 0; channel < a.head_dim; channel += kQueryChannels) {
    const int channels = smaller_of(kQueryChannels, a.head_dim - channel);
    for (int t = 0; t < T; ++t) round_row(a.query[t] + channel, channels, queries + t, T);
    add_scores<T, kFormat>(a, queries, channel, channels, padded, scores);
  }
  add_biases<T>(a, padded, scores);
  float inverse[T];
  for (int t = 0; t < T; ++t) {
    const float* row = scores + std::size_t(t) * padded;
    inverse[t] = 1.0f / softmax<T, kFormat>(row, a.visible[t], padded, a.scale, a.values,
                                            weights + t * Weights<T>::kRowStep);
  }
  mix_values<T, registers_for(T, 8), kFormat>(a, weights, inverse, visible, 0);
}

/// Few rows have code of their own, and so has a whole block. What is between is rare, and comes in
/// two parts.
template <CacheFormat kFormat>
void attend(const Attention& a) {
  constexpr int kFew = kTokenBlock < 8 ? kTokenBlock : 8;
  if (a.rows == kTokenBlock) return attend_of<kTokenBlock, kFormat>(a);
  with_count<kFew>(smaller_of(a.rows, kFew),
                   [&](auto t) { attend_of<decltype(t)::value, kFormat>(a); });
  if (a.rows <= kFew) return;
  Attention rest = a;
  rest.rows = a.rows - kFew;
  for (int t = 0; t < rest.rows; ++t) {
    rest.query[t] = a.query[kFew + t];
    rest.visible[t] = a.visible[kFew + t];
    rest.out[t] = a.out[kFew + t];
  }
  attend<kFormat>(rest);
}

// --- attention in INT8 ---------------------------------------------------------------------------

/// The low bytes of four registers, interleaved: byte 4 i + k of `out` is lane i of x[k].
EDGEVL_INLINE void store_interleaved(const Ints (&x)[4], std::uint32_t* out) {
  // What is negative would borrow from the byte after it: all are moved up before they are added.
  constexpr std::uint32_t kUp = 0x80808080;
  Ints words = splat(std::int32_t(kUp));
  EDGEVL_UNROLL
  for (int k = 0; k < 4; ++k) words = add(words, shift_left(x[k], 8 * k));
  copy<Ints>(out, &words);
  for (int i = 0; i < kWidth; ++i) out[i] ^= kUp;
}

/// How far ahead of the sums over a head its rows are fetched: they are far apart, and a processor
/// does not see them coming.
constexpr int kRowsAhead = 16;

/// Keys less their mean, which adds the same to all scores of a query and so changes no weight:
/// what all keys have in common, such as a bias, would take the precision from what tells them
/// apart (SageAttention, arXiv 2410.02367). The mean of values comes back with the result.
void quantize_head(float* keys, const float* values, std::size_t stride, int positions,
                   int head_dim, const Int8Head& out) {
  const Floats share = splat(1.0f / float(positions));
  const auto fetch_row = [&](const float* rows, int p) {
    __builtin_prefetch(rows + smaller_of(p + kRowsAhead, positions - 1) * stride);
  };
  sweep(head_dim, [&](int c, auto lanes) {
    Floats key_sum = splat(0.0f), sum = key_sum;
    Floats most = splat(-__builtin_inff()), least = splat(__builtin_inff());
    for (int p = 0; p < positions; ++p) {
      fetch_row(keys + c, p);
      fetch_row(values + c, p);
      const Floats value = load(values + p * stride + c, lanes);
      key_sum = key_sum + load(keys + p * stride + c, lanes);
      sum = sum + value;
      most = larger(value, most);
      least = smaller(value, least);
    }
    const Floats key_mean = key_sum * share, mean = sum * share;
    for (int p = 0; p < positions; ++p) {
      float* key = keys + p * stride + c;
      store(key, load(key, lanes) - key_mean, lanes);
    }
    const Floats reach = larger(most - mean, mean - least);
    const Floats inverse = splat(127.0f) / larger(reach, splat(1e-30f));
    store(out.value_means() + c, mean, lanes);
    store(out.value_scales() + c, reach * splat(1.0f / 127.0f), lanes);
    std::uint32_t* words = out.values() + c;
    for (int p = 0; p < out.positions(); p += 4, words += out.channels()) {
      Ints bytes[4];
      EDGEVL_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float* value = values + (p + k) * stride + c;
        bytes[k] = p + k < positions ? to_int((load(value, lanes) - mean) * inverse) : splat(0);
      }
      store_interleaved(bytes, words);
    }
  });
  for (int p = 0; p < positions; p += kLanes) {
    quantize(keys + p * stride, stride, head_dim, out.keys(p / kLanes));
  }
}

/// scores[T][padded] = queries times INT8 keys, but for the scales of the queries.
template <int T>
EDGEVL_INLINE void int8_scores(const Attention& a, const Int8Head& head, std::uint32_t* queries,
                               float* scores, float* query_scales) {
  constexpr int kBlockRegisters = kCacheBlock / kWidth;
  constexpr int R = registers_for(T, kBlockRegisters);
  const int cols = round_up(a.head_dim, 4), lines = cols / 4, padded = head.positions();
  for (int t = 0; t < T; ++t) {
    std::int32_t sum;
    quantize_group<1>(a.query[t], 0, a.head_dim, cols, queries + t, T, query_scales + t, &sum);
  }
  // One factor of dot4 has no sign. It is the query's: keys have their sums at hand.
  if constexpr (kByteOffset != 0) {
    for (int i = 0; i < lines * T; ++i) queries[i] ^= 0x80808080;
  }
  for (int position = 0; position < padded; position += kCacheBlock) {
    for (int first = 0; first < kBlockRegisters; first += R) {
      const std::uint8_t* source[R];
      Ints sums[T][R];
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) {
        const int at = position + (first + r) * kWidth;
        const Block keys = head.keys(at / kLanes);
        source[r] = reinterpret_cast<const std::uint8_t*>(keys.words + at % kLanes);
        Ints offset = splat(0);
        if constexpr (kByteOffset != 0) {
          copy<Ints>(&offset, keys.sums + at % kLanes);
          offset = shift_left(subtract(splat(0), offset), 7);
        }
        EDGEVL_UNROLL
        for (int t = 0; t < T; ++t) sums[t][r] = offset;
      }
      for (int i = 0; i < lines; ++i) {
        Bytes line[R];
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) line[r] = load_bytes(source[r] + i * kLineBytes);
        EDGEVL_UNROLL
        for (int t = 0; t < T; ++t) {
          const Bytes x = broadcast_bytes(queries + i * T + t);
          EDGEVL_UNROLL
          for (int r = 0; r < R; ++r) {
            sums[t][r] =
                kByteOffset == 0 ? dot4(sums[t][r], line[r], x) : dot4(sums[t][r], x, line[r]);
          }
        }
      }
      float* out = scores + position + first * kWidth;
      EDGEVL_UNROLL
      for (int r = 0; r < R; ++r) {
        const Floats scale = load(head.key_scales() + position + (first + r) * kWidth);
        // NaN for infinity: the least score would hide it.
        const Floats finite = scale + (scale - scale);
        EDGEVL_UNROLL
        for (int t = 0; t < T; ++t) {
          store(out + std::size_t(t) * padded + r * kWidth, to_float(sums[t][r]) * finite);
        }
      }
    }
  }
}

/// Steps of a weight in a byte: the factor of dot4 that has no sign has 255 of them.
constexpr int kWeightSteps = kByteOffset == 0 ? 127 : 255;

/// Where the bytes for a row's weight of position i lie, in those of T rows: rows of a cache block
/// are side by side, so that a loop over its positions finds them all from one address.
template <int T>
EDGEVL_INLINE std::size_t place_of(int i) {
  return std::size_t(i / kCacheBlock) * (T * kCacheBlock) + i % kCacheBlock;
}

/// Sums of a row's weights, in steps of 1 / kWeightSteps of the largest one.
struct WeightSums {
  float total, squares;  ///< before they are rounded
};

/// Weights of the first `visible` scores in bytes; those of the others, up to `padded`, are zero.
/// With kRest there is a second byte, in steps of 1 / kWeightSteps of the first one's.
template <int T, bool kRest>
EDGEVL_INLINE WeightSums int8_weights(const float* scores, int visible, int padded, float scale,
                                      std::int8_t* bytes, std::int8_t* rest) {
  // The largest is to be exact, or it would be a step too many: it is subtracted first.
  const Floats top = splat(largest_of(scores, visible)), slope = splat(scale * kLog2E);
  const Floats most = splat(log2f(kWeightSteps));
  const auto steps_of = [&](Floats score) { return rough_exp2(fma(score - top, slope, most)); };
  Floats total = splat(0.0f), squares = splat(0.0f);
  const auto put = [&](int i, Floats steps) {
    const std::size_t at = place_of<T>(i);
    total = total + steps;
    squares = fma(steps, steps, squares);
    if constexpr (kRest) {
      const Floats whole = larger(nearest(steps - splat(0.5f)), splat(0.0f));
      store_bytes(bytes + at, to_int(whole));
      store_bytes(rest + at, to_int((steps - whole) * splat(float(kWeightSteps))));
    } else {
      store_bytes(bytes + at, to_int(steps));
    }
  };
  int i = 0;
  for (; i + kCacheBlock <= visible; i += kCacheBlock) {
    EDGEVL_UNROLL
    for (int k = 0; k < kCacheBlock; k += kWidth) put(i + k, steps_of(load(scores + i + k)));
  }
  for (; i + kWidth <= visible; i += kWidth) put(i, steps_of(load(scores + i)));
  for (; i < padded; i += kWidth) {
    Floats steps = splat(0.0f);
    if (i < visible) {
      alignas(64) float part[kWidth];
      store(part, steps_of(load(scores + i, visible - i)));
      steps = load(part, visible - i);
    }
    put(i, steps);
  }
  return {sum(total), sum(squares)};
}

/// out = weights times the values of an INT8 head, times inverse[T], added to the values' means or,
/// where it is not the first part, to `out`; for the channels from `channel` on, R registers of
/// them at a time.
template <int T, int R>
EDGEVL_INLINE void mix_int8(const Attention& a, const Int8Head& head, const std::int8_t* weights,
                            const float* inverse, bool first, int channel) {
  constexpr int kLines = kCacheBlock / 4;
  for (; channel + (R - 1) * kWidth < a.head_dim; channel += R * kWidth) {
    Ints sums[T][R];
    clear(sums, splat(0));
    const std::uint32_t* line = head.values() + channel;
    const auto* words = reinterpret_cast<const std::uint32_t*>(weights);
    for (int position = 0; position < head.positions(); position += kCacheBlock) {
      for (int i = 0; i < kLines; ++i, line += head.channels(), ++words) {
        Bytes values[R];
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) {
          values[r] = load_bytes(reinterpret_cast<const std::uint8_t*>(line + r * kWidth));
        }
        EDGEVL_UNROLL
        for (int t = 0; t < T; ++t) {
          const Bytes x = broadcast_bytes(words + t * kLines);
          EDGEVL_UNROLL
          for (int r = 0; r < R; ++r) sums[t][r] = dot4(sums[t][r], x, values[r]);
        }
      }
      words += (T - 1) * kLines;
    }
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
      const int at = channel + r * kWidth;
      const Floats scale = load(head.value_scales() + at), mean = load(head.value_means() + at);
      EDGEVL_UNROLL
      for (int t = 0; t < T; ++t) {
        const Floats part = to_float(sums[t][r]) * splat(inverse[t]) * scale;
        float* out = a.out[t] + at;
        if (at + kWidth <= a.head_dim) {
          store(out, part + (first ? mean : load(out)));
        } else {
          store(out, part + (first ? mean : load(out, a.head_dim - at)), a.head_dim - at);
        }
      }
    }
  }
  if constexpr (R > 1) mix_int8<T, R / 2>(a, head, weights, inverse, first, channel);
}

/// The errors of N weights, each up to half a step, are sqrt(N / 12) steps together, beside the
/// root of the weights' squares, as far as values are independent of them. A row that may be more
/// than 1.5 % off by that has a second byte for each weight. It mostly is off by far less: nearly
/// all weights of such a row are below half a step, and so are their errors.
template <int T>
EDGEVL_NOINLINE void attend_int8_of(const Attention& a, const Int8Head& head) {
  constexpr float kSquares = 1.0f / (12.0f * 0.015f * 0.015f);  // in steps
  const int positions = head.positions();
  const std::size_t size = std::size_t(T) * positions;
  float* scores = a.scratch;
  auto* queries = reinterpret_cast<std::uint32_t*>(scores + size);
  auto* bytes = reinterpret_cast<std::int8_t*>(queries + kMaxTokenBlock * (kQueryChannels / 2));
  std::int8_t* rest = bytes + size;
  float scales[T], inverse[T];
  int8_scores<T>(a, head, queries, scores, scales);
  bool has_rest = false;
  for (int t = 0; t < T; ++t) {
    const int visible = a.visible[t], place = t * kCacheBlock;
    const float* row = scores + std::size_t(t) * positions;
    const float scale = scales[t] * a.scale;
    const WeightSums sums =
        int8_weights<T, false>(row, visible, positions, scale, bytes + place, nullptr);
    inverse[t] = 1.0f / sums.total;
    if (sums.squares < kSquares * float(visible)) {
      if (!has_rest) __builtin_memset(rest, 0, size);
      has_rest = true;
      int8_weights<T, true>(row, visible, positions, scale, bytes + place, rest + place);
    }
  }
  constexpr int R = registers_for(T, 8);
  mix_int8<T, R>(a, head, bytes, inverse, true, 0);
  if (!has_rest) return;
  for (float& each : inverse) each *= 1.0f / kWeightSteps;
  mix_int8<T, R>(a, head, rest, inverse, false, 0);
}

/// Whole sequences come in whole blocks but for the last one, which is not worth code of its own.
void attend_int8(const Attention& a, const Int8Head& head) {
  if (a.rows == kTokenBlock) return attend_int8_of<kTokenBlock>(a, head);
  Attention row = a;
  for (int t = 0; t < a.rows; ++t) {
    row.query[0] = a.query[t];
    row.visible[0] = a.visible[t];
    row.out[0] = a.out[t];
    attend_int8_of<1>(row, head);
  }
}

// --- element by element --------------------------------------------------------------------------

/// The sum of what body(i, lanes) gives for every register's worth of n elements.
template <class Body>
EDGEVL_INLINE float sum_of(int n, const Body& body) {
  Floats totals[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    EDGEVL_UNROLL
    for (int k = 0; k < 4; ++k) totals[k] = totals[k] + body(i + k * kWidth, Count<kWidth>());
  }
  for (; i + kWidth <= n; i += kWidth) totals[0] = totals[0] + body(i, Count<kWidth>());
  if (i < n) totals[1] = totals[1] + body(i, n - i);
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  const float squares = sum_of(n, [&](int i, auto lanes) {
    const Floats value = load(x + i, lanes);
    return value * value;
  });
  const Floats scale = splat(1.0f / sqrtf(squares / float(n) + eps));
  sweep(n, [&](int i, auto lanes) {
    store(out + i, load(x + i, lanes) * scale * load(weight + i, lanes), lanes);
  });
}

void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps,
                float* out) {
  const float total = sum_of(n, [&](int i, auto lanes) { return load(x + i, lanes); });
  const Floats mean = splat(total / float(n));
  // In lanes beyond the last element, (0 - mean)^2 would count.
  float squares = sum_of(n & ~(kWidth - 1), [&](int i, auto lanes) {
    const Floats value = load(x + i, lanes) - mean;
    return value * value;
  });
  for (int i = n & ~(kWidth - 1); i < n; ++i) {
    const float value = x[i] - total / float(n);
    squares += value * value;
  }
  const Floats scale = splat(1.0f / sqrtf(squares / float(n) + eps));
  sweep(n, [&](int i, auto lanes) {
    const Floats normal = (load(x + i, lanes) - mean) * scale;
    store(out + i, fma(normal, load(weight + i, lanes), load(bias + i, lanes)), lanes);
  });
}

void rotate(float* x, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  sweep(half, [&](int i, auto lanes) {
    const Floats a = load(x + i, lanes), b = load(x + half + i, lanes);
    const Floats c = load(cos + i, lanes), s = load(sin + i, lanes);
    store(x + i, a * c - b * s, lanes);
    store(x + half + i, b * c + a * s, lanes);
  });
}

/// x * sigmoid(x)
EDGEVL_INLINE Floats silu(Floats x) {
  const Floats power = smaller(splat(126.0f), x * splat(-kLog2E));
  return x * reciprocal(splat(1.0f) + exp2(power));
}

/// x * (1 + erf(x / sqrt 2)) / 2, as max(x, 0) - |x| * erfc(|x| / sqrt 2) / 2, so that nothing
/// cancels. erfc: Abramowitz and Stegun 7.1.26, to 1.5e-7.
EDGEVL_INLINE Floats gelu(Floats x) {
  const Floats positive = larger(splat(0.0f), x);
  const Floats size = positive - smaller(splat(0.0f), x);
  const Floats z = size * splat(0.70710678118654752f);
  const Floats t = reciprocal(fma(z, splat(0.3275911f), splat(1.0f)));
  Floats y = splat(1.061405429f);
  y = fma(y, t, splat(-1.453152027f));
  y = fma(y, t, splat(1.421413741f));
  y = fma(y, t, splat(-0.284496736f));
  y = fma(y, t, splat(0.254829592f));
  const Floats complement = y * t * exp2(z * z * splat(-kLog2E));
  return fma(size * splat(-0.5f), complement, positive);
}

/// out = body(y, out) for every register of every token, where body = column(i, lanes). Columns are
/// the outer loop, so that their bias and scale are loaded once.
template <class Column>
EDGEVL_INLINE void epilogue_columns(const float* tile, int tokens, const Epilogue& epilogue,
                                    const Column& column) {
  sweep(epilogue.width, [&](int i, auto lanes) {
    const auto body = column(i, lanes);
    for (int t = 0; t < tokens; ++t) {
      float* out = epilogue.out + t * epilogue.stride + i;
      store(out, body(tile + t * kTileLanes + i, out), lanes);
    }
  });
}

void apply_epilogue(const float* tile, int tokens, const Epilogue& epilogue) {
  const auto at = [](const float* x, int i, auto lanes, float missing) {
    return x == nullptr ? splat(missing) : load(x + i, lanes);
  };
  switch (epilogue.kind) {
    case Epilogue::Kind::kStore:
      return epilogue_columns(tile, tokens, epilogue, [&](int i, auto lanes) {
        const Floats bias = at(epilogue.bias, i, lanes, 0);
        return [=](const float* y, const float*) { return load(y) + bias; };
      });
    case Epilogue::Kind::kAdd:
      return epilogue_columns(tile, tokens, epilogue, [&](int i, auto lanes) {
        const Floats bias = at(epilogue.bias, i, lanes, 0), scale = at(epilogue.scale, i, lanes, 1);
        return [=](const float* y, const float* out) {
          return fma(load(y) + bias, scale, load(out, lanes));
        };
      });
    case Epilogue::Kind::kGelu:
      return epilogue_columns(tile, tokens, epilogue, [&](int i, auto lanes) {
        const Floats bias = at(epilogue.bias, i, lanes, 0);
        return [=](const float* y, const float*) { return gelu(load(y) + bias); };
      });
    case Epilogue::Kind::kSwiglu:
      return epilogue_columns(tile, tokens, epilogue, [&](int i, auto lanes) {
        const Floats gate_bias = at(epilogue.bias, i, lanes, 0);
        const Floats up_bias = at(epilogue.bias, kLanes + i, lanes, 0);
        return [=](const float* y, const float*) {
          return silu(load(y) + gate_bias) * (load(y + kLanes) + up_bias);
        };
      });
  }
}

float dot_bf16(const std::uint16_t* row, const float* x, int n) {
  const int whole = n & ~(kWidth - 1);
  float total = sum_of(whole, [&](int i, auto) { return load_bf16(row + i) * load(x + i); });
  for (int i = whole; i < n; ++i) {
    const std::uint32_t bits = std::uint32_t(row[i]) << 16;
    float value;
    copy<float>(&value, &bits);
    total += value * x[i];
  }
  return total;
}

// --- what the machine can do ---------------------------------------------------------------------

std::uint64_t read_bytes(const std::uint8_t* data, std::size_t bytes) {
  constexpr int kStep = 256 / kRegisterBytes;
  Bytes seen[kStep];
  for (int k = 0; k < kStep; ++k) seen[k] = load_bytes(data + k * kRegisterBytes);
  for (std::size_t i = 0; i < bytes; i += 256) {
    EDGEVL_UNROLL
    for (int k = 0; k < kStep; ++k) {
      seen[k] = either(seen[k], load_bytes(data + i + k * kRegisterBytes));
    }
  }
  for (int k = 1; k < kStep; ++k) seen[0] = either(seen[0], seen[k]);
  std::uint64_t result;
  copy<std::uint64_t>(&result, &seen[0]);
  return result;
}

std::uint64_t multiply() {
  constexpr int kChainsBusy = kAccumulators;
  constexpr int kProducts = (kBothNibbles ? 8 : 4) * kWidth;
  constexpr int kRounds = 100'000'000 / (kChainsBusy * kProducts);
  alignas(64) std::uint8_t ones[kRegisterBytes];
  for (int i = 0; i < kRegisterBytes; ++i) ones[i] = 1;
  const Bytes weights = load_bytes(ones);
  Bytes x = weights;
  [[maybe_unused]] Bytes y = weights;
  Ints sums[kChainsBusy];
  EDGEVL_UNROLL
  for (int k = 0; k < kChainsBusy; ++k) sums[k] = splat(0);
  const auto add_product = [&](auto& sum) {
    opaque(x);  // or products that are the same would be computed once for all chains
    if constexpr (kBothNibbles) {
      opaque(y);
      sum = dot8(sum, weights, weights, x, y);
    } else {
      sum = dot4(sum, weights, x);
    }
  };
  for (int i = 0; i < kRounds; ++i) {
    EDGEVL_UNROLL
    for (int k = 0; k < kChainsBusy; ++k) add_product(sums[k]);
  }
  std::uint64_t total = 0;
  for (int k = 0; k < kChainsBusy; ++k) total += std::uint64_t(sum(sums[k]));
  return total;  // every product is 1
}

constexpr Kernels table(const char* name) {
  return {name,
          kTokenBlock,
          quantize,
          round_rows,
          {row_of_groups<Format::kInt4>, row_int8, row_bf16, row_of_groups<Format::kSplit>},
          {tile_of_groups<Format::kInt4>, tile_int8, tile_bf16, tile_of_groups<Format::kSplit>},
          lower,
          apply_epilogue,
          {store_key_bf16, store_key_int8},
          {store_values_bf16, store_values_int8},
          {attend<CacheFormat::kBf16>, attend<CacheFormat::kInt8>},
          quantize_head,
          attend_int8,
          rms_norm,
          layer_norm,
          rotate,
          largest_of,
          dot_bf16,
          read_bytes,
          multiply};
}

}  // namespace
}  // namespace edgevl

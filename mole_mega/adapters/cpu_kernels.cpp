// What a MoLE layer does on the CPU that torch's own operators do in many passes.
//
// The thin products of a bank of LoRA experts: rows of each expert against that expert's matrix. A block of rows goes through oneDNN's small products (brgemm, as torch hands it out) in fixed shapes, so that a kernel
// is compiled once and not for each expert's number of rows, and wide rows are read and written where they lie.
//
// starts [E + 1]: expert e has the sorted rows starts[e] to starts[e + 1]. rows: which row of the wide tensor each sorted
// row is, null where they are the same. Sums are fp32.
//
// SwiGLU in bf16: of 65,536 numbers there is a table, so that it gives the bits that torch gives.

#include <ATen/native/CPUBlas.h>
#include <omp.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

namespace blas = at::native::cpublas;

constexpr int64_t kRows = 32;      // of a block of sorted rows
constexpr int64_t kColumns = 128;   // of a wide tensor at a time: what they make must stay in the first cache
constexpr int64_t kDepth = 64;     // rows that are summed over in one product
constexpr int64_t kAhead = 8;      // rows between one that is read and one that is sent for
constexpr int64_t kChunk = 512;    // rows of an expert that one thread takes

template <typename T>
constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;  // rows of the second factor that lie interleaved

template <typename T>
T* scratch(std::vector<uint8_t>& memory, int64_t size) {
  constexpr int64_t line = 64;
  const size_t bytes = size * sizeof(T) + line;
  if (memory.size() < bytes) memory.resize(bytes);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<T*>((address + line - 1) / line * line);
}

inline void narrow(float value, float& result) { result = value; }
inline void narrow(float value, at::BFloat16& result) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  result.x = value != value ? uint16_t(0x7fc0) : uint16_t(rounded);
}

inline float widen(float value) { return value; }
inline float widen(at::BFloat16 value) {
  const uint32_t bits = uint32_t(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// out = sums, or out += sums, n numbers side by side.
template <bool add, typename T>
inline void put(const float* __restrict__ sums, T* __restrict__ out, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    for (; i + 16 <= n; i += 16) {
      __m512 sum = _mm512_loadu_ps(sums + i);
      if constexpr (add) {
        const __m256i had = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out + i));
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(had), 16)));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(sum));
    }
  }
#endif
  for (; i < n; ++i) narrow(add ? widen(out[i]) + sums[i] : sums[i], out[i]);
}

// out[c, r] = in[r, c], numbers of four bytes.
template <typename Word>
void transpose(const Word* in, int64_t ldi, int64_t rows, int64_t columns, Word* out, int64_t ldo) {
  static_assert(sizeof(Word) == 4);
  int64_t done_rows = 0, done_columns = 0;
#ifdef __AVX512F__
  done_rows = rows / 16 * 16, done_columns = columns / 16 * 16;
  for (int64_t row = 0; row < done_rows; row += 16)
    for (int64_t column = 0; column < done_columns; column += 16) {
      // Pairs of words, pairs of those, then the four quarters of a register against each other.
      __m512i a[16], b[16];
      for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + (row + i) * ldi + column);
      for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
      }
      for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
          a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
          a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
      for (int j = 0; j < 4; ++j) {
        const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_below = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i odd_below = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        Word* to = out + (column + j) * ldo + row;
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(even, even_below, 0x88));
        _mm512_storeu_si512(to + 4 * ldo, _mm512_shuffle_i32x4(odd, odd_below, 0x88));
        _mm512_storeu_si512(to + 8 * ldo, _mm512_shuffle_i32x4(even, even_below, 0xdd));
        _mm512_storeu_si512(to + 12 * ldo, _mm512_shuffle_i32x4(odd, odd_below, 0xdd));
      }
    }
#endif
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = row < done_rows ? done_columns : 0; column < columns; ++column)
      out[column * ldo + row] = in[row * ldi + column];
}

inline uint32_t join(at::BFloat16 low, at::BFloat16 high) { return low.x | uint32_t(high.x) << 16; }

// Have n numbers on their way to the cache: pieces of rows are too short for the processor to see them coming.
template <typename T>
inline void fetch(const T* numbers, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(numbers + i);
}

// [K, N] with any strides -> [ceil(K / pair), N, pair], 0 beyond K.
template <typename T>
void interleave(const T* in, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, T* out) {
  constexpr int64_t pair = kPair<T>;
  using Word = std::conditional_t<pair == 2, uint32_t, T>;
  const int64_t whole = K / pair;
  Word* words = reinterpret_cast<Word*>(out);
  if (stride_k == 1 && stride_n % pair == 0) {
    transpose(reinterpret_cast<const Word*>(in), stride_n / pair, N, whole, words, N);
  } else {
    for (int64_t k = 0; k < whole; ++k) {
      const T* first = in + k * pair * stride_k;
      for (int64_t n = 0; n < N; ++n) {
        if constexpr (pair == 2)
          words[k * N + n] = join(first[n * stride_n], first[stride_k + n * stride_n]);
        else
          words[k * N + n] = first[n * stride_n];
      }
    }
  }
  if constexpr (pair == 2)
    if (K % pair)
      for (int64_t n = 0; n < N; ++n) words[whole * N + n] = join(in[(K - 1) * stride_k + n * stride_n], T(0.f));
}

// Where the rows [first, first + kRows) of a wide tensor lie one after another; a copy where they do not all exist or
// are scattered. `leading` becomes their distance.
template <typename T>
const T* block_of(const T* wide, int64_t& leading, const int64_t* rows, int64_t first, int64_t end, int64_t width,
                  std::vector<uint8_t>& memory) {
  if (!rows && first + kRows <= end) return wide + first * leading;
  T* copy = scratch<T>(memory, kRows * width);
  for (int64_t i = 0; i < kRows; ++i) {
    if (first + i < end)
      std::memcpy(copy + i * width, wide + (rows ? rows[first + i] : first + i) * leading, width * sizeof(T));
    else
      std::memset(static_cast<void*>(copy + i * width), 0, width * sizeof(T));
  }
  leading = width;
  return copy;
}

template <typename T>
void to_rank(const T* x, int64_t ldx, const int64_t* rows, const int64_t* starts, int64_t E, int64_t I, int64_t R,
             const T* M, int64_t stride_e, int64_t stride_i, int64_t stride_r, T* z, int64_t ldz, int64_t threads) {
  struct Item { int64_t expert, first, end; };
  std::vector<Item> items;
  for (int64_t e = 0; e < E; ++e)
    for (int64_t first = starts[e]; first < starts[e + 1]; first += kChunk)
      items.push_back({e, first, std::min(first + kChunk, starts[e + 1])});
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<uint8_t> of_matrix, of_rows, of_sums;
    T* packed = scratch<T>(of_matrix, (I + 1) * R);
    float* sums = scratch<float>(of_sums, kRows * R);
    int64_t held = -1;
#pragma omp for schedule(dynamic)
    for (size_t item = 0; item < items.size(); ++item) {
      const auto [expert, begin, end] = items[item];
      const bool as_it_lies = kPair<T> == 1 && stride_r == 1;
      if (held != expert && !as_it_lies) interleave(M + expert * stride_e, stride_i, stride_r, I, R, packed);
      held = expert;
      const T* matrix = as_it_lies ? M + expert * stride_e : packed;
      const int64_t ldm = as_it_lies ? stride_i : R;
      for (int64_t first = begin; first < end; first += kRows) {
        int64_t leading = ldx;
        const T* block = block_of(x, leading, rows, first, end, I, of_rows);
        blas::brgemm(kRows, R, I, leading, ldm, R, false, block, matrix, sums, kPair<T> > 1);
        for (int64_t i = 0; i < std::min(kRows, end - first); ++i)
          put<false>(sums + i * R, z + (first + i) * ldz, R);
      }
    }
    blas::brgemm_release(kPair<T> > 1);
  }
}

template <typename T>
void from_rank(T* out, int64_t ldo, const int64_t* rows, const int64_t* starts, int64_t E, int64_t R, int64_t O,
               const T* z, int64_t ldz, const T* M, int64_t stride_e, int64_t stride_r, int64_t stride_o, bool add,
               int64_t threads) {
  const int64_t blocks = (O + kColumns - 1) / kColumns;
  // Threads share the columns: two experts may add to one row.
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t from = blocks * part / threads * kColumns, to = std::min(blocks * (part + 1) / threads * kColumns, O);
    std::vector<uint8_t> of_matrix, of_rows, of_sums;
    const int64_t packed_rows = (R + kPair<T> - 1) / kPair<T> * kPair<T>;
    T* packed = scratch<T>(of_matrix, packed_rows * (to - from));
    float* sums = scratch<float>(of_sums, kRows * kColumns);
    for (int64_t e = 0; e < E; ++e) {
      if (starts[e] == starts[e + 1]) continue;
      const bool as_it_lies = kPair<T> == 1 && stride_o == 1;
      for (int64_t column = from; column < to && !as_it_lies; column += kColumns)
        interleave(M + e * stride_e + column * stride_o, stride_r, stride_o, R, std::min(kColumns, to - column),
                   packed + packed_rows * (column - from));
      for (int64_t first = starts[e]; first < starts[e + 1]; first += kRows) {
        const int64_t count = std::min(kRows, starts[e + 1] - first);
        int64_t leading = ldz;
        const T* block = block_of(z, leading, nullptr, first, starts[e + 1], R, of_rows);
        for (int64_t column = from; column < to; column += kColumns) {
          const int64_t width = std::min(kColumns, to - column);
          const T* matrix = as_it_lies ? M + e * stride_e + column : packed + packed_rows * (column - from);
          blas::brgemm(kRows, width, R, leading, as_it_lies ? stride_r : width, width, false, block, matrix, sums,
                       kPair<T> > 1);
          for (int64_t i = 0; i < count; ++i) {
            T* out_row = out + (rows ? rows[first + i] : first + i) * ldo + column;
            const float* sum = sums + i * width;
            if (add && column + kColumns < to) fetch(out_row + kColumns, kColumns);
            add ? put<true>(sum, out_row, width) : put<false>(sum, out_row, width);
          }
        }
      }
    }
    blas::brgemm_release(kPair<T> > 1);
  }
}

// kDepth rows of a wide tensor as `interleave` leaves them, 0 beyond `count`.
template <typename T>
void pack_rows(const T* wide, int64_t ldw, const int64_t* rows, int64_t first, int64_t count, int64_t width, T* out) {
  const auto row_of = [&](int64_t k) { return wide + (rows ? rows[first + k] : first + k) * ldw; };
  constexpr int64_t pair = kPair<T>;
  for (int64_t k = 0; k < kDepth; k += pair, out += width * pair) {
    if (k >= count) {
      std::memset(static_cast<void*>(out), 0, width * pair * sizeof(T));
    } else if constexpr (pair == 1) {
      std::memcpy(out, row_of(k), width * sizeof(T));
    } else {
      uint32_t* words = reinterpret_cast<uint32_t*>(out);
      const T* low = row_of(k);
      for (int64_t ahead = k + kAhead; ahead < std::min(k + kAhead + pair, count); ++ahead) fetch(row_of(ahead), width);
      if (k + 1 < count) {
        const T* high = row_of(k + 1);
        for (int64_t w = 0; w < width; ++w) words[w] = join(low[w], high[w]);
      } else {
        for (int64_t w = 0; w < width; ++w) words[w] = low[w].x;
      }
    }
  }
}

// sums [R, width], narrowed, to where grad[r, w] lies.
template <typename T>
void store(const float* sums, int64_t R, int64_t width, T* grad, int64_t stride_r, int64_t stride_w,
           std::vector<uint8_t>& memory) {
  if (stride_w == 1) {
    for (int64_t r = 0; r < R; ++r) put<false>(sums + r * width, grad + r * stride_r, width);
    return;
  }
  if constexpr (kPair<T> == 2) {
    if (stride_r == 1 && R % 2 == 0 && stride_w % 2 == 0) {  // two neighbours move as one word
      uint32_t* words = scratch<uint32_t>(memory, R / 2 * width);
      for (int64_t r = 0; r < R; r += 2)
        for (int64_t w = 0; w < width; ++w) {
          T low, high;
          narrow(sums[r * width + w], low);
          narrow(sums[(r + 1) * width + w], high);
          words[r / 2 * width + w] = join(low, high);
        }
      transpose(words, width, R / 2, width, reinterpret_cast<uint32_t*>(grad), stride_w / 2);
      return;
    }
  } else if (stride_r == 1) {
    transpose(sums, width, R, width, grad, stride_w);
    return;
  }
  for (int64_t w = 0; w < width; ++w)
    for (int64_t r = 0; r < R; ++r) narrow(sums[r * width + w], grad[r * stride_r + w * stride_w]);
}

// grad[e, r, w] = sum over the rows n of e of z[n, r] wide[n, w]
template <typename T>
void outer(const T* z, int64_t ldz, const T* wide, int64_t ldw, const int64_t* rows, const int64_t* starts, int64_t E,
           int64_t R, int64_t W, T* grad, int64_t stride_e, int64_t stride_r, int64_t stride_w, int64_t threads) {
  const int64_t blocks = (W + kColumns - 1) / kColumns;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<uint8_t> of_ranks, of_wide, of_sums, of_words;
    T* packed = scratch<T>(of_wide, kDepth * kColumns);
    float* sums = scratch<float>(of_sums, R * kColumns);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < E * threads; ++item) {
      const int64_t e = item / threads, part = item % threads, begin = starts[e], end = starts[e + 1];
      const int64_t from = blocks * part / threads * kColumns, to = std::min(blocks * (part + 1) / threads * kColumns, W);
      const int64_t depth = (end - begin + kDepth - 1) / kDepth * kDepth;
      // z transposed, kDepth rows at a time, as a leading dimension of `depth` would be a kernel for each; 0 beyond the
      // expert's rows
      T* ranks = scratch<T>(of_ranks, R * depth);
      for (int64_t n = 0; n < depth; ++n) {
        T* block = ranks + n / kDepth * kDepth * R + n % kDepth;
        for (int64_t r = 0; r < R; ++r) block[r * kDepth] = begin + n < end ? z[(begin + n) * ldz + r] : T(0.f);
      }
      for (int64_t column = from; column < to; column += kColumns) {
        const int64_t width = std::min(kColumns, to - column);
        if (begin == end) std::memset(sums, 0, R * width * sizeof(float));
        for (int64_t first = begin; first < end; first += kDepth) {
          const int64_t count = std::min(kDepth, end - first);
          const bool as_it_lies = kPair<T> == 1 && !rows && count == kDepth;
          if (!as_it_lies) pack_rows(wide + column, ldw, rows, first, count, width, packed);
          const T* matrix = as_it_lies ? wide + first * ldw + column : packed;
          blas::brgemm(R, width, kDepth, kDepth, as_it_lies ? ldw : width, width, first > begin,
                       ranks + (first - begin) * R, matrix, sums, kPair<T> > 1);
        }
        T* to_grad = grad + e * stride_e + column * stride_w;
        store(sums, R, width, to_grad, stride_r, stride_w, of_words);
      }
    }
    blas::brgemm_release(kPair<T> > 1);
  }
}

// out[n] = weight[n] z[n], rounded once.
void weigh(const at::BFloat16* z, const float* weight, int64_t N, int64_t R, at::BFloat16* out) {
  float product[kColumns];
  for (int64_t n = 0; n < N; ++n)
    for (int64_t from = 0; from < R; from += kColumns) {
      const int64_t count = std::min(kColumns, R - from);
      for (int64_t i = 0; i < count; ++i) product[i] = weight[n] * widen(z[n * R + from + i]);
      put<false>(product, out + n * R + from, count);
    }
}

// A table's entries at the bits of n numbers.
inline void look_up(const float* __restrict__ table, const at::BFloat16* __restrict__ of, float* __restrict__ found,
                    int64_t n) {
  for (int64_t i = 0; i < n; ++i) found[i] = table[of[i].x];
}

// fused [T, 2F]: gate and up side by side; out [T, F] = silu(gate) up, where silu is rounded before it is multiplied.
void swiglu(const at::BFloat16* fused, const float* silu, int64_t T, int64_t F, at::BFloat16* out, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < T; ++t) {
    float product[kColumns];
    for (int64_t from = 0; from < F; from += kColumns) {
      const int64_t n = std::min(kColumns, F - from);
      const at::BFloat16* gate = fused + t * 2 * F + from;
      look_up(silu, gate, product, n);
      for (int64_t i = 0; i < n; ++i) product[i] *= widen(gate[F + i]);
      put<false>(product, out + t * F + from, n);
    }
  }
}

// dfused [T, 2F] of grad [T, F]; slope: silu's derivative.
void swiglu_backward(const at::BFloat16* grad, const at::BFloat16* fused, const float* silu, const float* slope,
                     int64_t T, int64_t F, at::BFloat16* dfused, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < T; ++t) {
    float dgate[kColumns], dup[kColumns];
    for (int64_t from = 0; from < F; from += kColumns) {
      const int64_t n = std::min(kColumns, F - from), place = t * 2 * F + from;
      const at::BFloat16 *gate = fused + place, *of_out = grad + t * F + from;
      look_up(slope, gate, dgate, n);
      look_up(silu, gate, dup, n);
      for (int64_t i = 0; i < n; ++i) {
        const float g = widen(of_out[i]);
        dgate[i] *= g * widen(gate[F + i]);
        dup[i] *= g;
      }
      put<false>(dgate, dfused + place, n);
      put<false>(dup, dfused + place + F, n);
    }
  }
}

// Whether oneDNN has these products on this processor: elsewhere they throw, which a parallel region must not.
template <typename T>
int available() {
  std::vector<T> ones(32 * 32, T(1.f));
  std::vector<float> sums(32 * 32);
  try {
    blas::brgemm(32, 32, 32, 32, 32, 32, false, ones.data(), ones.data(), sums.data(), kPair<T> > 1);
    blas::brgemm_release(kPair<T> > 1);
  } catch (...) {
    return 0;
  }
  return sums[0] == 32.f && sums[1023] == 32.f;
}

}  // namespace

#define FOR_DTYPE(T, suffix)                                                                                          \
  extern "C" int available_##suffix() { return available<T>(); }                                                      \
  extern "C" void to_rank_##suffix(const T* x, int64_t ldx, const int64_t* rows, const int64_t* starts, int64_t E,    \
                                   int64_t I, int64_t R, const T* M, int64_t stride_e, int64_t stride_i,              \
                                   int64_t stride_r, T* z, int64_t ldz, int64_t threads) {                            \
    to_rank(x, ldx, rows, starts, E, I, R, M, stride_e, stride_i, stride_r, z, ldz, threads);                         \
  }                                                                                                                   \
  extern "C" void from_rank_##suffix(T* out, int64_t ldo, const int64_t* rows, const int64_t* starts, int64_t E,      \
                                     int64_t R, int64_t O, const T* z, int64_t ldz, const T* M, int64_t stride_e,     \
                                     int64_t stride_r, int64_t stride_o, int64_t add, int64_t threads) {              \
    from_rank(out, ldo, rows, starts, E, R, O, z, ldz, M, stride_e, stride_r, stride_o, add != 0, threads);           \
  }                                                                                                                   \
  extern "C" void outer_##suffix(const T* z, int64_t ldz, const T* wide, int64_t ldw, const int64_t* rows,            \
                                 const int64_t* starts, int64_t E, int64_t R, int64_t W, T* grad, int64_t stride_e,   \
                                 int64_t stride_r, int64_t stride_w, int64_t threads) {                               \
    outer(z, ldz, wide, ldw, rows, starts, E, R, W, grad, stride_e, stride_r, stride_w, threads);                     \
  }

FOR_DTYPE(at::BFloat16, bf16)
FOR_DTYPE(float, fp32)

extern "C" void weigh_bf16(const at::BFloat16* z, const float* weight, int64_t N, int64_t R, at::BFloat16* out,
                           int64_t /* threads: not worth waking */) {
  weigh(z, weight, N, R, out);
}

extern "C" void swiglu_bf16(const at::BFloat16* fused, const float* silu, int64_t T, int64_t F, at::BFloat16* out,
                            int64_t threads) {
  swiglu(fused, silu, T, F, out, threads);
}

extern "C" void swiglu_backward_bf16(const at::BFloat16* grad, const at::BFloat16* fused, const float* silu,
                                     const float* slope, int64_t T, int64_t F, at::BFloat16* dfused, int64_t threads) {
  swiglu_backward(grad, fused, silu, slope, T, F, dfused, threads);
}

// What a MoLE layer does on the CPU that torch's own operators do in many passes.
//
// The thin products of a bank of LoRA experts: rows of each expert against that expert's matrix. A block of rows goes
// through oneDNN's small products (brgemm, as torch hands it out) in fixed shapes, so that a kernel is compiled once
// and not for each expert's number of rows, and wide rows are read and written where they lie.
//
// The matrices of experts lie in P tensors, each of which has R / P of the R ranks.
//
// starts [E + 1]: expert e has the sorted rows starts[e] to starts[e + 1]. rows: which row of the wide tensor each
// sorted row is, null where they are the same. Sums are fp32.
//
// A router's logits and their gradients, in fp32 without copies of all tokens in it.
//
// Products with a matrix most of which is 0: what tokens make of the few experts, or ranks, that they use.
//
// SwiGLU: in bf16, of whose 65,536 numbers there is a table, with the bits that torch gives; and of several experts a
// token, with their sum.

#include <ATen/native/CPUBlas.h>
#include <omp.h>

#ifdef __AVX512F__
#include <immintrin.h>
#include <sleef.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

namespace blas = at::native::cpublas;

constexpr int64_t kRows = 32;      // of a block of sorted rows
constexpr int64_t kColumns = 128;  // of a wide tensor at a time: what they make must stay in the first cache
constexpr int64_t kAdded = 64;     // of one that is added to
constexpr int64_t kWide = 512;     // of one that two products read, the second while it is in the second cache
constexpr int64_t kDepth = 64;     // rows that are summed over in one product
constexpr int64_t kAhead = 8;      // rows between one that is read and one that is sent for
constexpr int64_t kChunk = 512;    // rows of an expert that one thread takes
constexpr int64_t kFew = 4;        // where at most one of so many numbers is not 0, those are taken one by one

template <typename T>
constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;  // rows of the second factor that lie interleaved

template <typename T>
constexpr int64_t kStep = sizeof(T) == 2 ? 32 : 8;  // a block of fewer rows is filled up to a multiple of these

// How many of `most` rows a product has to take for `left` of them.
template <typename T>
int64_t filled_up(int64_t left, int64_t most) {
  return std::min(most, (left + kStep<T> - 1) / kStep<T> * kStep<T>);
}

// Room for numbers on a cache line of their own, not set to anything.
class Memory {
 public:
  template <typename T>
  T* room(int64_t size) {
    constexpr size_t line = 64;
    const size_t bytes = size * sizeof(T) + line;
    if (size_ < bytes) bytes_.reset(new uint8_t[bytes]), size_ = bytes;
    const auto address = reinterpret_cast<uintptr_t>(bytes_.get());
    return reinterpret_cast<T*>((address + line - 1) / line * line);
  }

 private:
  std::unique_ptr<uint8_t[]> bytes_;
  size_t size_ = 0;
};

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

#ifdef __AVX512F__
// `once`: what is not read soon goes past the caches, and what lay there need not be read first.
template <bool once>
inline void write(void* to, __m512i value) {
  if (once && reinterpret_cast<uintptr_t>(to) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value);
  else
    _mm512_storeu_si512(to, value);
}
#endif

// Other threads see what went past the caches.
inline void written() {
#ifdef __AVX512F__
  _mm_sfence();
#endif
}

// out = sums, or base + sums, where base may be out itself; n numbers side by side.
template <bool add, bool once = false, typename T>
inline void put(const float* __restrict__ sums, T* out, int64_t n, const T* base = nullptr) {
  int64_t i = 0;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>)
    for (; i + 16 <= n; i += 16) {
      __m512 sum = _mm512_loadu_ps(sums + i);
      if constexpr (add) sum = _mm512_add_ps(sum, _mm512_loadu_ps(base + i));
      write<once>(out + i, _mm512_castps_si512(sum));
    }
#endif
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const auto sixteen = [&](int64_t at) {
      __m512 sum = _mm512_loadu_ps(sums + at);
      if constexpr (add) {
        const __m256i had = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(base + at));
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(had), 16)));
      }
      return (__m256i)_mm512_cvtneps_pbh(sum);
    };
    for (; once && i + 32 <= n; i += 32)
      write<true>(out + i, _mm512_inserti64x4(_mm512_castsi256_si512(sixteen(i)), sixteen(i + 16), 1));
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), sixteen(i));
  }
#endif
  for (; i < n; ++i) narrow(add ? widen(base[i]) + sums[i] : sums[i], out[i]);
}

// out[c, r] = in[r, c], numbers of four bytes.
template <bool once = false, typename Word>
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
        const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_below = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i odd_below = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        Word* to = out + (column + j) * ldo + row;
        write<once>(to, _mm512_shuffle_i32x4(even, even_below, 0x88));
        write<once>(to + 4 * ldo, _mm512_shuffle_i32x4(odd, odd_below, 0x88));
        write<once>(to + 8 * ldo, _mm512_shuffle_i32x4(even, even_below, 0xdd));
        write<once>(to + 12 * ldo, _mm512_shuffle_i32x4(odd, odd_below, 0xdd));
      }
    }
#endif
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = row < done_rows ? done_columns : 0; column < columns; ++column)
      out[column * ldo + row] = in[row * ldi + column];
}

inline uint32_t join(at::BFloat16 low, at::BFloat16 high) { return low.x | uint32_t(high.x) << 16; }

// n numbers of two rows, narrowed, side by side.
inline void join_rows(const float* __restrict__ low, const float* __restrict__ high, uint32_t* __restrict__ words,
                      int64_t n) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  const auto bits = [](const float* at) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(at)));
  };
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_si512(words + i, _mm512_or_si512(bits(low + i), _mm512_slli_epi32(bits(high + i), 16)));
#endif
  for (; i < n; ++i) {
    at::BFloat16 of_low, of_high;
    narrow(low[i], of_low);
    narrow(high[i], of_high);
    words[i] = join(of_low, of_high);
  }
}

// Have n numbers on their way to the cache: pieces of rows are too short for the processor to see them coming.
template <typename T>
inline void fetch(const T* numbers, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(numbers + i);
}

// [K, N] with any strides -> [ceil(K / pair), N, pair], 0 beyond K: the columns of one that is `columns` wide.
template <typename T>
void interleave(const T* in, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, T* out, int64_t columns) {
  constexpr int64_t pair = kPair<T>;
  using Word = std::conditional_t<pair == 2, uint32_t, T>;
  const int64_t whole = K / pair;
  Word* words = reinterpret_cast<Word*>(out);
  if (stride_k == 1 && stride_n % pair == 0) {
    transpose(reinterpret_cast<const Word*>(in), stride_n / pair, N, whole, words, columns);
  } else {
    for (int64_t k = 0; k < whole; ++k) {
      const T* first = in + k * pair * stride_k;
      for (int64_t n = 0; n < N; ++n) {
        if constexpr (pair == 2)
          words[k * columns + n] = join(first[n * stride_n], first[stride_k + n * stride_n]);
        else
          words[k * columns + n] = first[n * stride_n];
      }
    }
  }
  if constexpr (pair == 2)
    if (K % pair)
      for (int64_t n = 0; n < N; ++n) words[whole * columns + n] = join(in[(K - 1) * stride_k + n * stride_n], T(0.f));
}

// Where the rows [first, first + height) of a wide tensor lie one after another, of `all` that there are; a copy where
// they are scattered or do not all exist. `leading` becomes their distance. Of the rows from `end` on, which are not
// the expert's, the products' results are not used.
template <typename T>
const T* block_of(const T* wide, int64_t& leading, const int64_t* rows, int64_t first, int64_t height, int64_t end,
                  int64_t all, int64_t width, Memory& memory) {
  if (!rows && first + height <= all) return wide + first * leading;
  T* copy = memory.room<T>(kRows * width);
  for (int64_t i = 0; i < height; ++i) {
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
             const T* const* M, int64_t P, int64_t stride_e, int64_t stride_i, int64_t stride_r, T* z, int64_t ldz,
             int64_t threads) {
  struct Item { int64_t expert, first, end; };
  std::vector<Item> items;
  for (int64_t e = 0; e < E; ++e)
    for (int64_t first = starts[e]; first < starts[e + 1]; first += kChunk)
      items.push_back({e, first, std::min(first + kChunk, starts[e + 1])});
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Memory of_matrix, of_rows, of_sums;
    T* packed = of_matrix.room<T>((I + 1) * R);
    float* sums = of_sums.room<float>(kRows * R);
    int64_t held = -1;
#pragma omp for schedule(dynamic)
    for (size_t item = 0; item < items.size(); ++item) {
      const auto [expert, begin, end] = items[item];
      const bool as_it_lies = kPair<T> == 1 && stride_r == 1 && P == 1;
      for (int64_t p = 0; p < P && held != expert && !as_it_lies; ++p)
        interleave(M[p] + expert * stride_e, stride_i, stride_r, I, R / P, packed + p * (R / P) * kPair<T>, R);
      held = expert;
      const T* matrix = as_it_lies ? M[0] + expert * stride_e : packed;
      const int64_t ldm = as_it_lies ? stride_i : R;
      for (int64_t first = begin; first < end; first += kRows) {
        int64_t leading = ldx;
        const int64_t height = filled_up<T>(starts[expert + 1] - first, kRows);
        const T* block = block_of(x, leading, rows, first, height, end, starts[E], I, of_rows);
        blas::brgemm(height, R, I, leading, ldm, R, false, block, matrix, sums, kPair<T> > 1);
        for (int64_t i = 0; i < std::min(kRows, end - first); ++i)
          put<false>(sums + i * R, z + (first + i) * ldz, R);
      }
    }
    blas::brgemm_release(kPair<T> > 1);
  }
}

// What lies at M + offset in each of P tensors, [R / P, width] below one another: as `interleave` leaves it.
template <typename T>
void interleave_parts(const T* const* M, int64_t P, int64_t offset, int64_t stride_r, int64_t stride_o, int64_t R,
                      int64_t width, T* out) {
  for (int64_t p = 0; p < P; ++p)
    interleave(M[p] + offset, stride_r, stride_o, R / P, width, out + p * (R / P) * width, width);
}

// out = z M, or base + z M where base is given: out itself, or another tensor, of which base_rows says a sorted row's.
template <typename T>
void from_rank(T* out, int64_t ldo, const int64_t* starts, int64_t E, int64_t R, int64_t O, const T* z, int64_t ldz,
               const T* const* M, int64_t P, int64_t stride_e, int64_t stride_r, int64_t stride_o, const T* base,
               int64_t ldb, const int64_t* base_rows, int64_t threads) {
  const int64_t blocks = (O + kAdded - 1) / kAdded;
  const bool once = base != out;  // what is written is not read here
  const auto base_of = [&](int64_t n) { return base + (base_rows ? base_rows[n] : n) * ldb; };
  // Threads share the columns: an expert's matrix is packed once.
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t from = blocks * part / threads * kAdded, to = std::min(blocks * (part + 1) / threads * kAdded, O);
    Memory of_matrix, of_rows, of_sums;
    const int64_t packed_rows = (R + kPair<T> - 1) / kPair<T> * kPair<T>;
    T* packed = of_matrix.room<T>(packed_rows * (to - from));
    float* sums = of_sums.room<float>(kRows * kAdded);
    for (int64_t e = 0; e < E; ++e) {
      if (starts[e] == starts[e + 1]) continue;
      const bool as_it_lies = kPair<T> == 1 && stride_o == 1;
      for (int64_t column = from; column < to && !as_it_lies; column += kAdded)
        interleave_parts(M, P, e * stride_e + column * stride_o, stride_r, stride_o, R, std::min(kAdded, to - column),
                         packed + packed_rows * (column - from));
      for (int64_t first = starts[e]; first < starts[e + 1]; first += kRows) {
        const int64_t count = std::min(kRows, starts[e + 1] - first);
        int64_t leading = ldz;
        const int64_t height = filled_up<T>(count, kRows);
        const T* block = block_of(z, leading, nullptr, first, height, starts[e + 1], starts[E], R, of_rows);
        for (int64_t column = from; column < to; column += kAdded) {
          const int64_t width = std::min(kAdded, to - column);
          if (as_it_lies)
            for (int64_t p = 0; p < P; ++p)
              blas::brgemm(height, width, R / P, leading, stride_r, width, p > 0, block + p * (R / P),
                           M[p] + e * stride_e + column, sums, false);
          else
            blas::brgemm(height, width, R, leading, width, width, false, block, packed + packed_rows * (column - from),
                         sums, kPair<T> > 1);
          for (int64_t n = first; n < first + count; ++n) {
            T* to_row = out + n * ldo + column;
            const float* sum = sums + (n - first) * width;
            if (!base) {
              put<false>(sum, to_row, width);
              continue;
            }
            if (column + kAdded < to)
              fetch(base_of(n) + column + kAdded, kAdded);
            else if (n + kRows < starts[e + 1])
              fetch(base_of(n + kRows) + from, std::min(kAdded, to - from));
            if (once)
              put<true, true>(sum, to_row, width, base_of(n) + column);
            else
              put<true>(sum, to_row, width, base_of(n) + column);
          }
        }
      }
    }
    blas::brgemm_release(kPair<T> > 1);
    written();
  }
}

// out = the sum of what a token's sorted rows give, z M; or out + that, where `add`. It is rounded once and not with each
// expert: what one adds may be too little for the last place of what it is added to.
template <typename T>
void sum_from_rank(T* out, int64_t ldo, const int64_t* rows, const int64_t* starts, int64_t E, int64_t R, int64_t O,
                   const T* z, int64_t ldz, const T* const* M, int64_t P, int64_t stride_e, int64_t stride_r,
                   int64_t stride_o, int64_t tokens, bool add, int64_t threads) {
  const int64_t strips = (O + kAdded - 1) / kAdded;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Memory of_matrix, of_rows, of_sums, of_tokens;
    T* packed = of_matrix.room<T>((R + 1) * kAdded);
    float* sums = of_sums.room<float>(kRows * kAdded);
    float* total = of_tokens.room<float>(tokens * kAdded);
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t column = strip * kAdded, width = std::min(kAdded, O - column);
      std::memset(total, 0, tokens * width * sizeof(float));
      for (int64_t e = 0; e < E; ++e) {
        if (starts[e] == starts[e + 1]) continue;
        interleave_parts(M, P, e * stride_e + column * stride_o, stride_r, stride_o, R, width, packed);
        for (int64_t first = starts[e]; first < starts[e + 1]; first += kRows) {
          const int64_t count = std::min(kRows, starts[e + 1] - first);
          const int64_t height = filled_up<T>(count, kRows);
          int64_t leading = ldz;
          const T* block = block_of(z, leading, nullptr, first, height, starts[e + 1], starts[E], R, of_rows);
          blas::brgemm(height, width, R, leading, width, width, false, block, packed, sums, kPair<T> > 1);
          for (int64_t i = 0; i < count; ++i) {
            float* of_token = total + rows[first + i] * width;
            put<true>(sums + i * width, of_token, width, of_token);
          }
        }
      }
      for (int64_t t = 0; t < tokens; ++t) {
        T* to = out + t * ldo + column;
        if (add) {
          if (t + kAhead < tokens) fetch(to + kAhead * ldo, width);
          put<true>(total + t * width, to, width, to);
        } else {
          put<false>(total + t * width, to, width);
        }
      }
    }
    blas::brgemm_release(kPair<T> > 1);
  }
}

// `depth` rows of a wide tensor as `interleave` leaves them, 0 beyond `count`.
template <typename T>
void pack_rows(const T* wide, int64_t ldw, const int64_t* rows, int64_t first, int64_t count, int64_t depth,
               int64_t width, T* out) {
  const auto row_of = [&](int64_t k) { return wide + (rows ? rows[first + k] : first + k) * ldw; };
  constexpr int64_t pair = kPair<T>;
  for (int64_t k = 0; k < depth; k += pair, out += width * pair) {
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
           Memory& memory) {
  if (stride_w == 1) {
    for (int64_t r = 0; r < R; ++r) put<false, true>(sums + r * width, grad + r * stride_r, width);
    return;
  }
  if constexpr (kPair<T> == 2) {
    if (stride_r == 1 && R % 2 == 0 && stride_w % 2 == 0) {  // two neighbours move as one word
      uint32_t* words = memory.room<uint32_t>(R / 2 * width);
      for (int64_t r = 0; r < R; r += 2)
        join_rows(sums + r * width, sums + (r + 1) * width, words + r / 2 * width, width);
      transpose<true>(words, width, R / 2, width, reinterpret_cast<uint32_t*>(grad), stride_w / 2);
      return;
    }
  } else if (stride_r == 1) {
    transpose<true>(sums, width, R, width, grad, stride_w);
    return;
  }
  for (int64_t w = 0; w < width; ++w)
    for (int64_t r = 0; r < R; ++r) narrow(sums[r * width + w], grad[r * stride_r + w * stride_w]);
}

// The rows [begin, end) of z [N, R] as columns, kDepth of them at a time (a leading dimension of all would be a kernel
// for each number of rows): [ceil((end - begin) / kDepth), R, kDepth], 0 beyond `end`.
template <typename T>
void transpose_ranks(const T* z, int64_t ldz, int64_t begin, int64_t end, int64_t R, T* out,
                     Memory& memory) {
  constexpr int64_t pair = kPair<T>;
  using Word = std::conditional_t<pair == 2, uint32_t, T>;
  Word* words = memory.room<Word>(kDepth / pair * R);
  for (int64_t first = begin; first < end; first += kDepth, out += kDepth * R) {
    const int64_t count = std::min(kDepth, end - first), filled = (count + pair - 1) / pair * R;
    interleave(z + first * ldz, ldz, 1, count, R, reinterpret_cast<T*>(words), R);
    std::memset(static_cast<void*>(words + filled), 0, (kDepth / pair * R - filled) * sizeof(Word));
    transpose(words, R, kDepth / pair, R, reinterpret_cast<Word*>(out), kDepth / pair);
  }
}

// What one thread takes of wide rows: one expert's [begin, end), and of their W columns one of `parts` parts,
// [from, to).
struct Part {
  int64_t expert, number, begin, end, from, to;
};

inline Part part_of(int64_t item, int64_t parts, const int64_t* starts, int64_t W) {
  const int64_t blocks = (W + kColumns - 1) / kColumns, expert = item / parts, number = item % parts;
  return {expert, number, starts[expert], starts[expert + 1], blocks * number / parts * kColumns,
          std::min(blocks * (number + 1) / parts * kColumns, W)};
}

// grad[p][e, r, w] = sum over the rows n of e of z[n, r] wide[n, w]
template <typename T>
void outer(const T* z, int64_t ldz, const T* wide, int64_t ldw, const int64_t* rows, const int64_t* starts, int64_t E,
           int64_t R, int64_t W, T* const* grad, int64_t P, int64_t stride_e, int64_t stride_r, int64_t stride_w,
           int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Memory of_ranks, of_wide, of_sums, of_words;
    T* packed = of_wide.room<T>(kDepth * kColumns);
    float* sums = of_sums.room<float>(R * kColumns);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < E * threads; ++item) {
      const auto [e, part, begin, end, from, to] = part_of(item, threads, starts, W);
      const int64_t depth = (end - begin + kDepth - 1) / kDepth * kDepth;
      T* ranks = of_ranks.room<T>(R * depth);
      transpose_ranks(z, ldz, begin, end, R, ranks, of_words);
      for (int64_t column = from; column < to; column += kColumns) {
        const int64_t width = std::min(kColumns, to - column);
        if (begin == end) std::memset(sums, 0, R * width * sizeof(float));
        for (int64_t first = begin; first < end; first += kDepth) {
          const int64_t count = std::min(kDepth, end - first), height = filled_up<T>(count, kDepth);
          const bool as_it_lies = kPair<T> == 1 && !rows && count == height;
          if (!as_it_lies) pack_rows(wide + column, ldw, rows, first, count, height, width, packed);
          const T* matrix = as_it_lies ? wide + first * ldw + column : packed;
          blas::brgemm(R, width, height, kDepth, as_it_lies ? ldw : width, width, first > begin,
                       ranks + (first - begin) * R, matrix, sums, kPair<T> > 1);
        }
        for (int64_t p = 0; p < P; ++p)
          store(sums + p * (R / P) * width, R / P, width, grad[p] + e * stride_e + column * stride_w, stride_r, stride_w,
                of_words);
      }
    }
    blas::brgemm_release(kPair<T> > 1);
    written();
  }
}

// `to_rank` and `outer` of the same wide rows, which are read once: u = wide M, grad[e, w, r] = sum over the rows n of
// e of wide[n, w] z[n, r]. Threads share the columns, each with sums of u of its own: how many they are changes u's
// last bits, and no other result here.
template <typename T>
void to_rank_with_outer(const T* wide, int64_t ldw, const int64_t* rows, const int64_t* starts, int64_t E, int64_t W,
                        int64_t R, const T* M, int64_t m_stride_e, int64_t m_stride_w, int64_t m_stride_r, const T* z,
                        int64_t ldz, T* u, int64_t ldu, T* grad, int64_t stride_e, int64_t stride_w, int64_t stride_r,
                        int64_t threads) {
  const int64_t blocks = (W + kColumns - 1) / kColumns, parts = std::min(threads, blocks);
  std::vector<int64_t> places(E + 1, 0);  // each expert's rows in the sums of u, filled up to kDepth
  for (int64_t e = 0; e < E; ++e)
    places[e + 1] = places[e] + (starts[e + 1] - starts[e] + kDepth - 1) / kDepth * kDepth;
  Memory of_u;
  float* sums_of_u = of_u.room<float>(parts * places[E] * R);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Memory of_ranks, of_matrix, of_wide, of_rows, of_sums, of_words;
    T* matrix = of_matrix.room<T>((kWide + 1) * R);
    T* packed = of_wide.room<T>(kDepth * kColumns);
    T* copy = of_rows.room<T>(kDepth * kWide);
    float* sums = of_sums.room<float>(R * kWide);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < E * parts; ++item) {
      const auto [e, part, begin, end, from, to] = part_of(item, parts, starts, W);
      T* ranks = of_ranks.room<T>(R * (places[e + 1] - places[e]));
      transpose_ranks(z, ldz, begin, end, R, ranks, of_words);
      float* u_of_part = sums_of_u + (part * places[E] + places[e]) * R;
      for (int64_t column = from; column < to; column += kWide) {
        const int64_t width = std::min(kWide, to - column);
        if (begin == end) std::memset(sums, 0, R * width * sizeof(float));
        else interleave(M + e * m_stride_e + column * m_stride_w, m_stride_w, m_stride_r, width, R, matrix, R);
        for (int64_t first = begin; first < end; first += kDepth) {
          const int64_t count = std::min(kDepth, end - first), height = filled_up<T>(count, kDepth);
          const T* block = wide + first * ldw + column;
          int64_t leading = ldw;
          if (rows || count < height) {
            const auto row_of = [&](int64_t k) { return wide + (rows ? rows[first + k] : first + k) * ldw + column; };
            for (int64_t k = 0; k < height; ++k) {
              if (k + kAhead < count) fetch(row_of(k + kAhead), width);
              if (k < count)
                std::memcpy(copy + k * width, row_of(k), width * sizeof(T));
              else
                std::memset(static_cast<void*>(copy + k * width), 0, width * sizeof(T));
            }
            block = copy, leading = width;
          }
          for (int64_t w = 0; w < width; w += kColumns) {
            const int64_t columns = std::min(kColumns, width - w);
            if constexpr (kPair<T> == 2) pack_rows(block + w, leading, nullptr, 0, height, height, columns, packed);
            const T* second = kPair<T> == 2 ? packed : block + w;
            blas::brgemm(R, columns, height, kDepth, kPair<T> == 2 ? columns : leading, columns, first > begin,
                         ranks + (first - begin) * R, second, sums + w * R, kPair<T> > 1);
          }
          blas::brgemm(height, R, width, leading, R, R, column > from, block, matrix, u_of_part + (first - begin) * R,
                       kPair<T> > 1);
        }
        for (int64_t w = 0; w < width; w += kColumns) {
          T* to_grad = grad + e * stride_e + (column + w) * stride_w;
          store(sums + w * R, R, std::min(kColumns, width - w), to_grad, stride_r, stride_w, of_words);
        }
      }
    }
    blas::brgemm_release(kPair<T> > 1);
    written();
#pragma omp for schedule(static)
    for (int64_t e = 0; e < E; ++e)
      for (int64_t n = starts[e]; n < starts[e + 1]; ++n) {
        float* sum = sums_of_u + (places[e] + n - starts[e]) * R;
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t r = 0; r < R; ++r) sum[r] += sum[part * places[E] * R + r];
        put<false>(sum, u + n * ldu, R);
      }
  }
}

// So many numbers side by side, as the processor's registers hold them.
constexpr int64_t kLanes = 16;
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));

// n numbers, and 0 beyond. (Compilers do not see that sixteen are one load.)
template <typename T>
inline Lanes load(const T* from, int64_t n) {
#ifdef __AVX512F__
  if constexpr (kPair<T> == 1)
    if (n == kLanes) return (Lanes)_mm512_loadu_ps(from);
  if constexpr (kPair<T> == 2)
    if (n == kLanes) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    }
#endif
  float numbers[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) numbers[i] = widen(from[i]);
  Lanes lanes;
  std::memcpy(&lanes, numbers, sizeof(lanes));
  return lanes;
}

template <typename T>
inline void store(const Lanes& lanes, T* to, int64_t n) {
  put<false>(reinterpret_cast<const float*>(&lanes), to, n);
}

// What is not 0 of values [T, E]: token t has the entries from starts[t] to starts[t + 1], in their order.
struct Entries {
  struct Entry {
    int32_t expert;
    float value;
  };
  std::vector<int64_t> starts;
  std::unique_ptr<Entry[]> all;
};

// Without `all` where there are more than `most`.
template <typename T>
Entries entries_of(const T* values, int64_t ldv, int64_t tokens, int64_t E, int64_t most, int64_t threads) {
  Entries entries;
  entries.starts.resize(tokens + 1);
  int64_t* starts = entries.starts.data();
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    int32_t count = 0;
    for (int64_t e = 0; e < E; ++e) count += widen(values[t * ldv + e]) != 0.f;
    starts[t + 1] = count;
  }
  for (int64_t t = 0; t < tokens; ++t) starts[t + 1] += starts[t];
  if (starts[tokens] > most) return entries;
  entries.all.reset(new Entries::Entry[starts[tokens]]);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t n = starts[t];
    for (int64_t e = 0; n < starts[t + 1]; ++e)
      if (const float value = widen(values[t * ldv + e]); value != 0.f) entries.all[n++] = {int32_t(e), value};
  }
  return entries;
}

// Of v [T, E], most of which is 0. Forth: out [T, W] = v M, or with `add` what it has + v M, of M [E, W]. Back: grad
// [E, W] = v^T wide, of wide [T, W].
template <bool forth, bool add, bool back, typename T, typename Matrix>
void multiply_entries(const Entries& v, int64_t tokens, int64_t E, int64_t W, const Matrix* M, T* out, int64_t ldo,
                      const T* wide, int64_t ldw, Matrix* grad, int64_t threads) {
  constexpr int64_t lanes = kAdded / kLanes;
  const int64_t blocks = (W + kAdded - 1) / kAdded;
  // Threads share the columns, so that no two add to one number.
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Memory of_matrix, of_sums;
    Lanes* matrix = of_matrix.room<Lanes>(forth ? E * lanes : 0);
    Lanes* sums = of_sums.room<Lanes>(back ? E * lanes : 0);
    const auto columns = [&](int64_t from, auto width) {
      const auto has = [&](int64_t lane) {
        if constexpr (std::is_same_v<decltype(width), int64_t>)
          return std::clamp(width - lane * kLanes, int64_t(0), kLanes);
        else
          return kLanes;
      };
      for (int64_t e = 0; e < E; ++e)
        for (int64_t lane = 0; lane < lanes; ++lane) {
          if (forth) matrix[e * lanes + lane] = load(M + e * W + from + lane * kLanes, has(lane));
          if (back) sums[e * lanes + lane] = Lanes{};
        }
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t ahead = std::min(t + kAhead, tokens - 1);
        if (forth && add) fetch(out + ahead * ldo + from, width);
        if (back) fetch(wide + ahead * ldw + from, width);
        Lanes row[lanes], result[lanes];
        for (int64_t lane = 0; lane < lanes; ++lane) {
          result[lane] = Lanes{};
          if (back) row[lane] = load(wide + t * ldw + from + lane * kLanes, has(lane));
        }
        for (int64_t n = v.starts[t]; n < v.starts[t + 1]; ++n) {
          const int64_t e = v.all[n].expert;
          const float value = v.all[n].value;
          for (int64_t lane = 0; lane < lanes; ++lane) {
            if (back) sums[e * lanes + lane] += value * row[lane];
            if (forth) result[lane] += value * matrix[e * lanes + lane];
          }
        }
        for (int64_t lane = 0; forth && lane < lanes; ++lane) {
          T* to = out + t * ldo + from + lane * kLanes;
          if (add) result[lane] += load(to, has(lane));
          store(result[lane], to, has(lane));
        }
      }
      for (int64_t e = 0; back && e < E; ++e)
        for (int64_t lane = 0; lane < lanes; ++lane)
          store(sums[e * lanes + lane], grad + e * W + from + lane * kLanes, has(lane));
    };
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      if (const int64_t left = W - block * kAdded; left < kAdded)
        columns(block * kAdded, left);
      else
        columns(block * kAdded, std::integral_constant<int64_t, kAdded>());
    }
  }
}

// out [kRows, width] = the columns [from, from + width) of kRows rows of x [T, I], 0 for rows that there are not.
template <typename T>
void widen_rows(const T* x, int64_t first, int64_t tokens, int64_t I, int64_t from, int64_t width, float* out) {
  for (int64_t i = 0; i < kRows; ++i) {
    const T* row = x + (first + i) * I + from;
    for (int64_t w = 0; w < width; ++w) out[i * width + w] = first + i < tokens ? widen(row[w]) : 0.f;
  }
}

// logits [T, E] = x [T, I] weight^T + bias, in fp32.
void router_logits(const at::BFloat16* x, const float* weight, const float* bias, int64_t tokens, int64_t I, int64_t E,
                   float* logits, int64_t threads) {
  Memory of_weight;
  float* weight_IE = of_weight.room<float>(I * E);
  transpose(weight, I, E, I, weight_IE, E);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Memory of_rows, of_sums;
    float* block = of_rows.room<float>(kRows * kColumns);
    float* sums = of_sums.room<float>(kRows * E);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < tokens; first += kRows) {
      for (int64_t from = 0; from < I; from += kColumns) {
        const int64_t width = std::min(kColumns, I - from);
        widen_rows(x, first, tokens, I, from, width, block);
        blas::brgemm(kRows, E, width, width, E, E, from > 0, block, weight_IE + from * E, sums, false);
      }
      for (int64_t i = 0; i < std::min(kRows, tokens - first); ++i)
        for (int64_t e = 0; e < E; ++e) logits[(first + i) * E + e] = sums[i * E + e] + (bias ? bias[e] : 0.f);
    }
    blas::brgemm_release(false);
  }
}

// Of those logits' gradient [T, E]: dweight [E, I] and, where wanted, dx [T, I].
template <typename T>
void router_gradients(const float* grad, const T* x, const float* weight, int64_t tokens, int64_t I, int64_t E,
                      float* dweight, T* dx, int64_t threads) {
  // Where chosen experts alone have one. (Sums are in another order than below, and nothing is multiplied by 0.)
  if (const Entries few = entries_of(grad, E, tokens, E, tokens * E / kFew, threads); few.all) {
    if (dx)
      multiply_entries<true, false, true>(few, tokens, E, I, weight, dx, I, x, I, dweight, threads);
    else
      multiply_entries<false, false, true>(few, tokens, E, I, weight, dx, I, x, I, dweight, threads);
    return;
  }
  const int64_t blocks = (I + kColumns - 1) / kColumns, depth = (tokens + kRows - 1) / kRows * kRows;
  Memory of_grad, of_transposed;
  float* padded = of_grad.room<float>(depth * E);
  std::memcpy(padded, grad, tokens * E * sizeof(float));
  std::memset(padded + tokens * E, 0, (depth - tokens) * E * sizeof(float));
  float* transposed = of_transposed.room<float>(depth * E);  // kRows tokens at a time
  for (int64_t first = 0; first < depth; first += kRows)
    transpose(padded + first * E, E, kRows, E, transposed + first * E, kRows);
  // Threads share the columns, so that no two add to one number.
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t stop = std::min(blocks * (part + 1) / threads * kColumns, I);
    Memory of_rows, of_weight, of_x;
    float* block = of_rows.room<float>(kRows * kColumns);
    float* sums = of_weight.room<float>(E * kColumns);
    float* sums_of_x = of_x.room<float>(kRows * kColumns);
    for (int64_t from = blocks * part / threads * kColumns; from < stop; from += kColumns) {
      const int64_t width = std::min(kColumns, I - from);
      if (tokens == 0) std::memset(sums, 0, E * width * sizeof(float));
      for (int64_t first = 0; first < tokens; first += kRows) {
        widen_rows(x, first, tokens, I, from, width, block);
        blas::brgemm(E, width, kRows, kRows, width, width, first > 0, transposed + first * E, block, sums, false);
        if (!dx) continue;
        blas::brgemm(kRows, width, E, E, I, width, false, padded + first * E, weight + from, sums_of_x, false);
        for (int64_t i = 0; i < std::min(kRows, tokens - first); ++i)
          put<false>(sums_of_x + i * width, dx + (first + i) * I + from, width);
      }
      for (int64_t e = 0; e < E; ++e) std::memcpy(dweight + e * I + from, sums + e * width, width * sizeof(float));
    }
    blas::brgemm_release(false);
  }
}

// pairs [P, I + 1] += the sum over tokens of p_j p_k x, for each pair j < k of experts: probs [T, E], x [T, I] and a 1.
// The products of probabilities are rounded, the sums are not.
void sum_pairs(const at::BFloat16* x, const float* probs, int64_t tokens, int64_t I, int64_t E, float* pairs,
               int64_t threads) {
  const int64_t P = E * (E - 1) / 2, depth = (tokens + kDepth - 1) / kDepth * kDepth;
  const int64_t blocks = (I + kColumns - 1) / kColumns;
  Memory of_products;
  at::BFloat16* products = of_products.room<at::BFloat16>(depth * P);  // [ceil(T / kDepth), P, kDepth]
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Memory of_probs, of_transposed, of_x, of_sums;
    float* some = of_probs.room<float>(kDepth * E);
    float* transposed = of_transposed.room<float>(kDepth * E);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < depth; first += kDepth) {
      const int64_t count = std::min(kDepth, tokens - first);
      std::memcpy(some, probs + first * E, count * E * sizeof(float));
      std::memset(some + count * E, 0, (kDepth - count) * E * sizeof(float));
      transpose(some, E, kDepth, E, transposed, kDepth);
      at::BFloat16* out = products + first * P;
      float product[kDepth];
      for (int64_t j = 0; j < E; ++j)
        for (int64_t k = j + 1; k < E; ++k, out += kDepth) {
          for (int64_t t = 0; t < kDepth; ++t) product[t] = transposed[j * kDepth + t] * transposed[k * kDepth + t];
          put<false>(product, out, kDepth);
        }
    }
    at::BFloat16* packed = of_x.room<at::BFloat16>(kDepth * kColumns);
    float* sums = of_sums.room<float>(P * kColumns);
    // Threads share the columns, so that no two add to one number.
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t column = block * kColumns, width = std::min(kColumns, I - column);
      for (int64_t first = 0; first < tokens; first += kDepth) {
        pack_rows(x + column, I, nullptr, first, std::min(kDepth, tokens - first), kDepth, width, packed);
        blas::brgemm(P, width, kDepth, kDepth, width, width, first > 0, products + first * P, packed, sums, true);
      }
      for (int64_t p = 0; p < (tokens ? P : 0); ++p)
        for (int64_t w = 0; w < width; ++w) pairs[p * (I + 1) + column + w] += sums[p * width + w];
    }
    blas::brgemm_release(true);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      float sum = 0;
      for (int64_t first = 0; first < depth; first += kDepth)
        for (int64_t t = 0; t < kDepth; ++t) sum += widen(products[first * P + p * kDepth + t]);
      pairs[p * (I + 1) + I] += sum;
    }
  }
}

// Adds to row [3 + E + G E], over valid tokens: the squared logarithm of the sum of the logits' exponentials, the
// entropy of probs, by how much the chosen expert leads, probs, and for each group of tokens how often each expert was
// chosen. choice [T, K], the likeliest first; groups null where there is one.
void sum_routing(const float* logits, const float* probs, const int64_t* choice, const bool* valid,
                 const int64_t* groups, int64_t tokens, int64_t E, int64_t K, float* row) {
  double z = 0, entropy = 0, margin = 0;
  float* counts = row + 3 + E;
  for (int64_t t = 0; t < tokens; ++t) {
    if (!valid[t]) continue;
    const float *logit = logits + t * E, *p = probs + t * E;
    const int64_t* chosen = choice + t * K;
    float largest = logit[0], exponentials = 0, mean = 0, second = 0;
    for (int64_t e = 1; e < E; ++e) largest = std::max(largest, logit[e]);
    for (int64_t e = 0; e < E; ++e) {
      mean += p[e] * logit[e];
      row[3 + e] += p[e];
      if (e != chosen[0]) second = std::max(second, p[e]);
    }
    for (int64_t e = 0; e < E; ++e) exponentials += std::exp(logit[e] - largest);
    const float partition = largest + std::log(exponentials);
    z += partition * partition, entropy += partition - mean, margin += p[chosen[0]] - second;
    for (int64_t i = 0; i < K; ++i) counts[(groups ? groups[t] : 0) * E + chosen[i]] += 1;
  }
  row[0] += float(z), row[1] += float(entropy), row[2] += float(margin);
}

// The places of the K largest of each row of scores [T, E], the largest first.
void find_largest(const float* scores, int64_t T, int64_t E, int64_t K, int64_t* places, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < T; ++t) {
    const float* row = scores + t * E;
    int64_t* taken = places + t * K;
    for (int64_t e = 0; e < E; ++e) {
      int64_t place = std::min(e, K);
      if (place == K && !(row[e] > row[taken[--place]])) continue;
      for (; place > 0 && row[e] > row[taken[place - 1]]; --place) taken[place] = taken[place - 1];
      taken[place] = e;
    }
  }
}

// out[n] = scale weight[n] z[n], rounded once.
void weigh(const at::BFloat16* z, const float* weight, float scale, int64_t N, int64_t R, at::BFloat16* out,
           int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < N; ++n) {
    float product[kColumns];
    const float factor = scale * weight[n];
    for (int64_t from = 0; from < R; from += kColumns) {
      const int64_t count = std::min(kColumns, R - from);
      for (int64_t i = 0; i < count; ++i) product[i] = factor * widen(z[n * R + from + i]);
      put<false>(product, out + n * R + from, count);
    }
  }
}

// dots[n] = scale <u[n], z[n]>
template <typename T>
void dot_rows(const T* u, const T* z, float scale, int64_t N, int64_t R, float* dots, int64_t threads) {
  constexpr int64_t lanes = 16;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < N; ++n) {
    const T *of_u = u + n * R, *of_z = z + n * R;
    float sums[lanes] = {};
    int64_t r = 0;
    for (; r + lanes <= R; r += lanes)
      for (int64_t i = 0; i < lanes; ++i) sums[i] += widen(of_u[r + i]) * widen(of_z[r + i]);
    for (; r < R; ++r) sums[0] += widen(of_u[r]) * widen(of_z[r]);
    for (int64_t i = 1; i < lanes; ++i) sums[0] += sums[i];
    dots[n] = scale * sums[0];
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

// fused [T, 2F] becomes its own gradient, of grad [T, F]. With s = sigmoid(gate), of which there is a table too, silu
// is gate s and its slope s (1 + gate (1 - s)).
void swiglu_backward(const at::BFloat16* grad, at::BFloat16* fused, const float* sigmoid, int64_t T, int64_t F,
                     int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < T; ++t) {
    float dgate[kColumns], dup[kColumns];
    for (int64_t from = 0; from < F; from += kColumns) {
      const int64_t n = std::min(kColumns, F - from);
      at::BFloat16 *gate = fused + t * 2 * F + from, *up = gate + F;
      const at::BFloat16* of_out = grad + t * F + from;
      look_up(sigmoid, gate, dgate, n);
      for (int64_t i = 0; i < n; ++i) {
        const float s = dgate[i], x = widen(gate[i]), g = widen(of_out[i]);
        dgate[i] = g * widen(up[i]) * (s * (1 + x * (1 - s)));
        dup[i] = g * (x * s);
      }
      put<false>(dgate, gate, n);
      put<false>(dup, up, n);
    }
  }
}

// The sigmoid of n numbers; in bf16 there is a table of it.
inline void sigmoids(const float*, const float* of, float* found, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + kLanes <= n; i += kLanes) {
    const Lanes x = load(of + i, kLanes);
    _mm512_storeu_ps(found + i, (__m512)(1.f / (1.f + (Lanes)Sleef_expf16_u10((__m512)-x))));
  }
#endif
  for (; i < n; ++i) found[i] = 1.f / (1.f + std::exp(-of[i]));
}
inline void sigmoids(const float* table, const at::BFloat16* of, float* found, int64_t n) {
  look_up(table, of, found, n);
}

// work(from, n) for the columns [from, from + n) of so many, kLanes at a time.
template <typename Work>
inline void by_lanes(int64_t columns, const Work& work) {
  int64_t from = 0;
  for (; from + kLanes <= columns; from += kLanes) work(from, std::integral_constant<int64_t, kLanes>());
  if (from < columns) work(from, columns - from);
}

// Tokens have K sorted rows each, token t those at places[t K] to places[t K + K - 1], with weights that sum to 1.
// fused [N, 2F]: gate and up side by side. h [N, F] = silu(gate) up: in fp32 it comes with silu(gate), in bf16 there is
// a table. mixed [T, F] = h1 + sum_k w_k (h_k - h1), where h1 is the token's first: exactly h where all are equal.
template <typename T>
void swiglu_mixed(const T* fused, const float* silu, const float* weight, const int64_t* places, int64_t tokens,
                  int64_t K, int64_t F, T* h, T* mixed, int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Memory of_silu;
    float* found = of_silu.room<float>(K * kColumns);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t column = 0; column < F; column += kColumns) {
        const int64_t width = std::min(kColumns, F - column);
        if constexpr (kPair<T> == 2)
          for (int64_t k = 0; k < K; ++k)
            look_up(silu, fused + places[t * K + k] * 2 * F + column, found + k * kColumns, width);
        by_lanes(width, [&](int64_t i, auto n) {
          Lanes first, sum;
          for (int64_t k = 0; k < K; ++k) {
            const int64_t row = places[t * K + k];
            T* of_row = h + row * F + column + i;
            Lanes product;
            if constexpr (kPair<T> == 2)
              product = load(found + k * kColumns + i, n);
            else
              product = load(of_row, n);
            product *= load(fused + row * 2 * F + F + column + i, n);
            store(product, of_row, n);
            if (k == 0)
              sum = first = product;
            else
              sum += weight[row] * (product - first);
          }
          store(sum, mixed + t * F + column + i, n);
        });
      }
  }
}

// Of h's gradient dh [N, F] and mixed's, dmixed [T, F]: fused becomes its own gradient, dfused [T, 2F] the sum of a
// token's, dweight [N] the weights' (the first one's is 0).
template <typename T>
void swiglu_mixed_backward(const T* dh, const T* dmixed, T* fused, const float* table, const float* weight,
                           const int64_t* places, int64_t tokens, int64_t K, int64_t F, T* dfused, float* dweight,
                           int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Memory of_dots, of_sigmoids;
    Lanes* dots = of_dots.room<Lanes>(K);
    float* sigmoid = of_sigmoids.room<float>(K * kColumns);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      float weight_of_first = 1;  // as mixed has it: not what weight says, where those sum to almost 1
      for (int64_t k = 1; k < K; ++k) weight_of_first -= weight[places[t * K + k]];
      std::fill(dots, dots + K, Lanes{});
      for (int64_t column = 0; column < F; column += kColumns) {
        const int64_t width = std::min(kColumns, F - column);
        for (int64_t k = 0; k < K; ++k)
          sigmoids(table, fused + places[t * K + k] * 2 * F + column, sigmoid + k * kColumns, width);
        by_lanes(width, [&](int64_t i, auto n) {
          const Lanes of_mixed = load(dmixed + t * F + column + i, n);
          Lanes first, sum_gate, sum_up;
          for (int64_t k = 0; k < K; ++k) {
            const int64_t row = places[t * K + k];
            T *gate = fused + row * 2 * F + column + i, *up = gate + F;
            const Lanes x = load(gate, n), u = load(up, n), s = load(sigmoid + k * kColumns + i, n), silu = x * s;
            const Lanes g = load(dh + row * F + column + i, n) + (k == 0 ? weight_of_first : weight[row]) * of_mixed;
            const Lanes dgate = g * u * (s + silu * (1.f - s)), dup = g * silu, product = silu * u;
            store(dgate, gate, n);
            store(dup, up, n);
            if (k == 0) {
              first = product, sum_gate = dgate, sum_up = dup;
            } else {
              dots[k] += of_mixed * (product - first);
              sum_gate += dgate, sum_up += dup;
            }
          }
          store(sum_gate, dfused + t * 2 * F + column + i, n);
          store(sum_up, dfused + t * 2 * F + F + column + i, n);
        });
      }
      for (int64_t k = 0; k < K; ++k) {
        float sum = 0;
        for (int64_t i = 0; i < kLanes; ++i) sum += dots[k][i];
        dweight[places[t * K + k]] = sum;
      }
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
                                   int64_t I, int64_t R, const T* const* M, int64_t P, int64_t stride_e,              \
                                   int64_t stride_i, int64_t stride_r, T* z, int64_t ldz, int64_t threads) {          \
    to_rank(x, ldx, rows, starts, E, I, R, M, P, stride_e, stride_i, stride_r, z, ldz, threads);                      \
  }                                                                                                                   \
  extern "C" void from_rank_##suffix(T* out, int64_t ldo, const int64_t* starts, int64_t E, int64_t R, int64_t O,     \
                                     const T* z, int64_t ldz, const T* const* M, int64_t P, int64_t stride_e,         \
                                     int64_t stride_r, int64_t stride_o, const T* base, int64_t ldb,                  \
                                     const int64_t* base_rows, int64_t threads) {                                     \
    from_rank(out, ldo, starts, E, R, O, z, ldz, M, P, stride_e, stride_r, stride_o, base, ldb, base_rows, threads);  \
  }                                                                                                                   \
  extern "C" void sum_from_rank_##suffix(T* out, int64_t ldo, const int64_t* rows, const int64_t* starts, int64_t E,  \
                                         int64_t R, int64_t O, const T* z, int64_t ldz, const T* const* M, int64_t P, \
                                         int64_t stride_e, int64_t stride_r, int64_t stride_o, int64_t tokens,        \
                                         int64_t add, int64_t threads) {                                              \
    sum_from_rank(out, ldo, rows, starts, E, R, O, z, ldz, M, P, stride_e, stride_r, stride_o, tokens, add != 0,      \
                  threads);                                                                                           \
  }                                                                                                                   \
  extern "C" void outer_##suffix(const T* z, int64_t ldz, const T* wide, int64_t ldw, const int64_t* rows,            \
                                 const int64_t* starts, int64_t E, int64_t R, int64_t W, T* const* grad, int64_t P,   \
                                 int64_t stride_e, int64_t stride_r, int64_t stride_w, int64_t threads) {             \
    outer(z, ldz, wide, ldw, rows, starts, E, R, W, grad, P, stride_e, stride_r, stride_w, threads);                  \
  }                                                                                                                   \
  extern "C" void to_rank_with_outer_##suffix(                                                                        \
      const T* wide, int64_t ldw, const int64_t* rows, const int64_t* starts, int64_t E, int64_t W, int64_t R,        \
      const T* M, int64_t m_stride_e, int64_t m_stride_w, int64_t m_stride_r, const T* z, int64_t ldz, T* u,          \
      int64_t ldu, T* grad, int64_t stride_e, int64_t stride_w, int64_t stride_r, int64_t threads) {                  \
    to_rank_with_outer(wide, ldw, rows, starts, E, W, R, M, m_stride_e, m_stride_w, m_stride_r, z, ldz, u, ldu, grad, \
                       stride_e, stride_w, stride_r, threads);                                                        \
  }                                                                                                                   \
  extern "C" void router_gradients_##suffix(const float* grad, const T* x, const float* weight, int64_t tokens,       \
                                            int64_t I, int64_t E, float* dweight, T* dx, int64_t threads) {           \
    router_gradients(grad, x, weight, tokens, I, E, dweight, dx, threads);                                            \
  }                                                                                                                   \
  extern "C" void add_few_##suffix(T* out, int64_t ldo, const T* values, int64_t ldv, const T* M, int64_t tokens,     \
                                   int64_t R, int64_t O, int64_t threads) {                                           \
    const Entries few = entries_of(values, ldv, tokens, R, tokens * R, threads);                                      \
    multiply_entries<true, true, false, T, T>(few, tokens, R, O, M, out, ldo, nullptr, 0, nullptr, threads);          \
  }                                                                                                                   \
  extern "C" void outer_few_##suffix(const T* values, int64_t ldv, const T* wide, int64_t ldw, int64_t tokens,        \
                                     int64_t R, int64_t W, T* grad, int64_t threads) {                                \
    const Entries few = entries_of(values, ldv, tokens, R, tokens * R, threads);                                      \
    multiply_entries<false, false, true, T, T>(few, tokens, R, W, nullptr, nullptr, 0, wide, ldw, grad, threads);     \
  }                                                                                                                   \
  extern "C" void swiglu_mixed_##suffix(const T* fused, const float* silu, const float* weight,                       \
                                        const int64_t* places, int64_t tokens, int64_t K, int64_t F, T* h, T* mixed,  \
                                        int64_t threads) {                                                            \
    swiglu_mixed(fused, silu, weight, places, tokens, K, F, h, mixed, threads);                                       \
  }                                                                                                                   \
  extern "C" void swiglu_mixed_backward_##suffix(                                                                     \
      const T* dh, const T* dmixed, T* fused, const float* table, const float* weight, const int64_t* places,         \
      int64_t tokens, int64_t K, int64_t F, T* dfused, float* dweight, int64_t threads) {                             \
    swiglu_mixed_backward(dh, dmixed, fused, table, weight, places, tokens, K, F, dfused, dweight, threads);          \
  }

FOR_DTYPE(at::BFloat16, bf16)
FOR_DTYPE(float, fp32)

extern "C" void router_logits_bf16(const at::BFloat16* x, const float* weight, const float* bias, int64_t tokens,
                                   int64_t I, int64_t E, float* logits, int64_t threads) {
  router_logits(x, weight, bias, tokens, I, E, logits, threads);
}

extern "C" void sum_pairs_bf16(const at::BFloat16* x, const float* probs, int64_t tokens, int64_t I, int64_t E,
                               float* pairs, int64_t threads) {
  sum_pairs(x, probs, tokens, I, E, pairs, threads);
}

extern "C" void sum_routing(const float* logits, const float* probs, const int64_t* choice, const bool* valid,
                            const int64_t* groups, int64_t tokens, int64_t E, int64_t K, float* row,
                            int64_t /* threads: not worth waking */) {
  sum_routing(logits, probs, choice, valid, groups, tokens, E, K, row);
}

extern "C" void largest(const float* scores, int64_t T, int64_t E, int64_t K, int64_t* places, int64_t threads) {
  find_largest(scores, T, E, K, places, threads);
}

extern "C" void weigh_bf16(const at::BFloat16* z, const float* weight, float scale, int64_t N, int64_t R,
                           at::BFloat16* out, int64_t threads) {
  weigh(z, weight, scale, N, R, out, threads);
}

extern "C" void dot_rows_bf16(const at::BFloat16* u, const at::BFloat16* z, float scale, int64_t N, int64_t R,
                              float* dots, int64_t threads) {
  dot_rows(u, z, scale, N, R, dots, threads);
}

extern "C" void dot_rows_fp32(const float* u, const float* z, float scale, int64_t N, int64_t R, float* dots,
                              int64_t threads) {
  dot_rows(u, z, scale, N, R, dots, threads);
}

extern "C" void swiglu_bf16(const at::BFloat16* fused, const float* silu, int64_t T, int64_t F, at::BFloat16* out,
                            int64_t threads) {
  swiglu(fused, silu, T, F, out, threads);
}

extern "C" void swiglu_backward_bf16(const at::BFloat16* grad, at::BFloat16* fused, const float* sigmoid, int64_t T,
                                     int64_t F, int64_t threads) {
  swiglu_backward(grad, fused, sigmoid, T, F, threads);
}

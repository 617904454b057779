// The recurrence of an LSTM layer for processors with AVX-512 BF16, as custom calls of XLA. Each
// runs on the core that calls it.
//
// A matmul is computed in tiles: up to ROWS rows by 4 vectors of 16 columns, whose sums stay in
// registers. The right factor is packed by tile, so that a tile reads it in order. Both factors are
// read in pairs along their common axis, the depth: one instruction multiplies the two numbers of
// each pair and adds both products to a float32 sum.
//
// The hidden size is a multiple of 16, and every depth is even.

#include <immintrin.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

enum { ROWS = 6, LANES = 16, VECTORS = 4, TILE = LANES * VECTORS };

typedef uint16_t bfloat16;  // Its bits.
typedef uint32_t pair __attribute__((aligned(2), may_alias));
typedef __m512 sums[ROWS][VECTORS];

static __mmask16 first_lanes(size_t n) { return n < LANES ? (1 << n) - 1 : 0xffff; }

static void store_rounded(bfloat16 *to, __m512 x) {
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

// Compute tanh by the rational approximation that XLA uses, too.
static __m512 tanh_lanes(__m512 x) {
  static const float above[] = {-2.76076847742355e-16f, 2.00018790482477e-13f,
                                -8.60467152213735e-11f, 5.12229709037114e-08f,
                                1.48572235717979e-05f,  6.37261928875436e-04f,
                                4.89352455891786e-03f};
  static const float below[] = {1.19825839466702e-06f, 1.18534705686654e-04f,
                                2.26843463243900e-03f, 4.89352518554385e-03f};
  const __m512 limit = _mm512_set1_ps(7.90531110763549805f);
  // The second operand is the result if one is NaN.
  __m512 near = _mm512_max_ps(-limit, _mm512_min_ps(limit, x)), square = near * near;
  __m512 p = _mm512_set1_ps(above[0]), q = _mm512_set1_ps(below[0]);
  for (int i = 1; i < 7; i++) p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(above[i]));
  for (int i = 1; i < 4; i++) q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(below[i]));
  __mmask16 tiny = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(4e-4f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(near * p / q, tiny, x);
}

static __m512 sigmoid(__m512 x) {
  const __m512 half = _mm512_set1_ps(0.5f);
  return _mm512_fmadd_ps(half, tanh_lanes(half * x), half);
}

// Compute a tile: `rows` rows of `a`, `stride` numbers apart, times the packed right factor.
static inline __attribute__((always_inline)) void multiply_rows(int rows, const bfloat16 *a,
                                                                size_t stride, size_t depth,
                                                                const pair *packed, sums result) {
  sums sum = {0};
  for (size_t k = 0; k < depth; k += 2, packed += TILE) {
    __m512bh b[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) b[v] = (__m512bh)_mm512_loadu_si512(packed + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      __m512bh x = (__m512bh)_mm512_set1_epi32(*(const pair *)(a + r * stride + k));
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], b[v], x);
    }
  }
  memcpy(result, sum, rows * sizeof(sum[0]));
}

static void multiply(int rows, const bfloat16 *a, size_t stride, size_t depth, const pair *packed,
                     sums result) {
  switch (rows) {  // The compiler makes a loop for each number, with the sums in registers.
    case 1: return multiply_rows(1, a, stride, depth, packed, result);
    case 2: return multiply_rows(2, a, stride, depth, packed, result);
    case 3: return multiply_rows(3, a, stride, depth, packed, result);
    case 4: return multiply_rows(4, a, stride, depth, packed, result);
    case 5: return multiply_rows(5, a, stride, depth, packed, result);
    case 6: return multiply_rows(6, a, stride, depth, packed, result);
  }
}

// Return the number of rows of the next tile: tiles share the rows that are left equally.
static size_t next_rows(size_t left) {
  size_t tiles = (left + ROWS - 1) / ROWS;
  return (left + tiles - 1) / tiles;
}

// Pack a tile of `b` [depth, width]: columns from 4 places, `apart`. From `end` on it is zero.
static void pack(const bfloat16 *b, size_t depth, size_t width, size_t apart, size_t end,
                 pair *packed) {
  for (size_t k = 0; k < depth; k += 2, b += 2 * width)
    for (size_t v = 0; v < VECTORS; v++)
      for (size_t lane = 0; lane < LANES; lane++) {
        size_t i = v * apart + lane;
        *packed++ = i < end ? b[i] | (uint32_t)b[width + i] << 16 : 0;
      }
}

// Compute a [rows, depth] @ b [depth, width]. A tile is packed in `packed` [depth, 64].
static void matmul(size_t rows, size_t depth, size_t width, const bfloat16 *a, const bfloat16 *b,
                   float *result, pair *packed) {
  for (size_t j = 0; j < width; j += TILE) {
    pack(b + j, depth, width, LANES, width - j, packed);
    for (size_t i = 0, n; i < rows; i += n) {
      n = next_rows(rows - i);
      sums sum;
      multiply(n, a + i * depth, depth, depth, packed, sum);
      for (size_t r = 0; r < n; r++)
        for (size_t v = 0, at = j; v < VECTORS && at < width; v++, at += LANES)
          _mm512_mask_storeu_ps(result + (i + r) * width + at, first_lanes(width - at), sum[r][v]);
    }
  }
}

// Run the layer: inputs [time, batch, features] to cells and outputs [time, batch, hidden].
//
// The kernel [depth, 4 * hidden] consists of the recurrent kernel, the input kernel, the bias, and
// zeros if the depth is odd otherwise. Results are also the activated gates
// [time, batch, 4 * hidden], and rows [time, batch, depth], the rounded factors of the kernel:
// the hidden state, the inputs, and 1. `packed` is [depth, 4 * hidden].
static void forward(size_t time, size_t batch, size_t features, size_t hidden, size_t depth,
                    const float *inputs, const bfloat16 *kernel, const float *first_cell,
                    const float *first_hidden, float *gates, float *cells, float *outputs,
                    bfloat16 *rows, pair *packed) {
  size_t width = 4 * hidden;
  for (size_t j = 0; j < hidden; j += LANES)  // A tile has the four gates of 16 hidden units.
    pack(kernel + j, depth, width, hidden, width, packed + j * VECTORS * depth / 2);
  for (size_t row = 0; row < time * batch; row++) {
    const float *from = inputs + row * features;
    bfloat16 *to = rows + row * depth;
    if (row < batch)
      for (size_t j = 0; j < hidden; j += LANES)
        store_rounded(to + j, _mm512_loadu_ps(first_hidden + row * hidden + j));
    to += hidden;
    for (size_t j = 0; j < features; j += LANES) {
      __mmask16 mask = first_lanes(features - j);
      __m256i x = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + j));
      _mm256_mask_storeu_epi16(to + j, mask, x);
    }
    to[features] = 0x3f80;  // 1.
    if (hidden + features + 1 < depth) to[features + 1] = 0;
  }

  for (size_t t = 0; t < time; t++) {
    const float *previous = t ? cells + (t - 1) * batch * hidden : first_cell;
    for (size_t j = 0; j < hidden; j += LANES)
      for (size_t b = 0, n; b < batch; b += n) {
        n = next_rows(batch - b);
        sums sum;
        multiply(n, rows + (t * batch + b) * depth, depth, depth, packed + j * VECTORS * depth / 2,
                 sum);
        for (size_t r = 0; r < n; r++) {
          __m512 i = sigmoid(sum[r][0]), f = sigmoid(sum[r][1]);
          __m512 g = tanh_lanes(sum[r][2]), o = sigmoid(sum[r][3]);
          __m512 cell = f * _mm512_loadu_ps(previous + (b + r) * hidden + j) + i * g;
          __m512 output = o * tanh_lanes(cell);
          size_t row = t * batch + b + r;
          float *gate = gates + row * width + j;
          _mm512_storeu_ps(gate, i);
          _mm512_storeu_ps(gate + hidden, f);
          _mm512_storeu_ps(gate + 2 * hidden, g);
          _mm512_storeu_ps(gate + 3 * hidden, o);
          _mm512_storeu_ps(cells + row * hidden + j, cell);
          _mm512_storeu_ps(outputs + row * hidden + j, output);
          if (t + 1 < time) store_rounded(rows + (row + batch) * depth + j, output);
        }
      }
  }
}

// Compute the rounded gradients of the gates before their activation, [time, batch, 4 * hidden].
//
// kernel [hidden, 4 * hidden] is the recurrent kernel. d_cell and d_hidden [batch, hidden] are the
// gradients of the last state, and then those of the first. `packed` is [4 * hidden, hidden], with
// the hidden size rounded up to whole tiles.
static void backward(size_t time, size_t batch, size_t hidden, const float *gates,
                     const bfloat16 *kernel, const float *first_cell, const float *cells,
                     const float *d_outputs, bfloat16 *d_gates, float *d_cell, float *d_hidden,
                     pair *packed) {
  size_t width = 4 * hidden;
  const __m512 one = _mm512_set1_ps(1);
  pair *to = packed;
  for (size_t j = 0; j < hidden; j += TILE)  // Pack the transposed kernel.
    for (size_t k = 0; k < width; k += 2)
      for (size_t i = j; i < j + TILE; i++)
        *to++ = i < hidden ? *(const pair *)(kernel + i * width + k) : 0;

  for (size_t t = time; t-- > 0;) {
    const float *previous = t ? cells + (t - 1) * batch * hidden : first_cell;
    for (size_t b = 0; b < batch; b++)
      for (size_t j = 0; j < hidden; j += LANES) {
        size_t row = t * batch + b, at = b * hidden + j;
        const float *gate = gates + row * width + j;
        __m512 i = _mm512_loadu_ps(gate), f = _mm512_loadu_ps(gate + hidden);
        __m512 g = _mm512_loadu_ps(gate + 2 * hidden), o = _mm512_loadu_ps(gate + 3 * hidden);
        __m512 tanh_cell = tanh_lanes(_mm512_loadu_ps(cells + row * hidden + j));
        __m512 dh = _mm512_loadu_ps(d_hidden + at) + _mm512_loadu_ps(d_outputs + row * hidden + j);
        __m512 dc = _mm512_loadu_ps(d_cell + at) + dh * o * (one - tanh_cell * tanh_cell);
        bfloat16 *d_gate = d_gates + row * width + j;
        store_rounded(d_gate, dc * g * i * (one - i));
        store_rounded(d_gate + hidden, dc * _mm512_loadu_ps(previous + at) * f * (one - f));
        store_rounded(d_gate + 2 * hidden, dc * i * (one - g * g));
        store_rounded(d_gate + 3 * hidden, dh * tanh_cell * o * (one - o));
        _mm512_storeu_ps(d_cell + at, dc * f);
      }
    for (size_t j = 0; j < hidden; j += TILE)
      for (size_t b = 0, n; b < batch; b += n) {
        n = next_rows(batch - b);
        sums sum;
        multiply(n, d_gates + (t * batch + b) * width, width, width, packed + j * width / 2, sum);
        for (size_t r = 0; r < n; r++)
          for (size_t v = 0, at = j; v < VECTORS && at < hidden; v++, at += LANES)
            _mm512_storeu_ps(d_hidden + (b + r) * hidden + at, sum[r][v]);
      }
  }
}

static void *data(void **buffers, int i) { return ((XLA_FFI_Buffer *)buffers[i])->data; }

static size_t size(void **buffers, int i, int axis) {
  return ((XLA_FFI_Buffer *)buffers[i])->dims[axis];
}

// Return whether this call asks only for the version of the interface, after answering it.
static int is_query(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Api_Version *version = &((XLA_FFI_Metadata_Extension *)extension)->metadata->api_version;
  version->major_version = XLA_FFI_API_MAJOR;
  version->minor_version = XLA_FFI_API_MINOR;
  return 1;
}

XLA_FFI_Error *lstm_matmul(XLA_FFI_CallFrame *frame) {
  if (is_query(frame)) return NULL;
  void **in = frame->args.args, **out = frame->rets.rets;
  matmul(size(in, 0, 0), size(in, 0, 1), size(in, 1, 1), data(in, 0), data(in, 1), data(out, 0),
         data(out, 1));
  return NULL;
}

XLA_FFI_Error *lstm_forward(XLA_FFI_CallFrame *frame) {
  if (is_query(frame)) return NULL;
  void **in = frame->args.args, **out = frame->rets.rets;
  forward(size(in, 0, 0), size(in, 0, 1), size(in, 0, 2), size(in, 2, 1), size(in, 1, 0),
          data(in, 0), data(in, 1), data(in, 2), data(in, 3), data(out, 0), data(out, 1),
          data(out, 2), data(out, 3), data(out, 4));
  return NULL;
}

XLA_FFI_Error *lstm_backward(XLA_FFI_CallFrame *frame) {
  if (is_query(frame)) return NULL;
  void **in = frame->args.args, **out = frame->rets.rets;
  size_t batch = size(in, 2, 0), hidden = size(in, 2, 1);
  for (int i = 0; i < 2; i++)  // The gradients of the last state.
    memcpy(data(out, 1 + i), data(in, 5 + i), batch * hidden * sizeof(float));
  backward(size(in, 0, 0), batch, hidden, data(in, 0), data(in, 1), data(in, 2), data(in, 3),
           data(in, 4), data(out, 0), data(out, 1), data(out, 2), data(out, 3));
  return NULL;
}

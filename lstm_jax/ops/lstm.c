// The recurrence of an LSTM layer for processors with AVX-512, as custom calls of XLA. Each divides
// its work into parts, for the threads of XLA.
//
// A matmul is computed in tiles: a few rows by 4 vectors of 16 columns, whose sums stay in
// registers. The right factor is packed by tile, so that a tile reads it in order. Both factors are
// read in words of 32 bits along their common axis, the depth. A word is one float32, two bfloat16,
// or in steps of generation four numbers of 8 bits: one instruction multiplies the numbers of 16
// pairs of words, and adds the products to 16 sums, in float32, or in int32 for 8 bits. With AMX,
// one instruction does that for 16 words of 16 rows, in bfloat16.
// The hidden size is a multiple of 16, and every depth is a whole number of words.

#include <immintrin.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "xla/ffi/api/c_api.h"

enum { ROWS = 6, AMX_ROWS = 16, LANES = 16, VECTORS = 4, TILE = LANES * VECTORS };
enum { AHEAD = 16 };  // Words of the depth to prefetch: Intel's own prefetches come too late.

enum { FLOAT32 = 1, BFLOAT16 = 2, INT8 = 4 };  // Numbers in a word.

typedef uint32_t word __attribute__((may_alias));
typedef uint16_t bits16 __attribute__((may_alias));
typedef __m512 sums[AMX_ROWS][VECTORS];

static __mmask16 first_lanes(size_t n) { return n < LANES ? (1 << n) - 1 : 0xffff; }

// Store the first `n` of 16 numbers as factors of a matmul, in float32 or bfloat16.
static inline void store(int numbers, void *to, size_t at, __m512 x, size_t n) {
  if (numbers == FLOAT32)
    return _mm512_mask_storeu_ps((float *)to + at, first_lanes(n), x);
  __m256i rounded;  // Volatile: a compiler may run the intrinsic early, where it is not supported.
  __asm__ volatile("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(x));
  if (n < LANES)
    _mm256_mask_storeu_epi16((bits16 *)to + at, first_lanes(n), rounded);
  else  // Without a mask, in the inner loops.
    _mm256_storeu_si256((__m256i *)((bits16 *)to + at), rounded);
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

static __m512 sigmoid(__m512 x) { return 0.5f * tanh_lanes(0.5f * x) + 0.5f; }

// Instructions that processors with AVX-512 may lack, for bfloat16 and int8, and those of AMX.
#define WITH_BF16 __attribute__((target("avx512bf16,avx512vnni")))
#define WITH_AMX __attribute__((target("avx512bf16,avx512vnni,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline))

WITH_BF16 INLINE __m512 add_products(int numbers, __m512 sum, __m512i a, __m512i b) {
  if (numbers == FLOAT32) return _mm512_fmadd_ps((__m512)a, (__m512)b, sum);
  if (numbers == BFLOAT16) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  return (__m512)_mm512_dpbusd_epi32((__m512i)sum, a, b);  // `a` is unsigned, `b` is signed.
}

// Compute a tile: `rows` rows of `a`, of `words` words each, times the packed right factor.
WITH_BF16 INLINE void multiply_rows(int numbers, int rows, const word *a, size_t words,
                                    const word *packed, sums result) {
  __m512 sum[ROWS][VECTORS] = {0};
  for (size_t k = 0; k < words; k++, packed += TILE) {
    __m512i b[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      b[v] = _mm512_loadu_si512(packed + v * LANES);
      _mm_prefetch(packed + v * LANES + AHEAD * TILE, _MM_HINT_T0);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      __m512i x = _mm512_set1_epi32(a[r * words + k]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[r][v] = add_products(numbers, sum[r][v], x, b[v]);
    }
  }
  memcpy(result, sum, rows * sizeof(sum[0]));
}

// The compiler makes a loop for each dtype and number of rows, with the sums in registers.
#define CASE(numbers, rows) \
  case 8 * numbers + rows: return multiply_rows(numbers, rows, a, words, packed, result);
#define CASES(n) CASE(n, 1) CASE(n, 2) CASE(n, 3) CASE(n, 4) CASE(n, 5) CASE(n, 6)

static int uses_amx;

// Ask Linux for AMX (ARCH_REQ_XCOMP_PERM of XTILEDATA), before any other call; return the answer.
int lstm_ask_for_amx(void) { return uses_amx = !syscall(SYS_arch_prctl, 0x1023, 18); }

// The rows for which the tiles of this thread are configured; 0 outside of a part.
static _Thread_local int configured_rows;

// Configure tiles 0 to 3 for sums, 4 for the left factor, and 5 and 6 for the right one.
WITH_AMX static void configure_tiles(int rows) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 7; i++) config.bytes[i] = 64, config.rows[i] = i < 5 ? rows : 16;
  _tile_loadconfig(&config);
  configured_rows = rows;
}

WITH_AMX static void release_tiles(void) {
  if (configured_rows) _tile_release();
  configured_rows = 0;
}

#define FOR_EACH_VECTOR(DO) DO(0, 5) DO(1, 6) DO(2, 5) DO(3, 6)
#define SET_ZERO(v, right) _tile_zero(v);
#define ADD_PRODUCTS(v, right)                                                \
  _tile_loadd(right, packed + k * TILE + v * LANES, TILE * sizeof(word)); \
  _tile_dpbf16ps(v, 4, right);
#define STORE(v, right) _tile_stored(v, &result[0][v], sizeof(result[0]));

// Compute the same tile as `multiply_rows`, in bfloat16, with AMX.
WITH_AMX static void multiply_tiles(int rows, const word *a, size_t words, const word *packed,
                                    sums result) {
  if (rows != configured_rows) configure_tiles(rows);
  size_t k = 0;
  FOR_EACH_VECTOR(SET_ZERO)
  for (; k + 16 <= words; k += 16) {
    _tile_loadd(4, a + k, words * sizeof(word));
    FOR_EACH_VECTOR(ADD_PRODUCTS)
  }
  FOR_EACH_VECTOR(STORE)
  for (; k < words; k++)
    for (int i = 0; i < rows * VECTORS; i++) {
      __m512i b = _mm512_loadu_si512(packed + k * TILE + i % VECTORS * LANES);
      __m512i x = _mm512_set1_epi32(a[i / VECTORS * words + k]);
      result[0][i] = add_products(BFLOAT16, result[0][i], x, b);
    }
}

static int is_in_tiles(int numbers) { return uses_amx && numbers == BFLOAT16; }

WITH_BF16 static void multiply(int numbers, int rows, const word *a, size_t words,
                               const word *packed, sums result) {
  if (is_in_tiles(numbers)) return multiply_tiles(rows, a, words, packed, result);
  switch (8 * numbers + rows) { CASES(FLOAT32) CASES(BFLOAT16) CASES(INT8) }
}

// Return the number of rows of the next tile: the remaining rows are shared equally.
static size_t next_rows(int numbers, size_t left) {
  size_t most = is_in_tiles(numbers) ? AMX_ROWS : ROWS, tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// Return where a part begins, if `size` is divided into nearly equal parts of whole units.
static size_t begin(size_t part, size_t parts, size_t size, size_t unit) {
  size_t units = (size + unit - 1) / unit, at = part * units / parts * unit;
  return at < size ? at : size;
}

// Pack 64 columns of b [depth, width] in bfloat16. Columns from `end` on are zero.
static void pack(const bits16 *b, size_t depth, size_t width, size_t end, word *packed) {
  for (size_t k = 0; k < depth; k += BFLOAT16, b += BFLOAT16 * width)
    for (size_t i = 0; i < TILE; i++) *packed++ = i < end ? b[i] | (word)b[width + i] << 16 : 0;
}

typedef struct {
  size_t rows, depth, width;
  const word *a;
  const bits16 *b;
  float *result;
  word *packed;  // [parts, words, 64]: each part has its own memory for a tile.
} Matmul;

// Compute a [rows, depth] @ b [depth, width] in bfloat16; a part is a range of columns.
static void matmul(const void *work, size_t part, size_t parts) {
  const Matmul m = *(const Matmul *)work;
  size_t words = m.depth / BFLOAT16, end = begin(part + 1, parts, m.width, TILE);
  word *packed = m.packed + part * words * TILE;
  for (size_t j = begin(part, parts, m.width, TILE); j < end; j += TILE) {
    pack(m.b + j, m.depth, m.width, m.width - j, packed);
    for (size_t i = 0, n; i < m.rows; i += n) {
      n = next_rows(BFLOAT16, m.rows - i);
      sums sum;
      multiply(BFLOAT16, n, m.a + i * words, words, packed, sum);
      for (size_t r = 0; r < n; r++)
        for (size_t v = 0, at = j; v < VECTORS && at < m.width; v++, at += LANES)
          _mm512_mask_storeu_ps(m.result + (i + r) * m.width + at, first_lanes(m.width - at),
                                sum[r][v]);
    }
  }
}

// The gates of 16 hidden units, and their next state.
typedef struct {
  __m512 i, f, g, o, cell, output;
} Units;

static inline Units next_state(const __m512 *z, __mmask16 kept, const float *cell) {
  __m512 f = _mm512_maskz_mov_ps(kept, sigmoid(z[1]));
  Units to = {sigmoid(z[0]), f, tanh_lanes(z[2]), sigmoid(z[3])};
  to.cell = to.f * _mm512_loadu_ps(cell) + to.i * to.g;
  to.output = to.o * tanh_lanes(to.cell);
  return to;
}

typedef struct {
  int numbers;
  size_t batch, words, hidden;
  const word *rows;     // [batch, words]: inputs and the hidden state.
  const word *packed;   // The kernel, [depth, 4 * hidden], by gates.
  const float *scales;  // Of its columns, if it has 8 bits.
  size_t stride;        // Between rows of `added`, 0 if all are the same.
  const float *added;   // To the gates before their activation.
  const float *previous;
  float *cell, *output;  // [batch, hidden].
} Step;

// Run one step; a part is a range of hidden units.
static void step(const void *work, size_t part, size_t parts) {
  const Step s = *(const Step *)work;
  size_t end = begin(part + 1, parts, s.hidden, LANES);
  for (size_t j = begin(part, parts, s.hidden, LANES); j < end; j += LANES)
    for (size_t b = 0, n; b < s.batch; b += n) {
      n = next_rows(s.numbers, s.batch - b);
      sums sum;
      multiply(s.numbers, n, s.rows + b * s.words, s.words, s.packed + j * VECTORS * s.words, sum);
      for (size_t r = 0; r < n; r++) {
        size_t at = (b + r) * s.hidden + j;
        for (size_t v = 0; v < VECTORS; v++) {
          size_t column = v * s.hidden + j;
          if (s.numbers == INT8)
            sum[r][v] = _mm512_cvtepi32_ps((__m512i)sum[r][v]) * _mm512_loadu_ps(s.scales + column);
          sum[r][v] += _mm512_loadu_ps(s.added + (b + r) * s.stride + column);
        }
        Units to = next_state(sum[r], 0xffff, s.previous + at);
        _mm512_storeu_ps(s.cell + at, to.cell);
        _mm512_storeu_ps(s.output + at, to.output);
      }
    }
}

// Return the lanes of the state that a step reads: none where a document begins.
static __mmask16 kept(const uint8_t *starts, size_t i) { return starts && starts[i] ? 0 : 0xffff; }

typedef struct {
  int numbers;
  size_t time, batch, features, hidden, depth;
  const uint8_t *starts;  // [time, batch], where a step reads zeros instead of the state, or NULL.
  const float *inputs, *first_cell, *first_hidden;
  const word *packed;      // The kernel, [depth, 4 * hidden], by gates.
  float *gates;            // Activated, [time, batch, 4 * hidden].
  float *cells, *outputs;  // [time, batch, hidden].
  word *rows;              // Of numbers [time, batch, depth].
} Forward;

// Run the layer over inputs [time, batch, features]; a part is a range of texts.
//
// The kernel consists of the recurrent kernel, the input kernel, the bias, and zeros that fill the
// last word. `rows` are its factors: the hidden state, the inputs, 1, and zeros.
static void forward(const void *work, size_t part, size_t parts) {
  const Forward l = *(const Forward *)work;
  size_t first = begin(part, parts, l.batch, 1), end = begin(part + 1, parts, l.batch, 1);
  size_t words = l.depth / l.numbers, bias = l.hidden + l.features;
  const __m512 one = _mm512_setr_ps(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  for (size_t t = 0; t < l.time; t++) {
    const float *cells = t ? l.cells + (t - 1) * l.batch * l.hidden : l.first_cell;
    const float *hidden = t ? l.outputs + (t - 1) * l.batch * l.hidden : l.first_hidden;
    for (size_t b = first; b < end; b++) {
      size_t row = t * l.batch + b, to = row * l.depth;
      for (size_t j = 0; j < l.hidden; j += LANES)
        store(l.numbers, l.rows, to + j,
              _mm512_maskz_loadu_ps(kept(l.starts, row), hidden + b * l.hidden + j), LANES);
      for (size_t j = 0; j < l.features; j += LANES) {
        const float *from = l.inputs + row * l.features + j;
        __m512 x = _mm512_maskz_loadu_ps(first_lanes(l.features - j), from);
        store(l.numbers, l.rows, to + l.hidden + j, x, l.features - j);
      }
      store(l.numbers, l.rows, to + bias, one, l.depth - bias);
    }
    for (size_t j = 0; j < l.hidden; j += LANES)
      for (size_t b = first, n; b < end; b += n) {
        n = next_rows(l.numbers, end - b);
        sums sum;
        multiply(l.numbers, n, l.rows + (t * l.batch + b) * words, words,
                 l.packed + j * VECTORS * words, sum);
        for (size_t r = 0; r < n; r++) {
          size_t row = t * l.batch + b + r;
          Units to = next_state(sum[r], kept(l.starts, row), cells + (b + r) * l.hidden + j);
          float *gate = l.gates + row * 4 * l.hidden + j;
          _mm512_storeu_ps(gate, to.i);
          _mm512_storeu_ps(gate + l.hidden, to.f);
          _mm512_storeu_ps(gate + 2 * l.hidden, to.g);
          _mm512_storeu_ps(gate + 3 * l.hidden, to.o);
          _mm512_storeu_ps(l.cells + row * l.hidden + j, to.cell);
          _mm512_storeu_ps(l.outputs + row * l.hidden + j, to.output);
        }
      }
  }
}

typedef struct {
  int numbers;
  size_t time, batch, hidden;
  const uint8_t *starts;  // As in `Forward`.
  const float *gates, *first_cell, *cells, *d_outputs;
  const word *packed;        // The transposed recurrent kernel, [4 * hidden, hidden].
  word *d_gates;             // Before their activation, of numbers [time, batch, 4 * hidden].
  float *d_cell, *d_hidden;  // [batch, hidden], of the last state, and then of the first.
} Backward;

// Compute the gradients of the gates, and those of the state; a part is a range of texts.
static void backward(const void *work, size_t part, size_t parts) {
  const Backward l = *(const Backward *)work;
  size_t first = begin(part, parts, l.batch, 1), end = begin(part + 1, parts, l.batch, 1);
  size_t hidden = l.hidden, width = 4 * hidden, words = width / l.numbers;
  const __m512 one = _mm512_set1_ps(1);
  for (size_t t = l.time; t-- > 0;) {
    const float *previous = t ? l.cells + (t - 1) * l.batch * hidden : l.first_cell;
    for (size_t b = first; b < end; b++)
      for (size_t j = 0; j < hidden; j += LANES) {
        size_t row = t * l.batch + b, at = b * hidden + j;
        const float *gate = l.gates + row * width + j;
        __m512 i = _mm512_loadu_ps(gate), f = _mm512_loadu_ps(gate + hidden);
        __m512 g = _mm512_loadu_ps(gate + 2 * hidden), o = _mm512_loadu_ps(gate + 3 * hidden);
        __m512 tanh_cell = tanh_lanes(_mm512_loadu_ps(l.cells + row * hidden + j));
        __m512 d_output = _mm512_loadu_ps(l.d_outputs + row * hidden + j);
        __m512 dh = _mm512_loadu_ps(l.d_hidden + at) + d_output;
        __m512 dc = _mm512_loadu_ps(l.d_cell + at) + dh * o * (one - tanh_cell * tanh_cell);
        const __m512 d_gate[] = {dc * g * i * (one - i),
                                 dc * _mm512_loadu_ps(previous + at) * f * (one - f),
                                 dc * i * (one - g * g), dh * tanh_cell * o * (one - o)};
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
          store(l.numbers, l.d_gates, row * width + v * hidden + j, d_gate[v], LANES);
        _mm512_storeu_ps(l.d_cell + at, dc * f);  // f is 0 where a document begins.
      }
    for (size_t j = 0; j < hidden; j += TILE)
      for (size_t b = first, n; b < end; b += n) {
        n = next_rows(l.numbers, end - b);
        sums sum;
        multiply(l.numbers, n, l.d_gates + (t * l.batch + b) * words, words, l.packed + j * words,
                 sum);
        for (size_t r = 0; r < n; r++)
          for (size_t v = 0, at = j; v < VECTORS && at < hidden; v++, at += LANES)
            _mm512_storeu_ps(l.d_hidden + (b + r) * hidden + at,
                             _mm512_maskz_mov_ps(kept(l.starts, t * l.batch + b + r), sum[r][v]));
      }
  }
}

static void *data(void **buffers, int i) { return ((XLA_FFI_Buffer *)buffers[i])->data; }

static size_t size(void **buffers, int i, int axis) {
  return ((XLA_FFI_Buffer *)buffers[i])->dims[axis];
}

// Return how many numbers of an array in float32, bfloat16 or 8 bits a word has.
static int numbers(void **buffers, int i) {
  XLA_FFI_DataType dtype = ((XLA_FFI_Buffer *)buffers[i])->dtype;
  return dtype == XLA_FFI_DataType_F32 ? FLOAT32 : dtype == XLA_FFI_DataType_BF16 ? BFLOAT16 : INT8;
}

typedef void task(const void *work, size_t part, size_t parts);

// A task that threads work on. The last of them frees it: one may begin after the task has ended.
typedef struct {
  task *run;
  const void *work;
  size_t parts;
  atomic_size_t begun, done, threads;
} Job;

static void leave(Job *job) {
  if (atomic_fetch_sub(&job->threads, 1) == 1) free(job);
}

static void run_parts(void *data) {
  Job *job = data;
  for (size_t part; (part = atomic_fetch_add(&job->begun, 1)) < job->parts;) {
    job->run(job->work, part, job->parts);
    release_tiles();
    atomic_fetch_add(&job->done, 1);
  }
  leave(job);
}

// Run a task in the number of parts that the attribute of the call specifies; wait for all.
static void run(XLA_FFI_CallFrame *frame, task *task, const void *work) {
  size_t parts = *(int64_t *)((XLA_FFI_Scalar *)frame->attrs.attrs[0])->value;
  Job *job = malloc(sizeof(Job));
  *job = (Job){task, work, parts};
  atomic_init(&job->threads, parts + 1);
  for (size_t i = 1; i < parts; i++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {sizeof(args), NULL, frame->ctx, run_parts, job};
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
    if (error) {  // The other threads do the parts of this one.
      XLA_FFI_Error_Destroy_Args destroy = {sizeof(destroy), NULL, error};
      frame->api->XLA_FFI_Error_Destroy(&destroy);
      leave(job);
    }
  }
  run_parts(job);
  while (atomic_load(&job->done) < parts) sched_yield();
  leave(job);
}

// Return whether this call asks only for the version of the interface, after answering it.
static int is_query(XLA_FFI_CallFrame *frame) {
  __auto_type extension = frame->extension_start;  // Its type has another name in JAX 0.12.
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Api_Version *version = &((XLA_FFI_Metadata_Extension *)extension)->metadata->api_version;
  version->major_version = XLA_FFI_API_MAJOR;
  version->minor_version = XLA_FFI_API_MINOR;
  return 1;
}

// Define the function that XLA calls: it runs the task of this name, whose work the rest describes.
#define FUNCTION(name, Work, ...)                               \
  XLA_FFI_Error *lstm_##name(XLA_FFI_CallFrame *frame) {        \
    void **in = frame->args.args, **out = frame->rets.rets;     \
    if (!is_query(frame)) run(frame, name, &(Work){__VA_ARGS__}); \
    return NULL;                                                \
  }

FUNCTION(matmul, Matmul, size(in, 0, 0), size(in, 0, 1), size(in, 1, 1), data(in, 0), data(in, 1),
         data(out, 0), data(out, 1))
FUNCTION(step, Step, numbers(in, 0), size(in, 0, 0), size(in, 0, 1) / numbers(in, 0),
         size(in, 3, 1), data(in, 0), data(in, 1), frame->args.size == 5 ? data(in, 4) : NULL,
         size(in, 2, 0) == 1 ? 0 : size(in, 2, 1), data(in, 2), data(in, 3), data(out, 0),
         data(out, 1))
FUNCTION(forward, Forward, numbers(out, 3), size(in, 0, 0), size(in, 0, 1), size(in, 0, 2),
         size(in, 2, 1), size(out, 3, 2), frame->args.size == 5 ? data(in, 4) : NULL, data(in, 0),
         data(in, 2), data(in, 3), data(in, 1), data(out, 0), data(out, 1), data(out, 2),
         data(out, 3))
FUNCTION(backward, Backward, numbers(out, 0), size(in, 0, 0), size(in, 2, 0), size(in, 2, 1),
         frame->args.size == 8 ? data(in, 7) : NULL, data(in, 0), data(in, 2), data(in, 3),
         data(in, 4), data(in, 1), data(out, 0), data(out, 1), data(out, 2))

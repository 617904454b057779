// Gated recurrences, matmuls, and the loss over a large vocabulary, as custom calls of XLA for CPUs. Each
// divides its work into parts, for the threads of XLA. platform.h has the processor's instructions.
//
// A matmul is computed in tiles: a few rows by 4 vectors of columns, whose sums stay in registers. The
// right factor is packed by tile, so that a tile reads it in order. Both factors are read in words of
// 32 bits along their common axis, the depth. A word is one float32 or two bfloat16: one instruction
// multiplies the numbers of a vector of pairs of words, and adds the products to sums in float32. With
// AMX, one instruction does that for 16 words of 16 rows, in bfloat16.
// The hidden size is a multiple of the lanes, and every depth is a whole number of words.

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "platform.h"
#include "xla/ffi/api/c_api.h"

enum { AMX_ROWS = 16, VECTORS = 4, TILE = LANES * VECTORS };
enum { LINE = 16 };   // Words in a line of the cache.
enum { AHEAD = 16 };  // Words of the depth to prefetch: Intel's own prefetches come too late.

enum { FLOAT32 = 1, BFLOAT16 = 2 };  // Numbers in a word.

typedef Floats sums[AMX_ROWS][VECTORS];

#define INLINE static inline __attribute__((always_inline))

// Store the first `n` of a vector's numbers as factors of a matmul, in float32 or bfloat16.
INLINE void store_numbers(int numbers, void *to, size_t at, Floats x, size_t n) {
  if (numbers == FLOAT32) return store_first((float *)to + at, x, n);
  Halves rounded = round_lanes(x);
  copy_first((bits16 *)to + at, &rounded, n * sizeof(bits16), sizeof(rounded));
}

// Compute tanh by the rational approximation that XLA uses, too.
static Floats tanh_lanes(Floats x) {
  static const float above[] = {-2.76076847742355e-16f, 2.00018790482477e-13f,
                                -8.60467152213735e-11f, 5.12229709037114e-08f,
                                1.48572235717979e-05f,  6.37261928875436e-04f,
                                4.89352455891786e-03f};
  static const float below[] = {1.19825839466702e-06f, 1.18534705686654e-04f,
                                2.26843463243900e-03f, 4.89352518554385e-03f};
  const Floats zero = {0}, limit = zero + 7.90531110763549805f;
  // The second operand is the result if one is NaN.
  Floats near = greater(-limit, lesser(limit, x)), square = near * near;
  Floats p = zero + above[0], q = zero + below[0];
  for (int i = 1; i < 7; i++) p = multiply_add(p, square, zero + above[i]);
  for (int i = 1; i < 4; i++) q = multiply_add(q, square, zero + below[i]);
  return choose_small(x, 4e-4f, near * p / q);
}

static Floats sigmoid(Floats x) { return 0.5f * tanh_lanes(0.5f * x) + 0.5f; }

INLINE Floats add_products(int numbers, Floats sum, Words a, Words b) {
  return numbers == FLOAT32 ? multiply_add((Floats)a, (Floats)b, sum) : add_pairs(sum, a, b);
}

// The zeros of a packed right factor, which are not multiplied: none, or those of the kernel of a GRU
// (in vector 3 of the first words, and in vector 2 of the next), or those of the last words.
enum { NO_ZEROS, ZEROS_OF_GRU, LAST_WORDS };
typedef struct {
  int kind;
  size_t first, second;  // The words where they change.
} Zeros;

// Add the products of words [k, end) to the sums of a tile, but those of one vector.
INLINE void add_words(int numbers, int rows, const word *a, size_t words, const word *packed,
                      size_t k, size_t end, int skipped, Floats sum[ROWS][VECTORS]) {
  for (packed += k * TILE; k < end; k++, packed += TILE) {
    Words x[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) x[r] = (Words){0} + a[r * words + k];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      if (v == skipped) continue;
      Words b = load_words(packed + v * LANES);
      if (v * LANES % LINE == 0) __builtin_prefetch(packed + v * LANES + AHEAD * TILE);
#pragma GCC unroll 6
      for (int r = 0; r < rows; r++) sum[r][v] = add_products(numbers, sum[r][v], x[r], b);
    }
  }
}

// Compute a tile: `rows` rows of `a`, of `words` words each, times the packed right factor.
INLINE void multiply_rows(int numbers, int rows, int kind, const word *a, size_t words,
                          const word *packed, Zeros zeros, sums result) {
  Floats sum[ROWS][VECTORS] = {0};
  size_t end = kind == NO_ZEROS ? words : zeros.first;
  add_words(numbers, rows, a, words, packed, 0, end, kind == ZEROS_OF_GRU ? 3 : -1, sum);
  if (kind == ZEROS_OF_GRU)
    add_words(numbers, rows, a, words, packed, zeros.first, zeros.second, 2, sum);
  if (kind == ZEROS_OF_GRU) add_words(numbers, rows, a, words, packed, zeros.second, words, -1, sum);
  memcpy(result, sum, rows * sizeof(sum[0]));
}

// The compiler makes a loop for each dtype, number of rows and kind of zeros, with the sums in
// registers.
#define CASE(numbers, kind, rows)       \
  case 64 * kind + 8 * numbers + rows: \
    return multiply_rows(numbers, rows < ROWS ? rows : ROWS, kind, a, words, packed, zeros, result);
#define CASES(n, z) \
  CASE(n, z, 1) CASE(n, z, 2) CASE(n, z, 3) CASE(n, z, 4) CASE(n, z, 5) CASE(n, z, 6)

// Return the number of lanes of a vector, by which callers arrange kernels.
int lstm_count_lanes(void) { return LANES; }

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

static int uses_amx;

// Ask Linux for AMX (ARCH_REQ_XCOMP_PERM of XTILEDATA), before any other call; return the answer.
int lstm_ask_for_amx(void) { return uses_amx = !syscall(SYS_arch_prctl, 0x1023, 18); }

// The rows for which the tiles of this thread are configured; 0 outside of a part.
static _Thread_local int configured_rows;

// Configure tiles 0 to 3 for sums, 4 for the left factor, and 5 and 6 for the right one.
static void configure_tiles(int rows) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 7; i++) config.bytes[i] = 64, config.rows[i] = i < 5 ? rows : 16;
  _tile_loadconfig(&config);
  configured_rows = rows;
}

static void release_tiles(void) {
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
static void multiply_tiles(int rows, const word *a, size_t words, const word *packed, sums result) {
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
      Words b = load_words(packed + k * TILE + i % VECTORS * LANES);
      result[0][i] = add_pairs(result[0][i], (Words){0} + a[i / VECTORS * words + k], b);
    }
}

#else
enum { uses_amx = 0 };
int lstm_ask_for_amx(void) { return 0; }
static void release_tiles(void) {}
static void multiply_tiles(int rows, const word *a, size_t words, const word *packed, sums result) {
  (void)rows, (void)a, (void)words, (void)packed, (void)result;
}
#endif

static int is_in_tiles(int numbers) { return uses_amx && numbers == BFLOAT16; }

static void multiply(int numbers, int rows, const word *a, size_t words, const word *packed,
                     Zeros zeros, sums result) {
  if (is_in_tiles(numbers)) return multiply_tiles(rows, a, words, packed, result);
  switch (64 * zeros.kind + 8 * numbers + rows) {
    CASES(FLOAT32, NO_ZEROS) CASES(BFLOAT16, NO_ZEROS)
    CASES(FLOAT32, ZEROS_OF_GRU) CASES(BFLOAT16, ZEROS_OF_GRU)
    CASES(FLOAT32, LAST_WORDS) CASES(BFLOAT16, LAST_WORDS)
  }
}

// Return the number of blocks of rows that a tile needs; they share the rows nearly equally.
static size_t count_blocks(int numbers, size_t rows) {
  size_t most = is_in_tiles(numbers) ? AMX_ROWS : ROWS;
  return (rows + most - 1) / most;
}

// Return where a part begins, if `size` is divided into nearly equal parts of whole units.
static size_t begin(size_t part, size_t parts, size_t size, size_t unit) {
  size_t units = (size + unit - 1) / unit, at = part * units / parts * unit;
  return at < size ? at : size;
}

// A factor of a matmul. It is [along, depth], where `along` is the number of rows of a left factor or of
// columns of a right one; or [depth, along] if `is_transposed`.
typedef struct {
  int numbers, is_transposed;
  size_t along, depth;
  const void *array;
} Factor;

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static size_t count_words(Factor f) { return (f.depth + f.numbers - 1) / f.numbers; }

// Return words k to k + LANES of row (or column) i of a factor that is not transposed.
static Words load_along_depth(Factor f, size_t i, size_t k) {
  Words x = {0};
  size_t bytes = sizeof(word) / f.numbers, at = i * f.depth + k * f.numbers;
  if (i < f.along)
    copy_first(&x, (const char *)f.array + at * bytes, (f.depth - k * f.numbers) * bytes, sizeof(x));
  return x;
}

// Return word k of rows (or columns) i to i + LANES of a factor that is transposed.
static Words load_across(Factor f, size_t i, size_t k) {
  Words x = {0};
  Halves low = {0}, high = {0};
  size_t n = i < f.along ? f.along - i : 0, at = k * f.numbers * f.along + i;
  size_t later = (at + AHEAD * f.numbers * f.along) * sizeof(word) / f.numbers;
  __builtin_prefetch((const char *)f.array + later);
  if (f.numbers == FLOAT32) {
    copy_first(&x, (const float *)f.array + at, n * sizeof(float), sizeof(x));
    return x;
  }
  copy_first(&low, (const bits16 *)f.array + at, n * sizeof(bits16), sizeof(low));
  if (k * BFLOAT16 + 1 < f.depth)
    copy_first(&high, (const bits16 *)f.array + at + f.along, n * sizeof(bits16), sizeof(high));
  return __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
}

// Arrange words [k, end) of the columns of a tile of a right factor as [words, columns].
static void pack_columns(Factor f, size_t j, size_t k, size_t end, word *packed) {
  for (; k < end; k += LANES, packed += LANES * TILE)
    for (size_t v = 0; v < VECTORS; v++) {
      Words x[LANES];
      size_t n = end - k < LANES ? end - k : LANES;
      for (size_t i = 0; i < LANES; i++)
        if (!f.is_transposed) x[i] = load_along_depth(f, j + v * LANES + i, k);
        else if (i < n) x[i] = load_across(f, j + v * LANES, k + i);
      if (!f.is_transposed) transpose(x);
      for (size_t i = 0; i < n; i++) store_words(packed + i * TILE + v * LANES, x[i]);
    }
}

// Arrange words [k, end) of rows [first, last) of a left factor as [rows, words].
static void pack_rows(Factor f, size_t first, size_t last, size_t k, size_t end, word *packed) {
  size_t words = end - k;
  for (size_t w = 0; w < words; w += LANES)
    for (size_t i = first; i < last; i += LANES) {
      Words x[LANES];
      size_t n = last - i < LANES ? last - i : LANES;
      for (size_t r = 0; r < LANES; r++)
        x[r] = f.is_transposed ? load_across(f, i, least(k + w + r, end - 1))
                               : load_along_depth(f, i + r, k + w);
      if (f.is_transposed) transpose(x);
      word *to = packed + (i - first) * words + w;
      for (size_t r = 0; r < n; r++)
        copy_first(to + r * words, &x[r], (words - w) * sizeof(word), sizeof(x[r]));
    }
}

// Rows, and words of the depth, that stay in the cache of a core, and in that of all.
enum { BLOCK = 96, DEPTH = 256, LARGEST_DEPTH = 4096 };

// Compute rows of `a` times a tile of columns of `b`, both packed. Add them to the result, or store them
// there if these are the first words of the depth.
static void multiply_block(int numbers, const word *a, size_t rows, size_t words,
                           const word *packed, int is_first, float *result, size_t stride,
                           size_t width) {
  size_t blocks = count_blocks(numbers, rows);
  for (size_t k = 0, i = 0, n; k < blocks; k++, i += n) {
    n = begin(k + 1, blocks, rows, 1) - i;
    sums sum;
    multiply(numbers, n, a + i * words, words, packed, (Zeros){0}, sum);
    for (size_t r = 0; r < n; r++)
      for (size_t v = 0, at = 0; v < VECTORS && at < width; v++, at += LANES) {
        float *to = result + (i + r) * stride + at;
        if (!is_first) sum[r][v] += load_first(to, width - at, 0);
        store_first(to, sum[r][v], width - at);
      }
  }
}

// Compute rows [first, last) of a @ b, for `b` packed in tiles.
static void multiply_range(Factor a, size_t first, size_t last, const word *packed, size_t width,
                           word *packed_rows, float *result, size_t stride) {
  size_t words = count_words(a), k = 0, end;
  do {  // Without words, the result is zero.
    end = least(k + DEPTH, words);
    pack_rows(a, first, last, k, end, packed_rows);
    for (size_t j = 0; j < width; j += TILE)
      multiply_block(a.numbers, packed_rows, last - first, end - k,
                     packed + j * words + k * TILE, !k, result + j, stride, width - j);
  } while ((k = end) < words);
}

typedef struct {
  Factor factor;
  int is_right;
  size_t begin, end;  // Words of the depth.
  word *packed;
} Pack;

// Pack words of a factor: columns in tiles of [words, columns], or rows as [rows, words].
static void pack(const void *work, size_t part, size_t parts) {
  const Pack p = *(const Pack *)work;
  size_t words = p.end - p.begin, along = p.factor.along;
  for (size_t i = part * TILE; i < along; i += parts * TILE)
    if (p.is_right)
      pack_columns(p.factor, i, p.begin, p.end, p.packed + i * words);
    else
      pack_rows(p.factor, i, least(i + TILE, along), p.begin, p.end, p.packed + i * words);
}

typedef struct {
  Factor a, b;
  size_t begin, end;  // Words of the depth.
  float *result;
  word *packed, *packed_in_part;  // The smaller factor, and for each part a block of the other one.
  atomic_size_t *next;            // The next block that no part has begun.
} Matmul;

// Compute a @ b. Parts share blocks of rows if `b` was packed, or of columns if `a` was.
static void matmul(const void *work, size_t part, size_t parts) {
  (void)parts;
  const Matmul m = *(const Matmul *)work;
  size_t rows = m.a.along, width = m.b.along, words = m.end - m.begin;
  if (rows > width) {
    word *packed = m.packed_in_part + part * BLOCK * DEPTH;
    for (size_t i; (i = atomic_fetch_add(m.next, BLOCK)) < rows;)
      multiply_range(m.a, i, least(i + BLOCK, rows), m.packed, width, packed, m.result + i * width,
                     width);
  } else {
    word *packed = m.packed_in_part + part * words * TILE;
    for (size_t j; (j = atomic_fetch_add(m.next, TILE)) < width;) {
      pack_columns(m.b, j, m.begin, m.end, packed);
      multiply_block(m.a.numbers, m.packed, rows, words, packed, !m.begin, m.result + j, width,
                     width - j);
    }
  }
}

// Compute exp(x) for x <= 0, at least exp(-87).
static Floats exp_lanes(Floats x) {
  static const float terms[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1, 1};
  const Floats zero = {0}, whole = zero + 0x1.8p23f;  // The sum with it is rounded to an integer.
  x = greater(zero - 87, x);  // The second operand is the result if one is NaN.
  Floats n = multiply_add(x, zero + 1.44269504f, whole) - whole;
  Floats r = multiply_add(n, zero - 0.693359375f, x);
  r = multiply_add(n, zero + 2.12194440e-4f, r);
  Floats p = zero + terms[0];
  for (int i = 1; i < 7; i++) p = multiply_add(p, r, zero + terms[i]);
  return p * (Floats)((__builtin_convertvector(n, Integers) + 127) << 23);
}

typedef struct {
  Factor a, b;  // Inputs [rows, features], and the kernel.
  const float *bias;
  const int32_t *targets;
  float *sums, *shifted;  // [rows].
  void *d_logits;         // [rows, vocabulary] in the dtype of the inputs, or NULL.
  word *packed, *packed_in_part;
  float *logits;  // [parts, rows of a block, vocabulary rounded up to whole tiles].
  atomic_size_t *next;
} CrossEntropy;

// Compute the cross-entropies of softmax(a @ b + bias); the parts share blocks of rows.
//
// A cross-entropy is the logarithm of `sums` plus `shifted`. `d_logits` are its derivatives.
static void cross_entropy(const void *work, size_t part, size_t parts) {
  const CrossEntropy c = *(const CrossEntropy *)work;
  size_t rows = c.a.along, width = c.b.along, stride = (width + TILE - 1) / TILE * TILE;
  int numbers = c.a.numbers;
  word *packed = c.packed_in_part + part * BLOCK * DEPTH;
  float *logits = c.logits + part * BLOCK * stride;
  size_t block = least((rows + parts - 1) / parts, BLOCK);
  for (size_t i; (i = atomic_fetch_add(c.next, block)) < rows;) {
    size_t last = least(i + block, rows);
    multiply_range(c.a, i, last, c.packed, stride, packed, logits, stride);
    for (size_t row = i; row < last; row++) {
      float *z = logits + (row - i) * stride;
      Floats most = (Floats){0} - __builtin_inff(), total = {0};
      for (size_t j = 0; j < width; j += LANES) {
        Floats x = load(z + j) + load_first(c.bias + j, width - j, -__builtin_inff());
        store(z + j, x);
        most = greater(most, x);
      }
      float largest = find_largest(most);
      size_t target = c.targets[row];  // The loss of one outside of the vocabulary is NaN.
      c.shifted[row] = target < width ? largest - z[target] : __builtin_nanf("");
      for (size_t j = 0; j < width; j += LANES) {
        Floats x = exp_lanes(load(z + j) - largest);
        store(z + j, x);
        total += x;
      }
      float sum = c.sums[row] = add_lanes(total);
      if (!c.d_logits) continue;
      if (target < width) z[target] -= sum;
      for (size_t j = 0; j < width; j += LANES)
        store_numbers(numbers, c.d_logits, row * width + j, load(z + j) * (1 / sum), width - j);
    }
  }
}

// The kinds of recurrence, as in in_c.py. They differ in the functions below, without matmuls.
enum { LSTM, PEEPHOLE_LSTM, GRU, RNN };

INLINE int has_cell(int kind) { return kind == LSTM || kind == PEEPHOLE_LSTM; }

// Return the number of sums of a hidden unit. Those of a GRU are r, z, and the parts of the candidate
// that read the hidden state and the inputs. A tile has all sums of a vector of units, or the only sum
// of 4 vectors.
INLINE size_t count_sums(int kind) { return kind == RNN ? 1 : 4; }

// Return the number of sums that read the inputs.
INLINE size_t count_inputs(int kind) { return kind == GRU ? 3 : count_sums(kind); }

INLINE size_t count_units(int kind) { return TILE / count_sums(kind); }

// Steps that do not simply read the carry: a reset step reads zeros, a frozen one leaves it as it is.
enum { RESET = 1, FROZEN = 2 };

static inline int get_mark(const uint8_t *marks, size_t row) { return marks ? marks[row] : 0; }

// The states of a vector of hidden units, or their cotangents; zeros where a kind has no cell state.
typedef struct {
  Floats cell, hidden;
} State;

// Load the states that a step with this mark reads.
INLINE State load_state(int kind, int mark, const float *cell, const float *hidden, size_t at) {
  State state = {0};
  if (mark == RESET) return state;
  if (has_cell(kind)) state.cell = load(cell + at);
  state.hidden = load(hidden + at);
  return state;
}

INLINE void store_state(int kind, State state, float *cell, float *hidden, size_t at) {
  if (has_cell(kind)) store(cell + at, state.cell);
  store(hidden + at, state.hidden);
}

// Compute the next state, and in place of the sums the gates (of a GRU r, z, its third sum, and n).
// `peepholes` are those of the first unit for i; those for f and o follow after `hidden` numbers each.
INLINE State activate(int kind, Floats *z, State before, const float *peepholes, size_t hidden) {
  if (kind == RNN) {
    z[0] = tanh_lanes(z[0]);
    return (State){before.cell, z[0]};
  }
  if (kind == PEEPHOLE_LSTM) {
    z[0] += load(peepholes) * before.cell;
    z[1] += load(peepholes + hidden) * before.cell;
  }
  z[0] = sigmoid(z[0]);
  z[1] = sigmoid(z[1]);
  if (kind == GRU) {
    z[3] = tanh_lanes(z[3] + z[0] * z[2]);
    return (State){before.cell, (1 - z[1]) * z[3] + z[1] * before.hidden};
  }
  z[2] = tanh_lanes(z[2]);
  Floats cell = multiply_add(z[1], before.cell, z[0] * z[2]);
  if (kind == PEEPHOLE_LSTM) z[3] += load(peepholes + 2 * hidden) * cell;
  z[3] = sigmoid(z[3]);
  return (State){cell, z[3] * tanh_lanes(cell)};
}

// Compute the cotangents of the sums, and return that of the state before a step, without what
// reaches the hidden state through a matmul. `d` is the cotangent of the state after it.
INLINE State pull_back(int kind, const Floats *gate, State before, State after, State d,
                       const float *peepholes, size_t hidden, Floats *d_sum) {
  const Floats zero = {0};
  if (kind == RNN) {
    d_sum[0] = d.hidden * (1 - after.hidden * after.hidden);
    return (State){zero, zero};
  }
  if (kind == GRU) {
    Floats r = gate[0], z = gate[1], n = gate[3];
    d_sum[3] = d.hidden * (1 - z) * (1 - n * n);
    d_sum[2] = d_sum[3] * r;
    d_sum[0] = d_sum[3] * gate[2] * r * (1 - r);
    d_sum[1] = d.hidden * (before.hidden - n) * z * (1 - z);
    return (State){zero, d.hidden * z};
  }
  Floats i = gate[0], f = gate[1], g = gate[2], o = gate[3], activated = tanh_lanes(after.cell);
  Floats d_cell = d.cell + d.hidden * o * (1 - activated * activated);
  d_sum[3] = d.hidden * activated * o * (1 - o);
  if (kind == PEEPHOLE_LSTM) d_cell += d_sum[3] * load(peepholes + 2 * hidden);
  d_sum[0] = d_cell * g * i * (1 - i);
  d_sum[1] = d_cell * before.cell * f * (1 - f);
  d_sum[2] = d_cell * i * (1 - g * g);
  Floats d_before = d_cell * f;
  if (kind == PEEPHOLE_LSTM)
    d_before += d_sum[0] * load(peepholes) + d_sum[1] * load(peepholes + hidden);
  return (State){d_before, zero};
}

// A step of a layer consists of blocks: a few rows of a tile. A part has all blocks of some texts, or
// a range of the blocks of all, by tile.
typedef struct {
  size_t row, rows, in_tile;  // The texts, and the number of their blocks in a tile.
  size_t first, end;
} Blocks;

typedef struct {
  size_t row, rows, tile;
} Block;

// Return the blocks of a part; a tile is for `units` hidden units.
static Blocks divide(int numbers, size_t batch, size_t hidden, size_t units, int by_texts,
                     size_t part, size_t parts) {
  size_t first = begin(part, parts, batch, 1), end = begin(part + 1, parts, batch, 1);
  Blocks b = {.row = by_texts ? first : 0, .rows = by_texts ? end - first : batch};
  b.in_tile = count_blocks(numbers, b.rows);
  b.end = (hidden + units - 1) / units * b.in_tile;
  if (by_texts) return b;
  b.first = begin(part, parts, b.end, 1);
  b.end = begin(part + 1, parts, b.end, 1);
  return b;
}

static Block get_block(Blocks b, size_t i) {
  size_t n = i % b.in_tile, row = begin(n, b.in_tile, b.rows, 1);
  return (Block){b.row + row, begin(n + 1, b.in_tile, b.rows, 1) - row, i / b.in_tile};
}

// Run a function for a kind of recurrence that the compiler knows.
#define FOR_KIND(function, kind, ...)                                     \
  switch (kind) {                                                         \
    case LSTM: return function(LSTM, __VA_ARGS__);                        \
    case PEEPHOLE_LSTM: return function(PEEPHOLE_LSTM, __VA_ARGS__);      \
    case GRU: return function(GRU, __VA_ARGS__);                          \
    case RNN: return function(RNN, __VA_ARGS__);                          \
  }

typedef struct {
  int kind, numbers;
  size_t batch, words, hidden;
  const word *rows;     // [batch, words]: inputs and the hidden state.
  const word *packed;   // The kernel, [depth, sums * hidden], by tiles.
  size_t stride;        // Between rows of `added`, 0 if all are the same.
  const float *added;   // To the sums.
  const float *first_cell, *first_hidden, *peepholes;
  float *cell, *output;  // [batch, hidden].
} Step;

INLINE void step_of(int kind, Step s, size_t part, size_t parts) {
  size_t num_sums = count_sums(kind), units = count_units(kind);
  Blocks blocks = divide(s.numbers, s.batch, s.hidden, units, 0, part, parts);
  for (size_t i = blocks.first; i < blocks.end; i++) {
    Block block = get_block(blocks, i);
    sums sum;
    multiply(s.numbers, block.rows, s.rows + block.row * s.words, s.words,
             s.packed + block.tile * TILE * s.words, (Zeros){0}, sum);
    for (size_t r = 0; r < block.rows; r++)
      for (size_t v = 0, unit = block.tile * units; v < VECTORS && unit < s.hidden;
           v += num_sums, unit += LANES) {
        size_t row = block.row + r, at = row * s.hidden + unit;
        Floats *z = sum[r] + v;
        for (size_t k = 0; k < num_sums; k++)
          z[k] += load(s.added + row * s.stride + k * s.hidden + unit);
        State before = load_state(kind, 0, s.first_cell, s.first_hidden, at);
        State after = activate(kind, z, before, s.peepholes + unit, s.hidden);
        store_state(kind, after, s.cell, s.output, at);
      }
  }
}

// Run one step.
static void step(const void *work, size_t part, size_t parts) {
  const Step s = *(const Step *)work;
  FOR_KIND(step_of, s.kind, s, part, parts)
}

typedef struct {
  int kind, numbers, by_texts;
  size_t time, batch, features, hidden, depth;
  const uint8_t *marks;  // [time, batch], or NULL.
  const float *inputs, *first_cell, *first_hidden, *peepholes;
  const float *added;      // To the sums that read inputs, [time, batch, sums * hidden], or NULL.
  const word *packed;      // The kernel, [depth, sums * hidden], by tiles.
  float *gates;            // Of kinds with four sums, [time, batch, 4 * hidden]; may be `added`.
  float *cells, *outputs;  // [time, batch, hidden].
  word *rows;              // Of numbers [time, batch, depth].
} Forward;

// Store a hidden state as factors of a step, which may read zeros instead.
INLINE void store_hidden(const Forward *l, size_t row, size_t unit, Floats hidden) {
  if (get_mark(l->marks, row) == RESET) hidden = (Floats){0};
  store_numbers(l->numbers, l->rows, row * l->depth + unit, hidden, LANES);
}

// Store the inputs of a step, and 1 for the bias, as factors; a part is a range of texts.
INLINE void store_inputs(const Forward *l, size_t t, size_t part, size_t parts) {
  const Floats one = {1};
  size_t end = t * l->batch + begin(part + 1, parts, l->batch, 1);
  for (size_t row = t * l->batch + begin(part, parts, l->batch, 1); row < end; row++) {
    size_t to = row * l->depth + l->hidden;
    for (size_t j = 0; j < l->features; j += LANES) {
      size_t n = l->features - j;
      Floats x = load_first(l->inputs + row * l->features + j, n, 0);
      store_numbers(l->numbers, l->rows, to + j, x, n);
    }
    store_numbers(l->numbers, l->rows, to + l->features, one, l->depth - l->hidden - l->features);
  }
}

// Store the factors of the first step.
static void begin_forward(const void *work, size_t part, size_t parts) {
  const Forward *l = work;
  size_t end = begin(part + 1, parts, l->batch, 1);
  for (size_t row = begin(part, parts, l->batch, 1); row < end; row++)
    for (size_t j = 0; j < l->hidden; j += LANES)
      store_hidden(l, row, j, load(l->first_hidden + row * l->hidden + j));
  store_inputs(l, 0, part, parts);
}

// Add to the sums of a vector of hidden units; the third of a GRU does not read inputs.
INLINE void add_to_sums(int kind, Forward l, size_t row, size_t unit, Floats *z) {
  const float *x = l.added + row * count_inputs(kind) * l.hidden + unit;
  for (size_t k = 0; k < count_sums(kind); k++) {
    if (kind == GRU && k == 2) continue;
    z[k] += load(x);
    x += l.hidden;
  }
}

INLINE void forward_of(int kind, Forward l, size_t t, size_t part, size_t parts) {
  size_t words = l.depth / l.numbers, bias = l.hidden + l.features;
  size_t num_sums = count_sums(kind), units = count_units(kind);
  // The candidate's sums: the first does not read the inputs, and the second not the hidden state.
  Zeros zeros = {kind == GRU ? ZEROS_OF_GRU : NO_ZEROS, l.hidden / l.numbers, bias / l.numbers};
  const float *cells = t ? l.cells + (t - 1) * l.batch * l.hidden : l.first_cell;
  const float *hidden = t ? l.outputs + (t - 1) * l.batch * l.hidden : l.first_hidden;
  if (t + 1 < l.time) store_inputs(&l, t + 1, part, parts);
  Blocks blocks = divide(l.numbers, l.batch, l.hidden, units, l.by_texts, part, parts);
  for (size_t i = blocks.first; i < blocks.end; i++) {
    Block block = get_block(blocks, i);
    sums sum;
    multiply(l.numbers, block.rows, l.rows + (t * l.batch + block.row) * words, words,
             l.packed + block.tile * TILE * words, zeros, sum);
    for (size_t r = 0; r < block.rows; r++)
      for (size_t v = 0, unit = block.tile * units; v < VECTORS && unit < l.hidden;
           v += num_sums, unit += LANES) {
        size_t row = t * l.batch + block.row + r;
        int mark = get_mark(l.marks, row);
        State before = load_state(kind, mark, cells, hidden, (block.row + r) * l.hidden + unit);
        if (l.added) add_to_sums(kind, l, row, unit, sum[r] + v);
        State after = activate(kind, sum[r] + v, before, l.peepholes + unit, l.hidden);
        for (size_t k = 0; num_sums > 1 && k < num_sums; k++)
          store(l.gates + (row * num_sums + k) * l.hidden + unit, sum[r][v + k]);
        if (mark == FROZEN) after = before;
        store_state(kind, after, l.cells, l.outputs, row * l.hidden + unit);
        if (t + 1 < l.time) store_hidden(&l, row + l.batch, unit, after.hidden);
      }
  }
}

// Run a step of the layer over inputs [time, batch, features], after `begin_forward`. It also stores
// the factors of the next step.
//
// The kernel consists of the recurrent kernel, the input kernel, the bias, and zeros that fill the
// last word. `rows` are its factors: the hidden state, the inputs, 1, and zeros.
static void forward(const void *work, size_t t, size_t part, size_t parts) {
  const Forward l = *(const Forward *)work;
  FOR_KIND(forward_of, l.kind, l, t, part, parts)
}

typedef struct {
  int kind, numbers, by_texts;
  size_t time, batch, hidden;
  const uint8_t *marks;  // As in `Forward`.
  const float *gates, *first_cell, *first_hidden, *cells, *outputs, *d_outputs, *peepholes;
  const word *packed;        // The transposed recurrent kernel, [sums * hidden, hidden].
  word *d_sums;              // Of numbers [time, batch, sums * hidden].
  float *d_cell, *d_hidden;  // [batch, hidden], of the last state, and then of the first.
} Backward;

// Add to the cotangent of the hidden state before step t what passes through the matmul.
INLINE void multiply_back(int kind, Backward l, size_t t, Blocks blocks) {
  size_t hidden = l.hidden, words = count_sums(kind) * hidden / l.numbers;
  Zeros zeros = {.kind = kind == GRU ? LAST_WORDS : NO_ZEROS};
  zeros.first = 3 * hidden / l.numbers;  // Of n.
  for (size_t i = blocks.first; i < blocks.end; i++) {
    Block block = get_block(blocks, i);
    sums sum;
    multiply(l.numbers, block.rows, l.d_sums + (t * l.batch + block.row) * words, words,
             l.packed + block.tile * TILE * words, zeros, sum);
    for (size_t r = 0; r < block.rows; r++) {
      size_t row = block.row + r;
      int is_reset = get_mark(l.marks, t * l.batch + row) == RESET;
      for (size_t v = 0, j = block.tile * TILE; v < VECTORS && j < hidden; v++, j += LANES) {
        float *to = l.d_hidden + row * hidden + j;
        store(to, is_reset ? (Floats){0} : sum[r][v] + load(to));
      }
    }
  }
}

// Compute the cotangents of the sums of step t for hidden units [first, end) of a text.
INLINE void pull_back_row(int kind, Backward l, size_t t, size_t b, size_t first, size_t end) {
  size_t hidden = l.hidden, num_sums = count_sums(kind), width = num_sums * hidden;
  const float *cells = t ? l.cells + (t - 1) * l.batch * hidden : l.first_cell;
  const float *outputs = t ? l.outputs + (t - 1) * l.batch * hidden : l.first_hidden;
  size_t row = t * l.batch + b;
  int mark = get_mark(l.marks, row);
  for (size_t j = first; j < end; j += LANES) {
    size_t at = b * hidden + j;
    Floats gate[VECTORS], d_sum[VECTORS] = {0};
    State d = load_state(kind, 0, l.d_cell, l.d_hidden, at);
    d.hidden += load(l.d_outputs + row * hidden + j);
    if (mark != FROZEN) {
      for (size_t k = 0; num_sums > 1 && k < num_sums; k++)
        gate[k] = load(l.gates + row * width + k * hidden + j);
      State before = load_state(kind, mark, cells, outputs, at);
      State after = load_state(kind, 0, l.cells, l.outputs, row * hidden + j);
      d = pull_back(kind, gate, before, after, d, l.peepholes + j, hidden, d_sum);
    }
#pragma GCC unroll 4
    for (size_t k = 0; k < num_sums; k++)
      store_numbers(l.numbers, l.d_sums, row * width + k * hidden + j, d_sum[k], LANES);
    if (mark == RESET) d.cell = (Floats){0};
    store_state(kind, d, l.d_cell, l.d_hidden, at);
  }
}

INLINE void backward_of(int kind, Backward l, size_t i, size_t part, size_t parts) {
  Blocks blocks = divide(l.numbers, l.batch, l.hidden, TILE, l.by_texts, part, parts);
  if (i > 0) multiply_back(kind, l, l.time - i, blocks);
  for (size_t n = 0; i < l.time && n < blocks.in_tile; n++) {
    // The tiles of this part that have block n of the texts.
    size_t first = (blocks.first + blocks.in_tile - 1 - n) / blocks.in_tile;
    size_t end = (blocks.end + blocks.in_tile - 1 - n) / blocks.in_tile;
    Block block = get_block(blocks, n);
    for (size_t b = block.row; b < block.row + block.rows; b++)
      pull_back_row(kind, l, l.time - 1 - i, b, first * TILE, least(end * TILE, l.hidden));
  }
}

// Run step i of time + 1: compute the cotangents of the sums of step time - 1 - i from those of the
// step after it. After all, `d_cell` and `d_hidden` are those of the first state.
static void backward(const void *work, size_t i, size_t part, size_t parts) {
  const Backward l = *(const Backward *)work;
  FOR_KIND(backward_of, l.kind, l, i, part, parts)
}

static void *data(void **buffers, int i) { return ((XLA_FFI_Buffer *)buffers[i])->data; }

// Return a dimension of an array, 0 if it has fewer.
static size_t size(void **buffers, int i, int axis) {
  XLA_FFI_Buffer *buffer = buffers[i];
  return axis < buffer->rank ? buffer->dims[axis] : 0;
}

// Return the number of elements of an array, float32 or bfloat16, in a word of 32 bits.
static int numbers(void **buffers, int i) {
  XLA_FFI_DataType dtype = ((XLA_FFI_Buffer *)buffers[i])->dtype;
  return dtype == XLA_FFI_DataType_BF16 ? BFLOAT16 : FLOAT32;
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

// Return an attribute of a call, an integer; -1 if there is none of this name.
static int64_t get_attribute(XLA_FFI_CallFrame *frame, const char *name) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    XLA_FFI_ByteSpan *found = frame->attrs.names[i];
    XLA_FFI_Scalar *scalar = frame->attrs.attrs[i];
    if (found->len == strlen(name) && !memcmp(found->ptr, name, found->len))
      if (frame->attrs.types[i] == XLA_FFI_AttrType_SCALAR && scalar->dtype == XLA_FFI_DataType_S64)
        return *(int64_t *)scalar->value;
  }
  return -1;
}

// Run a task in the number of parts that the attribute of the call specifies; wait for all.
static void run(XLA_FFI_CallFrame *frame, task *task, const void *work) {
  size_t parts = get_attribute(frame, "parts");
  Job *job = malloc(sizeof(Job));
  *job = (Job){.run = task, .work = work, .parts = parts};
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

typedef void step_task(const void *work, size_t step, size_t part, size_t parts);

typedef struct {
  step_task *run;
  const void *work;
  size_t steps;
  int are_separate;      // Parts do not read what other parts compute.
  atomic_size_t done;    // Parts of all steps.
  atomic_size_t *begun;  // Steps, by part.
} Steps;

// Run a part of each step, and the parts that no other thread has begun. Unless parts are separate, a
// step begins after all parts of the one before.
static void run_share(const void *work, size_t share, size_t parts) {
  Steps *s = (Steps *)work;
  for (size_t step = 0; step < s->steps; step++) {
    if (s->are_separate) {
      s->run(s->work, step, share, parts);
      continue;
    }
    for (size_t i = 0; i < parts; i++) {
      size_t part = (share + i) % parts, begun = step;
      if (!atomic_compare_exchange_strong(&s->begun[part], &begun, step + 1)) continue;
      s->run(s->work, step, part, parts);
      atomic_fetch_add(&s->done, 1);
    }
    for (int i = 0; atomic_load(&s->done) < (step + 1) * parts; i++)
      i < 1000 ? relax() : (void)sched_yield();
  }
}

static void run_steps(XLA_FFI_CallFrame *frame, step_task *task, const void *work, size_t steps,
                      int are_separate) {
  atomic_size_t *begun = calloc(get_attribute(frame, "parts"), sizeof(atomic_size_t));
  run(frame, run_share, &(Steps){task, work, steps, are_separate, 0, begun});
  free(begun);
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

// What an argument or result must be.
enum { MAX_RANK = 5, U8 = XLA_FFI_DataType_U8, S32 = XLA_FFI_DataType_S32, U32 = XLA_FFI_DataType_U32 };
enum { F32 = XLA_FFI_DataType_F32, BF16 = XLA_FFI_DataType_BF16 };
typedef struct {
  int dtype, rank;
  int64_t dims[MAX_RANK];
} Array;

static int get_dtype(int numbers) { return numbers == BFLOAT16 ? BF16 : F32; }

// Return whether arrays, all arguments and then all results, are what they must be.
static int check(XLA_FFI_CallFrame *frame, const Array *arrays) {
  for (int64_t i = 0; i < frame->args.size + frame->rets.size; i++) {
    int64_t result = i - frame->args.size;
    XLA_FFI_Buffer *buffer = result < 0 ? frame->args.args[i] : frame->rets.rets[result];
    Array expected = arrays[i];
    if (buffer->dtype != (XLA_FFI_DataType)expected.dtype || buffer->rank != expected.rank ||
        (!HAS_BFLOAT16 && expected.dtype == BF16) ||
        memcmp(buffer->dims, expected.dims, expected.rank * sizeof(int64_t)))
      return 0;
  }
  return 1;
}

// Prepare the memory of the results.
static void prepare_results(XLA_FFI_CallFrame *frame) {
  for (int64_t i = 0; i < frame->rets.size; i++) {
    XLA_FFI_Buffer *buffer = frame->rets.rets[i];
    size_t bytes = buffer->dtype == XLA_FFI_DataType_BF16 ? sizeof(bits16) : sizeof(word);
    for (int64_t axis = 0; axis < buffer->rank; axis++) bytes *= buffer->dims[axis];
    prefer_huge_pages(buffer->data, bytes);
  }
}

static XLA_FFI_Error *fail(XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message,
                                    XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

// Define the function that XLA calls. Its body returns 0 if arrays are wrong, before it computes anything;
// in_c.py passes none, and its callers check theirs, so the error says no more.
#define HANDLER(name, num_arguments, num_results)                          \
  static int call_##name(XLA_FFI_CallFrame *, void **in, void **out);      \
  XLA_FFI_Error *lstm_##name(XLA_FFI_CallFrame *frame) {                   \
    if (is_query(frame)) return NULL;                                      \
    if (frame->args.size == num_arguments && frame->rets.size == num_results && \
        get_attribute(frame, "parts") > 0 &&                               \
        call_##name(frame, frame->args.args, frame->rets.rets))            \
      return NULL;                                                         \
    return fail(frame, "lstm_" #name ": wrong arrays");                    \
  }                                                                        \
  static int call_##name(XLA_FFI_CallFrame *frame, void **in, void **out)

// Return whether this is a kind of recurrence, and the hidden size is supported.
static int check_kind(int64_t kind, size_t hidden) {
  return kind >= LSTM && kind <= RNN && hidden % LANES == 0;
}

// An array that a call does not need is empty: cell states and peepholes of kinds without them, gates
// of a simple RNN, marks if there are none, and what is added if the loop multiplies the inputs.

static Factor factor(void **in, int i, int is_transposed) {
  return (Factor){numbers(in, i), is_transposed, size(in, i, is_transposed),
                  size(in, i, !is_transposed), data(in, i)};
}

// Return whether parts are ranges of texts, not of blocks. Each thread then reads the whole kernel at
// every step; otherwise it reads a part of it, and what other threads computed for all texts. The
// latter was faster for larger kernels and fewer texts, on two cores of Zen 5 and of a Xeon.
static int divides_texts(size_t batch, size_t hidden) { return hidden * hidden < 6000 * batch; }

static size_t count_tile_columns(size_t width) { return (width + TILE - 1) / TILE * TILE; }

HANDLER(matmul, 2, 3) {
  Factor a = factor(in, 0, get_attribute(frame, "transpose_a"));
  Factor b = factor(in, 1, !get_attribute(frame, "transpose_b"));
  size_t rows = a.along, width = b.along, words = count_words(a);
  int is_right = rows > width;  // Whether `b` is packed whole.
  int dtype = get_dtype(a.numbers);
  size_t packed = is_right ? count_tile_columns(width) : rows;
  size_t most = is_right ? words : least(words, LARGEST_DEPTH);
  const Array arrays[] = {
      {dtype, 2, {size(in, 0, 0), size(in, 0, 1)}},
      {dtype, 2, {b.is_transposed ? a.depth : width, b.is_transposed ? width : a.depth}},
      {F32, 2, {rows, width}},
      {U32, 1, {packed * most}},
      {U32, 2, {get_attribute(frame, "parts"), is_right ? BLOCK * DEPTH : most * TILE}}};
  if (!check(frame, arrays)) return 0;
  size_t k = 0, end;
  do {  // Without words, the result is zero.
    atomic_size_t next = 0;
    end = least(k + most, words);
    run(frame, pack, &(Pack){is_right ? b : a, is_right, k, end, data(out, 1)});
    run(frame, matmul, &(Matmul){a, b, k, end, data(out, 0), data(out, 1), data(out, 2), &next});
  } while ((k = end) < words);
  return 1;
}

HANDLER(cross_entropy, 4, 6) {
  Factor a = factor(in, 0, 0), b = factor(in, 1, !get_attribute(frame, "is_transposed"));
  size_t rows = a.along, width = b.along, parts = get_attribute(frame, "parts");
  size_t columns = count_tile_columns(width), is_differentiable = size(out, 2, 0) > 0;
  int dtype = get_dtype(a.numbers);
  const Array arrays[] = {
      {dtype, 2, {rows, a.depth}},
      {dtype, 2, {b.is_transposed ? a.depth : width, b.is_transposed ? width : a.depth}},
      {F32, 1, {width}}, {S32, 1, {rows}}, {F32, 1, {rows}}, {F32, 1, {rows}},
      {dtype, 2, {is_differentiable * rows, is_differentiable * width}},
      {U32, 1, {columns * count_words(a)}},
      {U32, 2, {parts, BLOCK * DEPTH}},
      {U32, 3, {parts, BLOCK, columns}}};
  if (!check(frame, arrays)) return 0;
  atomic_size_t next = 0;
  run(frame, pack, &(Pack){b, 1, 0, count_words(b), data(out, 3)});
  run(frame, cross_entropy,
      &(CrossEntropy){a, b, data(in, 2), data(in, 3), data(out, 0), data(out, 1),
                      is_differentiable ? data(out, 2) : NULL, data(out, 3), data(out, 4),
                      data(out, 5), &next});
  return 1;
}

HANDLER(step, 6, 2) {
  int64_t kind = get_attribute(frame, "kind");
  int number = numbers(in, 0), dtype = get_dtype(number);
  size_t batch = size(in, 4, 0), hidden = size(in, 4, 1), words = size(in, 1, 1);
  size_t num_sums = count_sums(kind), width = num_sums * hidden, units = count_units(kind);
  size_t cell = has_cell(kind) ? hidden : 0, is_shared = size(in, 2, 0) == 1;
  const Array arrays[] = {
      {dtype, 2, {batch, words * number}},
      {dtype, 5, {(hidden + units - 1) / units, words, VECTORS, LANES, number}},
      {F32, 2, {is_shared ? 1 : batch, width}},
      {F32, 2, {batch, cell}}, {F32, 2, {batch, hidden}},
      {F32, 2, {kind == PEEPHOLE_LSTM ? 3 : 0, hidden}},
      {F32, 2, {batch, cell}}, {F32, 2, {batch, hidden}}};
  if (!check_kind(kind, hidden) || !check(frame, arrays)) return 0;
  run(frame, step,
      &(Step){kind, number, batch, words, hidden, data(in, 0), data(in, 1),
              is_shared ? 0 : width, data(in, 2), data(in, 3), data(in, 4), data(in, 5),
              data(out, 0), data(out, 1)});
  return 1;
}

HANDLER(forward, 7, 4) {
  int64_t kind = get_attribute(frame, "kind");
  int number = numbers(out, 3), dtype = get_dtype(number);
  size_t time = size(in, 0, 0), batch = size(in, 0, 1), features = get_attribute(frame, "features");
  size_t hidden = size(in, 3, 1), units = count_units(kind);
  size_t words = (hidden + features + 1 + number - 1) / number, depth = words * number;
  size_t cell = has_cell(kind) ? hidden : 0, num_marks = size(in, 5, 0) ? time : 0;
  size_t added = size(in, 6, 2) ? count_inputs(kind) * hidden : 0;
  const Array arrays[] = {
      {F32, 3, {time, batch, features}},
      {dtype, 5, {(hidden + units - 1) / units, words, VECTORS, LANES, number}},
      {F32, 2, {batch, cell}}, {F32, 2, {batch, hidden}},
      {F32, 2, {kind == PEEPHOLE_LSTM ? 3 : 0, hidden}}, {U8, 2, {num_marks, batch}},
      {F32, 3, {time, batch, added}},
      {F32, 3, {time, batch, kind == RNN ? 0 : 4 * hidden}},
      {F32, 3, {time, batch, cell}}, {F32, 3, {time, batch, hidden}},
      {dtype, 3, {time, batch, depth}}};
  if (!check_kind(kind, hidden) || !check(frame, arrays)) return 0;
  prepare_results(frame);
  const Forward work = {
      kind, number, divides_texts(batch, hidden), time, batch, features, hidden, depth,
      num_marks ? data(in, 5) : NULL, data(in, 0), data(in, 2), data(in, 3), data(in, 4),
      added ? data(in, 6) : NULL, data(in, 1), data(out, 0), data(out, 1), data(out, 2),
      data(out, 3)};
  if (time) run(frame, begin_forward, &work);
  run_steps(frame, forward, &work, time, work.by_texts);
  return 1;
}

HANDLER(backward, 11, 3) {
  int64_t kind = get_attribute(frame, "kind");
  int number = numbers(out, 0), dtype = get_dtype(number);
  size_t time = size(in, 6, 0), batch = size(in, 6, 1), hidden = size(in, 6, 2);
  size_t width = count_sums(kind) * hidden, cell = has_cell(kind) ? hidden : 0;
  size_t num_marks = size(in, 10, 0) ? time : 0;
  const Array arrays[] = {
      {F32, 3, {time, batch, kind == RNN ? 0 : width}},
      {dtype, 4, {(hidden + TILE - 1) / TILE, width / number, TILE, number}},
      {F32, 2, {batch, cell}}, {F32, 2, {batch, hidden}},
      {F32, 3, {time, batch, cell}}, {F32, 3, {time, batch, hidden}},
      {F32, 3, {time, batch, hidden}},
      {F32, 2, {batch, cell}}, {F32, 2, {batch, hidden}},
      {F32, 2, {kind == PEEPHOLE_LSTM ? 3 : 0, hidden}}, {U8, 2, {num_marks, batch}},
      {dtype, 3, {time, batch, width}},
      {F32, 2, {batch, cell}}, {F32, 2, {batch, hidden}}};
  if (!check_kind(kind, hidden) || !check(frame, arrays)) return 0;
  prepare_results(frame);
  const Backward work = {
      kind, number, divides_texts(batch, hidden), time, batch, hidden,
      num_marks ? data(in, 10) : NULL, data(in, 0), data(in, 2), data(in, 3), data(in, 4),
      data(in, 5), data(in, 6), data(in, 9), data(in, 1), data(out, 0), data(out, 1), data(out, 2)};
  run_steps(frame, backward, &work, time + 1, work.by_texts);
  return 1;
}

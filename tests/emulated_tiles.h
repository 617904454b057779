// Compute AMX's instructions without AMX, so that its code is tested on other processors.
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

static _Thread_local struct {
  int configured, rows[8], bytes[8];
  char content[8][16][64];
} tiles;

static void configure(const unsigned char *config) {
  if (config[0] != 1) abort();  // The only palette.
  tiles.configured = 1;
  for (int i = 0; i < 8; i++) {
    tiles.bytes[i] = config[16 + 2 * i];
    tiles.rows[i] = config[48 + i];
  }
}

static char *tile(int i) {
  if (!tiles.configured || !tiles.rows[i]) abort();
  return tiles.content[i][0];
}

static void load_tile(int i, const char *from, size_t stride) {
  memset(tile(i), 0, sizeof(tiles.content[i]));
  for (int r = 0; r < tiles.rows[i]; r++)
    memcpy(tiles.content[i][r], from + r * stride, tiles.bytes[i]);
}

static void save_tile(int i, char *to, size_t stride) {
  for (int r = 0; r < tiles.rows[i]; r++)
    memcpy(to + r * stride, tile(i) + 64 * r, tiles.bytes[i]);
}

static void add_tile(int to, int a, int b) {
  if (tiles.rows[a] != tiles.rows[to] || tiles.bytes[b] != tiles.bytes[to]) abort();
  if (4 * tiles.rows[b] != tiles.bytes[a]) abort();
  float *sums = (float *)tile(to);
  const unsigned short *left = (const unsigned short *)tile(a);
  const unsigned short *right = (const unsigned short *)tile(b);
  for (int r = 0; r < tiles.rows[to]; r++)
    for (int k = 0; k < tiles.bytes[a] / 2; k++)
      for (int c = 0; c < tiles.bytes[to] / 4; c++) {
        unsigned x = left[32 * r + k] << 16, y = right[32 * (k / 2) + 2 * c + k % 2] << 16;
        float u, v;
        memcpy(&u, &x, 4);
        memcpy(&v, &y, 4);
        sums[16 * r + c] += u * v;
      }
}

#define _tile_loadconfig(config) configure((const void *)(config))
#define _tile_release() (tiles.configured = 0)
#define _tile_zero(i) memset(tile(i), 0, sizeof(tiles.content[i]))
#define _tile_loadd(i, from, stride) load_tile(i, (const char *)(from), stride)
#define _tile_stored(i, to, stride) save_tile(i, (char *)(to), stride)
#define _tile_dpbf16ps(to, a, b) add_tile(to, a, b)
#define syscall(...) 0

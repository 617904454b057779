// Call the functions of the library as XLA does, on one thread: run the calls that standard input
// describes, and write the number of lanes, whether the processor has bfloat16, and the errors and
// results of the calls. tests/call_handlers.py has the format.
#include <stdio.h>

#include "lstm.c"

static char message[1000];

static XLA_FFI_Error *create_error(XLA_FFI_Error_Create_Args *args) {
  if (args->errc != XLA_FFI_Error_Code_INVALID_ARGUMENT) abort();
  return (XLA_FFI_Error *)strncpy(message, args->message, sizeof(message) - 1);
}

static XLA_FFI_Error *run_now(XLA_FFI_ThreadPool_Schedule_Args *args) {
  args->task(args->data);
  return NULL;
}

static void read_all(void *to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) abort();
}

static int64_t read_number(void) {
  int64_t number;
  read_all(&number, sizeof(number));
  return number;
}

typedef char Text[32];

static void read_text(Text text) {
  size_t length = read_number();
  if (length >= sizeof(Text)) abort();
  read_all(text, length);
  text[length] = 0;
}

static XLA_FFI_Handler *find_handler(const char *name) {
  const struct {
    const char *name;
    XLA_FFI_Handler *handler;
  } handlers[] = {{"matmul", lstm_matmul},   {"cross_entropy", lstm_cross_entropy},
                  {"step", lstm_step},       {"forward", lstm_forward},
                  {"backward", lstm_backward}};
  for (int i = 0; i < 5; i++)
    if (!strcmp(handlers[i].name, name)) return handlers[i].handler;
  abort();
}

// Read one call, run it, and write the length of the error, the error, and the results.
static void run_call(void) {
  XLA_FFI_Api api = {.XLA_FFI_Error_Create = create_error, .XLA_FFI_ThreadPool_Schedule = run_now};
  void *arrays[32], *attributes[8];
  XLA_FFI_Buffer buffers[32] = {0};
  XLA_FFI_AttrType types[8];
  XLA_FFI_ByteSpan spans[8], *all_spans[8];
  XLA_FFI_Scalar scalars[8];
  int64_t values[8], sizes[32], dims[32][8];
  Text function, names[8];
  read_text(function);
  XLA_FFI_Handler *handler = find_handler(function);
  int64_t num_attributes = read_number();
  for (int64_t i = 0; i < num_attributes; i++) {
    read_text(names[i]);
    spans[i] = (XLA_FFI_ByteSpan){names[i], strlen(names[i])};
    values[i] = read_number();
    scalars[i] = (XLA_FFI_Scalar){XLA_FFI_DataType_S64, values + i};
    types[i] = XLA_FFI_AttrType_SCALAR;
    all_spans[i] = spans + i;
    attributes[i] = scalars + i;
  }
  int64_t num_arguments = read_number(), num_results = read_number();
  for (int64_t i = 0; i < num_arguments + num_results; i++) {
    buffers[i].dtype = read_number();
    buffers[i].rank = read_number();
    read_all(dims[i], buffers[i].rank * sizeof(int64_t));
    buffers[i].dims = dims[i];
    sizes[i] = read_number();
    buffers[i].data = malloc(sizes[i]);  // No byte more, for AddressSanitizer.
    read_all(buffers[i].data, sizes[i]);
    arrays[i] = buffers + i;
  }
  XLA_FFI_CallFrame frame = {
      .api = &api,
      .args = {.size = num_arguments, .args = arrays},
      .rets = {.size = num_results, .rets = arrays + num_arguments},
      .attrs = {.size = num_attributes, .types = types, .names = all_spans, .attrs = attributes},
  };
  memset(message, 0, sizeof(message));
  handler(&frame);
  int64_t length = strlen(message);
  fwrite(&length, sizeof(length), 1, stdout);
  fwrite(message, 1, length, stdout);
  for (int64_t i = 0; i < num_arguments + num_results; i++) {
    if (i >= num_arguments) fwrite(buffers[i].data, 1, sizes[i], stdout);
    free(buffers[i].data);
  }
}

int main(void) {
  int64_t facts[] = {lstm_count_lanes(), HAS_BFLOAT16};
  fwrite(facts, sizeof(facts), 1, stdout);
  for (int64_t calls = read_number(); calls > 0; calls--) run_call();
  return 0;
}

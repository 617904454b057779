// Call the functions of the library as XLA does, on one thread.
#include "lstm.c"

static XLA_FFI_Error *create_error(XLA_FFI_Error_Create_Args *args) {
  static char message[1000];
  if (args->errc != XLA_FFI_Error_Code_INVALID_ARGUMENT) abort();
  return (XLA_FFI_Error *)strncpy(message, args->message, sizeof(message) - 1);
}

static XLA_FFI_Error *run_now(XLA_FFI_ThreadPool_Schedule_Args *args) {
  args->task(args->data);
  return NULL;
}

// Return the message of the error, or NULL. The buffers are all arguments and then all results.
const char *call_handler(XLA_FFI_Handler *handler, int64_t num_attributes, const char **names,
                         int64_t *values, int64_t num_arguments, int64_t num_results,
                         XLA_FFI_Buffer *buffers) {
  XLA_FFI_Api api = {.XLA_FFI_Error_Create = create_error, .XLA_FFI_ThreadPool_Schedule = run_now};
  void *arrays[32], *attributes[8];
  XLA_FFI_AttrType types[8];
  XLA_FFI_ByteSpan spans[8], *all_spans[8];
  XLA_FFI_Scalar scalars[8];
  for (int64_t i = 0; i < num_arguments + num_results; i++) arrays[i] = buffers + i;
  for (int64_t i = 0; i < num_attributes; i++) {
    spans[i] = (XLA_FFI_ByteSpan){names[i], strlen(names[i])};
    scalars[i] = (XLA_FFI_Scalar){XLA_FFI_DataType_S64, values + i};
    types[i] = XLA_FFI_AttrType_SCALAR;
    all_spans[i] = spans + i;
    attributes[i] = scalars + i;
  }
  XLA_FFI_CallFrame frame = {
      .api = &api,
      .args = {.size = num_arguments, .args = arrays},
      .rets = {.size = num_results, .rets = arrays + num_arguments},
      .attrs = {.size = num_attributes, .types = types, .names = all_spans, .attrs = attributes},
  };
  return (const char *)handler(&frame);
}

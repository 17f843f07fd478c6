// What Triton calls of libcuda, for a device that runs nothing: it keeps what was last launched.
#include <cuda.h>
#include <string.h>

#define DOES_NOTHING(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define MOST 64

static struct {
  long count;
  void *function;
  unsigned shape[5];  // grid, threads, attributes
  int given;
  int sizes[MOST];
  unsigned long long values[MOST];
} seen;

// Sizes in bytes of the next launch's arguments.
void stub_expect(int given, const int *sizes) {
  seen.given = given;
  memcpy(seen.sizes, sizes, given * sizeof(int));
}
long stub_count(void) { return seen.count; }
void *stub_function(void) { return seen.function; }
unsigned *stub_shape(void) { return seen.shape; }
unsigned long long *stub_values(void) { return seen.values; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction f, void **arguments, void **extra) {
  unsigned shape[5] = {how->gridDimX, how->gridDimY, how->gridDimZ, how->blockDimX, how->numAttrs};
  memcpy(seen.shape, shape, sizeof(shape));
  memset(seen.values, 0, sizeof(seen.values));
  for (int i = 0; i < seen.given; i++) memcpy(&seen.values[i], arguments[i], seen.sizes[i]);
  seen.function = f;
  seen.count++;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "stub";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device) {
  *value = what == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK ? 48 << 10 : 227 << 10;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit what) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  static long modules;
  *module = (CUmodule)++modules;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction function) {
  *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 32;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute what, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

DOES_NOTHING(cuInit, unsigned flags)
DOES_NOTHING(cuCtxSetCurrent, CUcontext context)
DOES_NOTHING(cuCtxSetLimit, CUlimit what, size_t value)
DOES_NOTHING(cuModuleUnload, CUmodule module)
DOES_NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute what, int value)
DOES_NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache preference)

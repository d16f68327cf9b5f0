/* The driver's symbols that sgl_kernel, flashinfer and tvm_ffi look for when they are imported.
 *
 * Every call fails with CUDA_ERROR_NO_DEVICE, but for those that torch's fake CUDA tensors pass
 * through: there they answer as if a device were there. Nothing ever runs on it.
 */
#define NO_DEVICE 100

int cuCtxFromGreenCtx(void) { return NO_DEVICE; }
int cuCtxGetCurrent(void) { return NO_DEVICE; }
int cuCtxPopCurrent_v2(void) { return NO_DEVICE; }
int cuCtxPushCurrent_v2(void) { return NO_DEVICE; }
int cuCtxSetCurrent(void) { return NO_DEVICE; }
int cuDevResourceGenerateDesc(void) { return NO_DEVICE; }
int cuDevSmResourceSplitByCount(void) { return NO_DEVICE; }
int cuDeviceGetDevResource(void) { return NO_DEVICE; }
int cuDevicePrimaryCtxRetain(void) { return NO_DEVICE; }
int cuDriverGetVersion(void) { return NO_DEVICE; }
int cuGetErrorString(void) { return NO_DEVICE; }
int cuGetProcAddress_v2(void) { return NO_DEVICE; }
int cuGreenCtxCreate(void) { return NO_DEVICE; }
int cuGreenCtxDestroy(void) { return NO_DEVICE; }
int cuGreenCtxGetDevResource(void) { return NO_DEVICE; }
int cuInit(unsigned flags) { return NO_DEVICE; }
int cuPointerGetAttribute(void) { return NO_DEVICE; }
int cuStreamCreate(void) { return NO_DEVICE; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 0;
  return 0;
}

static int current = 0;
int cudaGetDevice(int *device) { *device = current; return 0; }
int cudaSetDevice(int device) { current = device; return 0; }
int cudaGetDeviceCount(int *count) { *count = 8; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }

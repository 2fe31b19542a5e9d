/* Stands in for libcudart and libcuda: one device, an H100 by its properties, on which nothing can be launched. */
#include <string.h>

typedef unsigned long ulong;

int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *d) { *d = 0; return 0; }
int cudaSetDevice(int d) { return 0; }
int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaStreamGetCaptureInfo(void *s, int *c, void *i, void *g, void *d, void *e, void *n) { *c = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
/* 75: major capability, 16: multiprocessors, 10: warp size. */
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 16 ? 132 : a == 10 ? 32 : 0; return 0; }

/* By their places in CUDA 13's cudaDeviceProp, which has 1,008 bytes: torch picks its attention by the capability. */
int cudaGetDeviceProperties(void *properties, int d) {
  char *p = properties;
  memset(p, 0, 1008);
  strcpy(p, "NVIDIA H100 80GB HBM3");
  *(ulong *)(p + 288) = 80ul << 30; /* memory */
  *(ulong *)(p + 296) = 49152;      /* shared memory of a block */
  *(int *)(p + 304) = 65536;        /* registers of a block */
  *(int *)(p + 308) = 32;           /* warp */
  *(int *)(p + 320) = 1024;         /* threads of a block */
  *(int *)(p + 360) = 9;            /* major capability */
  *(int *)(p + 384) = 132;          /* multiprocessors */
  *(int *)(p + 596) = 50 << 20;     /* L2 */
  *(int *)(p + 604) = 2048;         /* threads of a multiprocessor */
  *(ulong *)(p + 624) = 233472;     /* shared memory of a multiprocessor */
  *(int *)(p + 632) = 65536;        /* registers of a multiprocessor */
  *(ulong *)(p + 672) = 232448;     /* shared memory that a block may ask for */
  return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = 0; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)0x1000; return 0; }
int cuModuleLoad(void **module, const char *name) { *module = (void *)0x2000; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)0x2000; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)0x3000; return 0; }
int cuFuncGetAttribute(int *v, int attribute, void *function) { *v = attribute == 4 ? 32 : 0; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int v) { return 0; }
int cuFuncSetCacheConfig(void *function, int v) { return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 97 ? 232448 : a == 8 ? 49152 : 0; return 0; }
int cuLaunchKernel() { return 0; }
int cuLaunchKernelEx() { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no error: nothing is done here"; return 0; }

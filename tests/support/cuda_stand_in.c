/* A CUDA runtime that computes nothing, for the functions whose results onnxruntime's provider reads while it opens: one
 * GPU of SM 89 with 16 GiB, whose memory is the host's. All others return 0 and do nothing. */
#include <stdlib.h>
#include <string.h>

static int nothing(void) { return 0; }
static int handle(void **made) { return (*made = malloc(64)) == NULL; }
static int memory(void **made, size_t size) { return posix_memalign(made, 256, size ? size : 256); }

int cudaGetDeviceProperties(char *properties, int device) {
  memset(properties, 0, 512); /* offsets of struct cudaDeviceProp */
  *(size_t *)(properties + 288) = 1ull << 34; /* totalGlobalMem */
  *(size_t *)(properties + 296) = 49152;      /* sharedMemPerBlock */
  *(int *)(properties + 304) = 65536;         /* regsPerBlock */
  *(int *)(properties + 308) = 32;            /* warpSize */
  *(int *)(properties + 320) = 1024;          /* maxThreadsPerBlock */
  *(int *)(properties + 360) = 8;             /* major */
  *(int *)(properties + 364) = 9;             /* minor */
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 9 : 1024;
  return 0;
}
int cudaGetDeviceCount(int *value) { return *value = 1, 0; }
int cudaGetDevice(int *value) { return *value = 0; }
int cudaRuntimeGetVersion(int *value) { return *value = 13000, 0; }
int cudaDriverGetVersion(int *value) { return *value = 13000, 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { return *available = 1ull << 33, *total = 1ull << 34, 0; }
int cudaMalloc(void **made, size_t size) { return memory(made, size); }
int cudaMallocHost(void **made, size_t size) { return memory(made, size); }
int cudaHostAlloc(void **made, size_t size, unsigned flags) { return memory(made, size); }
int cudaFree(void *made) { return free(made), 0; }
int cudaFreeHost(void *made) { return free(made), 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return memcpy(to, from, size), 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *s) { return memcpy(to, from, size), 0; }
int cudaPointerGetAttributes(void *attributes, void *pointer) { return memset(attributes, 0, 32), 0; }
int cudaStreamIsCapturing(void *stream, int *value) { return *value = 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned v, unsigned long long f, int *found) {
  if (found) *found = 0;
  return *entry = (void *)nothing, 0;
}
const char *cudaGetErrorString(int error) { return "stand-in"; }
const char *cudaGetErrorName(int error) { return "stand-in"; }
const char *cublasGetStatusString(int error) { return "stand-in"; }
const char *cublasGetStatusName(int error) { return "stand-in"; }
int cudaStreamCreate(void **made) { return handle(made); }
int cudaStreamCreateWithFlags(void **made) { return handle(made); }
int cudaEventCreate(void **made) { return handle(made); }
int cudaEventCreateWithFlags(void **made) { return handle(made); }
int cudaMemPoolCreate(void **made) { return handle(made); }
int cudaLibraryLoadData(void **made) { return handle(made); }
int cudaLibraryGetKernel(void **made) { return handle(made); }
int cublasCreate_v2(void **made) { return handle(made); }
int cublasLtCreate(void **made) { return handle(made); }
void *__cudaRegisterFatBinary(void *binary) { return malloc(64); }

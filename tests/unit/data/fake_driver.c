/* A libcuda and an NVML in one library, for test_device.py and test_energy.py: two boards, the second cut by MIG.
   Answers come from the environment: FAKE_INIT (what cuInit returns), FAKE_NVML (what nvmlInit returns),
   FAKE_VISIBLE (number of devices), FAKE_HANG (cuInit never returns), FAKE_MJ (energy counter, millijoules). */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int env(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) {
  while (env("FAKE_HANG", 0)) sleep(1);
  return env("FAKE_INIT", 0);
}
int cuDeviceGetCount(int *out) { *out = env("FAKE_VISIBLE", 2); return 0; }
int cuDriverGetVersion(int *out) { *out = 13010; return 0; }
int cuDeviceGet(int *out, int ordinal) { *out = ordinal; return 0; }
int cuDeviceGetName(char *out, int size, int device) { strcpy(out, device ? "Fake B" : "Fake A"); return 0; }
int cuDeviceTotalMem_v2(size_t *out, int device) { *out = 1000; return 0; }
int cuDeviceGetUuid_v2(unsigned char *out, int device) { memset(out, device ? 0xbb : 0xaa, 16); return 0; }
int cuDeviceGetAttribute(int *out, int which, int device) {
  *out = which == 75 ? 9 : which == 76 ? 0 : which == 38 ? 62914560 : which;
  return 0;
}

typedef struct { int mig; } Board;
static Board boards[2] = {{0}, {1}};

int nvmlInit_v2(void) { return env("FAKE_NVML", 0); }
int nvmlDeviceGetHandleByUUID(const char *uuid, Board **out) {
  if (!strcmp(uuid, "GPU-aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa")) *out = &boards[0];
  else if (!strcmp(uuid, "MIG-bbbbbbbb-bbbb-bbbb-bbbb-bbbbbbbbbbbb")) *out = &boards[1];
  else return 6;
  return 0;
}
int nvmlSystemGetDriverVersion(char *out, unsigned size) { strcpy(out, "580.1"); return 0; }
int nvmlDeviceGetClockInfo(Board *b, int which, unsigned *out) { *out = which == 1 ? 1755 : 2619; return 0; }
int nvmlDeviceGetMaxClockInfo(Board *b, int which, unsigned *out) { *out = which == 1 ? 1980 : 2619; return 0; }
int nvmlDeviceGetEnforcedPowerLimit(Board *b, unsigned *out) { *out = 700000; return 0; }
int nvmlDeviceGetTemperature(Board *b, int sensor, unsigned *out) { *out = 41; return 0; }
int nvmlDeviceGetEccMode(Board *b, unsigned *now, unsigned *next) { *now = 1; *next = 0; return 0; }
int nvmlDeviceGetTotalEccErrors(Board *b, int kind, int since, unsigned long long *out) {
  *out = kind == 1 && since == 0 ? 0 : 99;
  return 0;
}
int nvmlDeviceGetMigMode(Board *b, unsigned *now, unsigned *next) { *now = b->mig; *next = b->mig; return 0; }
int nvmlDeviceGetPersistenceMode(Board *b, unsigned *out) { *out = 1; return 0; }
int nvmlDeviceGetComputeMode(Board *b, unsigned *out) { return 3; } /* not supported */
int nvmlDeviceGetCurrPcieLinkGeneration(Board *b, unsigned *out) { *out = 5; return 0; }
int nvmlDeviceGetCurrPcieLinkWidth(Board *b, unsigned *out) { *out = 16; return 0; }
int nvmlDeviceGetMemoryInfo(Board *b, unsigned long long *out) { out[0] = 1000; out[1] = 900; out[2] = 100; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(Board *b, unsigned long long *out) { *out = 0x5; return 0; }
typedef struct { unsigned pid; unsigned long long memory; unsigned gpu, compute; } Process;
int nvmlDeviceGetComputeRunningProcesses_v3(Board *b, unsigned *count, Process *out) {
  if (*count < 2) return 7;
  *count = 2;
  out[0].pid = 4242;
  out[1].pid = 17;
  return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(Board *b, unsigned long long *out) {
  *out = (unsigned long long)env("FAKE_MJ", 5000);
  return env("FAKE_MJ", 5000) < 0 ? 3 : 0;
}
typedef struct {
  unsigned field, scope;
  long long timestamp, latency;
  unsigned kind, status;
  union { double d; unsigned u; unsigned long long ull; } value;
} Field;
int nvmlDeviceGetFieldValues(Board *b, int count, Field *out) {
  out->status = out->field == 186 ? 0 : 3;
  out->kind = 1;
  out->value.u = 350500;
  return 0;
}
